"""1x1 convolutions as products of ``[pixels, channels]`` matrices, deferred on the way in, reduced on the way out.

A program takes ``run`` tiles of ROWS pixels of one image (of all images where nothing depends on the image) and one
block of channels. Programs that read the same rows are neighbours in the grid, so that memory is read once and the
others find the rows in the second-level cache. OUT is the layer's output width, IN its input width, DTYPE that in which
operands are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    activate,
    folded_norm,
    gradient,
    kernel,
    merge,
    place,
    product,
    store_moments,
    store_sums,
    store_two_sums,
    sum_terms,
    tile_rows,
    value,
    vector,
)


@triton.jit
def _operand(x, scale, shift, gate, start, channels, rows, r, k, per_image, ACT: tl.constexpr):
    """A tile of deferred values; columns past the last channel are finite, and meet zero weights."""
    keep = k < channels
    at = r[:, None] * channels + k[None, :]
    y = tl.load(x + start + at, mask=(r < rows)[:, None] & keep[None, :], other=0.0)
    g = vector(gate, per_image + k, keep)
    return value(y, vector(scale, k, keep), vector(shift, k, keep), g, ACT)


@triton.jit
def _output_gradient(
    g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c, start, channels, rows, r, n, per_image,
    G_ACT: tl.constexpr,
):  # fmt: skip
    """A tile of the deferred gradient, 0 outside of the tensor."""
    keep = n < channels
    at = r[:, None] * channels + n[None, :]
    mask = (r < rows)[:, None] & keep[None, :]
    dv = tl.load(g_dv + start + at, mask=mask, other=0.0)
    y = None
    if g_y is not None:
        y = tl.load(g_y + start + at, mask=mask, other=0.0)
    dy = gradient(
        dv, y, vector(g_scale, n, keep), vector(g_shift, n, keep), vector(g_gate, per_image + n, keep),
        vector(g_q, per_image + n, keep), vector(g_a, n, keep), vector(g_b, n, keep), vector(g_c, n, keep), G_ACT,
    )  # fmt: skip
    return tl.where(mask, dy, 0.0)


@triton.jit
def _weight_tile(weight, n, k, OUT, IN, DTYPE: tl.constexpr):
    """weight[n, k] as a tile whose rows are k or n, whichever of the two index tiles is a column."""
    return tl.load(weight + n * IN + k, mask=(n < OUT) & (k < IN), other=0.0).to(DTYPE)


@kernel
def pointwise_forward(
    x, scale, shift, gate, weight, y, counts, moments,
    mean, var, bn_weight, bias, residual,
    images, pixels, parts, run, span, in_units, out_units, eps,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACT: tl.constexpr, OUT_ACT: tl.constexpr,
    ROWS: tl.constexpr, IN_BLOCK: tl.constexpr, OUT_BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = value(u) weight^T. In training (``moments``) with its statistics; in evaluation (``var`` or ``bias``)
    normalised, activated and added to the residual.
    """
    IN, OUT = in_units * IN_UNIT, out_units * OUT_UNIT
    block, group, first_image, part = place(tl.cdiv(OUT, OUT_BLOCK), parts, span)
    r, n = tl.arange(0, ROWS), block * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    k0 = tl.arange(0, IN_BLOCK)
    keep = n < OUT

    out_scale = None
    out_shift = None
    if var is not None:
        out_scale, out_shift = folded_norm(mean, var, bn_weight, bias, n, keep, eps)
    elif bias is not None:
        out_shift = vector(bias, n, keep)
    if ONE_BLOCK:  # the whole weight stays in registers or shared memory
        w = _weight_tile(weight, n[None, :], k0[:, None], OUT, IN, DTYPE)
    count = 0.0
    pivot = tl.zeros((OUT_BLOCK,), tl.float32)  # the first tile's mean: statistics are taken of what differs from it
    means, m2 = tl.zeros((OUT_BLOCK,), tl.float32), tl.zeros((OUT_BLOCK,), tl.float32)

    for t in tl.range(0, tl.minimum(span, images - first_image) * run, num_stages=STAGES):
        image, start, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        total = tl.zeros((ROWS, OUT_BLOCK), tl.float32)
        if ONE_BLOCK:
            v = _operand(x, scale, shift, gate, start * IN, IN, rows, r, k0, image * IN, ACT)
            total = product(v, w, total, DTYPE, PRECISION)
        else:
            for k_first in tl.range(0, IN, IN_BLOCK, num_stages=STAGES):
                k = k_first + k0
                v = _operand(x, scale, shift, gate, start * IN, IN, rows, r, k, image * IN, ACT)
                w = _weight_tile(weight, n[None, :], k[:, None], OUT, IN, DTYPE)
                total = product(v, w, total, DTYPE, PRECISION)
        if out_scale is not None:
            total *= out_scale[None, :]
        if out_shift is not None:
            total += out_shift[None, :]
        total = activate(total, OUT_ACT)
        mask = (r < rows)[:, None] & keep[None, :]
        at = r[:, None] * OUT + n[None, :]
        if residual is not None:
            total += tl.load(residual + start * OUT + at, mask=mask, other=0.0).to(tl.float32)
        stored = total.to(y.dtype.element_ty)
        tl.store(y + start * OUT + at, stored, mask=mask)
        if moments is not None:
            kept = stored.to(tl.float32)
            valid = rows.to(tl.float32)
            share = 1.0 / tl.maximum(valid, 1.0)
            if t == 0:
                pivot = tl.sum(tl.where(mask, kept, 0.0), 0) * share
            off = tl.where(mask, kept - pivot[None, :], 0.0)
            tile_mean = tl.sum(off, 0) * share
            off = tl.where(mask, off - tile_mean[None, :], 0.0)
            count, means, m2 = merge(count, means, m2, valid, tile_mean, tl.sum(off * off, 0))
    if moments is not None:
        store_moments(moments, counts, group, block, n, OUT, keep, pivot, means, m2, count)


@kernel
def pointwise_backward(
    g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c,
    x, scale, shift, gate, mean, rstd, weight, residual, du, sums, dweight,
    images, pixels, parts, run, span, in_units, out_units,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACT: tl.constexpr, G_ACT: tl.constexpr,
    ROWS: tl.constexpr, IN_BLOCK: tl.constexpr, OUT_BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du = dy weight (+ residual), the sums of the stage before at du, and, where one block holds the output channels,
    a part of dweight: everything from one reading of dy and u.
    """
    IN, OUT = in_units * IN_UNIT, out_units * OUT_UNIT
    block, group, first_image, part = place(tl.cdiv(IN, IN_BLOCK), parts, span)
    r, k = tl.arange(0, ROWS), block * IN_BLOCK + tl.arange(0, IN_BLOCK)
    n0 = tl.arange(0, OUT_BLOCK)
    keep = k < IN
    zero = tl.zeros((IN_BLOCK,), tl.float32)
    t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    if ONE_BLOCK:
        w = _weight_tile(weight, n0[:, None], k[None, :], OUT, IN, DTYPE)
    if dweight is not None:
        dw = tl.zeros((OUT_BLOCK, IN_BLOCK), tl.float32)

    for t in tl.range(0, tl.minimum(span, images - first_image) * run, num_stages=STAGES):
        image, start, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        mask = (r < rows)[:, None] & keep[None, :]
        at = r[:, None] * IN + k[None, :]
        # Per-channel numbers are loaded for each tile anew: kept, they would take the registers of the tile itself.
        if sums is not None or dweight is not None:
            u = tl.load(x + start * IN + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, IN_BLOCK), tl.float32)
        if ONE_BLOCK:
            dy = _output_gradient(
                g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c, start * OUT, OUT, rows, r, n0,
                image * OUT, G_ACT,
            )  # fmt: skip
            total = product(dy, w, total, DTYPE, PRECISION)
            if dweight is not None:
                u_gate = vector(gate, image * IN + k, keep)
                v = value(u, vector(scale, k, keep), vector(shift, k, keep), u_gate, ACT)
                dw = product(tl.trans(dy), v, dw, DTYPE, PRECISION)
        else:
            for n_first in tl.range(0, OUT, OUT_BLOCK, num_stages=STAGES):
                n = n_first + n0
                dy = _output_gradient(
                    g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c, start * OUT, OUT, rows, r, n,
                    image * OUT, G_ACT,
                )  # fmt: skip
                w = _weight_tile(weight, n[:, None], k[None, :], OUT, IN, DTYPE)
                total = product(dy, w, total, DTYPE, PRECISION)
        if residual is not None:
            # Else the compiler begins the sum at the residual, to whose size every term is then rounded.
            if ONE_BLOCK and residual.dtype.element_ty == tl.float32 and PRECISION == "ieee":
                total = tl.where(mask, total, 0.0)
            total += tl.load(residual + start * IN + at, mask=mask, other=0.0).to(tl.float32)
        stored = total.to(du.dtype.element_ty)
        tl.store(du + start * IN + at, stored, mask=mask)
        if sums is not None:
            kept = stored.to(tl.float32)
            s1, s2, s3, s4, s5 = sum_terms(
                kept, u, vector(scale, k, keep), vector(shift, k, keep), vector(mean, k, keep), vector(rstd, k, keep),
                mask, ACT,
            )  # fmt: skip
            t2 += tl.sum(s2, 0)
            t4 += tl.sum(s4, 0)
            if gate is not None:
                t1 += tl.sum(s1, 0)
                t3 += tl.sum(s3, 0)
                t5 += tl.sum(s5, 0)
                if t % run == run - 1:
                    store_sums(sums + (image * parts + part) * 5 * IN + k, IN, keep, t1, t2, t3, t4, t5)
                    t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    if sums is not None and gate is None:
        to = sums + group.to(tl.int64) * 2 * IN + k
        store_two_sums(to, IN, keep, t2, t4)
    if dweight is not None:
        to = dweight + group.to(tl.int64) * OUT * IN + n0[:, None] * IN + k[None, :]
        tl.store(to, dw, mask=(n0 < OUT)[:, None] & keep[None, :])


@kernel
def pointwise_weight(
    g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c,
    x, scale, shift, gate, dweight, dbias,
    images, pixels, parts, run, span, in_units, out_units,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACT: tl.constexpr, G_ACT: tl.constexpr,
    ROWS: tl.constexpr, IN_BLOCK: tl.constexpr, OUT_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of dweight = dy^T value(u): the sum over the group's pixels, for one block of both widths; of a layer with
    a bias that of dbias, too.
    """
    IN, OUT = in_units * IN_UNIT, out_units * OUT_UNIT
    in_blocks = tl.cdiv(IN, IN_BLOCK)
    block, group, first_image, part = place(in_blocks * tl.cdiv(OUT, OUT_BLOCK), parts, span)
    k = block % in_blocks * IN_BLOCK + tl.arange(0, IN_BLOCK)
    n = block // in_blocks * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    r = tl.arange(0, ROWS)
    dw = tl.zeros((OUT_BLOCK, IN_BLOCK), tl.float32)
    db = tl.zeros((OUT_BLOCK,), tl.float32)
    for t in tl.range(0, tl.minimum(span, images - first_image) * run, num_stages=STAGES):
        image, start, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        dy = _output_gradient(
            g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c, start * OUT, OUT, rows, r, n,
            image * OUT, G_ACT,
        )  # fmt: skip
        if dbias is not None:
            db += tl.sum(dy, 0)
        v = _operand(x, scale, shift, gate, start * IN, IN, rows, r, k, image * IN, ACT)
        dw = product(tl.trans(dy), v, dw, DTYPE, PRECISION)
    to = dweight + group.to(tl.int64) * OUT * IN + n[:, None] * IN + k[None, :]
    tl.store(to, dw, mask=(n < OUT)[:, None] & (k < IN)[None, :])
    if dbias is not None:
        tl.store(dbias + group.to(tl.int64) * OUT + n, db, mask=n < tl.where(block % in_blocks == 0, OUT, 0))
