"""Depthwise convolutions: a tile of columns and channels slides down the rows of an image.

Rows are loaded once by a program and used by every output row that they reach, from a ring of accumulators in
registers; within a row the window's columns come from the first-level cache. A *unit* is a strip of one image: COLUMNS
output columns and ``strip`` steps of rows. With a dilation of D rows and a stride of S, output rows that are D/gcd(D,
S) apart share input rows, so an image falls into ``phases`` = D/gcd(D, S) interleaved ones of stride STEP = S/gcd(D,
S), with input rows D apart: row DH*(STEP*q + i) + phase*SH - top, for step q and window row i, of output row phase +
phases*q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    SILU,
    activate,
    folded_norm,
    gradient,
    kernel,
    merge,
    place,
    store_moments,
    store_sums,
    store_two_sums,
    sum_terms,
    value,
    vector,
)


@triton.jit
def _unit(t, first_image, part, run, pixels, phases, strips, column_blocks, ALL: tl.constexpr):
    """Unit t of a group (:class:`launch.Groups`, whose "pixels" are units): (image, phase, strip, block of columns,
    whether there is such a unit). ALL: the units of all images are one row of them.
    """
    u = part * run + t % run
    live = u < pixels
    image = first_image + t // run
    within = u
    if ALL:
        per_image = phases * strips * column_blocks
        image, within = u // per_image, u % per_image
    of_strip = within // column_blocks
    return image.to(tl.int64), of_strip % phases, of_strip // phases, within % column_blocks, live


@triton.jit
def _window(weight, c, keep, KH: tl.constexpr, KW: tl.constexpr):
    """The window's weights, a vector of channels each."""
    w = ()
    for tap in tl.static_range(KH * KW):
        w = w + (vector(weight, c * (KH * KW) + tap, keep),)
    return w


@triton.jit
def _tap(total, w, v, ROW: tl.constexpr, COLUMN: tl.constexpr, KW: tl.constexpr):
    """Adds what an input row, seen through window row ROW (none if negative), gives by a window column."""
    if ROW >= 0:
        total += w[ROW * KW + COLUMN][None, :] * v
    return total


@triton.jit
def _rows_ahead(
    x, start, q, wanted, H, W, C, row_of, columns, c, keep,
    KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, STEP: tl.constexpr, NEW: tl.constexpr, KH: tl.constexpr,
):  # fmt: skip
    """The raw tiles that step q brings: window rows NEW to KH, each at every window column; 0 where not ``wanted``."""
    tiles = ()
    for i in tl.static_range(NEW, KH):
        h = DH * (STEP * q + i) + row_of
        wide = tl.where((h >= 0) & (h < H) & wanted, W, 0)  # a row outside of the image has no columns
        row = start + h.to(tl.int64) * W * C
        for j in tl.static_range(KW):
            at = columns + j * DW
            mask = ((at >= 0) & (at < wide))[:, None] & keep[None, :]
            tiles = tiles + (tl.load(x + row + at[:, None] * C + c[None, :], mask=mask, other=0.0),)
    return tiles


@kernel
def depthwise_forward(
    x, scale, shift, gate, weight, y, counts, moments,
    mean, var, bn_weight, bias, residual, pooled,
    images, pixels, H, W, OH, OW, units, parts, run, span, phases, strips, strip, column_blocks, top, left, eps, factor,
    UNIT: tl.constexpr, ALL: tl.constexpr, ACT: tl.constexpr, OUT_ACT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    STEP: tl.constexpr, RING: tl.constexpr, NEW: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = the depthwise convolution of value(u). In training (``moments``) with its statistics; in evaluation (``var``)
    normalised, activated, added to the residual and, for squeeze-excite, pooled.
    """
    C = units * UNIT
    DTYPE: tl.constexpr = y.dtype.element_ty
    block, group, first_image, part = place(tl.cdiv(C, CHANNELS), parts, span)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < C
    columns = tl.arange(0, COLUMNS)
    u_scale = vector(scale, c, keep)
    u_shift = vector(shift, c, keep)
    w = _window(weight, c, keep, KH, KW)
    out_scale = None
    out_shift = None
    if var is not None:
        out_scale, out_shift = folded_norm(mean, var, bn_weight, bias, c, keep, eps)
    count = 0.0
    pivot = tl.zeros((CHANNELS,), tl.float32)  # the first unit's: statistics are taken of what differs from it
    means, m2 = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    squeezed = zero

    for t in range(tl.minimum(span, images - first_image) * run):
        image, phase, strip_of, column_block, live = _unit(
            t, first_image, part, run, pixels, phases, strips, column_blocks, ALL
        )
        u_gate = vector(gate, image * C + c, keep)
        column = column_block * COLUMNS + columns
        some = column < tl.where(live, OW, 0)
        some_mask = some[:, None] & keep[None, :]
        from_column, row_of = column * SW - left, phase * SH - top
        rows_done, base, row_mean, row_m2 = 0.0, zero, zero, zero
        ring = ()
        for a in tl.static_range(RING):
            ring = ring + (zero,)
        start, end = image * H * W * C, (strip_of + 1) * strip
        begin = strip_of * strip - (RING - 1)
        ahead = _rows_ahead(
            x, start, begin, live, H, W, C, row_of, from_column, c, keep, KW, DH, DW, STEP, NEW, KH
        )  # fmt: skip
        for q in range(begin, end):
            tiles = ahead  # loaded a step before, so that memory is never waited for
            ahead = _rows_ahead(
                x, start, q + 1, live & (q + 1 < end), H, W, C, row_of, from_column, c, keep, KW, DH, DW, STEP, NEW, KH
            )  # fmt: skip
            for i in tl.static_range(NEW, KH):
                h = DH * (STEP * q + i) + row_of
                wide = tl.where((h >= 0) & (h < H), W, 0)
                for j in tl.static_range(KW):
                    v = value(tiles[(i - NEW) * KW + j], u_scale, u_shift, u_gate, ACT)
                    if scale is not None or ACT > SILU:  # else padding is 0 as it is
                        at = from_column + j * DW
                        v = tl.where(((at >= 0) & (at < wide))[:, None], v, 0.0)
                    after = ()
                    for a in tl.static_range(RING):
                        after = after + (_tap(ring[a], w, v, i - a * STEP, j, KW),)
                    ring = after
            total = ring[0]
            moved = ()
            for a in tl.static_range(1, RING):
                moved = moved + (ring[a],)
            ring = moved + (zero,)
            r = phase + phases * q
            emit = (q >= strip_of * strip) & (r < OH)
            mask = (column < tl.where(emit & live, OW, 0))[:, None] & keep[None, :]
            row = (image * OH + r) * OW * C
            at = column[:, None] * C + c[None, :]
            if out_scale is not None:
                total = total * out_scale[None, :] + out_shift[None, :]
            total = activate(total, OUT_ACT)
            if residual is not None:
                total += tl.load(residual + row + at, mask=mask, other=0.0).to(tl.float32)
            stored = total.to(DTYPE)
            tl.store(y + row + at, stored, mask=mask)
            kept = stored.to(tl.float32)
            if moments is not None:  # Welford's update, for each column alone, of what differs from its first row
                rows_done += emit.to(tl.float32)
                base = tl.where(emit & (rows_done <= 1.0), tl.where(mask, kept, 0.0), base)
                delta = tl.where(mask, kept - base - row_mean, 0.0)
                share = 1.0 / tl.maximum(rows_done, 1.0)
                row_mean += delta * share
                row_m2 += delta * delta * (1.0 - share)
            if pooled is not None:
                squeezed += tl.where(mask, kept, 0.0)
        if moments is not None:
            valid = tl.sum(some.to(tl.float32), 0)
            share = 1.0 / tl.maximum(valid, 1.0)
            if t == 0:
                pivot = tl.sum(base, 0) * share
            off = tl.where(some_mask, base - pivot[None, :] + row_mean, 0.0)
            unit_mean = tl.sum(off, 0) * share
            off = tl.where(some_mask, off - unit_mean[None, :], 0.0)
            unit_m2 = tl.sum(row_m2 + rows_done * off * off, 0)
            count, means, m2 = merge(count, means, m2, valid * rows_done, unit_mean, unit_m2)
        if pooled is not None and t % run == run - 1:
            to = pooled + (image * parts + part) * C + c
            tl.store(to, tl.sum(squeezed, 0) * factor, mask=keep)
            squeezed = zero
    if moments is not None:
        store_moments(moments, counts, group, block, c, C, keep, pivot, means, m2, count)


@triton.jit
def _output_rows_ahead(
    g_dv, g_y, start, r, wanted, OH, OW, C, column, c, keep, OFFSETS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Row r of dv and y at every column offset, raw; 0 where not ``wanted``."""
    wide = tl.where((r >= 0) & (r < OH) & wanted, OW, 0)
    row = start + r.to(tl.int64) * OW * C
    dvs, ys = (), ()
    for p in tl.static_range(COUNT):
        at = column + OFFSETS[p]
        mask = ((at >= 0) & (at < wide))[:, None] & keep[None, :]
        offset = row + at[:, None] * C + c[None, :]
        dv = tl.load(g_dv + offset, mask=mask, other=0.0)
        dvs = dvs + (dv,)
        y = dv  # where y is not given, the gradient does not depend on it
        if g_y is not None:
            y = tl.load(g_y + offset, mask=mask, other=0.0)
        ys = ys + (y,)
    return dvs, ys


@triton.jit
def _reached(
    total, w, dy, ROW: tl.constexpr, REACH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DW: tl.constexpr
):  # fmt: skip
    """Adds what dy gives to the input row of window row ROW, if a window column is REACH = column*DW from it."""
    if ROW < KH and REACH >= 0 and REACH % DW == 0 and REACH // DW < KW:
        total += w[ROW * KW + REACH // DW][None, :] * dy
    return total


@triton.jit
def _met(total, values, dy, ROW: tl.constexpr, S: tl.constexpr, SW: tl.constexpr):
    """Adds a window weight's gradient: dy times the value it met, in ring row ROW, if that is one of SW columns."""
    if S >= 0 and S < SW:
        total += dy * values[ROW * SW + S]
    return total


@kernel
def depthwise_backward(
    g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c,
    x, scale, shift, gate, mean, rstd, weight, residual, du, sums, dweight,
    images, pixels, H, W, OH, OW, units, parts, run, span, phases, strips, strip, column_blocks, top,
    UNIT: tl.constexpr, ALL: tl.constexpr, ACT: tl.constexpr, G_ACT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    LEFT: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, RING: tl.constexpr, FIRST: tl.constexpr,
    OFFSETS: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """du (+ residual), the sums of the stage before at du, and a part of dweight, from one reading of dy and u.

    A step takes one row of dy; the ring holds the RING = max(KH, STEP) input rows that it can reach: gradients, and
    values for dweight. After the step, its first STEP rows are done. An input column SW*i + s meets window column j and
    output column i + (s + LEFT - j*DW)/SW where that is whole: OFFSETS are the COUNT numbers that are added to i.
    """
    C = units * UNIT
    DTYPE: tl.constexpr = x.dtype.element_ty
    block, group, first_image, part = place(tl.cdiv(C, CHANNELS), parts, span)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < C
    columns = tl.arange(0, COLUMNS)
    u_scale = vector(scale, c, keep)
    u_shift = vector(shift, c, keep)
    mu = vector(mean, c, keep)
    rs = vector(rstd, c, keep)
    y_scale = vector(g_scale, c, keep)
    y_shift = vector(g_shift, c, keep)
    ga = vector(g_a, c, keep)
    gb = vector(g_b, c, keep)
    gc = vector(g_c, c, keep)
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    if du is not None:
        w = _window(weight, c, keep, KH, KW)
    dw = ()
    for tap in tl.static_range(KH * KW):
        dw = dw + (zero,)

    for t in range(tl.minimum(span, images - first_image) * run):
        image, phase, strip_of, column_block, live = _unit(
            t, first_image, part, run, pixels, phases, strips, column_blocks, ALL
        )
        u_gate = vector(gate, image * C + c, keep)
        y_gate = vector(g_gate, image * C + c, keep)
        y_q = vector(g_q, image * C + c, keep)
        column = column_block * COLUMNS + columns
        q_first = FIRST + strip_of * strip
        gradients, values = (), ()
        for a in tl.static_range(RING * SW):
            gradients, values = gradients + (zero,), values + (zero,)
        row_of, x_start, y_start = phase * SH - top, image * H * W * C, image * OH * OW * C
        begin, end = q_first - (KH - 1) // STEP, q_first + strip
        dys, ys = _output_rows_ahead(
            g_dv, g_y, y_start, phase + phases * begin, live, OH, OW, C, column, c, keep, OFFSETS, COUNT
        )
        for q in range(begin, end):
            if dweight is not None:
                kept = ()
                for a in tl.static_range(STEP * SW, RING * SW):
                    kept = kept + (values[a],)
                for pos in tl.static_range(RING - STEP, RING):
                    step_row = q * STEP + pos
                    h = DH * step_row + row_of
                    owned = (step_row >= q_first * STEP) & (step_row < end * STEP)
                    wide = tl.where(owned & (h >= 0) & (h < H) & live, W, 0)
                    row = x_start + h.to(tl.int64) * W * C
                    for s in tl.static_range(SW):
                        at = column * SW + s
                        inside = (at < wide)[:, None] & keep[None, :]
                        v = tl.load(x + row + at[:, None] * C + c[None, :], mask=inside, other=0.0)
                        kept = kept + (tl.where(inside, value(v, u_scale, u_shift, u_gate, ACT), 0.0),)
                values = kept
            r = phase + phases * q
            wide = tl.where((r >= 0) & (r < OH) & live, OW, 0)
            dv_tiles, y_tiles = dys, ys
            dys, ys = _output_rows_ahead(
                g_dv, g_y, y_start, r + phases, live & (q + 1 < end), OH, OW, C, column, c, keep, OFFSETS, COUNT
            )
            for p in tl.static_range(COUNT):
                dy = gradient(dv_tiles[p], y_tiles[p], y_scale, y_shift, y_gate, y_q, ga, gb, gc, G_ACT)
                at = column + OFFSETS[p]
                dy = tl.where(((at >= 0) & (at < wide))[:, None] & keep[None, :], dy, 0.0)
                if du is not None:
                    after = ()
                    for a in tl.static_range(RING * SW):
                        after = after + (
                            _reached(gradients[a], w, dy, a // SW, a % SW + LEFT - OFFSETS[p] * SW, KH, KW, DW),
                        )
                    gradients = after
                if dweight is not None:
                    after = ()
                    for tap in tl.static_range(KH * KW):
                        met = _met(dw[tap], values, dy, tap // KW, OFFSETS[p] * SW + tap % KW * DW - LEFT, SW)
                        after = after + (met,)
                    dw = after
            if du is not None:
                for pos in tl.static_range(STEP):
                    for z in tl.static_range(GAP):  # rows between those that any window reaches have no gradient
                        h = DH * (q * STEP + pos) + row_of + z
                        row = x_start + h.to(tl.int64) * W * C
                        wide = tl.where((h >= 0) & (h < H) & (q >= q_first) & live, W, 0)
                        for s in tl.static_range(SW):
                            at_column = column * SW + s
                            mask = (at_column < wide)[:, None] & keep[None, :]
                            at = row + at_column[:, None] * C + c[None, :]
                            total = zero
                            if z == 0:
                                total = gradients[pos * SW + s]
                            if residual is not None:
                                total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
                            stored = total.to(DTYPE)
                            tl.store(du + at, stored, mask=mask)
                            if sums is not None:
                                stored = tl.where(mask, stored.to(tl.float32), 0.0)
                                y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                                s1, s2, s3, s4, s5 = sum_terms(stored, y, u_scale, u_shift, mu, rs, mask, ACT)
                                t2 += s2
                                t4 += s4
                                if gate is not None:
                                    t1 += s1
                                    t3 += s3
                                    t5 += s5
                moved = ()
                for a in tl.static_range(STEP * SW, RING * SW):
                    moved = moved + (gradients[a],)
                for a in tl.static_range(STEP * SW):
                    moved = moved + (zero,)
                gradients = moved
        if sums is not None and gate is not None and t % run == run - 1:
            to = sums + (image * parts + part) * 5 * C + c
            store_sums(to, C, keep, tl.sum(t1, 0), tl.sum(t2, 0), tl.sum(t3, 0), tl.sum(t4, 0), tl.sum(t5, 0))
            t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    if sums is not None and gate is None:
        to = sums + group.to(tl.int64) * 2 * C + c
        store_two_sums(to, C, keep, tl.sum(t2, 0), tl.sum(t4, 0))
    if dweight is not None:
        to = dweight + (group.to(tl.int64) * C + c) * (KH * KW)
        for tap in tl.static_range(KH * KW):
            tl.store(to + tap, tl.sum(dw[tap], 0), mask=keep)
