"""``fuse(model)``: fused execution wherever a module's children form a chain; ``unfuse(model)``: as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..chain import chain_spec, parse
from ..checks import check_bool
from ..errors import fail, short
from ..modules.fused import FusedModule
from ..modules.sequence import FusedSequential
from ..modules.units import ACTS, Unit, describe, is_same_conv, norm_kind
from ..modules.watch import has_hook
from . import adopted
from .adopted import Adopted, AdoptedBlock
from .report import Report, Row, in_words
from .trace import NotAChain, Plan, read
from .verify import difference

#: A block has a handful of convolutions; what has more is looked at in parts.
_MOST_CONVOLUTIONS = 12


def fuse(
    model: nn.Module, *, blocks: Iterable[type | str] | None = None, inplace: bool = True, verify: bool = True
) -> Report:
    """Puts fused execution wherever the forward of one of the model's modules is a chain: 1x1 or depthwise convolution,
    batch norm, activation, squeeze-excite, and so on, dropped paths and the input added at the end.

    A module is judged by what its forward does (it is traced by torch.fx), not by its name, and compared with itself
    in float64 on a random input. It keeps its parameters, buffers, children, hooks and attributes; its class becomes a
    subclass of what it was. :func:`unfuse` undoes it. Fuse again after changing a block's own flags.

    Args:
        model: any module, on any device, in any dtype.
        blocks: only modules of these classes, or of these names in the model; None: all.
        inplace: False fuses a copy, the report's ``model``.
        verify: False leaves the comparison out.

    Returns:
        A :class:`~mbn_kernels.fusing.report.Report`; print it. A UserWarning says so where nothing was fused.

    >>> layers = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    >>> print(mbn_kernels.fuse(nn.Sequential(*layers, nn.Conv2d(8, 4, 3))))
    mbn_kernels.fuse: 1 modules fused, 1 skipped
    fused:
      [0:2]  Sequential  depthwise 3x3 8 relu
    skipped:
      3  Conv2d  a convolution with a bias, or with a padding other than a number of zeros
    """
    if not isinstance(model, nn.Module):
        fail("fuse", "model", "an nn.Module", type(model).__name__, TypeError)
    check_bool("fuse", "inplace", inplace)
    check_bool("fuse", "verify", verify)
    classes, names = _wanted(model, blocks)
    report = Report(model if inplace else copy.deepcopy(model))
    _Walk(report, classes, names, verify).visit(report.model, "", blocks is None, "")
    if not report.fused:
        warnings.warn("mbn_kernels.fuse: no module was fused; print the report to see why", stacklevel=2)
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every module that :func:`fuse` changed its own class back; returns the model. Modules that are fused by
    their own class, as FusedInvResBlock, stay what they are.

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    >>> mbn_kernels.fuse(model)
    <Report: 1 modules fused, 0 skipped>
    >>> type(model) is nn.Sequential, type(mbn_kernels.unfuse(model)) is nn.Sequential
    (False, True)
    """
    if not isinstance(model, nn.Module):
        fail("unfuse", "model", "an nn.Module", type(model).__name__, TypeError)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Adopted)]
    for name, m in found:
        if not adopted.is_plain(m):
            raise RuntimeError(f"unfuse: {name}: expected the class that fuse() gave it, got {type(m).__name__}")
    for _, m in found:
        adopted.release(m)
    return model


def _wanted(model: nn.Module, blocks: Iterable[type | str] | None) -> tuple[tuple[type, ...], set[str]]:
    try:
        found = [] if blocks is None else [blocks] if isinstance(blocks, (str, type)) else list(blocks)
    except TypeError:
        fail("fuse", "blocks", "classes of modules, or names", short(blocks), TypeError)
    for each in found:
        if not isinstance(each, str) and not (isinstance(each, type) and issubclass(each, nn.Module)):
            fail("fuse", "blocks", "classes of modules, or names", short(each), TypeError)
    names = {b for b in found if isinstance(b, str)}
    unknown = sorted(names - dict(model.named_modules()).keys())
    if unknown:
        fail("fuse", "blocks", "names of the model's modules", repr(unknown[0]))
    return tuple(b for b in found if isinstance(b, type)), names


class _Walk:
    """One pass over a model, outermost modules first."""

    def __init__(self, report: Report, classes: tuple[type, ...], names: set[str], verify: bool) -> None:
        self.report, self.classes, self.names, self.verify = report, classes, names, verify
        self.seen: set[nn.Module] = set()
        self.compared: dict[tuple, str | None] = {}  # networks repeat their blocks

    def visit(self, module: nn.Module, name: str, wanted: bool, why: str, covered: bool = False) -> None:
        """Fuses the module, or what is in it. ``why``: the reason why the nearest module around it is no chain;
        ``covered``: one is.
        """
        if module in self.seen:
            return
        self.seen.add(module)
        wanted = wanted or name in self.names or isinstance(module, self.classes)
        if _is_convolution(module):
            if not covered:
                self.skip(module, name, _of_layer(module) or why if wanted else "not among the blocks asked for")
        elif isinstance(module, (FusedModule, torch.jit.ScriptModule)):
            reason = module.why_not_fused() if isinstance(module, FusedModule) else "a ScriptModule"
            self.skip(module, name, reason or "fused already")
        elif _is_worth_a_look(module):
            reason = self.as_block(module, name) if wanted else None
            self.children(module, name, wanted, reason or why, covered)

    def children(self, module: nn.Module, name: str, wanted: bool, why: str, covered: bool) -> None:
        """What is in a module: of one that is a chain only the parts of a Sequential, which may be called alone."""
        whole, prefix = isinstance(module, AdoptedBlock), f"{name}." if name else ""
        if whole and not _is_sequential(module):
            return
        views = self.views(module, name) if wanted and not whole and _is_sequential(module) else {}
        shown = {id(layer) for view in views.values() for layer in view._modules.values()}
        for child_name, child in module._modules.items():
            if child is not None and id(child) not in shown:
                self.visit(child, prefix + child_name, wanted, why, covered or whole)
        if _is_sequential(module) and type(module) is not FusedSequential and not isinstance(module, Adopted):
            neighbours = sum(isinstance(child, FusedModule) for child in module._modules.values())
            if views or (neighbours > 1 and not adopted.why_not_adoptable(module)):
                adopted.adopt_sequential(module, views)

    def as_block(self, module: nn.Module, name: str) -> str | None:
        """Fuses the module as a whole; returns why it cannot."""
        plan, reason = self.plan(module, name)
        if plan is not None:
            self.report.fused.append(Row(name or "(the model)", type(module).__name__, _in_words(module, plan)))
            adopted.adopt_block(module, plan)
        return reason

    def plan(self, module: nn.Module, name: str) -> tuple[Plan | None, str | None]:
        """(how the module is a chain, None), or (None, why it is none)."""
        reason = adopted.why_not_adoptable(module) or _why_not_traceable(module)
        if reason:
            return None, reason
        try:
            plan = read(module)
        except NotAChain as error:
            return None, str(error)
        found = [describe(unit) for unit in plan.units(module)]
        reason = next((each.reason for each in found if each.reason), None)
        if reason is None and self.verify:
            shapes = tuple(tuple(t.shape) for t in (*module.parameters(), *module.buffers()))
            key = adopted.tree_of(module), plan, tuple(each.stage for each in found), shapes
            if key not in self.compared:
                self.compared[key] = difference(module, plan)
            reason = self.compared[key]
            if reason:  # its parts may be fused: that the whole is not must be seen
                self.skip(module, name, reason)
        return (None, reason) if reason else (plan, None)

    def views(self, module: nn.Sequential, name: str) -> dict[str, AdoptedBlock]:
        """Runs of layers of a Sequential that are stages, each as a module of its own that holds them."""
        found: dict[str, AdoptedBlock] = {}
        for layers in () if adopted.why_not_adoptable(module) else _runs(module):
            view = nn.Sequential()
            view._modules.update(layers)
            plan, _ = self.plan(view, f"{name}[{next(iter(layers))}:]")
            if plan is not None:
                first, last = next(iter(layers)), next(reversed(layers))
                row = Row(f"{name}[{first}:{last}]", type(module).__name__, _in_words(view, plan))
                self.report.fused.append(row)
                adopted.adopt_block(view, plan)
                found[first] = view
        return found

    def skip(self, module: nn.Module, name: str, why: str) -> None:
        self.report.skipped.append(Row(name or "(the model)", adopted.own_class(module).__name__, why))


def _in_words(module: nn.Module, plan: Plan) -> str:
    units = plan.units(module)
    stages = parse(chain_spec("", [describe(unit).stage for unit in units])).stages
    widths = [unit.conv and unit.conv.out_channels for unit in units]
    return in_words(stages, widths, bool(plan.drops), plan.residual)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and adopted.own_class(module).forward is nn.Sequential.forward


def _is_convolution(module: nn.Module) -> bool:
    """Whether it is a layer that convolves maps; those of quantized networks have other classes, and such names."""
    return "Conv2d" in type(module).__name__ and not any(map(_is_convolution, list(module.modules())[1:]))


def _is_worth_a_look(module: nn.Module) -> bool:
    """Whether there are convolutions in it, or the two layers of a squeeze-excite."""
    kinds = (_is_convolution(m) or isinstance(m, (nn.Linear, torch.jit.ScriptModule)) for m in module.modules())
    return not isinstance(module, nn.Linear) and any(kinds)


def _of_layer(conv: nn.Module) -> str | None:
    """Why a convolution can be in no chain, whatever is around it."""
    kind = type(conv)
    if "quantized" in kind.__module__ or ".qat." in kind.__module__:
        return "quantized"
    if kind is not nn.Conv2d and not is_same_conv(kind):
        return f"a {kind.__name__}, which no chain knows"
    return describe(Unit(conv, nn.BatchNorm2d(conv.out_channels, device="meta"))).reason


def _why_not_traceable(module: nn.Module) -> str | None:
    if sum(map(_is_convolution, module.modules())) > _MOST_CONVOLUTIONS:
        return "no module around it is a chain"
    hooked = next((name for name, m in module.named_modules() if name and has_hook(m)), None)
    return f"a hook on an inner module, {hooked}" if hooked else None


def _runs(module: nn.Sequential) -> Iterator[dict[str, nn.Module]]:
    """Layers that are stages, as many as stand in a row."""
    layers, run, i = list(module._modules.items()), {}, 0
    while i < len(layers):
        count = _stage_length([layer for _, layer in layers[i : i + 3]])
        run |= dict(layers[i : i + count])
        if run and not count:
            yield run
            run = {}
        i += max(count, 1)
    if run:
        yield run


def _stage_length(layers: list[nn.Module]) -> int:
    """How many of three layers are (convolution, batch norm[, activation]): 0, 2 or 3."""
    if len(layers) < 2 or not _is_convolution(layers[0]) or norm_kind(type(layers[1])) is None or _of_layer(layers[0]):
        return 0
    return 3 if len(layers) == 3 and type(layers[2]) in ACTS else 2
