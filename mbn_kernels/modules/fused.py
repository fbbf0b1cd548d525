"""How a module's ordinary children become one chain: the shared part of every fused module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..chain import chain_spec, parse
from ..checks import check_bool, check_tensor
from ..functional import Running, evaluates, run_chain, runs_directly
from .kept import KeepsEvaluation, keep, recall
from .units import Description, Unit, append_tensors, describe, is_same_conv
from .watch import has_hook, hooks_of


class _Reading(NamedTuple):
    """What was read of the tree of children, and how to tell that the tree is still the same."""

    places: list[dict]  # where each module that has children keeps them
    children: list[tuple]  # which they were
    hooks: list[dict]  # of all descendants
    own: list[dict]  # their attributes
    units: list[Unit]
    drops: list[nn.Module]
    sized: bool  # whether a stage depends on the size of its input

    def holds(self) -> bool:
        return [tuple(place.values()) for place in self.places] == self.children

    def forwards(self) -> bool:
        """Whether a child's forward is not its class's, as where a library has wrapped it."""
        return True in ["forward" in attributes for attributes in self.own]

    def stages(self, size: tuple[int, int] | None) -> list[Description]:
        """Each unit as a stage, for an input of that height and width where it plays a part."""
        if not self.sized or size is None:
            return [describe(unit) for unit in self.units]
        found, shape = [], (1, 1, *size)
        for unit in self.units:
            found.append(describe(unit, shape[2:]))
            if found[-1].stage:
                shape = parse(chain_spec("", [found[-1].stage])).stages[0].output_shape(shape, (1, 1))
        return found


class Call(NamedTuple):
    """What a fused module asks :func:`mbn_kernels.functional.run_chain` for, and what follows before the residual."""

    spec: str
    params: list[Tensor]
    running: list[Running]
    residual: bool
    drops: tuple[nn.Module, ...] = ()

    def evaluates(self, backend: str) -> bool:
        """Whether that backend has one call for it where no gradient is wanted."""
        return not self.running and not self.drops and evaluates(self.spec, self.residual, backend)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.drops:
            return run_chain(x, *self[:4])
        out = run_chain(x, *self[:3], False)
        for drop in self.drops:
            out = drop(out)
        return out + x if self.residual else out


def _drops(module: nn.Module) -> bool:
    """Whether a dropout or stochastic depth does anything at this moment."""
    return module.training and (getattr(module, "p", 0) or getattr(module, "drop_prob", 0)) > 0


class FusedModule(KeepsEvaluation, nn.Module):
    """A module whose children are ordinary PyTorch modules and whose forward runs them as one fused chain.

    The children own the parameters and buffers, so state_dict, optimizers, pruning and conversion find what they
    expect. Where a child is no longer what the chain knows (another class, a forward or backward hook on it), the
    children run one after another as they are; :meth:`why_not_fused` says so. So they do while ONNX is exported, which
    knows no operator of ours.

    >>> block = mbn_kernels.FusedSqueezeExcite(16)
    >>> isinstance(block, FusedModule), block.why_not_fused()
    (True, None)
    >>> block.excitation[1] = nn.Tanh()
    >>> block.why_not_fused()
    'a squeeze-excite of other modules than Linear, activation, Linear, activation'
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()
        check_bool(type(self).__name__, "fused", fused)
        self.fused = fused
        self._reading: _Reading | None = None

    def units(self) -> list[Unit]:
        """The children as stages, in order."""
        raise NotImplementedError

    def drops(self) -> list[nn.Module]:
        """Dropout between the last stage and the residual."""
        return []

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
        hooks = [hooks for m in modules[1:] for hooks in hooks_of(m)]
        units = self.units()
        sized = any(is_same_conv(type(unit.conv)) for unit in units)
        reading = _Reading(places, children, hooks, [m.__dict__ for m in modules[1:]], units, self.drops(), sized)
        if not torch.compiler.is_compiling():
            self._reading = reading
        return reading

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reading": None, "_kept": None}

    def why_not_fused(self) -> str | None:
        """Why the children run one by one, or None where they run fused."""
        reading = self._read()
        if not self.fused:
            return "built with fused=False"
        if any(reading.hooks):
            return "a hook on a child"
        if reading.forwards():
            return "a forward of its own, set on a child"
        return next((found.reason for found in reading.stages(None) if found.reason), None)

    def call(self, x: Tensor | None = None) -> Call | None:
        """The chain that the children are at this moment, or None where they run one by one; without ``x`` also where
        the chain depends on its size.
        """
        reading = self._read()
        if not self.fused or not reading.units or any(reading.hooks) or reading.forwards():
            return None
        if torch.onnx.is_in_onnx_export():
            return None
        if reading.sized and x is None:
            return None
        stages = [found.stage for found in reading.stages(x.shape[2:] if reading.sized else None)]
        if None in stages:
            return None
        params: list[Tensor] = []
        running: list[Running] = []
        for unit in reading.units:
            append_tensors(unit, params, running)
        drops = tuple(filter(_drops, reading.drops))
        return Call(chain_spec(type(self).__name__, stages), params, running, self.has_residual(), drops)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(type(self).__name__, "x", x)
        out = self.run_fused(x)
        return self.stock_forward(x) if out is None else out

    def run_fused(self, x: Tensor) -> Tensor | None:
        """What the chain makes of ``x``, or None where the children run one by one."""
        backend = None
        if not torch.is_grad_enabled() and runs_directly(x):
            backend = backends.choose(x.device, x.dtype)
            out = recall(self, [self], x, backend)
            if out is not None:
                return out
        call = self.call(x)
        if call is None:
            return None
        out = call(x)
        if backend and call.evaluates(backend) and not self._reading.sized and not has_hook(self):
            keep(self, [self], x, [call], backend)
        return out

    def extra_repr(self) -> str:
        reason = self.why_not_fused()
        return f"not fused: {reason}" if reason else "fused"
