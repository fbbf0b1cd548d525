"""1x1 convolutions as PyTorch's own products, between passes that store what is deferred and take sums and statistics.

A product in Triton that evaluates its operands on the way in saves these passes, which is worth more than anything
where layers are narrow: there memory is waited for. In wide layers the tensor cores are, and PyTorch's library keeps
them two to seven times as busy: :func:`config.library_forward` and :func:`config.library_backward` say where. Operands
and results are rounded where the Triton kernels round them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...chain import Gradient, Norm, Value
from ..reference import empty_channels_last
from . import elementwise


def is_deferred(u: Value) -> bool:
    """Whether the value is not what is stored."""
    return u.scale is not None or u.act != "identity" or u.gate is not None


def _stored(u: Value) -> Tensor:
    return elementwise.materialize(u, None) if is_deferred(u) else u.y


def _stored_gradient(g: Gradient) -> Tensor:
    """Its value, likewise; with what is 0 or 1 left out it is dv."""
    deferred = g.of.act != "identity" or g.of.gate is not None or g.a is not None or g.b is not None
    return elementwise.materialize_gradient(g, None) if deferred else g.dv


def _rows(t: Tensor) -> Tensor:
    """``[N, C, H, W]`` in channels-last order -> ``[N*H*W, C]``, the same memory."""
    n, c, h, w = t.shape
    return t.as_strided((n * h * w, c), (c, 1))


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    matrix = weight.detach().flatten(1)
    return matrix if matrix.dtype == dtype else matrix.to(dtype)


# Products write where they are told to: those that return a tensor would be cast where autocast is on.


def pointwise_forward(u: Value, weight: Tensor, statistics: bool, after: dict):
    """As :func:`convolutions.pointwise_forward`; the product is rounded before the epilogue, as stock's is."""
    x = _stored(u)
    n, _, h, w = x.shape
    y = empty_channels_last(x, (n, weight.shape[0], h, w))
    torch.mm(_rows(x), _matrix(weight, x.dtype).t(), out=_rows(y))
    if after["var"] is not None or after["OUT_ACT"] or after["residual"] is not None:
        elementwise.finish(y, after)
    return y, elementwise.statistics(y) if statistics else None


def pointwise_backward(
    g: Gradient, weight: Tensor, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool,
):  # fmt: skip
    """As :func:`convolutions.pointwise_backward`."""
    dy, du, sums, value, dweight = _stored_gradient(g), None, None, None, None
    if want_du:
        du = empty_channels_last(u.y, tuple(u.y.shape))
        matrix = _matrix(weight, dy.dtype)
        if residual is None:
            torch.mm(_rows(dy), matrix, out=_rows(du))
        else:
            torch.addmm(_rows(residual), _rows(dy), matrix, out=_rows(du))
        if want_sums and want_dweight and is_deferred(u):
            sums, value = elementwise.reduce_gradient_and_materialize(du, u, norm_of)
        elif want_sums:
            sums = elementwise.reduce_gradient(du, u, norm_of)
    if want_dweight:
        value = _stored(u) if value is None else value
        dweight = _float32_product(_rows(dy).t(), _rows(value)).view(weight.shape)
    return du, sums, dweight


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Not rounded to the operands' dtype, nor are the parts that a library splits a long sum into."""
    if a.dtype == torch.float32:
        out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
        return torch.mm(a, b, out=out)
    if a.is_cuda and not torch.version.hip:  # PyTorch has this product nowhere else
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
