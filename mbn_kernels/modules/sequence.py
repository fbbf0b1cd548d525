"""Blocks one behind the other: in evaluation, neighbours run in one call; in training, a stem and the first block."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..chain import joined_spec, parse
from ..functional import evaluates, runs_directly
from .ends import Head, stem_call
from .fused import Call, FusedModule, has_hook
from .watch import Watch


class _Kept(NamedTuple):
    """An evaluation in one call, and what it was made of."""

    children: dict  # of the module that keeps it; a replica has others
    parts: list[nn.Module]  # and the head's modules
    watch: Watch
    backend: str
    run: Callable[[Tensor], Tensor]
    flat: bool

    def holds(self, parts: list[nn.Module]) -> bool:
        return self.parts == parts and self.watch.holds()


def forget(owner: KeepsEvaluation) -> None:
    """Drops what :class:`KeepsEvaluation` has kept."""
    owner.__dict__.pop("_kept", None)


class KeepsEvaluation:
    """Of a module that runs its parts in turn: the last evaluation that took one call, as long as the parts are what
    they were. The class's ``__getstate__`` must leave it out.
    """

    _kept: _Kept | None = None


class FusedSequential(KeepsEvaluation, nn.Sequential):
    """``nn.Sequential``, whose neighbouring fused modules run in one call where no gradient is wanted and all of them
    normalise by running statistics: what one hands to the next stays in the processor's cache.

    Everywhere else, and for children that are not fused, have a hook or are something else, it does what
    ``nn.Sequential`` does.
    """

    def forward(self, x: Tensor) -> Tensor:
        return run_in_turn(self, list(self._modules.values()), x)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}


def run_in_turn(owner: KeepsEvaluation, parts: list[nn.Module], x: Tensor, head: Head | None = None) -> Tensor:
    """The parts of ``owner`` one behind the other, as :class:`FusedSequential` does, and the head; a stem in front of
    the others and the head are in the same call.
    """
    if not isinstance(x, Tensor) or not runs_directly(x):
        return _one_by_one(parts, x, head)
    backend = backends.choose(x.device, x.dtype)
    if torch.is_grad_enabled():
        call, count = _front(parts, x, backend)
        return _one_by_one(parts[count:], call(x) if call else x, head)
    kept, everything = owner._kept, [*parts, *(head.modules() if head else ())]
    if kept and kept.children is owner._modules and kept.backend == backend and kept.holds(everything):
        try:
            out = kept.run(x)
            return out.flatten(1) if kept.flat else out
        except (RuntimeError, ValueError, IndexError):
            pass  # x does not fit, or a tensor is no longer what it was: the way below finds out, and finds the words
    if kept:
        forget(owner)
    if backends.why_unsupported(x.device, x.dtype):
        return _one_by_one(parts, x, head)
    waiting, whole = [], True
    for part in parts:
        calls = _calls(part, not waiting)
        if calls and all(_evaluates(call, backend) for call in calls):
            waiting += calls
            continue
        x, waiting, whole = part(_run(x, waiting, backend)), [], False
    ends = head and head.calls()
    if ends and all(_evaluates(call, backend) for call in ends):
        waiting += ends
    elif head:
        return head(_run(x, waiting, backend))
    out = _run(x, waiting, backend)
    if whole and waiting:
        _keep(owner, everything, head is not None, x, waiting, backend)
    return out.flatten(1) if head else out


def _keep(
    owner: KeepsEvaluation, parts: list[nn.Module], flat: bool, x: Tensor, calls: list[Call], backend: str
) -> None:
    chains, residuals = tuple(parse(call.spec) for call in calls), tuple(call.residual for call in calls)
    run = backends.get(backend).kernels.prepared(x, chains, [p for call in calls for p in call.params], residuals)
    if run is None:
        return
    owner.__dict__["_kept"] = _Kept(owner._modules, parts, Watch(parts), backend, run, flat)


def _front(parts: list[nn.Module], x: Tensor, backend: str) -> tuple[Call | None, int]:
    """Where gradients are wanted, a stem in front as a chain, and how many parts that is: with the block behind it,
    if this adds no residual to the stem's map, that map is not stored.
    """
    # Elsewhere than on a CPU this was not measured.
    if backend != "cpu" or backends.why_unsupported(x.device, x.dtype) or not parts:
        return None, 0
    stem = None if isinstance(parts[0], FusedModule) else stem_call(parts[0])
    if stem is None or parse(stem.spec).stages[0].group is not None:
        return None, 0
    block = _block_call(parts[1]) if len(parts) > 1 and isinstance(parts[1], FusedModule) else None
    if block and not block.residual and not block.drops:
        spec = joined_spec(stem.spec, block.spec)
        call, count = Call(spec, stem.params + block.params, stem.running + block.running, False), 2
    else:
        call, count = stem, 1
    plain = all(type(p) in (Tensor, nn.Parameter) for p in call.params)
    wanted = x.requires_grad or any(p.requires_grad for p in call.params)
    return (call, count) if plain and wanted else (None, 0)


def _one_by_one(parts: list[nn.Module], x: Tensor, head: Head | None) -> Tensor:
    for part in parts:
        x = part(x)
    return head(x) if head else x


def _calls(part: nn.Module, first: bool) -> list[Call] | None:
    if not isinstance(part, FusedModule):
        call = stem_call(part) if first else None
    else:
        call = _block_call(part)
    return None if call is None else [call]


def _block_call(block: FusedModule) -> Call | None:
    return None if has_hook(block) or "forward" in block.__dict__ else block.call()


def _evaluates(call: Call, backend: str) -> bool:
    return not call.running and not call.drops and evaluates(call.spec, call.residual, backend)


def _run(x: Tensor, calls: list[Call], backend: str) -> Tensor:
    if not calls:
        return x
    specs, params, _, residuals, _ = zip(*calls, strict=True)
    return ops.evaluate_chains(x, tuple(map(parse, specs)), params, residuals, backend)
