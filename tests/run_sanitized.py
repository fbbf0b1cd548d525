"""Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests with them.

    python tests/run_sanitized.py [pytest's options and files]        # `make sanitize`

Everything lies in build/sanitize, a copy of the checkout, so that the ordinary build stays as it is. The first report
ends the process that made it, and so fails the test; whatever a test makes of that, a report ends this with 1.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
REPORTS = COPY / "build" / "reports"
COPIED = ("mbn_kernels", "csrc", "tests", "benchmarks", "examples", "docs", ".ci")

#: Files of tests that stay out, by reason. The CUDA kernels' have a sanitizer of their own (test_cuda_host_faults.py).
LEFT_OUT = {
    "compile for GPUs and other processors": ("triton_compiled", "cuda_compiled", "cross_compile"),
    "need a GPU, or what stands in for one": ("cuda*", "triton_*"),
    "look at the ordinary library, and how a process ends without sanitizers": ("build", "memory_bounds"),
    "have a sanitizer that no other may be loaded with": ("team_races",),
    "take memory away, which a sanitizer needs, or count it": ("out_of_memory", "soak"),
    "read pages, tables and results": ("pages", "environment", "contributing", "kept_results", "figures", "report*"),
    "start pytest's benchmarks, where only times are new": ("benchmark_option",),
}

#: A tensor whose memory ends 16 bytes before it does, which no operator can see.
TOO_SHORT = """
import torch
from mbn_kernels.backends import cpu
x = torch.zeros(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
out = torch.empty_like(x)
x.untyped_storage().resize_(x.untyped_storage().nbytes() - 16)
cpu.load()
torch.ops.mbn.materialize(x, None, None, None, 0, None, out)
"""
EXIT_CODE = 99


def copy_checkout() -> None:
    """Files keep their times, so that only what has changed is compiled again."""
    COPY.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy2(file, COPY)


def runtime_libraries() -> str:
    """The sanitizers' libraries have to be there before all others, and C++'s, of which they look for a part."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        command = [*compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            sys.exit(f"make sanitize: CXX: expected a compiler that has {name}, got {shlex.join(compiler)}")
        found.append(path)
    return " ".join(found)


def sanitizer_options() -> dict[str, str]:
    asan = {
        "detect_leaks": 0,  # Python and PyTorch keep much of what they have until the process ends
        # The frames that GCC 12 makes for it are aligned to 32 bytes, where variables of AVX-512 need 64.
        "detect_stack_use_after_return": int(os.environ.get("MBN_CPU_ISA") in ("avx2", "baseline")),
        "allocator_may_return_null": 1,  # tests ask for more memory than there is, and want the error
        "exitcode": EXIT_CODE,
        "log_path": REPORTS / "report",
    }
    ubsan = {"print_stacktrace": 1, "log_path": REPORTS / "report"}
    options = (":".join(f"{name}={value}" for name, value in each.items()) for each in (asan, ubsan))
    return dict(zip(("ASAN_OPTIONS", "UBSAN_OPTIONS"), options, strict=True))


def make_reports_folder() -> None:
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)


def main(arguments: list[str]) -> int:
    libraries = runtime_libraries()
    copy_checkout()
    build = {**os.environ, "MBN_SANITIZE": "1", "MBN_BUILD_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=COPY, env=build, check=True)
    # Processes that tests start elsewhere find this package and not the installed one.
    environment = {**os.environ, **sanitizer_options(), "LD_PRELOAD": libraries, "PYTHONPATH": str(COPY)}
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    make_reports_folder()
    noticed = subprocess.run([sys.executable, "-c", TOO_SHORT], cwd=COPY, env=environment, capture_output=True)
    if noticed.returncode != EXIT_CODE or not any(REPORTS.iterdir()):
        sys.exit(f"make sanitize: expected a report of a read out of bounds, got none:\n{noticed.stderr.decode()}")
    make_reports_folder()
    ignored = [f"--ignore-glob=*/test_{name}.py" for names in LEFT_OUT.values() for name in names]
    command = [sys.executable, "-m", "pytest", *ignored, *arguments]
    done = subprocess.run(command, cwd=COPY, env=environment)

    written = [file.read_text(errors="replace") for file in sorted(REPORTS.iterdir())]
    reports = [text for text in written if "ERROR: " in text or "runtime error: " in text]  # else warnings
    print("\n".join(reports))
    print(f"{len(reports)} reports of the sanitizers")
    return done.returncode or bool(reports)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
