"""Kernels that walk a tensor once: the value or gradient that leaves a chain, the sums of its backward, the squeeze;
and, behind a product of PyTorch's, its statistics or its epilogue.

Tiles are ``[ROWS, CHANNELS]`` of a dense channels-last tensor seen as rows of pixels; a program takes ``run`` tiles of
one image and one block of channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...chain import Gradient, Norm, Value
from ..reference import empty_channels_last
from . import config, tuning
from .arguments import gradient_arguments, norm_arguments, value_arguments
from .device import (
    activate,
    folded_norm,
    gradient,
    kernel,
    place,
    store_moments,
    store_sums,
    store_two_sums,
    sum_terms,
    tile_rows,
    value,
    vector,
)
from .launch import Groups, Plan, cdiv, channel_unit, launch, rows_of, share_rows, vectors
from .norm import Statistics

#: Tiles that the reductions load ahead: their own registers leave room for few programs, and so for few loads at once.
AHEAD = tl.constexpr(3)


@triton.jit
def _tile(channels, tiles, pixels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's only tile: (channels, which of them exist, image, offset of the tile, offsets in it, mask)."""
    block, _, image, tile = place(tl.cdiv(channels, CHANNELS), tiles, 1)
    c, r = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    keep = c < channels
    image, row, rows = tile_rows(0, image, tile, 1, pixels, ROWS)
    mask = (r < rows)[:, None] & keep[None, :]
    return c, keep, image, row * channels, r[:, None] * channels + c[None, :], mask


@kernel
def _materialize(
    x, scale, shift, gate, residual, out,
    images, pixels, units, tiles,
    UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    c, keep, image, start, at, mask = _tile(channels, tiles, pixels, ROWS, CHANNELS)
    per_image = image * channels + c
    y = tl.load(x + start + at, mask=mask, other=0.0)
    v = value(y, vector(scale, c, keep), vector(shift, c, keep), vector(gate, per_image, keep), ACT)
    if residual is not None:
        v += tl.load(residual + start + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + at, v.to(out.dtype.element_ty), mask=mask)


@kernel
def _materialize_gradient(
    g_dv, g_y, g_scale, g_shift, g_gate, g_q, g_a, g_b, g_c, residual, out,
    images, pixels, units, tiles,
    UNIT: tl.constexpr, G_ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    c, keep, image, start, at, mask = _tile(channels, tiles, pixels, ROWS, CHANNELS)
    per_image = image * channels + c
    dv = tl.load(g_dv + start + at, mask=mask, other=0.0)
    y = None
    if g_y is not None:
        y = tl.load(g_y + start + at, mask=mask, other=0.0)
    dy = gradient(
        dv, y, vector(g_scale, c, keep), vector(g_shift, c, keep), vector(g_gate, per_image, keep),
        vector(g_q, per_image, keep), vector(g_a, c, keep), vector(g_b, c, keep), vector(g_c, c, keep), G_ACT,
    )  # fmt: skip
    if residual is not None:
        dy += tl.load(residual + start + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + at, dy.to(out.dtype.element_ty), mask=mask)


@kernel
def _finish(
    y, mean, var, bn_weight, bias, residual,
    images, pixels, units, tiles, eps,
    UNIT: tl.constexpr, OUT_ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A convolution's epilogue in evaluation, in place."""
    channels = units * UNIT
    c, keep, _, start, at, mask = _tile(channels, tiles, pixels, ROWS, CHANNELS)
    v = tl.load(y + start + at, mask=mask, other=0.0).to(tl.float32)
    if var is not None:
        scale, shift = folded_norm(mean, var, bn_weight, bias, c, keep, eps)
        v = v * scale[None, :] + shift[None, :]
    v = activate(v, OUT_ACT)
    if residual is not None:
        v += tl.load(residual + start + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + start + at, v.to(y.dtype.element_ty), mask=mask)


@kernel
def _statistics(
    x, counts, moments,
    images, pixels, parts, run, span, units,
    UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A part of :class:`norm.Statistics`: each row of the tile takes its own, of what differs from its first number, by
    Welford's update; they are merged at the end.
    """
    channels = units * UNIT
    block, group, first_image, part = place(tl.cdiv(channels, CHANNELS), parts, span)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    zero = tl.zeros((ROWS, CHANNELS), tl.float32)
    base, means, m2 = zero, zero, zero
    done = tl.zeros((ROWS,), tl.float32)
    for t in tl.range(0, tl.minimum(span, images - first_image) * run, num_stages=AHEAD):
        _, row, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        mask = (r < rows)[:, None] & keep[None, :]
        y = tl.load(x + row * channels + at, mask=mask, other=0.0).to(tl.float32)
        if t == 0:
            base = y
        done += (r < rows).to(tl.float32)
        share = (1.0 / tl.maximum(done, 1.0))[:, None]
        delta = tl.where(mask, y - base - means, 0.0)
        means += delta * share
        m2 += delta * delta * (1.0 - share)
    count = tl.sum(done, 0)
    some = 1.0 / tl.maximum(count, 1.0)
    pivot = tl.sum(base * done[:, None], 0) * some
    off = base - pivot[None, :] + means
    mean = tl.sum(off * done[:, None], 0) * some
    off = off - mean[None, :]
    total = tl.sum(m2 + off * off * done[:, None], 0)
    store_moments(moments, counts, group, block, c, channels, keep, pivot, mean, total, count)


@kernel
def _reduce_gradient(
    g_dv, x, scale, shift, gate, mean, rstd, sums, out,
    images, pixels, parts, run, span, units,
    UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``out``: the value, for those who need it stored."""
    channels = units * UNIT
    block, group, first_image, part = place(tl.cdiv(channels, CHANNELS), parts, span)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    k = vector(scale, c, keep)
    b = vector(shift, c, keep)
    mu = vector(mean, c, keep)
    rs = vector(rstd, c, keep)
    zero = tl.zeros((ROWS, CHANNELS), tl.float32)
    t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    for t in tl.range(0, tl.minimum(span, images - first_image) * run, num_stages=AHEAD):
        image, row, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        start = row * channels
        mask = (r < rows)[:, None] & keep[None, :]
        dv = tl.load(g_dv + start + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(x + start + at, mask=mask, other=0.0).to(tl.float32)
        s1, s2, s3, s4, s5 = sum_terms(dv, y, k, b, mu, rs, mask, ACT)
        if out is not None:
            v = value(y, k, b, vector(gate, image * channels + c, keep), ACT)
            tl.store(out + start + at, v.to(out.dtype.element_ty), mask=mask)
        t2 += s2
        t4 += s4
        if gate is not None:
            t1 += s1
            t3 += s3
            t5 += s5
            if t % run == run - 1:
                to = sums + (image * parts + part) * 5 * channels + c
                store_sums(
                    to, channels, keep, tl.sum(t1, 0), tl.sum(t2, 0), tl.sum(t3, 0), tl.sum(t4, 0), tl.sum(t5, 0)
                )
                t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    if gate is None:
        to = sums + group.to(tl.int64) * 2 * channels + c
        store_two_sums(to, channels, keep, tl.sum(t2, 0), tl.sum(t4, 0))


@kernel
def _pool(
    x, scale, shift, sums,
    images, pixels, parts, run, span, units, factor,
    UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    block, _, first_image, part = place(tl.cdiv(channels, CHANNELS), parts, span)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    k = vector(scale, c, keep)
    b = vector(shift, c, keep)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for t in tl.range(0, tl.minimum(span, images - first_image) * run, num_stages=AHEAD):
        image, row, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        start = row * channels
        mask = (r < rows)[:, None] & keep[None, :]
        y = tl.load(x + start + at, mask=mask, other=0.0)
        total += tl.where(mask, value(y, k, b, None, ACT), 0.0)
        if t % run == run - 1:
            to = sums + (image * parts + part) * channels + c
            tl.store(to, tl.sum(total, 0) * factor, mask=keep)
            total = tl.zeros((ROWS, CHANNELS), tl.float32)


def _run(
    name: str,
    like: Tensor,
    by_image: bool,
    plan: Callable[[config.Config], Plan],
    run: Callable[[Plan], Tensor],
    numbers: int = 0,
):
    """``numbers``: sums that a program keeps for each number of its tile."""
    tiles = functools.partial(config.elementwise, like.shape[1], rows_of(like, by_image)[1], numbers)
    return tuning.best((name, *like.shape, like.dtype, by_image), tiles, like.device, plan, run)


def _channels(like: Tensor) -> dict:
    unit = channel_unit(like.shape[1])
    return {"units": like.shape[1] // unit, "UNIT": unit}


def _one_tile(like: Tensor, by_image: bool) -> Callable[[config.Config], Plan]:
    """One tile a program, nothing to merge."""

    def plan(tile: config.Config) -> Plan:
        images, pixels = rows_of(like, by_image)
        tiles = cdiv(pixels, tile.blocks["ROWS"])
        programs = images * tiles * cdiv(like.shape[1], tile.blocks["CHANNELS"])
        sizes = {"images": images, "pixels": pixels, "tiles": tiles}
        return Plan(programs, Groups(images, pixels, tiles, 1, 1), {**sizes, **_channels(like), **tile.arguments()})

    return plan


def _whole(kernel, name: str, like: Tensor, by_image: bool, arguments: dict) -> Tensor:
    def run(plan: Plan) -> Tensor:
        out = empty_channels_last(like, tuple(like.shape))
        launch(kernel, plan, like.device, {"out": out, **arguments})
        return out

    return _run(name, like, by_image, _one_tile(like, by_image), run)


def materialize(u: Value, residual: Tensor | None) -> Tensor:
    arguments = {"residual": residual, **value_arguments(u)}
    return _whole(_materialize, "materialize", u.y, u.gate is not None, arguments)


def materialize_gradient(g: Gradient, residual: Tensor | None) -> Tensor:
    arguments = {"residual": residual, **gradient_arguments(g)}
    return _whole(_materialize_gradient, "materialize_gradient", g.dv, g.of.gate is not None, arguments)


def finish(y: Tensor, after: dict) -> None:
    """Does to a raw output, in its place, what an epilogue (:func:`convolutions.epilogue`) says."""

    def run(plan: Plan) -> None:
        launch(_finish, plan, y.device, {"y": y, **after})

    _run("finish", y, False, _one_tile(y, False), run)


def empty_sums(u: Value, groups: Groups) -> Tensor:
    """The sums of a stage's backward in parts: ``[images, parts, 5, C]`` with a gate, else ``[1, parts, 2, C]``."""
    c = u.y.shape[1]
    shape = (1, groups.count, 2, c) if u.gate is None else (groups.images, groups.parts, 5, c)
    return vectors(u.y, *shape)


def _reducing(like: Tensor, by_image: bool) -> Callable[[config.Config], Plan]:
    def plan(tile: config.Config) -> Plan:
        blocks = cdiv(like.shape[1], tile.blocks["CHANNELS"])
        groups = share_rows(like, by_image, tile.blocks["ROWS"], blocks)
        return Plan(groups.count * blocks, groups, {**groups._asdict(), **_channels(like), **tile.arguments()})

    return plan


def reduce_gradient(dv: Tensor, u: Value, norm: Norm | None) -> Tensor:
    return _reduce_gradient_and(dv, u, norm, None)


def reduce_gradient_and_materialize(dv: Tensor, u: Value, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(the sums, the value): both from one reading."""
    out = empty_channels_last(u.y, tuple(u.y.shape))
    return _reduce_gradient_and(dv, u, norm, out), out


def _reduce_gradient_and(dv: Tensor, u: Value, norm: Norm | None, out: Tensor | None) -> Tensor:
    by_image = u.gate is not None

    def run(plan: Plan) -> Tensor:
        sums = empty_sums(u, plan.groups)
        arguments = {"g_dv": dv, "sums": sums, "out": out, **value_arguments(u), **norm_arguments(norm)}
        launch(_reduce_gradient, plan, dv.device, arguments)
        return sums

    name = "reduce_gradient" if out is None else "reduce_gradient_and_materialize"
    return _run(name, u.y, by_image, _reducing(u.y, by_image), run, 5 if by_image else 2)


def statistics(y: Tensor) -> Statistics:
    def run(plan: Plan) -> Statistics:
        found = Statistics(y, plan.groups.count, y.shape[1])
        launch(_statistics, plan, y.device, {"x": y, **found.arguments()})
        return found

    return _run("statistics", y, False, _reducing(y, False), run)


def pool(u: Value) -> Tensor:
    n, c, h, w = u.y.shape

    def run(plan: Plan) -> Tensor:
        sums = vectors(u.y, n, plan.groups.parts, c)
        arguments = {"sums": sums, "factor": 1.0 / max(h * w, 1), **value_arguments(u)}
        del arguments["gate"]
        launch(_pool, plan, u.y.device, arguments)
        return sums

    return mean_of_parts(_run("pool", u.y, True, _reducing(u.y, True), run))


def mean_of_parts(parts: Tensor) -> Tensor:
    """``[N, parts, C]`` of a mean -> ``[N, C]``."""
    return parts.flatten(1) if parts.shape[1] == 1 else parts.sum(1)
