"""How a module's ordinary children become one chain: the shared part of every fused module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..chain import chain_spec
from ..checks import check_tensor
from ..functional import Running, run_chain
from .units import Unit, append_tensors, describe


def has_hook(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _child_has_hook(module: nn.Module) -> bool:
    pending = list(module._modules.values())
    for m in pending:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        pending += m._modules.values()
    return False


class Call(NamedTuple):
    """What a fused module asks :func:`mbn_kernels.functional.run_chain` for."""

    spec: str
    params: list[Tensor]
    running: list[Running]
    residual: bool


class FusedModule(nn.Module):
    """A module whose children are ordinary PyTorch modules and whose forward runs them as one fused chain.

    The children own the parameters and buffers, so state_dict, optimizers, pruning and conversion find what they
    expect. Where a child is no longer what the chain knows (another class, a forward or backward hook on it), the
    children run one after another as they are; :meth:`why_not_fused` says so.
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def units(self) -> list[Unit]:
        """The children as stages, in order."""
        raise NotImplementedError

    def stock_forward(self, x: Tensor) -> Tensor:
        """The children one after another: what PyTorch would compute."""
        raise NotImplementedError

    def has_residual(self) -> bool:
        return False

    def why_not_fused(self) -> str | None:
        """Why the children run one by one, or None where they run fused."""
        if not self.fused:
            return "built with fused=False"
        if _child_has_hook(self):
            return "a hook on a child"
        for unit in self.units():
            reason = describe(unit).reason
            if reason:
                return reason
        return None

    def call(self) -> Call | None:
        """The chain that the children are at this moment, or None where they run one by one."""
        if not self.fused or _child_has_hook(self):
            return None
        units = self.units()
        stages = [describe(unit).stage for unit in units]
        if None in stages:
            return None
        params: list[Tensor] = []
        running: list[Running] = []
        for unit in units:
            append_tensors(unit, params, running)
        return Call(chain_spec(type(self).__name__, stages), params, running, self.has_residual())

    def forward(self, x: Tensor) -> Tensor:
        call = self.call()
        if call is None:
            return self.stock_forward(x)
        check_tensor(type(self).__name__, "x", x)
        return run_chain(x, *call)

    def extra_repr(self) -> str:
        reason = self.why_not_fused()
        return f"not fused: {reason}" if reason else "fused"
