"""How a module's ordinary children become one chain: the shared part of every fused module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..chain import chain_spec
from ..checks import check_tensor
from ..functional import Running, run_chain
from .units import Unit, append_tensors, describe


def _hooks(module: nn.Module) -> tuple[dict, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_hook(module: nn.Module) -> bool:
    return any(_hooks(module))


class _Reading(NamedTuple):
    """What was read of the tree of children, and how to tell that the tree is still the same."""

    places: list[dict]  # where each module that has children keeps them
    children: list[tuple]  # which they were
    hooks: list[dict]  # of all descendants
    units: list[Unit]

    def holds(self) -> bool:
        return [tuple(place.values()) for place in self.places] == self.children


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
        self._reading: _Reading | None = None

    def units(self) -> list[Unit]:
        """The children as stages, in order."""
        raise NotImplementedError

    def stock_forward(self, x: Tensor) -> Tensor:
        """The children one after another: what PyTorch would compute."""
        raise NotImplementedError

    def has_residual(self) -> bool:
        return False

    def _read(self) -> _Reading:
        # Walking the tree anew for each call would take longer than a small block's kernels. The first dictionary is
        # compared by identity: a replica of this module has one of its own.
        kept = self._reading
        if kept and kept.places[0] is self._modules and kept.holds():
            return kept
        modules = list(self.modules())
        places = [m._modules for m in modules if m._modules]
        children = [tuple(place.values()) for place in places]
        reading = _Reading(places, children, [hooks for m in modules[1:] for hooks in _hooks(m)], self.units())
        if not torch.compiler.is_compiling():
            self._reading = reading
        return reading

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reading": None}

    def why_not_fused(self) -> str | None:
        """Why the children run one by one, or None where they run fused."""
        reading = self._read()
        if not self.fused:
            return "built with fused=False"
        if any(reading.hooks):
            return "a hook on a child"
        for unit in reading.units:
            reason = describe(unit).reason
            if reason:
                return reason
        return None

    def call(self) -> Call | None:
        """The chain that the children are at this moment, or None where they run one by one."""
        reading = self._read()
        if not self.fused or any(reading.hooks):
            return None
        units = reading.units
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
