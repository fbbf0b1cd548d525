"""What every Triton kernel computes on a tile in registers: activations, deferred values and gradients, products,
merged statistics.

Tiles are ``[rows, channels]`` in float32. A pointer that is None is an argument that is not there; what depends on it
is left out of the compiled kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import triton
import triton.language as tl

from ...activations import ACTIVATIONS

#: Whether Triton's interpreter runs the kernels, on the CPU: decided by TRITON_INTERPRET before they are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_INTERPRETED = tl.constexpr(INTERPRETED)

RELU, RELU6, HARDSWISH, SILU, HARDSIGMOID, SIGMOID = (
    tl.constexpr(ACTIVATIONS[name].code) for name in ("relu", "relu6", "hardswish", "silu", "hardsigmoid", "sigmoid")
)
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # min and max that pass NaN through, one instruction as the others


#: Arguments whose value changes nothing but how long a loop is: a kernel is not compiled anew where they are 1 or 16.
_SIZES = (
    "images", "pixels", "parts", "run", "span", "tiles", "units", "in_units", "out_units", "H", "W", "OH", "OW",
    "phases", "strips", "strip", "column_blocks", "top", "left", "channels", "rows", "size",
)  # fmt: skip


def kernel(fn: Callable) -> triton.runtime.KernelInterface:
    """A function that programs of a grid run, compiled for the types of its arguments and for its constants."""
    return triton.jit(fn, do_not_specialize=_SIZES)


@triton.jit
def _clamp(n, low, high):
    return tl.minimum(tl.maximum(n, low, propagate_nan=_NAN), high, propagate_nan=_NAN)


@triton.jit
def _logistic(n):
    return 1.0 / (1.0 + tl.exp(-n))


@triton.jit
def _hard_logistic(n):
    return _clamp(n + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def activate(n, ACT: tl.constexpr):
    """The activation of that code in :mod:`mbn_kernels.activations`."""
    if ACT == RELU:
        n = tl.maximum(n, 0.0, propagate_nan=_NAN)
    elif ACT == RELU6:
        n = _clamp(n, 0.0, 6.0)
    elif ACT == HARDSWISH:
        n = n * _hard_logistic(n)
    elif ACT == SILU:
        n = n * _logistic(n)
    elif ACT == HARDSIGMOID:
        n = _hard_logistic(n)
    elif ACT == SIGMOID:
        n = _logistic(n)
    return n


@triton.jit
def activate_grad(n, ACT: tl.constexpr):
    """Its derivative; at a kink the subgradient that PyTorch gives."""
    d = tl.full(n.shape, 1.0, tl.float32)
    if ACT == RELU:
        d = tl.where(n <= 0.0, 0.0, 1.0)
    elif ACT == RELU6:
        d = tl.where((n <= 0.0) | (n >= 6.0), 0.0, 1.0)
    elif ACT == HARDSWISH:
        d = tl.where(n <= -3.0, 0.0, tl.where(n >= 3.0, 1.0, n * (1.0 / 3.0) + 0.5))
    elif ACT == SILU:
        s = _logistic(n)
        d = s * (1.0 + n * (1.0 - s))
    elif ACT == HARDSIGMOID:
        d = tl.where((n > -3.0) & (n < 3.0), 1.0 / 6.0, 0.0)
    elif ACT == SIGMOID:
        s = _logistic(n)
        d = s * (1.0 - s)
    return d


@triton.jit
def vector(pointer, offset, mask):
    """Per-channel numbers in float32, 0 where the mask is off; None where the pointer is.

    To be assigned alone: Triton 3.6 makes no tuple of None.
    """
    v = None
    if pointer is not None:
        v = tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def normalised(y, scale, shift):
    n = y.to(tl.float32)
    if scale is not None:
        n = n * scale[None, :] + shift[None, :]
    return n


@triton.jit
def value(y, scale, shift, gate, ACT: tl.constexpr):
    """:class:`mbn_kernels.chain.Value` of a tile."""
    v = activate(normalised(y, scale, shift), ACT)
    if gate is not None:
        v = v * gate[None, :]
    return v


@triton.jit
def gradient(dv, y, scale, shift, gate, q, a, b, c, ACT: tl.constexpr):
    """:class:`mbn_kernels.chain.Gradient` of a tile."""
    h = dv.to(tl.float32)
    if gate is not None:
        h = h * gate[None, :] + q[None, :]
    if y is not None:
        h = h * activate_grad(normalised(y, scale, shift), ACT)
    if a is not None:
        h = a[None, :] * h
    if b is not None:
        h = h + (b[None, :] * y.to(tl.float32) + c[None, :])
    return h


@triton.jit
def _tf32(x):
    """Rounded to the nearest TF32 number, as PyTorch's products have it; without it the tensor cores cut digits off."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, total, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, on operands rounded to the storage dtype."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if PRECISION == "tf32" and not _INTERPRETED:
        a, b = _tf32(a), _tf32(b)
    if _INTERPRETED:  # its product would multiply the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def merge(count, mean, m2, count_b, mean_b, m2_b):
    """(count, mean, sum of squared deviations) of two sets of numbers, from each one's (Chan, Golub, LeVeque 1983)."""
    total = count + count_b
    part = tl.where(total > 0, count_b / tl.maximum(total, 1.0), 0.0)
    delta = mean_b - mean
    return total, mean + delta * part, m2 + m2_b + delta * delta * (count * part)


@triton.jit
def sum_terms(dv, y, scale, shift, mean, rstd, mask, ACT: tl.constexpr):
    """What the five sums of a stage add up over a tile (docs/design.md, "Backward"), 0 outside of the mask, where dv is
    0 already. Those that are not used are not computed.
    """
    n = normalised(y, scale, shift)
    d = tl.where(mask, activate_grad(n, ACT), 0.0)
    x = y
    if mean is not None:
        x = (y - mean[None, :]) * rstd[None, :]
    return dv * activate(n, ACT), dv * d, d, dv * d * x, d * x


@triton.jit
def store_two_sums(to, channels, keep, t2, t4):
    """The sums of a stage without a gate, a row each."""
    tl.store(to, t2, mask=keep)
    tl.store(to + channels, t4, mask=keep)


@triton.jit
def folded_norm(mean, var, weight, bias, c, keep, eps):
    """Batch norm's scale and shift from running statistics."""
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + c, mask=keep, other=1.0).to(tl.float32) + eps))
    if weight is not None:
        scale *= vector(weight, c, keep)
    shift = -vector(mean, c, keep) * scale
    if bias is not None:
        shift += vector(bias, c, keep)
    return scale, shift


@triton.jit
def store_sums(to, channels, keep, t1, t2, t3, t4, t5):
    """The five sums of a gated stage, a row each."""
    tl.store(to, t1, mask=keep)
    tl.store(to + channels, t2, mask=keep)
    tl.store(to + 2 * channels, t3, mask=keep)
    tl.store(to + 3 * channels, t4, mask=keep)
    tl.store(to + 4 * channels, t5, mask=keep)


@triton.jit
def store_moments(moments, counts, group, block, c, channels, keep, pivot, mean, m2, count):
    """A part of :class:`norm.Statistics`; the count by the first block of channels."""
    to = moments + group.to(tl.int64) * 3 * channels + c
    tl.store(to, pivot, mask=keep)
    tl.store(to + channels, mean, mask=keep)
    tl.store(to + 2 * channels, m2, mask=keep)
    tl.store(counts + group, count, mask=block == 0)


@triton.jit
def place(blocks, parts, span):
    """What this program is for: (block of channels, group, the group's first image, its part of each image). Blocks of
    the same rows are neighbours, so that they share them in the second-level cache.
    """
    program = tl.program_id(0)
    group = program // blocks
    return program % blocks, group, group // parts * span, group % parts


@triton.jit
def tile_rows(t, first_image, part, run, pixels, ROWS: tl.constexpr):
    """Tile t of a group (:class:`launch.Groups`): its image, its first row in the tensor, how many rows it has; 64 bits
    where a tensor's size may need them.
    """
    image = (first_image + t // run).to(tl.int64)
    first = (part.to(tl.int64) * run + t % run) * ROWS
    return image, image * pixels + first, tl.maximum(tl.minimum(pixels - first, ROWS), 0).to(tl.int32)
