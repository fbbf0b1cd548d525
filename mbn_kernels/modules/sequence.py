"""Blocks one behind the other: in evaluation, neighbours run in one call; in training, what one hands to the next is
not stored twice.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..chain import parse
from ..errors import fail, short
from ..functional import run_linked, runs_directly
from .ends import Head, stem_call
from .fused import Call, FusedModule
from .kept import KeepsEvaluation, keep, recall
from .watch import has_hook


class FusedSequential(KeepsEvaluation, nn.Sequential):
    """``nn.Sequential``, whose neighbouring fused modules run in one call where no gradient is wanted and all of them
    normalise by running statistics: what one hands to the next stays in the processor's cache.

    Everywhere else, and for children that are not fused, have a hook or are something else, it does what
    ``nn.Sequential`` does.

    >>> blocks = [mbn_kernels.FusedDepthwiseSeparable(4, 8), mbn_kernels.FusedDepthwiseSeparable(8, 8, s=2)]
    >>> net, x = mbn_kernels.FusedSequential(*blocks).eval(), torch.randn(2, 4, 8, 8)
    >>> with torch.no_grad():
    ...     torch.allclose(net(x), nn.Sequential(*blocks)(x), atol=1e-4)
    True
    """

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module]) -> None:
        named = len(modules) == 1 and isinstance(modules[0], dict)
        for part in modules[0].values() if named else modules:
            if not isinstance(part, nn.Module):
                fail("FusedSequential", "modules", "modules, or a dictionary of them", short(part), TypeError)
        super().__init__(*modules)

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
        # On other devices than a CPU this was not measured.
        x = _train(parts, x, backend) if backend == "cpu" else _one_by_one(parts, x, None)
        return head(x) if head else x
    everything = [*parts, *(head.modules() if head else ())]
    out = recall(owner, everything, x, backend)
    if out is not None:
        return out
    if backends.why_unsupported(x.device, x.dtype):
        return _one_by_one(parts, x, head)
    waiting, whole = [], True
    for part in parts:
        calls = _calls(part, not waiting)
        if calls and all(call.evaluates(backend) for call in calls):
            waiting += calls
            continue
        x, waiting, whole = part(_run(x, waiting, backend)), [], False
    ends = head and head.calls()
    if ends and all(call.evaluates(backend) for call in ends):
        waiting += ends
    elif head:
        return head(_run(x, waiting, backend))
    out = _run(x, waiting, backend)
    if whole and waiting:
        keep(owner, everything, x, waiting, backend, head is not None)
    return out.flatten(1) if head else out


def _train(parts: list[nn.Module], x: Tensor, backend: str) -> Tensor:
    """Where gradients are wanted: a stem runs as a chain, and chains without a residual, neighbours, are linked."""
    waiting: list[tuple[nn.Module, Call]] = []
    for i, part in enumerate(parts):
        call = _linkable(part, i == 0)
        wanted = bool(waiting) or x.requires_grad or (call is not None and any(p.requires_grad for p in call.params))
        if call is None or not wanted:
            x, waiting = part(_run_linked(x, waiting, backend)), []
            continue
        if waiting and not _may_follow(waiting[-1][1], call):
            x, waiting = _run_linked(x, waiting, backend), []
        waiting.append((part, call))
    return _run_linked(x, waiting, backend)


def _linkable(part: nn.Module, first: bool) -> Call | None:
    """The part as one chain, where its own statistics and no dropped paths are in it."""
    (call,) = _calls(part, first) or (None,)
    if call is None or call.drops or any(stage.group is not None for stage in parse(call.spec).stages):
        return None
    return call if all(type(p) in (Tensor, nn.Parameter) for p in call.params) else None


def _may_follow(call: Call, following: Call) -> bool:
    last, first = parse(call.spec).stages[-1], parse(following.spec).stages[0]
    leaves = not call.residual and last.norm != "none" and not last.gate
    return leaves and not following.residual and first.conv != "none"


def _run_linked(x: Tensor, waiting: list[tuple[nn.Module, Call]], backend: str) -> Tensor:
    # A part between two others may have changed more than the numbers.
    if backends.choose(x.device, x.dtype) != backend or backends.why_unsupported(x.device, x.dtype):
        return _one_by_one([part for part, _ in waiting], x, None)
    if len(waiting) == 1:
        return waiting[0][1](x)
    return run_linked(x, [call[:3] for _, call in waiting], backend)


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


def _run(x: Tensor, calls: list[Call], backend: str) -> Tensor:
    if not calls:
        return x
    specs, params, _, residuals, _ = zip(*calls, strict=True)
    return ops.evaluate_chains(x, tuple(map(parse, specs)), params, residuals, backend)
