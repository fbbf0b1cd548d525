"""The compiled library keeps to the stable ABI, setup.py explains itself, and the doctor runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mbn_kernels

ROOT = Path(__file__).parent.parent
LIBRARY = Path(mbn_kernels.__file__).parent / "_C.abi3.so"


def dynamic_symbols(kind: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    command = ["nm", "-D", "--demangle", f"--{kind}-only", str(LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(None, 2 if kind == "defined" else 1)[-1] for line in lines]


def test_one_library_for_every_python():
    assert LIBRARY.is_file()
    assert [path.name for path in LIBRARY.parent.glob("_C.*so")] == ["_C.abi3.so"]


def test_needs_only_the_stable_abi():
    symbols = dynamic_symbols("undefined")
    unstable = [name for name in symbols if any(part in name for part in ("at::", "c10::", "torch::"))]
    assert unstable == []
    assert [name for name in symbols if name.startswith("aoti_torch_")]  # nm did read the right file


def test_exports_nothing_of_its_own():
    ours = [name for name in dynamic_symbols("defined") if "mbn::" in name or "torch::" in name]
    assert ours == []


@pytest.mark.parametrize(
    ("stub", "beginning"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\")",
            "mbn_kernels builds against the PyTorch of your environment and could not import it",
        ),
        ("__version__ = '2.10.1+cpu'", "mbn_kernels needs PyTorch 2.11 or newer and found 2.10.1+cpu: "),
    ],
    ids=["no torch", "old torch"],
)
def test_setup_without_a_usable_torch_is_one_sentence(tmp_path, stub, beginning):
    (tmp_path / "torch.py").write_text(stub + "\n")
    # -S hides site-packages, as build isolation does; the stub stands where setup.py looks for them.
    program = (
        "import runpy, sys, sysconfig, types; sys.modules['setuptools'] = types.ModuleType('setuptools'); "
        "sys.modules['setuptools'].setup = print; sysconfig.get_path = lambda name: sys.argv[1]; "
        "runpy.run_path(sys.argv[2])"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(tmp_path), str(ROOT / "setup.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(beginning)
    assert '"torch>=2.11"' in result.stderr
    assert ("--no-isolation" in result.stderr) == ("could not import it" in beginning)


# setup.py with a torch and a setuptools that build nothing: the last line says what would be built, and with what.
SETUP = """
import json, os, runpy, sys, types

cuda, refusal, script = sys.argv[1:]

def extension(**options):
    return types.SimpleNamespace(**options)

def check(compiler, version):
    if refusal:
        raise RuntimeError(refusal)

class BuildExtension:
    def _check_abi(self):
        return "g++", "12.2.0"
    def build_extensions(self):
        built = {extension.name: extension.depends for extension in self.extensions}
        flags = [[*e.extra_compile_args["cxx"], *e.extra_link_args] for e in self.extensions]
        print(json.dumps([built, cpp_extension.CUDA_HOME, os.environ.get("TORCH_CUDA_ARCH_LIST"), flags, self.folder]))

def setup(ext_modules, cmdclass, options):
    build = cmdclass["build_ext"]()
    build.folder = options["build"]["build_base"]
    build.extensions = ext_modules
    build.build_extensions()

def module(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]

cpp_extension = types.SimpleNamespace(
    CUDA_HOME=os.environ.get("CUDA_HOME"), CppExtension=extension, CUDAExtension=extension,
    BuildExtension=BuildExtension, _check_cuda_version=check,
)
module("setuptools", setup=setup)
module("torch", __version__="2.14.0", version=types.SimpleNamespace(cuda=cuda or None))
module("torch.utils", cpp_extension=cpp_extension)
runpy.run_path(script)
"""

# What the real one answers.
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --dryrun) printf '#$ _HERE_=%s\\n#$ TOP=%s/..\\n' "${{0%/*}}" "${{0%/*}}" >&2 ;;
  --list-gpu-arch) printf 'compute_%s\\n' {gpus} ;;
esac
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run_setup(folder: Path, cuda: str = "13.0", release: str = "13.0", refusal: str = "", **environment: str):
    """With this CUDA version of torch, this release of nvcc behind a script on the PATH, and what torch says of it."""
    write_script(folder / "bin" / "c++", "")
    if release:
        gpus = "75 80 86 90" + (" 100 120" if release == "13.0" else "")
        write_script(folder / "toolkit" / "bin" / "nvcc", NVCC.format(release=release, gpus=gpus))
        write_script(folder / "bin" / "nvcc", f'#!/bin/sh\nexec {folder}/toolkit/bin/nvcc "$@"\n')
    command = [sys.executable, "-I", "-S", "-c", SETUP, cuda, refusal, str(ROOT / "setup.py")]
    environment["PATH"] = str(folder / "bin")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_setup_finds_the_toolkit_behind_a_script(tmp_path):
    result = run_setup(tmp_path, MBN_BUILD_CUDA="1")
    assert result.returncode == 0, result.stderr
    cpu, cuda, last = result.stdout.splitlines()
    assert cpu.startswith("mbn_kernels: building the CPU kernels (")
    assert re.fullmatch(
        r"mbn_kernels: building the CUDA kernels \(\d+ sources\) for 8.0, 9.0, 10.0\+PTX with nvcc 13.0", cuda
    )
    built, home, gpus, *_ = json.loads(last)
    assert list(built) == ["mbn_kernels._C", "mbn_kernels._CUDA"]
    headers = {str(path.relative_to(ROOT)) for end in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{end}")}
    assert all(headers <= set(depends) for depends in built.values())
    assert home == os.path.realpath(tmp_path / "toolkit")
    assert gpus == "8.0;9.0;10.0+PTX"


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [({}, "8.0;9.0+PTX"), ({"TORCH_CUDA_ARCH_LIST": "8.6"}, "8.6")],
    ids=["what nvcc knows", "what the user chose"],
)
def test_setup_chooses_gpus(tmp_path, environment, gpus):
    result = run_setup(tmp_path, cuda="12.6", release="12.4", **environment)
    assert json.loads(result.stdout.splitlines()[-1])[2] == gpus


WITHOUT_CUDA = {
    "torch for the CPU": ({"cuda": ""}, "torch 2.14.0 was built without CUDA; they need a CUDA build of torch"),
    "no nvcc": ({"release": ""}, "no nvcc was found; they need CUDA 13.0's, on the PATH or in CUDA_HOME/bin"),
    "empty CUDA_HOME": (
        {"CUDA_HOME": os.devnull},
        "no nvcc was found; they need CUDA 13.0's, on the PATH or in CUDA_HOME/bin",
    ),
    "another version": (
        {"release": "12.4"},
        "nvcc is CUDA 12.4's and torch was built with CUDA 13.0; "
        "they need one major version, on the PATH or in CUDA_HOME/bin",
    ),
    "torch refuses": ({"refusal": "c++ 99.0 is too new."}, "c++ 99.0 is too new"),
}


@pytest.mark.parametrize(("situation", "reason"), WITHOUT_CUDA.values(), ids=WITHOUT_CUDA)
def test_setup_without_cuda_says_why(tmp_path, situation, reason):
    result = run_setup(tmp_path, **situation)
    assert result.returncode == 0, result.stderr
    _, cuda, last = result.stdout.splitlines()
    assert cuda == f"mbn_kernels: building without the CUDA kernels: {reason}"
    assert list(json.loads(last)[0]) == ["mbn_kernels._C"]

    result = run_setup(tmp_path, **situation, MBN_BUILD_CUDA="1")
    assert result.returncode == 1
    assert result.stderr == (
        f"mbn_kernels: MBN_BUILD_CUDA=1 asks for the CUDA kernels, and they cannot be built: {reason} "
        "(without MBN_BUILD_CUDA they are left out).\n"
    )


def test_setup_leaves_cuda_out_on_request(tmp_path):
    result = run_setup(tmp_path, MBN_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    _, cuda, last = result.stdout.splitlines()
    assert cuda == "mbn_kernels: building without the CUDA kernels: MBN_BUILD_CUDA=0"
    assert list(json.loads(last)[0]) == ["mbn_kernels._C"]

    result = run_setup(tmp_path, MBN_BUILD_CUDA="yes")
    assert result.returncode == 1
    assert result.stderr == "mbn_kernels: MBN_BUILD_CUDA: expected 0, 1 or nothing, got 'yes'\n"


def test_setup_leaves_the_cpu_out_on_request(tmp_path):
    result = run_setup(tmp_path, MBN_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    cpu, _, last = result.stdout.splitlines()
    assert cpu.startswith("mbn_kernels: building none of the CPU kernels (MBN_BUILD_CPU=0) against torch 2.14.0")
    assert list(json.loads(last)[0]) == ["mbn_kernels._CUDA"]


@pytest.mark.parametrize("sanitize", ("", "1"), ids=("ordinary", "sanitized"))
def test_setup_with_sanitizers(tmp_path, sanitize):
    """Compiled and linked with them, in a folder of their own; an ordinary build has nothing of them."""
    result = run_setup(tmp_path, MBN_BUILD_CUDA="0", MBN_SANITIZE=sanitize)
    assert result.returncode == 0, result.stderr
    *_, (flags,), folder = json.loads(result.stdout.splitlines()[-1])
    asked = [flag for flag in flags if flag.startswith("-fsanitize=")]
    assert asked == ["-fsanitize=address,undefined,float-cast-overflow"] * (2 * bool(sanitize))
    assert ("-O3" in flags, "-fno-sanitize-recover=all" in flags) == (not sanitize, bool(sanitize))
    assert folder == os.path.join("build", "torch-2.14.0" + "-sanitize" * bool(sanitize))

    result = run_setup(tmp_path, MBN_SANITIZE="yes")
    assert (result.returncode, result.stderr) == (1, "mbn_kernels: MBN_SANITIZE: expected 1 or nothing, got 'yes'\n")


def run_doctor(*arguments: str) -> str:
    command = [sys.executable, "-m", "mbn_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_doctor_names_versions_and_backends():
    text = run_doctor()
    for words in (torch.__version__, "instruction_set", "backends", "self_test"):
        assert words in text


def test_doctor_json():
    facts = json.loads(run_doctor("--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == mbn_kernels.available_backends()
    assert facts["backends"]["reference"] == facts["backends"]["cpu"] == "available"
    assert facts["cpu"]["instruction_set"] in {"avx512_bf16", "avx512", "avx2", "baseline"}
    assert facts["cpu"]["threads"] >= 1
