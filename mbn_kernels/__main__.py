"""``python -m mbn_kernels``: what a bug report needs. Versions, the machine, what is built, which backends can be used
here, and whether each of them computes what plain PyTorch computes. Nothing is written, and what is missing is said.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import backends
from mbn_kernels.backends.triton import cache

Facts = dict[str, object]

PACKAGE = Path(mbn_kernels.__file__).resolve().parent
#: Besides MBN_*: what decides what is built, how fast it runs, and what of the machine it sees.
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CC", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CXX",
    "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_LIBRARY_PATH", "LD_PRELOAD", "MAX_JOBS", "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDA_ARCH_LIST", "TRITON_CACHE_DIR", "TRITON_INTERPRET",
)  # fmt: skip
WIDTH = 2 + max(map(len, VARIABLES))  # of the names in the text
#: By name, what the line of a compiler's answer holds that tells its version.
COMPILERS = {"c++": "", "g++": "", "clang++": "", "nvcc": "release"}
LIBRARIES = (backends.cpu.LIBRARY, backends.cuda.LIBRARY)
#: Of float32 against float64, as part of the largest number: rounding leaves a hundredth of it.
TOLERANCE = 1e-4


def main(arguments: list[str] | None = None) -> int:
    """Prints the report, with --json as JSON; returns 1 where a backend that can be used fails its test, else 0."""
    parser = argparse.ArgumentParser(prog="python -m mbn_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    facts = report()
    if not options.json:
        print(as_text(facts), flush=True)  # before any kernel runs, which may end the process
    found = self_test(facts["backends"])
    print(json.dumps(facts | {"self_test": found}, indent=2) if options.json else "\n" + as_text({"self_test": found}))
    return int(any(said != "ok" for said in found.values()))


def report() -> Facts:
    """All but the self-test, as plain data; None for what is not there, and a text that begins with "failed: " for what
    could not be found out.
    """
    gpus, driver = _tried(_gpus), _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "versions": _tried(_versions),
        "torch": _tried(_torch_build),
        "package": _tried(_package),
        "libraries": {path.name.partition(".")[0]: _tried(lambda path=path: _library(path)) for path in LIBRARIES},
        "cpu": _tried(_cpu),
        "gpu": gpus[0]["name"] if isinstance(gpus, list) and gpus else None,
        "gpus": {"driver": driver, "devices": gpus},
        "compilers": {name: _answer(name, "--version", holding=text) for name, text in COMPILERS.items()},
        "environment": {k: os.environ[k] for k in sorted(os.environ) if k.startswith("MBN_") or k in VARIABLES},
        "cache": _tried(_cache),
        "backends": _tried(mbn_kernels.available_backends),
    }


def as_text(facts: Facts) -> str:
    """A heading for each part of a report, and a line for each fact in it."""
    lines: list[str] = []
    for heading, part in facts.items():
        if heading == "gpu":  # the first of "gpus"
            continue
        rows = part if isinstance(part, dict) else {"": part}
        lines += ["", heading, *(f"  {name:<{WIDTH}}{_in_words(value)}" for name, value in rows.items())]
        if not rows:
            lines.append("  none")
    return "\n".join(lines[1:])


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_in_words, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tried(find: Callable[[], object]) -> object:
    try:
        return find()
    except Exception as error:  # the rest of the report is worth having all the more
        return f"failed: {_in_one_line(error)}"


def _in_one_line(error: BaseException) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _answer(*command: str, holding: str = "") -> str | None:
    """The first line with that text that a command prints; None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=5)
    except (OSError, subprocess.SubprocessError) as error:
        return f"failed: {_in_one_line(error)}"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return ": ".join([f"failed: exit status {done.returncode}", *said[:1]])
    return next((line.strip() for line in done.stdout.splitlines() if line.strip() and holding in line), "")


# What is installed ----------------------------------------------------------------------------------------------------


def _versions() -> Facts:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "mbn_kernels": mbn_kernels.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _torch_build() -> Facts:
    build = torch.version
    return {"debug": bool(build.debug), "cuda": build.cuda, "hip": build.hip, "path": str(Path(torch.__file__).parent)}


def _package() -> Facts:
    """Where the package is, and of which commit if that is a checkout. An environment may lie in a checkout of
    something else: only one whose root holds the package counts.
    """
    facts = {"path": str(PACKAGE), "git_commit": None, "git_changed": None}
    if (PACKAGE.parent / ".git").exists():
        git = ("git", "--no-optional-locks", "-C", str(PACKAGE.parent))  # locks: it would write its index
        commit = _answer(*git, "rev-parse", "HEAD")
        facts["git_commit"] = "failed: there is no git to ask" if commit is None else commit
        if commit and not commit.startswith("failed"):
            changed = _answer(*git, "status", "--porcelain", "--untracked-files=no")
            facts["git_changed"] = changed if changed.startswith("failed") else bool(changed)
    return facts


def _library(path: Path) -> Facts | None:
    """A library's size and age, and why it does not load or None; None where it was not built."""
    if not path.exists():
        return None
    stat, error = path.stat(), None
    try:
        torch.ops.load_library(str(path))
    except Exception as failed:
        error = _in_one_line(failed.__cause__ or failed)  # torch's own message leaves the reason out
    modified = datetime.fromtimestamp(stat.st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"file": path.name, "bytes": stat.st_size, "modified": modified, "error": error}


def _cache() -> Facts:
    """Where tuned tile sizes are kept, and how many of them."""
    folder = cache.folder().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        "entries": sum(len(cache.read(file)) for file in folder.glob("triton-*.json")),
    }


# The machine ----------------------------------------------------------------------------------------------------------


def _cpu() -> Facts:
    pools = dict(re.findall(r"(omp|mkl)_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info()))
    built = backends.cpu.load() is None
    return {
        "model": _tried(_cpu_model),
        "physical_cores": _tried(_physical_cores),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "instruction_set": _tried(backends.cpu.instruction_set) if built else None,
        "MBN_CPU_ISA": os.environ.get("MBN_CPU_ISA"),
        "threads": torch.get_num_threads(),
        **{f"{name}_threads": int(pools[name]) if name in pools else None for name in ("omp", "mkl")},
    }


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        return _answer("sysctl", "-n", "machdep.cpu.brand_string")
    told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return told[1].strip() if told else platform.processor() or None


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        told = _answer("sysctl", "-n", "hw.physicalcpu") or ""
        return int(told) if told.isdigit() else None
    cores = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology")
    names = ("physical_package_id", "core_id")
    return len({tuple((core / name).read_text() for name in names) for core in cores}) or None


def _gpus() -> list[Facts]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        found.append({"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "bytes": gpu.total_memory})
    return found


# Self-test ------------------------------------------------------------------------------------------------------------


def self_test(states: object) -> dict[str, str]:
    """Of each backend that can be used "ok", or what is wrong with it, in one line."""
    usable = [name for name, state in states.items() if state == "available"] if isinstance(states, dict) else []
    return {name: str(_tried(lambda name=name: _compared(name))) for name in usable}


def _compared(backend: str) -> str:
    supports = backends.get(backend).supports
    device = next(name for name in ("cpu", "cuda") if not supports(torch.device(name), torch.float32))
    block, x, dout, expected = _case()
    with _undisturbed(device), mbn_kernels.use_backend(backend):
        found = _results(copy.deepcopy(block).to(device), x.to(device), dout.to(device))
    for name, wanted in expected.items():
        error, size = (t.abs().max().item() for t in (found[name].cpu().double() - wanted, wanted))
        if not error <= TOLERANCE * size:  # nor is NaN
            return f"{name}: off by {error:.1e} where plain PyTorch has up to {size:.1e}"
    return "ok"


@lru_cache(maxsize=1)
def _case() -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """A block with everything in it, an input, a gradient of its output, and what its plain twin makes of them in
    float64: by one thread, as waiting for others would take longer.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # silu has no kink, where a rounding error becomes one of a derivative's size.
        block, twin = (mbn_kernels.FusedInvResBlock(8, 3, 16, 8, True, "silu", 1, fused=f) for f in (True, False))
        twin.load_state_dict(block.state_dict())
        x, dout = torch.randn(2, 8, 7, 6), torch.randn(2, 8, 7, 6)
    try:
        torch.set_num_threads(1)
        return block, x, dout, _results(twin.double(), x.double(), dout.double())
    finally:
        torch.set_num_threads(threads)


def _results(block: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Of a training step, and of an evaluation behind it."""
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(dout)
    found = {"output": out.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    found |= {name: b for name, b in block.named_buffers() if b.is_floating_point()}
    with torch.no_grad():
        found["evaluation"] = block.eval()(x)
    return found


@contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    """Products as exact as on a CPU; nothing is timed, and what Triton compiles is not kept."""
    before, cudnn = dict(os.environ), torch.backends.cudnn
    allowed = cudnn.allow_tf32
    with TemporaryDirectory() if device == "cuda" else nullcontext() as folder:
        try:
            os.environ |= {"MBN_TRITON_TUNE": "0"} | ({"TRITON_CACHE_DIR": folder} if folder else {})
            cudnn.allow_tf32 = False
            yield
        finally:
            cudnn.allow_tf32 = allowed
            os.environ.clear()
            os.environ |= before


if __name__ == "__main__":
    if sys.stderr is not None:
        faulthandler.enable()  # a kernel that ends the process shows where it was
    sys.exit(main())
