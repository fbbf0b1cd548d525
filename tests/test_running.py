"""Running statistics: what a batch makes of them, by the kernel and without it, and that a failure changes none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mbn_kernels import backends
from mbn_kernels.functional import Running, update_running

VALUES = 12


def make(momenta: tuple[float | None, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Running], list[Tensor]]:
    """Running statistics of one batch norm for each momentum, and of a batch the mean and unbiased variance of each."""
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    running, batch = [], []
    for i, momentum in enumerate(momenta):
        mean, var = torch.randn(5 + i), torch.rand(5 + i)
        running.append(Running(mean.to(dtype), var.to(dtype), momentum, torch.tensor(3)))
        batch += torch.randn(5 + i, dtype=wider), torch.rand(5 + i, dtype=wider)
    return running, batch


def expected(running: list[Running], batch: list[Tensor]) -> list[Running]:
    """In float64, one batch norm after the other."""
    for r, *found in zip(running, batch[::2], batch[1::2], strict=True):
        r.count.add_(1)
        momentum = 1 / r.count.item() if r.momentum is None else r.momentum
        for a, b in zip(r[:2], found, strict=True):
            a.copy_((1 - momentum) * a.double() + momentum * b.double())
    return running


def hold(got: list[Running], want: list[Running]) -> None:
    for a, b in zip(got, want, strict=True):
        for name in ("mean", "var", "count"):
            a_t, b_t = getattr(a, name), getattr(b, name)
            rounding = torch.finfo(a_t.dtype).eps if a_t.is_floating_point() else 0
            torch.testing.assert_close(a_t, b_t, rtol=2 * rounding, atol=rounding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("momenta", ((0.1,), (0.1, 0.1, 0.3), (1.0, 0.0), (None, 0.1)), ids=str)
def test_as_in_float64(backend: str, momenta: tuple, dtype: torch.dtype) -> None:
    running, batch = make(momenta, dtype)
    want, versions = expected(copy.deepcopy(running), batch), [t._version for r in running for t in (*r[:2], r.count)]
    update_running(running, batch, VALUES)
    hold(running, want)
    # What keeps packed parameters looks at the version.
    assert all(t._version > v for t, v in zip([t for r in running for t in (*r[:2], r.count)], versions, strict=True))


@pytest.mark.parametrize("momentum", (0.1, None))
def test_one_batch_norm_in_two_stages(backend: str, momentum: float | None) -> None:
    """It takes the two batches in one after the other, and counts both."""
    (r,), first = make((momentum,))
    second = [torch.randn(5), torch.rand(5)]
    for values in (VALUES, 0):
        want = copy.deepcopy(r)
        update_running([r, r], [*first, *second], values)
        for batch in (first, second) if values else ():
            expected([want], batch)
        if not values:
            want.count.add_(2)
        hold([r], [want])


def test_without_values_only_the_batch_counts(backend: str) -> None:
    running, batch = make((0.1, None))
    want = copy.deepcopy(running)
    update_running(running, batch, 0)
    for r in want:
        r.count.add_(1)
    hold(running, want)


def wrong_size(running: list[Running], batch: list[Tensor]) -> None:
    batch[3] = torch.randn(2)


def expanded(running: list[Running], batch: list[Tensor]) -> None:
    running[1] = running[1]._replace(var=torch.ones(1).expand(6))


@pytest.mark.parametrize("change", (wrong_size, expanded))
def test_a_failure_changes_nothing(backend: str, change) -> None:
    """The last of two batch norms does not fit: the first is as it was."""
    running, batch = make((0.1, 0.1))
    change(running, batch)
    before = copy.deepcopy(running)
    with pytest.raises((RuntimeError, ValueError)):
        update_running(running, batch, VALUES)
    for a, b in zip(running, before, strict=True):
        assert torch.equal(a.mean, b.mean) and torch.equal(a.var, b.var) and torch.equal(a.count, b.count)


def test_the_kernel_runs_where_it_can(needs_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, update = [], backends.cpu.update_running
    monkeypatch.setattr(backends.cpu, "update_running", lambda *given: (calls.append(given), update(*given)))
    update_running(*make((0.1, 0.2)), VALUES)
    assert len(calls) == 1
    update_running(*make((0.1, 0.2), torch.bfloat16), VALUES)
    update_running(*make((None,)), VALUES)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "running, batch, momenta, counts, message",
    (
        ([torch.zeros(3)], [torch.zeros(3)], [0.1], [], "running: expected a mean and a variance"),
        ([torch.zeros(3), torch.zeros(4)], [torch.zeros(3)] * 2, [0.1], [], "running: expected 3 elements"),
        ([torch.zeros(3)] * 2, [torch.zeros(3), torch.zeros(2)], [0.1], [], "batch: expected 3 elements"),
        ([torch.zeros(3)] * 2, [torch.zeros(3).double()] * 2, [0.1], [], "batch: expected Float"),
        ([torch.zeros(3)] * 2, [torch.zeros(3)] * 2, [0.1], [torch.tensor(1.0)], "counts: expected Long"),
        ([torch.zeros(6)[::2]] * 2, [torch.zeros(3)] * 2, [0.1], [], "running: expected contiguous"),
        ([torch.zeros(3, dtype=torch.int64)] * 2, [torch.zeros(3)] * 2, [0.1], [], "running: expected Float or Double"),
    ),
)
def test_the_operator_checks_its_arguments(needs_cpu: None, running, batch, momenta, counts, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"update_running: {message}"):
        torch.ops.mbn.update_running(running, batch, momenta, counts)
