"""What a module's ordinary children say: which stage of a chain they are, or why they are none."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..chain import stage_spec
from ..functional import Running

#: Activation modules and the chain's names for them.
_ACTS = {
    type(None): "identity",
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
}


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


class Description(NamedTuple):
    """A unit's stage as text, or why it cannot be one."""

    stage: str | None
    reason: str | None = None


def describe(unit: Unit) -> Description:
    """Reads the modules as they are now. Their facts are hashable, so that an eager call only looks them up; what is
    traced becomes a constant anyway.
    """
    describe_facts = _describe if torch.compiler.is_compiling() else _described
    return describe_facts(
        _conv_facts(unit.conv), _norm_facts(unit.bn), type(unit.act), _excitation_facts(unit.excitation)
    )


# The dictionaries of parameters and buffers are read directly: nn.Module's attribute look-up takes ten times as long.


def _conv_facts(conv: nn.Module | None) -> tuple | None:
    if type(conv) is not nn.Conv2d:
        return None if conv is None else (type(conv),)
    window = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    plain = conv._parameters.get("bias") is None and conv.padding_mode == "zeros"
    return nn.Conv2d, window, conv.groups, conv.in_channels, conv.out_channels, plain


def _norm_facts(bn: nn.Module | None) -> tuple | None:
    if type(bn) is not nn.BatchNorm2d:
        return None if bn is None else (type(bn),)
    # As nn.BatchNorm2d: batch statistics in training, and wherever there are no running ones.
    batch = bn.training or bn._buffers.get("running_mean") is None
    return nn.BatchNorm2d, batch, bn.affine, bn.eps


def _excitation_facts(excitation: nn.Sequential | None) -> tuple | None:
    if excitation is None:
        return None
    modules = tuple(excitation._modules.values())
    kinds = tuple(type(m) for m in modules)
    if len(kinds) != 4 or not kinds[0] is kinds[2] is nn.Linear:
        return (kinds,)
    return kinds, all(fc._parameters.get("bias") is not None for fc in modules[::2])


def _describe(conv: tuple | None, norm: tuple | None, act: type, excitation: tuple | None) -> Description:
    gate = None
    if excitation is not None:
        kinds, biased = excitation if len(excitation) == 2 else ((), False)
        gate = tuple(_ACTS.get(kind) for kind in kinds[1::2])
        if not biased or None in gate:
            return Description(None, "a squeeze-excite of other modules than Linear, activation, Linear, activation")
    if conv is None:
        return Description(stage_spec("none", gate=gate))
    if norm is None:
        return Description(None, f"{conv[0].__name__} in the place of a stage")
    if conv[0] is not nn.Conv2d:
        return Description(None, f"{conv[0].__name__} in the place of Conv2d")
    _, (kernel, stride, padding, dilation), groups, c_in, c_out, plain = conv
    if not plain or isinstance(padding, str):
        return Description(None, "a convolution with a bias, or with a padding other than a number of zeros")
    if groups == c_in == c_out and (groups > 1 or kernel != (1, 1)):
        kind = "depthwise"
    elif kernel == stride == (1, 1) and padding == (0, 0) and groups == 1:
        kind = "pointwise"
    else:
        return Description(None, "a convolution that is neither pointwise nor depthwise")
    if norm[0] is not nn.BatchNorm2d:
        return Description(None, f"{norm[0].__name__} in the place of BatchNorm2d")
    if act not in _ACTS:
        return Description(None, f"activation {act.__name__}")
    (ph, pw), (_, batch, affine, eps) = padding, norm
    fields = {"kernel": kernel, "stride": stride, "padding": (ph, ph, pw, pw), "dilation": dilation}
    fields |= {"norm": "batch" if batch else "running", "affine": affine, "eps": eps}
    return Description(stage_spec(kind, **fields, act=_ACTS[act], gate=gate))


_described = lru_cache(maxsize=4096)(_describe)


def append_tensors(unit: Unit, params: list[Tensor], running: list[Running]) -> None:
    """Appends a fusible unit's tensors to ``params``, and what a batch updates to ``running``."""
    conv, bn = unit.conv, unit.bn
    if conv is not None:
        params.append(conv._parameters["weight"])
        if bn.affine:
            params += (bn._parameters["weight"], bn._parameters["bias"])
        mean, var = bn._buffers["running_mean"], bn._buffers["running_var"]
        if not bn.training and mean is not None:
            params += (mean, var)
        elif bn.training and bn.track_running_stats:
            running.append(Running(mean, var, bn.momentum, bn._buffers["num_batches_tracked"]))
        else:
            running.append(Running())
    if unit.excitation is not None:
        fc1, _, fc2, _ = unit.excitation._modules.values()
        for fc in (fc1, fc2):
            params += (fc._parameters["weight"], fc._parameters["bias"])
