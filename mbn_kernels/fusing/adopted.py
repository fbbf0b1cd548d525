"""Fused execution in the place of a module's own forward: the module stays what it is, of a subclass of its class.

Its children, parameters, buffers, hooks and attributes are untouched, and its own forward runs wherever the chain does
not: in a trace or an export, under a transform of torch.func, for a dtype that no kernel takes, or where its tree of
children is no longer the one that was read.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from .. import backends
from ..modules.fused import FusedModule
from ..modules.kept import KeepsEvaluation
from ..modules.sequence import run_in_turn
from ..modules.units import Unit, norm_kind
from ..ops import AUTOCAST_DEVICES
from .trace import Plan

#: What adoption adds to a module itself.
_ATTRIBUTES = ("_plan", "_tree", "_reading", "_views", "_kept")


class Adopted:
    """In front of a class that was adopted: its own class is the next but the fused part."""

    _own: type[nn.Module]


class AdoptedBlock(Adopted, FusedModule):
    """A module whose forward is a chain, as :mod:`mbn_kernels.fusing.trace` read it."""

    fused = True
    _reading = None
    #: None in what was made of it as of a class, as a slice of a Sequential: that is not read yet.
    _plan: Plan | None = None
    _tree: tuple = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        super(FusedModule, self).__init__(*args, **kwargs)

    def units(self) -> list[Unit]:
        return self._plan.units(self) if self._changed() is None else []

    def drops(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self._plan.drops] if self._changed() is None else []

    def has_residual(self) -> bool:
        return self._plan.residual

    def _changed(self) -> str | None:
        if self._plan is None:
            return "it was made of a fused module, and not read itself"
        return None if tree_of(self) == self._tree else "its children are no longer those that fuse() read"

    def why_not_fused(self) -> str | None:
        return self._changed() or super().why_not_fused()

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        out = self.run_fused(x) if isinstance(x, Tensor) and runs_fused(x) else None
        return self.stock_forward(*args, **kwargs) if out is None else out

    def stock_forward(self, *args: object, **kwargs: object) -> Tensor:
        return super(FusedModule, self).forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return _extra_repr(super(FusedModule, self).extra_repr(), super().extra_repr())

    def __getstate__(self) -> dict:
        return _state(super(FusedModule, self)) | {"_reading": None, "_kept": None}

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _revive, (self._own, AdoptedBlock), self.__getstate__()


class AdoptedSequential(Adopted, KeepsEvaluation, nn.Sequential):
    """An nn.Sequential that runs some of its children together: neighbouring fused modules in evaluation, and layers
    that are stages, which lie in ``_views``: by the name of the first, an adopted Sequential of those layers.
    """

    _views: dict[str, AdoptedBlock] | None = None

    def forward(self, input: Tensor) -> Tensor:
        fused = isinstance(input, Tensor) and runs_fused(input)
        return run_in_turn(self, self._parts() if fused else list(self._modules.values()), input)

    def _parts(self) -> list[nn.Module]:
        views, parts, skipped = self._views or {}, [], 0
        for i, (name, child) in enumerate(self._modules.items()):
            if skipped:
                skipped -= 1
                continue
            view = views.get(name) and self._current(name, i)
            skipped = len(view._modules) - 1 if view else 0
            parts.append(view or child)
        return parts

    def _current(self, name: str, first: int) -> AdoptedBlock | None:
        """The view of the layers from ``first`` on, if they still stand here in its order. One of layers that were
        replaced is made anew and not changed: another thread, with a replica of this module, may be in it.
        """
        view = self._views[name]
        own = dict(list(self._modules.items())[first : first + len(view._modules)])
        if list(own) != list(view._modules):
            return None
        if any(view._modules[key] is not child for key, child in own.items()):
            fresh = type(view).__new__(type(view))
            fresh.__dict__.update(view.__dict__, _modules=own, _reading=None, _kept=None)
            self.__dict__["_views"] = {**self._views, name: fresh}
            return fresh
        return view

    def extra_repr(self) -> str:
        return _extra_repr(super().extra_repr(), "neighbours fused")

    def __getstate__(self) -> dict:
        return _state(super()) | {"_kept": None}

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _revive, (self._own, AdoptedSequential), self.__getstate__()


def _state(of: object) -> dict:
    own = getattr(of, "__getstate__", None)  # object has one from Python 3.11 on
    return dict(own() if own is not None else of.__self__.__dict__)


def _extra_repr(own: str, more: str) -> str:
    return f"{own}, {more}" if own else more


def runs_fused(x: Tensor) -> bool:
    """Whether a chain may take such an input: else a module's own forward runs, as what asks for it knows no chain."""
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    device, dtype = x.device, x.dtype
    if device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    reason = backends.why_unsupported(device, dtype)
    if reason:
        _warn_stock(device.type, dtype, reason)
    return not reason


_warned: set[tuple[str, torch.dtype]] = set()


def _warn_stock(device_type: str, dtype: torch.dtype, reason: str) -> None:
    if (device_type, dtype) not in _warned and not torch.compiler.is_compiling():
        _warned.add((device_type, dtype))
        warnings.warn(f"mbn_kernels: fused modules run unfused: x: expected {reason}", stacklevel=4)


def tree_of(module: nn.Module) -> tuple:
    """The names of all modules below, and the classes of those that have children: what a trace depends on. A batch
    norm is one layer: conversions may put an activation that it holds in another place.
    """
    found, norms = [], ()
    for name, m in module.named_modules():
        if name.startswith(norms):
            continue
        norm = norm_kind(type(m)) is not None
        norms = (*norms, f"{name}.") if norm and m._modules else norms
        found.append((name, None if norm or not m._modules else own_class(m)))
    return tuple(found)


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, or what it was before it was adopted."""
    return module._own if isinstance(module, Adopted) else type(module)


@cache
def _adopted_class(own: type[nn.Module], kind: type[Adopted]) -> type[nn.Module]:
    members = {"_own": own, "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (kind, own), members)


def _revive(own: type[nn.Module], kind: type[Adopted]) -> nn.Module:
    """For pickle and copy: an adopted module before it has its state."""
    adopted = _adopted_class(own, kind)
    return adopted.__new__(adopted)


def why_not_adoptable(module: nn.Module) -> str | None:
    """What of a module, whatever it computes, keeps its forward from being taken over."""
    if "forward" in module.__dict__:
        return "a forward of its own, set on the module itself"
    ours = {name for part in (KeepsEvaluation, FusedModule, AdoptedBlock) for name in vars(part)} - set(dir(nn.Module))
    taken = sorted(name for name in ours if hasattr(module, name))
    return f"an attribute named {taken[0]!r}" if taken else None


def adopt_block(module: nn.Module, plan: Plan) -> None:
    """Makes the module run as the chain ``plan``."""
    module.__dict__.update(_plan=plan, _tree=tree_of(module))
    module.__class__ = _adopted_class(type(module), AdoptedBlock)


def adopt_sequential(module: nn.Sequential, views: dict[str, AdoptedBlock]) -> None:
    """Makes an nn.Sequential run its neighbours together, and the layers of each view as that."""
    module.__dict__["_views"] = views
    module.__class__ = _adopted_class(type(module), AdoptedSequential)


def is_plain(module: Adopted) -> bool:
    """Whether the module's class is the one that adoption gave it, and not one made of that."""
    return type(module) in (_adopted_class(module._own, kind) for kind in (AdoptedBlock, AdoptedSequential))


def release(module: nn.Module) -> None:
    """Makes an adopted module what it was."""
    module.__class__ = module._own
    for name in _ATTRIBUTES:
        module.__dict__.pop(name, None)
