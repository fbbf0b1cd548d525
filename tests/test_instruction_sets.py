"""Every instruction set that this processor runs, forced by MBN_CPU_ISA in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mbn_kernels.backends import cpu

pytestmark = pytest.mark.usefixtures("needs_cpu")
TESTS = Path(__file__).parent
LEVELS = ("avx512_bf16", "avx512", "avx2", "baseline")
WHAT = "cpu and (matches_the_oracle or odd_chain or block_geometry or same_bits or large_mean or special_values)"
FILES = ("functional", "blocks", "numerics", "sequence", "evaluation")
EVALUATION = "one_by_one or small_network or block_with or stem_with or odd_blocks"


def python(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A run under pytest-xdist must not make the inner one think that it is a worker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["MBN_CPU_ISA"] = instruction_set
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("instruction_set", LEVELS)
def test_forced(instruction_set: str) -> None:
    says = python(instruction_set, "-c", "from mbn_kernels.backends import cpu; print(cpu.instruction_set())")
    if "this processor does not run" in says.stderr:
        pytest.skip(f"this processor does not run {instruction_set}")
    assert says.stdout.strip() == instruction_set, says.stderr
    if instruction_set == cpu.instruction_set():
        return  # the whole suite runs with it
    what, least = f"({WHAT}) or {EVALUATION}", 800
    if {instruction_set, cpu.instruction_set()} == {"avx512", "avx512_bf16"}:
        what, least = f"bfloat16 and ({EVALUATION})", 30  # all else is the same code
    files = [str(TESTS / f"test_{name}.py") for name in FILES]
    result = python(instruction_set, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", what, *files)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > least


def test_unknown() -> None:
    result = python("sse9", "-c", "import mbn_kernels.backends.cpu as cpu; print(cpu.instruction_set())")
    assert result.returncode != 0
    assert "MBN_CPU_ISA: expected avx512_bf16, avx512, avx2 or baseline, got sse9" in result.stderr
