"""Running statistics: what a batch makes of them, and how they all change at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .checks import check_statistics
from .errors import fail


class Running(NamedTuple):
    """Running statistics to update after a batch, as ``nn.BatchNorm2d`` does; without tensors there is nothing to
    update.

    >>> Running(torch.zeros(8), torch.ones(8)).momentum
    0.1
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float | None = 0.1  # None: the cumulative mean over `count` batches
    count: Tensor | None = None


Batch = tuple[Running, Tensor, Tensor]  # what to update, from that mean and unbiased variance
Update = tuple[list[Tensor], list[Tensor]]  # tensors of one dtype, and what they become


@torch.no_grad()
def update_running(
    running: Sequence[Running], statistics: Sequence[Tensor], values: int, shared: Sequence[bool] = ()
) -> None:
    """Takes the [mean, unbiased var] of each of ``running`` in, from a batch of that many values; one without values
    counts, but changes no statistics, except where they are ``shared`` with other processes and one of these had some.

    >>> running = Running(torch.zeros(2), torch.ones(2), momentum=0.5)
    >>> update_running([running], [torch.tensor([2.0, 4.0]), torch.tensor([3.0, 1.0])], values=8)
    >>> running.mean, running.var
    (tensor([1., 2.]), tensor([2., 1.]))
    """
    if 2 * len(running) != len(statistics):
        fail("update_running", "running", f"one for each of {len(statistics) // 2} batch norms", len(running))
    batches = list(zip(running, statistics[::2], statistics[1::2], strict=True))
    try:
        # Where statistics are shared, processes without values are to come to the same bits (_updates_from_others).
        if values and True not in shared and _update_at_once(batches):
            return
    except (RuntimeError, AttributeError):  # something that cannot be updated; nothing is yet
        check_statistics(batches)
        raise
    if not torch.compiler.is_compiling():
        check_statistics(batches)
    kept = [t for r in running for t in r[:2] if t is not None]
    if len({id(t) for t in kept}) == len(kept):
        updates = _updates(batches, values, shared)
    else:
        updates = _updates_in_turn(batches, values, shared)
    # The loop is map's own: an interrupt, which Python takes between its instructions, comes before all or after all.
    list(map(torch._foreach_copy_, *zip(*updates, strict=True)) if updates else ())


def _update_at_once(batches: Sequence[Batch]) -> bool:
    """By the CPU's kernel, a fraction of the time, where it takes them and nothing watches; whether it did."""
    running, batch, momenta = [], [], []
    for r, mean, var in batches:
        if r.mean is not None:
            running += r.mean, r.var
            batch += mean, var
            momenta.append(r.momentum)
    if not running or None in momenta or ops.is_watched(running[0]):
        return False
    counts = [r.count for r, _, _ in batches if r.count is not None]
    first = running[0]
    chosen = first.is_cpu and backends.choose(first.device, first.dtype) == "cpu" and backends.is_available("cpu")
    if not (chosen and backends.cpu.updates_running(running, batch, counts)):
        return False
    backends.cpu.update_running(running, batch, momenta, counts)
    return True


def _updates(batches: Sequence[Batch], values: int, shared: Sequence[bool]) -> list[Update]:
    """Of running statistics that are all distinct; nothing is changed yet."""
    counts = [r.count for r, _, _ in batches if r.count is not None]
    updates = [(counts, torch._foreach_add(counts, 1))] if counts else []
    if not values:
        return updates + _updates_from_others(
            [batch for batch, is_shared in zip(batches, shared, strict=False) if is_shared]
        )
    groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # by momentum: as few calls as there are momenta
    for r, mean, var in batches:
        if r.mean is None:
            continue
        into, batch = groups.setdefault(_momentum(r), ([], []))
        into += r.mean, r.var
        batch += mean, var
    return updates + [(into, _blended(into, batch, momentum)) for momentum, (into, batch) in groups.items()]


def _updates_in_turn(batches: Sequence[Batch], values: int, shared: Sequence[bool]) -> list[Update]:
    """Where one batch norm stands in two stages: each is the update of what the one before makes of it."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by a tensor's id: the tensor, and what it becomes
    for i, (r, mean, var) in enumerate(batches):
        before = r._replace(**{name: made[id(t)][1] for name, t in r._asdict().items() if id(t) in made})
        names = {id(getattr(before, name)): getattr(r, name) for name in ("mean", "var", "count")}
        for into, new in _updates([(before, mean, var)], values, shared[i : i + 1]):
            made |= {id(names[id(a)]): (names[id(a)], b) for a, b in zip(into, new, strict=True)}
    return [([t], [new]) for t, new in made.values()]


def _updates_from_others(batches: Sequence[Batch]) -> list[Update]:
    """Statistics of all processes, taken in where this one has no values, so that they stay equal everywhere."""
    updates = []
    for r, mean, var in batches:
        if r.mean is None:
            continue
        nobody = mean.isnan() & (var == 0)  # what synchronize.Merged says where no process has values
        into = [r.mean, r.var]
        new = _blended(into, [mean, var], _momentum(r))
        updates.append((into, [torch.where(nobody, a, b) for a, b in zip(into, new, strict=True)]))
    return updates


def _momentum(r: Running) -> float:
    return 1.0 / (float(r.count) + 1) if r.momentum is None else r.momentum


def _blended(into: list[Tensor], batch: list[Tensor], momentum: float) -> list[Tensor]:
    if any(a.dtype != b.dtype for a, b in zip(into, batch, strict=True)):
        # Where fewer digits are stored, rounded once, at the end.
        into = [a.to(b.dtype) for a, b in zip(into, batch, strict=True)]
    new = torch._foreach_mul(into, 1 - momentum)
    torch._foreach_add_(new, batch, alpha=momentum)
    return list(new)
