"""What a module's forward does with its input, read by tracing it with torch.fx: a chain of stages, or why it is none.

The graph is run once with descriptions in the place of tensors: a :class:`_Map` says which stages made a feature map, a
:class:`_Squeezed` which layers a map's mean went through on its way to become a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.units import Unit, is_same_conv, norm_kind

#: Functions and methods that are activations, and the chain's names for them.
_ACT_FUNCTIONS = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "hardswish": "hardswish", "silu": "silu",
    "hardsigmoid": "hardsigmoid", "sigmoid": "sigmoid",
}  # fmt: skip
_ADDS, _MULTIPLIES = {"add", "iadd", "add_"}, {"mul", "imul", "mul_"}
#: What a squeezed map may go through: its numbers stay the same.
_SHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "expand", "expand_as", "getitem", "view_as"}
#: Modules that are the identity but for training, where whole samples or numbers are left out.
_DROPS = {"StochasticDepth", "DropPath", "Dropout", "Dropout2d"}


class NotAChain(Exception):
    """Its text is why a module is not a chain of stages."""


class Step(NamedTuple):
    """A stage as names of modules below the traced one; an activation that is a function is ``=name``."""

    conv: str | None
    bn: str | None = None
    act: str | None = None
    gate: tuple[str, ...] | None = None


class Plan(NamedTuple):
    """A module as a chain: ``residual`` adds its input, after the modules ``drops``."""

    steps: tuple[Step, ...]
    drops: tuple[str, ...] = ()
    residual: bool = False

    def units(self, module: nn.Module) -> list[Unit]:
        """The stages, with the modules that are there at this moment."""

        def find(name: str | None) -> nn.Module | str | None:
            return name[1:] if name and name[0] == "=" else name and module.get_submodule(name)

        return [Unit(find(s.conv), find(s.bn), find(s.act), s.gate and tuple(map(find, s.gate))) for s in self.steps]


class _Map(NamedTuple):
    """The input after these steps."""

    steps: tuple[Step, ...] = ()
    drops: tuple[str, ...] = ()
    residual: bool = False


class _Squeezed(NamedTuple):
    """The mean of a map over height and width, after layers of (fc, act, fc, gate)."""

    of: _Map
    layers: tuple[str, ...] = ()


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not module._modules or isinstance(module, _BatchNorm) or norm_kind(type(module)) is not None


def read(module: nn.Module) -> Plan:
    """The chain that ``module.forward`` is. Raises :class:`NotAChain`."""
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever the module's own code does with something that is no tensor
        raise NotAChain(f"its forward cannot be traced ({first_line(error)})") from error
    found: dict[torch.fx.Node, object] = {}
    for node in graph.nodes:
        if node.op == "output":
            return _finish(found.get(node.args[0]) if isinstance(node.args[0], torch.fx.Node) else None)
        found[node] = _READERS[node.op](module, node, found)
    raise NotAChain("it returns nothing")


def first_line(error: Exception) -> str:
    """For a reason in a report."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


def _finish(found: object) -> Plan:
    if not isinstance(found, _Map) or not found.steps:
        raise NotAChain("its output is not a feature map that a chain makes")
    _complete(found)
    return Plan(*found)


def _complete(found: _Map) -> None:
    if found.steps and found.steps[-1].conv is not None and found.steps[-1].bn is None:
        raise NotAChain("a convolution without batch norm behind it")


# One node each --------------------------------------------------------------------------------------------------------


def _placeholder(module: nn.Module, node: torch.fx.Node, found: dict) -> object:
    if not found:
        return _Map()
    if node.args:  # it has a default, and what is not looked at plays no part
        return None
    raise NotAChain("its forward takes more than one argument")


def _call_module(module: nn.Module, node: torch.fx.Node, found: dict) -> object:
    child = module.get_submodule(node.target)
    given = found.get(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
    if isinstance(given, _Map):
        return _through(given, node.target, child)
    if isinstance(given, _Squeezed):
        return _through_layer(given, node.target, child)
    raise NotAChain(f"{node.target}: a {type(child).__name__} of something other than one feature map")


def _through(given: _Map, name: str, child: nn.Module) -> _Map | _Squeezed:
    """What a module makes of a map."""
    kind, last = type(child), given.steps[-1] if given.steps else None
    if _is_identity(child):
        return given
    if _is_drop(kind):
        return given._replace(drops=(*given.drops, name))
    if given.drops or given.residual:
        raise NotAChain(f"{name}: a {kind.__name__} behind a dropout or the residual")
    if _is_mean(child):
        return _Squeezed(given)
    if isinstance(child, nn.Conv2d) or is_same_conv(kind):
        _complete(given)
        return _Map((*given.steps, Step(name)))
    pending = last is not None and last.conv is not None and last.bn is None
    if pending and (norm_kind(kind) or "Norm" in kind.__name__):
        return _replace_last(given, bn=name, act=_act_of_norm(name, child))
    if last is not None and last.bn is not None and last.act is None and last.gate is None:
        return _replace_last(given, act=name)  # whether a chain knows it is asked of the module that is there
    raise NotAChain(f"{name}: a {kind.__name__} where no stage has one")


def _act_of_norm(name: str, child: nn.Module) -> str | None:
    """timm's batch norms hold (drop, act)."""
    if not child._modules:
        return None
    if set(child._modules) != {"drop", "act"} or not _is_identity(child.drop):
        raise NotAChain(f"{name}: a {type(child).__name__} with other modules than an activation in it")
    return None if _is_identity(child.act) else f"{name}.act"


def _replace_last(given: _Map, **changes: object) -> _Map:
    return given._replace(steps=(*given.steps[:-1], given.steps[-1]._replace(**changes)))


def _through_layer(given: _Squeezed, name: str, child: nn.Module) -> _Squeezed:
    """What a module makes of a squeezed map: the next of (fc, act, fc, gate)."""
    if _is_identity(child) or isinstance(child, nn.Flatten):
        return given
    if isinstance(child, (nn.Linear, nn.Conv2d)) == bool(len(given.layers) % 2) or len(given.layers) == 4:
        raise NotAChain(f"{name}: a {type(child).__name__} in a squeeze-excite, where a chain has none")
    return given._replace(layers=(*given.layers, name))


def _call_function(module: nn.Module, node: torch.fx.Node, found: dict) -> object:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    given = [found.get(a) for a in node.args if isinstance(a, torch.fx.Node)]
    first = given[0] if given else None
    if name in _ADDS and len(given) == len(node.args) == 2 and not node.kwargs:
        return _add(*given)
    if name in _MULTIPLIES and len(given) == len(node.args) == 2 and not node.kwargs:
        return _multiply(*given)
    if name in ("mean", "adaptive_avg_pool2d") and isinstance(first, _Map) and _averages(name, node):
        return _Squeezed(first)
    if name in _ACT_FUNCTIONS and len(given) == 1:
        return _act_function(first, _ACT_FUNCTIONS[name])
    if name in _SHAPES and isinstance(first, _Squeezed):
        return first
    if name in ("size", "getattr", "dim", "_assert", "eq", "ne", "getitem") or not any(given):
        return None  # a number, or a check: if a tensor's value follows from it, that is noticed there
    raise NotAChain(f"{name}: an operation that no stage has")


def _add(a: object, b: object) -> _Map:
    maps = sorted((v for v in (a, b) if isinstance(v, _Map)), key=lambda v: len(v.steps))
    if len(maps) < 2 or maps[0] != _Map() or not maps[1].steps or maps[1].residual:
        raise NotAChain("an addition of something other than its input")
    _complete(maps[1])
    return maps[1]._replace(residual=True)


def _multiply(a: object, b: object) -> _Map:
    gate, given = (a, b) if isinstance(a, _Squeezed) else (b, a)
    if not isinstance(gate, _Squeezed) or gate.of != given or len(gate.layers) != 4:
        raise NotAChain("a product that is no squeeze-excite of two layers")
    if not given.steps or given.steps[-1].gate:
        return given._replace(steps=(*given.steps, Step(None, gate=gate.layers)))
    _complete(given)
    return _replace_last(given, gate=gate.layers)


def _act_function(given: object, act: str) -> object:
    if isinstance(given, _Squeezed) and len(given.layers) in (1, 3):
        return given._replace(layers=(*given.layers, f"={act}"))
    last = given.steps[-1] if isinstance(given, _Map) and given.steps else None
    if last is None or last.bn is None or last.act or last.gate or given.drops or given.residual:
        raise NotAChain(f"{act}: an activation where no stage has one")
    return _replace_last(given, act=f"={act}")


def _averages(name: str, node: torch.fx.Node) -> bool:
    """Whether it is the mean over height and width."""
    if name == "mean":
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, (tuple, list)) and {d % 4 for d in dims} == {2, 3}
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    return size in (1, (1, 1), [1, 1])


def _is_mean(child: nn.Module) -> bool:
    return type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1), [1, 1])


def _is_identity(child: nn.Module) -> bool:
    return type(child) is nn.Identity or (type(child) is nn.Sequential and not child._modules)


def _is_drop(kind: type) -> bool:
    return kind.__name__ in _DROPS and kind.__module__.startswith(("torch.nn.", "torchvision.", "timm."))


def _get_attr(module: nn.Module, node: torch.fx.Node, found: dict) -> object:
    return None


_READERS: dict[str, Callable] = {
    "placeholder": _placeholder,
    "call_module": _call_module,
    "call_function": _call_function,
    "call_method": _call_function,
    "get_attr": _get_attr,
}
