"""What a module's ordinary children say: which stage of a chain they are, or why they are none."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..chain import stage_spec
from ..functional import Running

#: Activation modules and the chain's names for them.
ACTS = {
    type(None): "identity",
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
}
#: Other libraries' layers that are known without importing them. Those of timm hold an activation, too.
_NORMS = {
    "torchvision.ops.misc.FrozenBatchNorm2d": "frozen",
    "timm.layers.norm_act.BatchNormAct2d": "batch",
    "timm.layers.norm_act.SyncBatchNormAct": "sync",
    "timm.layers.norm_act.FrozenBatchNormAct2d": "frozen",
}
_SAME_CONV = "timm.layers.conv2d_same.Conv2dSame"

#: A dense convolution of more channels is better done by PyTorch.
_MOST_STEM_CHANNELS = 4

Size = tuple[int, int]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def norm_kind(kind: type) -> str | None:
    """What a class normalises by: "batch" as nn.BatchNorm2d, "sync" as nn.SyncBatchNorm, "frozen" always by running
    statistics; None where it is no batch norm that a chain knows.
    """
    if kind is nn.BatchNorm2d:
        return "batch"
    return "sync" if kind is nn.SyncBatchNorm else _NORMS.get(_full_name(kind))


def is_same_conv(kind: type) -> bool:
    """Whether a convolution pads as TensorFlow does, so that n pixels become ceil(n / stride)."""
    return kind is not nn.Conv2d and _full_name(kind) == _SAME_CONV


class Unit(NamedTuple):
    """One stage as modules: a convolution, its batch norm, an activation (a module or its name in a chain), and the
    (fc, act, fc, gate) of a squeeze-excite behind it.

    Without convolution and batch norm it is a squeeze-excite alone.
    """

    conv: nn.Module | None
    bn: nn.Module | None
    act: nn.Module | str | None = None
    excitation: tuple[nn.Module | str, ...] | None = None


def stage_unit(layer: nn.Module) -> Unit:
    """The unit of a module that holds (convolution, batch norm[, activation]); of any other, one that does not fuse."""
    children = layer._modules.values()
    return Unit(*children) if len(children) in (2, 3) else Unit(layer, None)


class Description(NamedTuple):
    """A unit's stage as text, or why it cannot be one."""

    stage: str | None
    reason: str | None = None


def describe_stem(layer: nn.Module) -> Description:
    """The dense stage of a module that holds (convolution of few channels, batch norm[, activation])."""
    conv, bn, act = stage_unit(layer)[:3]
    if type(conv) is not nn.Conv2d or conv.in_channels > _MOST_STEM_CHANNELS or conv.groups > 1 or bn is None:
        return Description(None, "no stem")
    return _described(_conv_facts(conv, None), _norm_facts(bn), _act_fact(act), None, True)


def describe(unit: Unit, size: Size | None = None) -> Description:
    """Reads the modules as they are now; ``size`` is that of the maps, where a convolution's padding depends on it.

    The modules' facts are hashable, so that an eager call only looks them up; what is traced becomes a constant anyway.
    """
    describe_facts = _describe if torch.compiler.is_compiling() else _described
    return describe_facts(
        _conv_facts(unit.conv, size), _norm_facts(unit.bn), _act_fact(unit.act), _excitation_facts(unit.excitation)
    )


# The dictionaries of parameters and buffers are read directly: nn.Module's attribute look-up takes ten times as long.


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """A replica of nn.DataParallel has its parameters as ordinary attributes."""
    found = module._parameters.get(name)
    return getattr(module, name, None) if found is None and name not in module._parameters else found


def _conv_facts(conv: nn.Module | None, size: Size | None) -> tuple | None:
    kind = type(conv)
    if kind is not nn.Conv2d and not is_same_conv(kind):
        return None if conv is None else (kind,)
    padding = conv.padding if kind is nn.Conv2d else _same_padding(conv, size)
    window = conv.kernel_size, conv.stride, padding, conv.dilation
    plain = _parameter(conv, "bias") is None and conv.padding_mode == "zeros"
    return nn.Conv2d, window, conv.groups, conv.in_channels, conv.out_channels, plain


def _same_padding(conv: nn.Conv2d, size: Size | None) -> tuple[int, int, int, int]:
    """TensorFlow's: (top, bottom, left, right), the odd pixel at the end. Of an unknown size only that there is some
    matters.
    """
    pads: list[int] = []
    for n, k, s, d in zip(size or (1, 1), conv.kernel_size, conv.stride, conv.dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads += total // 2, total - total // 2
    return tuple(pads)


def _norm_facts(bn: nn.Module | None) -> tuple | None:
    kind = norm_kind(type(bn))
    if kind is None:
        return None if bn is None else (type(bn),)
    if kind == "frozen":
        return "running", None, True, bn.eps
    scaled, shifted = (_parameter(bn, name) is not None for name in ("weight", "bias"))
    affine = scaled if scaled == shifted else None
    # As nn.BatchNorm2d: batch statistics in training, and wherever there are no running ones.
    if not bn.training and bn._buffers.get("running_mean") is not None:
        return "running", None, affine, bn.eps
    return "batch", _group(bn) if kind == "sync" and bn.training else None, affine, bn.eps


def _group(bn: nn.SyncBatchNorm) -> str | None:
    """The name of the process group over which statistics are taken; None where it is this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else None


def _act_fact(act: nn.Module | str | None) -> type | str:
    return act if type(act) is str else type(act)


def _excitation_facts(excitation: tuple[nn.Module | str, ...] | None) -> tuple | None:
    if excitation is None:
        return None
    if len(excitation) != 4 or not all(_is_layer(fc) for fc in excitation[::2]):
        return ()
    return _act_fact(excitation[1]), _act_fact(excitation[3])


def _is_layer(fc: nn.Module | str) -> bool:
    """Whether it is a linear layer with a bias, over channels."""
    if type(fc) is nn.Conv2d:
        plain = fc.kernel_size == fc.stride == (1, 1) and fc.padding == (0, 0) and fc.groups == 1
        return plain and _parameter(fc, "bias") is not None
    return type(fc) is nn.Linear and _parameter(fc, "bias") is not None


def _describe(
    conv: tuple | None, norm: tuple | None, act: type | str, excitation: tuple | None, stem: bool = False
) -> Description:
    gate = None
    if excitation is not None:
        gate = tuple(_act_name(kind) for kind in excitation)
        if len(gate) != 2 or None in gate:
            return Description(None, "a squeeze-excite of other modules than Linear, activation, Linear, activation")
    if conv is None:
        return Description(stage_spec("none", gate=gate))
    if norm is None:
        return Description(None, f"{conv[0].__name__} in the place of a stage")
    if conv[0] is not nn.Conv2d:
        return Description(None, f"{conv[0].__name__} in the place of Conv2d")
    reason, kind = _conv_kind(conv, stem)
    if reason:
        return Description(None, reason)
    if len(norm) == 1:
        return Description(None, f"{norm[0].__name__} in the place of BatchNorm2d")
    if _act_name(act) is None:
        return Description(None, f"activation {getattr(act, '__name__', act)}")
    kernel, stride, padding, dilation = conv[1]
    ways, group, affine, eps = norm
    if affine is None:
        return Description(None, "a batch norm with a weight or a bias alone")
    padding = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    fields = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    fields |= {"norm": ways, "affine": affine, "eps": eps, "act": _act_name(act), "gate": gate}
    if group is not None:
        fields["group"] = group
    return Description(stage_spec(kind, **fields))


def _act_name(kind: type | str) -> str | None:
    return kind if type(kind) is str and kind in ACTS.values() else ACTS.get(kind)


def _conv_kind(conv: tuple, stem: bool) -> tuple[str | None, str | None]:
    """(why it is no stage's convolution, or what kind it is)."""
    _, (kernel, stride, padding, _), groups, c_in, c_out, plain = conv
    if not plain or isinstance(padding, str):
        return "a convolution with a bias, or with a padding other than a number of zeros", None
    if stem:
        return None, "dense"
    if groups == c_in == c_out and (groups > 1 or kernel != (1, 1)):
        return None, "depthwise"
    if kernel == stride == (1, 1) and not any(padding) and groups == 1:
        return None, "pointwise"
    return "a convolution that is neither pointwise nor depthwise", None


_described = lru_cache(maxsize=4096)(_describe)


def append_tensors(unit: Unit, params: list[Tensor], running: list[Running]) -> None:
    """Appends a fusible unit's tensors to ``params``, and what a batch updates to ``running``."""
    conv, bn = unit.conv, unit.bn
    if conv is not None:
        params.append(_parameter(conv, "weight"))
        _append_norm(bn, params, running)
    if unit.excitation is not None:
        for fc in unit.excitation[::2]:
            params += (_parameter(fc, "weight"), _parameter(fc, "bias"))


def _append_norm(bn: nn.Module, params: list[Tensor], running: list[Running]) -> None:
    if norm_kind(type(bn)) == "frozen":
        params += (bn._buffers[name] for name in ("weight", "bias", "running_mean", "running_var"))
        return
    if _parameter(bn, "weight") is not None:
        params += (_parameter(bn, "weight"), _parameter(bn, "bias"))
    mean, var = bn._buffers["running_mean"], bn._buffers["running_var"]
    if not bn.training and mean is not None:
        params += (mean, var)
    elif bn.training and bn.track_running_stats:
        running.append(Running(mean, var, bn.momentum, bn._buffers["num_batches_tracked"]))
    else:
        running.append(Running())
