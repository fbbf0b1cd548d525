"""Blocks one behind the other: in evaluation, neighbours run in one call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..chain import parse
from ..functional import evaluates, runs_directly
from .fused import Call, FusedModule, has_hook


class FusedSequential(nn.Sequential):
    """``nn.Sequential``, whose neighbouring fused modules run in one call where no gradient is wanted and all of them
    normalise by running statistics: what one hands to the next stays in the processor's cache.

    Everywhere else, and for children that are not fused, have a hook or are something else, it does what
    ``nn.Sequential`` does.
    """

    def forward(self, x: Tensor) -> Tensor:
        return run_in_turn(self._modules.values(), x)


def run_in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The modules one behind the other, as :class:`FusedSequential` does."""
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or not runs_directly(x):
        return _one_by_one(modules, x)
    backend, waiting = backends.choose(x.device, x.dtype), []
    if backends.why_unsupported(x.device, x.dtype):
        return _one_by_one(modules, x)
    for module in modules:
        call = module.call() if isinstance(module, FusedModule) and not has_hook(module) else None
        if call and not call.running and not call.drops and evaluates(call.spec, call.residual, backend):
            waiting.append(call)
            continue
        x = module(_run(x, waiting, backend))
        waiting = []
    return _run(x, waiting, backend)


def _one_by_one(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _run(x: Tensor, calls: list[Call], backend: str) -> Tensor:
    if not calls:
        return x
    specs, params, _, residuals, _ = zip(*calls, strict=True)
    return ops.evaluate_chains(x, tuple(map(parse, specs)), params, residuals, backend)
