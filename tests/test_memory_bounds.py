"""No CPU kernel touches memory beyond its tensors: they end at a page that may not be read, and begin behind one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guarded import Guarded, GuardedOperators
from torch import Tensor

from mbn_kernels import schemas

pytestmark = [
    pytest.mark.usefixtures("needs_cpu"),
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does"),
]
TESTS = Path(__file__).parent
LEVELS = ("avx512_bf16", "avx512", "avx2", "baseline")
NOT_CALLED = {"evaluate_held"}  # another way to call the kernel of evaluate


def run_cases(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of their own, which a fault ends: then the last line that it wrote names the case."""
    environment = {**os.environ, "MBN_CPU_ISA": instruction_set, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), *sys.path])
    command = [sys.executable, str(TESTS / "guarded.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if "this processor does not run" in done.stderr:
        pytest.skip(f"this processor does not run {instruction_set}")
    return done


def hold(done: subprocess.CompletedProcess[str]) -> None:
    *_, last = ["nothing", *done.stdout.splitlines()]
    assert done.returncode == 0, f"{done.returncode} in {last}\n{done.stderr[-4000:]}"
    assert schemas.KERNEL_SCHEMAS.keys() - set(last.split()) == NOT_CALLED


def test_nothing_is_touched_outside() -> None:
    hold(run_cases("", "float32,bfloat16", "1", "end"))


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", LEVELS)
def test_nothing_is_touched_outside_by_any_instruction_set(instruction_set: str) -> None:
    hold(run_cases(instruction_set, "float32,bfloat16,float64", "1,3", "end,begin"))


def test_a_touch_outside_ends_the_process() -> None:
    """Of a tensor whose last number is where no memory is, in an operator, and in the first case."""
    done = run_cases("", "float32", "1", "end", "4")
    assert done.returncode == -signal.SIGSEGV and len(done.stdout.splitlines()) == 1, done.stderr[-4000:]
    assert re.search(r"most recent call first\):\n  File .*torch/_ops.py", done.stderr), done.stderr[-4000:]


@pytest.mark.parametrize("at_end", (True, False))
def test_a_write_on_the_same_page_is_noticed(at_end: bool) -> None:
    t = torch.arange(15, dtype=torch.float32).view(3, 5).t()
    guard = Guarded(t, at_end)
    assert torch.equal(guard.tensor, t) and guard.tensor.stride() == t.stride()
    guard.tensor[0, 0] = 7
    assert guard.written() and not guard.written_beside()
    beside = guard.tensor.storage_offset() + (-1 if at_end else 15)
    guard.tensor.as_strided((1,), (1,), beside).zero_()
    assert guard.written_beside()


def test_a_written_input_is_noticed() -> None:
    def changes(x: Tensor, out: Tensor) -> None:
        out.copy_(x)
        x += 1

    with torch.library._scoped_library("mbn", "FRAGMENT") as library:
        library.define("changes(Tensor x, Tensor(a!) out) -> ()")
        library.impl("changes", changes, "CPU")
        x, out = torch.ones(3), torch.zeros(3)
        with pytest.raises(AssertionError, match=r"changes wrote to an input \(3,\)"):
            GuardedOperators(at_end=True).changes(x, out)
