"""A stage's dense convolution, as in a stem: PyTorch's own, as of few channels a library makes the best of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .chain import Gradient, Kernels, Stage, Value

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


def convolve(kernels: Kernels, u: Value, weight: Tensor, stage: Stage) -> Tensor:
    x, padding = _padded(kernels, u, stage)
    if x.shape[1] == 1 and stage.output_shape(u.y.shape, weight.shape)[3] == 1:
        # Of one channels-last channel oneDNN makes wrong numbers where a stride leaves one column.
        x, weight = _contiguous(x), _contiguous(weight)
    return _channels_last(_CONVOLUTION(x, weight, None, stage.stride, padding, stage.dilation, False, (0, 0), 1))


def backward(
    kernels: Kernels, g: Gradient, weight, stage: Stage, u: Value, norm, residual, want_du, want_sums, want_dweight
):
    """As the backward kernels of :class:`mbn_kernels.chain.Kernels`."""
    if not (want_du or want_dweight):
        return None, None, None
    dy = _channels_last(kernels.materialize_gradient(g, None))
    x, padding = _padded(kernels, u, stage)
    if x.dtype == torch.bfloat16 and (x.shape[3] <= stage.stride[1] or max(stage.dilation) > 1):
        # Channels-last, oneDNN leaves numbers of the weight's gradient unwritten, or makes wrong ones of the input's.
        x, dy, weight = _contiguous(x), _contiguous(dy), _contiguous(weight)
    window, wants = (stage.stride, padding, stage.dilation, False, (0, 0), 1), (want_du, want_dweight, False)
    du, dweight, _ = _CONVOLUTION_BACKWARD(dy, x, weight, None, *window, wants)
    if want_du:
        if x.shape != u.y.shape:
            du = du[:, :, stage.padding[0] :, stage.padding[2] :][:, :, : u.y.shape[2], : u.y.shape[3]]
        du = _channels_last(du if residual is None else du + residual)
    return du, kernels.reduce_gradient(du, u, norm) if want_sums else None, dweight


def _padded(kernels: Kernels, u: Value, stage: Stage) -> tuple[Tensor, tuple[int, int]]:
    """(the value as a convolution takes it in, the padding left for the convolution): it knows no uneven one."""
    deferred = u.scale is not None or u.act != "identity" or u.gate is not None
    x = _channels_last(kernels.materialize(u, None) if deferred else u.y)
    top, bottom, left, right = stage.padding
    if (top, left) == (bottom, right):
        return x, (top, left)
    return torch.nn.functional.pad(x, (left, right, top, bottom)), (0, 0)


def _contiguous(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _channels_last(t: Tensor) -> Tensor:
    """With the very strides of fresh memory, also where a size is 1: a library reads the layout off them."""
    _, c, h, w = t.shape
    return t.contiguous(memory_format=torch.channels_last).as_strided(t.shape, (h * w * c, 1, w * c, c))
