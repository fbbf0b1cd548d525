"""The reference backend: every kernel in plain PyTorch, for any floating dtype and device. It is the oracle that the
others are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..chain import Chain, Gradient, Norm, Stage, Value, accumulate_dtype


def empty_channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised activation with exactly the strides that the operators' fake kernels promise."""
    n, c, h, w = shape  # by its strides in half the time of torch.empty with a memory format
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _stored(like: Tensor, result: Tensor) -> Tensor:
    return empty_channels_last(like, tuple(result.shape)).copy_(result)


def _over_channels(v: Tensor) -> Tensor:
    """[C] or [N, C] against [N, C, H, W]."""
    return v[..., None, None]


def _normalised(u: Value) -> Tensor:
    y = u.y.to(accumulate_dtype(u.y.dtype))
    return y if u.scale is None else _over_channels(u.scale) * y + _over_channels(u.shift)


def value(u: Value) -> Tensor:
    """The deferred value, in the accumulation dtype."""
    z = ACTIVATIONS[u.act].value(_normalised(u))
    return z if u.gate is None else z * _over_channels(u.gate)


def gradient(g: Gradient) -> Tensor:
    """The deferred gradient of a raw output, in the accumulation dtype."""
    h = g.dv.to(accumulate_dtype(g.dv.dtype))
    if g.of.gate is not None:
        h = h * _over_channels(g.of.gate) + _over_channels(g.q)
    dy = h * ACTIVATIONS[g.of.act].derivative(_normalised(g.of))
    if g.a is not None:
        dy = _over_channels(g.a) * dy
    if g.b is not None:
        dy = dy + _over_channels(g.b) * g.of.y.to(dy.dtype) + _over_channels(g.c)
    return dy


def gate_forward(pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]) -> Tensor:
    w1, b1, w2, b2 = _gate_parameters(pooled, p)
    hidden = F.linear(pooled, w1, b1)
    return ACTIVATIONS[acts[1]].value(F.linear(ACTIVATIONS[acts[0]].value(hidden), w2, b2))


def gate_backward(
    sums: Tensor, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]
) -> tuple[Tensor, dict[str, Tensor]]:
    # The two layers are recomputed: they are (N, C) small, and so nothing but `pooled` is saved for them.
    w1, b1, w2, b2 = _gate_parameters(pooled, p)
    hidden = F.linear(pooled, w1, b1)
    active = ACTIVATIONS[acts[0]].value(hidden)
    dlogits = sums[0] * ACTIVATIONS[acts[1]].derivative(F.linear(active, w2, b2))
    dhidden = (dlogits @ w2) * ACTIVATIONS[acts[0]].derivative(hidden)
    found = {"w1": dhidden.T @ pooled, "b1": dhidden.sum(0), "w2": dlogits.T @ active, "b2": dlogits.sum(0)}
    return dhidden @ w1, found


def _gate_parameters(pooled: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    w1, b1, w2, b2 = (p[name].to(pooled.dtype) for name in ("w1", "b1", "w2", "b2"))
    return w1.flatten(1), b1, w2.flatten(1), b2


def running_norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight * rstd
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.stack([scale, shift, mean, rstd])


def unbiased(var: Tensor, count: int) -> Tensor:
    return var * (count / (count - 1) if count > 1 else float("nan"))


def batch_norm(
    statistics: tuple[Tensor, Tensor], count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = statistics
    return running_norm(mean, var, weight, bias, eps), mean, unbiased(var, count)


def norm_backward(sums: Tensor, gate: Tensor | None, q: Tensor | None, norm: Tensor, count: int | None):
    if gate is None:
        # Copies: an operator's outputs may not share memory, and these are two halves of `sums`.
        dbias, dweight = (half.clone() for half in sums.unbind(0))
    else:
        _, t2, t3, t4, t5 = sums.unbind(0)
        dbias, dweight = (gate * t2 + q * t3).sum(0), (gate * t4 + q * t5).sum(0)
    if count is None:
        return dweight, dbias, None, None
    scale, _, mean, rstd = norm.unbind(0)
    b = -scale * rstd * (dweight / count)
    return dweight, dbias, b, -scale * (dbias / count) - b * mean


class ReferenceKernels:
    """:class:`mbn_kernels.chain.Kernels` in plain PyTorch."""

    evaluate_checks = False
    gate_forward = staticmethod(gate_forward)
    gate_backward = staticmethod(gate_backward)
    batch_norm = staticmethod(batch_norm)
    running_norm = staticmethod(running_norm)
    norm_backward = staticmethod(norm_backward)

    def prepared(self, *args: object) -> None:
        return None

    def evaluates(self, chain: Chain, residual: bool) -> bool:
        return False

    def pointwise_forward(self, u: Value, weight: Tensor, statistics: bool):
        v = value(u)
        return self._with_statistics(u.y, F.conv2d(v, weight.to(v.dtype)), statistics)

    def depthwise_forward(self, u: Value, weight: Tensor, stage: Stage, statistics: bool):
        v, channels = self._padded(value(u), stage), u.y.shape[1]
        weight = weight.to(v.dtype)
        if channels == 1:  # channels-last, oneDNN makes wrong numbers where a stride leaves one column
            v, weight = (t.clone(memory_format=torch.contiguous_format) for t in (v, weight))
        y = F.conv2d(v, weight, None, stage.stride, 0, stage.dilation, channels)
        return self._with_statistics(u.y, y, statistics)

    @staticmethod
    def _padded(v: Tensor, stage: Stage) -> Tensor:
        top, bottom, left, right = stage.padding
        return F.pad(v, (left, right, top, bottom))

    @staticmethod
    def _with_statistics(like: Tensor, result: Tensor, statistics: bool):
        y = _stored(like, result)
        return y, ReferenceKernels.statistics(y) if statistics else None  # those of the stored numbers

    @staticmethod
    def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.to(accumulate_dtype(y.dtype))
        mean = y.mean((0, 2, 3))
        y = y - _over_channels(mean)
        rest = y.mean((0, 2, 3))  # what the mean was rounded by; else a constant would have a variance
        return mean + rest, (y - _over_channels(rest)).square().mean((0, 2, 3))  # of no values NaN, without a warning

    def pool(self, u: Value) -> Tensor:
        return value(u).mean((2, 3))

    def materialize(self, u: Value, residual: Tensor | None) -> Tensor:
        v = value(u)
        return _stored(u.y, v if residual is None else v + residual)

    def materialize_gradient(self, g: Gradient, residual: Tensor | None) -> Tensor:
        dy = gradient(g)
        return _stored(g.dv, dy if residual is None else dy + residual)

    def reduce_gradient(self, dv: Tensor, u: Value, norm: Norm | None) -> Tensor:
        n = _normalised(u)
        act = ACTIVATIONS[u.act]
        dv, d, x = dv.to(n.dtype), act.derivative(n), u.y.to(n.dtype)
        if norm is not None:
            x = (x - _over_channels(norm.mean)) * _over_channels(norm.rstd)
        if u.gate is None:
            return torch.stack([(dv * d).sum((0, 2, 3)), (dv * d * x).sum((0, 2, 3))])
        return torch.stack([t.sum((2, 3)) for t in (dv * act.value(n), dv * d, d, dv * d * x, d * x)])

    def pointwise_backward(self, g, weight, u, norm, residual, want_du, want_sums, want_dweight):
        dy, w, v = gradient(g), weight.to(accumulate_dtype(weight.dtype)), value(u)
        du = torch.einsum("nohw,oc->nchw", dy, w.flatten(1)) if want_du else None
        # As stock sums: a product over all pixels adds them one by one, and rounds as often.
        dweight = torch.nn.grad.conv2d_weight(v, weight.shape, dy) if want_dweight else None
        return self._backward(u, norm, residual, du, want_sums, dweight)

    def depthwise_backward(self, g, weight, stage, u, norm, residual, want_du, want_sums, want_dweight):
        dy, w, v = gradient(g), weight.to(accumulate_dtype(weight.dtype)), self._padded(value(u), stage)
        groups, (top, _, left, _) = v.shape[1], stage.padding
        du = dweight = None
        if want_du:
            padded = torch.nn.grad.conv2d_input(v.shape, w, dy, stage.stride, 0, stage.dilation, groups)
            du = padded[:, :, top : top + u.y.shape[2], left : left + u.y.shape[3]]
        if want_dweight:
            dweight = torch.nn.grad.conv2d_weight(v, w.shape, dy, stage.stride, 0, stage.dilation, groups)
        return self._backward(u, norm, residual, du, want_sums, dweight)

    def _backward(self, u, norm, residual, du, want_sums, dweight):
        if du is not None:
            du = _stored(u.y, du if residual is None else du + residual)
        return du, self.reduce_gradient(du, u, norm) if want_sums else None, dweight
