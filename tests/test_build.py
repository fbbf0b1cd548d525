"""The compiled library keeps to the stable ABI, setup.py explains itself, and the doctor runs."""

from __future__ import annotations

import json
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
    assert [path.name for path in LIBRARY.parent.glob("_C*.so")] == ["_C.abi3.so"]


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


def run_doctor(*arguments: str) -> str:
    command = [sys.executable, "-m", "mbn_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_doctor_names_versions_and_backends():
    text = run_doctor()
    for words in (torch.__version__, "CPU features", "backend reference", "backend cpu"):
        assert words in text


def test_doctor_json():
    facts = json.loads(run_doctor("--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == mbn_kernels.available_backends()
    assert facts["backends"]["reference"] == facts["backends"]["cpu"] == "available"
    assert facts["cpu"]["instruction_set"] in {"avx512", "avx2", "baseline"}
    assert facts["cpu"]["threads"] >= 1


def test_the_readme_runs():
    """Its Python examples, as they stand there."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
