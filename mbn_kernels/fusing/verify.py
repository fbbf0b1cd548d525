"""Whether an adopted module computes what it did before: both versions, in float64, on a random input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..modules.watch import hooks_of
from .adopted import AdoptedBlock, adopt_block
from .trace import Plan, first_line

#: Of the largest number: float64 has 1e-16, and a chain of batch norms loses a few digits.
_TOLERANCE = 1e-9
_SHAPE = (2, 7, 6)  # images, height, width


def difference(module: nn.Module, plan: Plan) -> str | None:
    """How ``module`` as the chain ``plan`` differs from its own forward, in training and in evaluation; None where it
    does not. Nothing of the module is changed: copies with random parameters are compared.
    """
    try:
        own = _copy(module)
        channels = next(
            (u.conv or u.excitation[0]).weight.shape[1] * getattr(u.conv, "groups", 1) for u in plan.units(own)
        )
        adopted = copy.deepcopy(own)
        adopt_block(adopted, plan)
        g = torch.Generator("cpu").manual_seed(1)
        x = torch.randn(_SHAPE[0], channels, *_SHAPE[1:], dtype=torch.float64, device="cpu", generator=g)
        for training in (True, False):
            reason = _compare(own.train(training), adopted.train(training), x)
            if reason:
                return f"not what it was {'in training' if training else 'in evaluation'}: {reason}"
    except Exception as error:  # whatever a module's own code does
        return f"it could not be compared ({first_line(error)})"
    return None


def _compare(own: nn.Module, adopted: AdoptedBlock, x: Tensor) -> str | None:
    if adopted.why_not_fused():
        return adopted.why_not_fused()
    expected, got = (_run(m, x) for m in (own, adopted))
    for name, want in expected.items():
        if want.shape != got[name].shape:
            return f"{name} of shape {tuple(got[name].shape)} instead of {tuple(want.shape)}"
        worst, scale = (got[name] - want).abs().max().item(), max(want.abs().max().item(), 1.0)
        if not worst <= _TOLERANCE * scale:
            return f"{name} differs by {worst:.1e}"
    return None


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the buffers afterwards; what is random is the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = module(x.clone())
    return {"the output": out} | {f"buffer {k}": b.double() for k, b in module.named_buffers() if b.numel()}


def _copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64, without hooks, with random parameters and statistics."""
    with _without_hooks(module):
        module = copy.deepcopy(module)
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        module = module.to_empty(device="cpu")
    module = module.to("cpu", torch.float64).requires_grad_(False)
    g = torch.Generator("cpu").manual_seed(0)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if t.is_floating_point():
            scale = max(t[0].numel(), 1) ** -0.5 if t.dim() > 1 else 1.0
            t.copy_(scale * torch.randn(t.shape, generator=g, dtype=t.dtype, device="cpu"))
            if "var" in name.rpartition(".")[2]:
                t.abs_().add_(0.5)
        else:
            t.zero_()
    return module


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """A hook may hold anything, and what it does is for its module, not for a copy."""
    places = [hooks for m in module.modules() for hooks in hooks_of(m) if hooks]
    kept = [dict(hooks) for hooks in places]
    for hooks in places:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(places, kept, strict=True):
            hooks.update(before)
