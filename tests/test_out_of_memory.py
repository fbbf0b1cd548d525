"""Memory that runs out in a kernel, on whichever thread, becomes a Python exception; what is left works on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import out_of_memory
import pytest
from cuda_host_build import compiler

TESTS = Path(__file__).parent
COMPILER = compiler()

pytestmark = [
    pytest.mark.usefixtures("needs_cpu"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc are Linux's"),
]


def run(work: str, threads: int, *refusing: str, **environment: str) -> dict[str, int]:
    """What the calls of that work said, and how often each."""
    command = [sys.executable, str(TESTS / "out_of_memory.py"), work, str(threads), *refusing]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": str(threads)} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=out_of_memory.PATIENCE + 60)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-4000:])
    lines = (line.split(" ", 1) for line in done.stdout.splitlines())
    return {words: int(times) for times, words in lines}


@pytest.fixture(scope="module")
def failing_memory(tmp_path_factory: pytest.TempPathFactory) -> str:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("failing_memory") / "failing_memory.so"
    source = TESTS / "failing_memory.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
    return str(library)


SLOW = pytest.mark.slow
SCRATCH = "MemoryError: mbn_kernels: scratch: expected at most the free memory, got N bytes"
CASES = [(work, threads) for work in out_of_memory.WORKS for threads in (1, 2)]


@pytest.mark.parametrize(
    "work, threads, every",
    [("training", 1, 17), ("one image", 2, 17), *(pytest.param(*case, 1, marks=SLOW) for case in CASES)],
)
def test_requests_for_memory_fail_in_turn(failing_memory: str, work: str, threads: int, every: int) -> None:
    said = run(work, threads, failing_memory, str(every), LD_PRELOAD=failing_memory)
    assert said[SCRATCH] >= threads
    assert said["MemoryError: std::bad_alloc"] > 10
    assert said["done"] >= 2


@pytest.mark.parametrize(
    "work, threads", [pytest.param(*case, marks=() if case == ("images", 2) else SLOW) for case in CASES]
)
def test_a_bounded_address_space(work: str, threads: int) -> None:
    said = run(work, threads)
    assert said["done"] == 1
    assert sum(said.values()) > 3
