"""How a module's ordinary children become one chain: the shared part of every fused module."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..chain import chain_spec, stage_spec
from ..checks import check_tensor
from ..functional import Running, run_chain

#: Activation modules and the chain's names for them.
_ACTS = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
}


def act_name(module: nn.Module | None) -> str | None:
    """The chain's name for an activation module (None: no activation), or None for a module that it does not know."""
    return "identity" if module is None else _ACTS.get(type(module))


class Unit(NamedTuple):
    """One stage as modules: a convolution, its batch norm, an activation, and the (fc, act, fc, gate) of a
    squeeze-excite behind it.

    Without convolution and batch norm it is a squeeze-excite alone.
    """

    conv: nn.Conv2d | None
    bn: nn.BatchNorm2d | None
    act: nn.Module | None = None
    excitation: nn.Sequential | None = None


def stage_unit(layer: nn.Module) -> Unit:
    """The unit of a module that holds (convolution, batch norm[, activation]); of any other, one that does not fuse."""
    children = layer._modules.values()
    return Unit(*children) if len(children) in (2, 3) else Unit(layer, None)


def _child_has_hook(module: nn.Module) -> bool:
    pending = list(module._modules.values())
    for m in pending:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        pending += m._modules.values()
    return False


def _conv_kind(conv: nn.Conv2d) -> str | None:
    if conv.groups == conv.in_channels == conv.out_channels and (conv.groups > 1 or conv.kernel_size != (1, 1)):
        return "depthwise"
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return "pointwise" if plain else None


def _conv_reason(conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} in the place of Conv2d"
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "a convolution with a bias, or with a padding other than a number of zeros"
    if _conv_kind(conv) is None:
        return "a convolution that is neither pointwise nor depthwise"
    return None


def _unit_reason(unit: Unit) -> str | None:
    if unit.conv is not None and unit.bn is None:
        return f"{type(unit.conv).__name__} in the place of a stage"
    if unit.conv is not None:
        reason = _conv_reason(unit.conv)
        if reason:
            return reason
        if type(unit.bn) is not nn.BatchNorm2d:
            return f"{type(unit.bn).__name__} in the place of BatchNorm2d"
        if act_name(unit.act) is None:
            return f"activation {type(unit.act).__name__}"
    if unit.excitation is not None:
        modules = unit.excitation._modules.values()
        fc1, act, fc2, gate = modules if len(modules) == 4 else (None,) * 4
        linear = type(fc1) is type(fc2) is nn.Linear and fc1.bias is not None and fc2.bias is not None
        if not linear or act_name(act) is None or act_name(gate) is None:
            return "a squeeze-excite of other modules than Linear, activation, Linear, activation"
    return None


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
            reason = _unit_reason(unit)
            if reason:
                return reason
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_fused():
            return self.stock_forward(x)
        check_tensor(type(self).__name__, "x", x)
        specs, params, running = [], [], []
        for unit in self.units():
            specs.append(_append_unit(unit, params, running))
        return run_chain(x, chain_spec(type(self).__name__, specs), params, running, self.has_residual())

    def extra_repr(self) -> str:
        reason = self.why_not_fused()
        return f"not fused: {reason}" if reason else "fused"


def _append_unit(unit: Unit, params: list[Tensor], running: list[Running]) -> str:
    """Appends a unit's tensors to ``params`` and ``running``; returns its stage as text."""
    conv, bn = unit.conv, unit.bn
    shape = ("none", (1, 1), (1, 1), (0, 0), (1, 1), "none", False, 0.0)
    if conv is not None:
        # As nn.BatchNorm2d: batch statistics in training, and wherever there are no running ones.
        batch = bn.training or bn.running_mean is None
        params.append(conv.weight)
        if bn.affine:
            params += (bn.weight, bn.bias)
        if not batch:
            params += (bn.running_mean, bn.running_var)
        elif bn.training and bn.track_running_stats:
            running.append(Running(bn.running_mean, bn.running_var, bn.momentum, bn.num_batches_tracked))
        else:
            running.append(Running())
        norm = "batch" if batch else "running"
        shape = (_conv_kind(conv), conv.kernel_size, conv.stride, conv.padding, conv.dilation, norm, bn.affine, bn.eps)
    gate = None
    if unit.excitation is not None:
        fc1, act, fc2, gate_act = unit.excitation
        params += [fc1.weight, fc1.bias, fc2.weight, fc2.bias]
        gate = (act_name(act), act_name(gate_act))
    # Traced, the text is a constant anyway; in eager mode, making it takes longer than looking it up.
    text = _stage_text if torch.compiler.is_compiling() else _cached_stage_text
    return text(*shape, act_name(unit.act), gate)


def _stage_text(
    kind: str,
    kernel: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    norm: str,
    affine: bool,
    eps: float,
    act,
    gate,
) -> str:
    ph, pw = padding
    window = {"kernel": kernel, "stride": stride, "padding": (ph, ph, pw, pw), "dilation": dilation}
    return stage_spec(kind, **window, norm=norm, affine=affine, eps=eps, act=act, gate=gate)


_cached_stage_text = lru_cache(maxsize=4096)(_stage_text)
