"""An evaluation in one call, kept from call to call for as long as the modules that it was made of are what they
were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from .. import backends
from ..chain import parse
from .watch import Watch

if TYPE_CHECKING:
    from .fused import Call


class Kept(NamedTuple):
    """An evaluation in one call, and what it was made of."""

    children: dict  # of the module that keeps it; a replica has others
    parts: list[nn.Module]  # what runs
    watch: Watch
    backend: str
    run: Callable[[Tensor], Tensor]
    flat: bool  # whether the output is a vector for each image


class KeepsEvaluation:
    """Of a module: its last evaluation that took one call. The class's ``__getstate__`` must leave it out."""

    _kept: Kept | None = None


def forget(owner: KeepsEvaluation) -> None:
    """Drops what ``owner`` keeps."""
    owner.__dict__.pop("_kept", None)


def keep(
    owner: KeepsEvaluation, parts: list[nn.Module], x: Tensor, calls: Sequence[Call], backend: str, flat: bool = False
) -> None:
    """Keeps the evaluation of the chains that ``parts`` are at this moment, for inputs like ``x``."""
    chains, residuals = tuple(parse(call.spec) for call in calls), tuple(call.residual for call in calls)
    run = backends.get(backend).kernels.prepared(x, chains, [p for call in calls for p in call.params], residuals)
    if run is None:
        return
    owner.__dict__["_kept"] = None  # the watch sees the name where the owner is a part of its own
    owner.__dict__["_kept"] = Kept(owner._modules, parts, Watch(parts), backend, run, flat)


def recall(owner: KeepsEvaluation, parts: list[nn.Module], x: Tensor, backend: str) -> Tensor | None:
    """The kept evaluation of ``x``; None where there is none, or none any more."""
    kept = owner._kept
    if kept is None:
        return None
    if kept.children is owner._modules and kept.backend == backend and kept.parts == parts and kept.watch.holds():
        try:
            out = kept.run(x)
            return out.flatten(1) if kept.flat else out
        except (RuntimeError, ValueError, IndexError):
            pass  # x does not fit, or a tensor is no longer what it was: the way without finds out, and finds the words
    forget(owner)
    return None
