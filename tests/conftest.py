"""Fixtures of the correctness tests: every backend in turn, and fresh memory that holds NaN until it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import mbn_kernels

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each backend; one that is not built is missed by test_ops.py, once."""
    reason = mbn_kernels.available_backends()[request.param]
    if reason != "available":
        pytest.skip(reason)
    with mbn_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def needs_cpu() -> None:
    reason = mbn_kernels.available_backends()["cpu"]
    if reason != "available":
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output element that no kernel writes stays NaN, and the test that compares it fails."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args, **kwargs) -> Tensor:
            t = allocate(*args, **kwargs)
            if t.is_floating_point() and not torch.compiler.is_compiling():
                with torch.no_grad():
                    t.fill_(float("nan"))
            return t

        return wrapper

    owners = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (Tensor, "new_empty_strided"))
    owners += ((mbn_kernels.backends.cpu, "buffer"),)
    for owner, name in owners:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables of test_triton_compiled.py, test_cuda_compiled.py and test_cuda_host.py: what kernels take."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    recorded = [each for report in reports for each in getattr(report, "user_properties", ())]
    rows = [v for name, v in recorded if name == "triton"]
    if rows:
        terminalreporter.section("Triton kernels: variants, registers, bytes spilled, bytes of shared memory, at most")
    for key in sorted({tuple(row[:3]) for row in rows}):
        numbers = [row[3:] for row in rows if tuple(row[:3]) == key]
        most = "".join(f"{max(column):>8}" for column in zip(*numbers, strict=True))
        terminalreporter.write_line(f"{key[0]:<20} sm_{key[1]:<4} {key[2]:<9}{len(numbers):>5}{most}")
    rows = sorted(tuple(v) for name, v in recorded if name == "cuda")
    if rows:
        terminalreporter.section("CUDA kernels: registers, bytes spilled, bytes of static shared memory, MOV, FFMA")
    kernels = sorted({row[0] for row in rows})
    width = max(map(len, kernels), default=0)
    for kernel in kernels:
        each = (f"{row[1]:>6}:" + "".join(f"{n:>5}" for n in row[2:]) for row in rows if row[0] == kernel)
        terminalreporter.write_line(f"{kernel:<{width}}{''.join(each)}")
    shared = sorted(tuple(v) for name, v in recorded if name == "cuda_shared")
    if shared:
        terminalreporter.section(
            "CUDA kernels: bytes of shared memory of a block, at most, in the networks at batch 256"
        )
    for kernel, taken in dict(shared).items():
        terminalreporter.write_line(f"{kernel:<{max(len(name) for name, _ in shared)}}{taken:>8}")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Leaves the random state, the number of threads and the choice of backend as they were."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    with mbn_kernels.use_backend(None):
        yield
    torch.set_num_threads(threads)
