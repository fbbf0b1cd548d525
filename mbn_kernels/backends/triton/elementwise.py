"""Kernels that walk a tensor once: the value or gradient that leaves a chain, the sums of its backward, the squeeze.

Tiles are ``[ROWS, CHANNELS]`` of a dense channels-last tensor seen as rows of pixels; a program takes ``run`` tiles of
one image and one block of channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import triton.language as tl
from torch import Tensor

from ...chain import Gradient, Norm, Value
from ..reference import empty_channels_last
from . import config, tuning
from .arguments import gradient_arguments, norm_arguments, value_arguments
from .device import activate, activate_grad, gradient, kernel, normalised, store_sums, tile_rows, value, vector
from .launch import Groups, cdiv, channel_unit, launch, share_rows, vectors


@kernel
def _materialize(
    x, scale, shift, gate, residual, out,
    images, pixels, units, tiles,
    UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    tile = program // blocks
    image, row, rows = tile_rows(0, tile // tiles, tile % tiles, 1, pixels, ROWS)
    keep = c < channels
    per_image = image * channels + c
    start = row * channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    mask = (r < rows)[:, None] & keep[None, :]
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
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    tile = program // blocks
    image, row, rows = tile_rows(0, tile // tiles, tile % tiles, 1, pixels, ROWS)
    keep = c < channels
    per_image = image * channels + c
    start = row * channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    mask = (r < rows)[:, None] & keep[None, :]
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
def _reduce_gradient(
    g_dv, x, scale, shift, gate, mean, rstd, sums,
    images, pixels, parts, run, span, units,
    UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    group = program // blocks
    first_image, part = group // parts * span, group % parts
    keep = c < channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    k, b = vector(scale, c, keep), vector(shift, c, keep)
    mu, rs = vector(mean, c, keep), vector(rstd, c, keep)
    zero = tl.zeros((ROWS, CHANNELS), tl.float32)
    t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    for t in range(tl.minimum(span, images - first_image) * run):
        image, row, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        start = row * channels
        mask = (r < rows)[:, None] & keep[None, :]
        dv = tl.load(g_dv + start + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(x + start + at, mask=mask, other=0.0).to(tl.float32)
        n = normalised(y, k, b)
        d = tl.where(mask, activate_grad(n, ACT), 0.0)
        if mean is not None:
            y = (y - mu[None, :]) * rs[None, :]
        t2 += dv * d
        t4 += dv * d * y
        if gate is not None:
            t1 += dv * activate(n, ACT)
            t3 += d
            t5 += d * y
            if t % run == run - 1:
                to = sums + (image * parts + part) * 5 * channels + c
                store_sums(
                    to, channels, keep, tl.sum(t1, 0), tl.sum(t2, 0), tl.sum(t3, 0), tl.sum(t4, 0), tl.sum(t5, 0)
                )
                t1, t2, t3, t4, t5 = zero, zero, zero, zero, zero
    if gate is None:
        to = sums + group.to(tl.int64) * 2 * channels + c
        tl.store(to, tl.sum(t2, 0), mask=keep)
        tl.store(to + channels, tl.sum(t4, 0), mask=keep)


@kernel
def _pool(
    x, scale, shift, sums,
    images, pixels, parts, run, span, units, factor,
    UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    group = program // blocks
    first_image, part = group // parts * span, group % parts
    keep = c < channels
    r = tl.arange(0, ROWS)
    at = r[:, None] * channels + c[None, :]
    k, b = vector(scale, c, keep), vector(shift, c, keep)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for t in range(tl.minimum(span, images - first_image) * run):
        image, row, rows = tile_rows(t, first_image, part, run, pixels, ROWS)
        start = row * channels
        mask = (r < rows)[:, None] & keep[None, :]
        y = tl.load(x + start + at, mask=mask, other=0.0)
        total += tl.where(mask, value(y, k, b, None, ACT), 0.0)
        if t % run == run - 1:
            to = sums + (image * parts + part) * channels + c
            tl.store(to, tl.sum(total, 0) * factor, mask=keep)
            total = tl.zeros((ROWS, CHANNELS), tl.float32)


def _sizes(u: Tensor, by_image: bool) -> tuple[int, int]:
    """(images, rows of each): where nothing depends on the image, all rows are one image."""
    n, _, h, w = u.shape
    return (n, h * w) if by_image else (1, n * h * w)


def _run(name: str, like: Tensor, by_image: bool, run: Callable[[config.Config, dict], Tensor]) -> Tensor:
    """``run`` with the tile to use and the arguments that every kernel here takes."""
    c, (images, pixels) = like.shape[1], _sizes(like, by_image)
    unit = channel_unit(c)
    shape = {"images": images, "pixels": pixels, "units": c // unit, "UNIT": unit}
    key = (name, *like.shape, str(like.dtype), by_image)
    tiles = functools.partial(config.elementwise, c, pixels)
    return tuning.best(key, tiles, like.device, lambda tile: run(tile, {**shape, **tile.arguments()}))


def _whole(kernel, name: str, like: Tensor, by_image: bool, arguments: dict) -> Tensor:
    """One tile a program, nothing to merge."""

    def run(tile: config.Config, shape: dict) -> Tensor:
        out = empty_channels_last(like, tuple(like.shape))
        tiles = cdiv(shape["pixels"], tile.blocks["ROWS"])
        programs = shape["images"] * tiles * cdiv(like.shape[1], tile.blocks["CHANNELS"])
        launch(kernel, programs, like.device, out=out, tiles=tiles, **shape, **arguments)
        return out

    return _run(name, like, by_image, run)


def materialize(u: Value, residual: Tensor | None) -> Tensor:
    arguments = {"residual": residual, **value_arguments(u)}
    return _whole(_materialize, "materialize", u.y, u.gate is not None, arguments)


def materialize_gradient(g: Gradient, residual: Tensor | None) -> Tensor:
    arguments = {"residual": residual, **gradient_arguments(g)}
    return _whole(_materialize_gradient, "materialize_gradient", g.dv, g.of.gate is not None, arguments)


def empty_sums(u: Value, groups: Groups) -> Tensor:
    """The sums of a stage's backward in parts: ``[images, parts, 5, C]`` with a gate, else ``[1, parts, 2, C]``."""
    c = u.y.shape[1]
    shape = (1, groups.count, 2, c) if u.gate is None else (groups.images, groups.parts, 5, c)
    return vectors(u.y, *shape)


def reduce_gradient(dv: Tensor, u: Value, norm: Norm | None) -> Tensor:
    by_image, c = u.gate is not None, u.y.shape[1]
    arguments = {"g_dv": dv, **value_arguments(u), **norm_arguments(norm)}

    def run(tile: config.Config, shape: dict) -> Tensor:
        blocks = cdiv(c, tile.blocks["CHANNELS"])
        groups = share_rows(u.y, by_image, tile.blocks["ROWS"], blocks)
        sums = empty_sums(u, groups)
        programs = groups.count * blocks
        launch(_reduce_gradient, programs, dv.device, sums=sums, **arguments, **{**shape, **groups._asdict()})
        return sums

    return _run("reduce_gradient", u.y, by_image, run)


def pool(u: Value) -> Tensor:
    n, c, h, w = u.y.shape
    arguments = {name: v for name, v in value_arguments(u).items() if name != "gate"}
    arguments["factor"] = 1.0 / max(h * w, 1)

    def run(tile: config.Config, shape: dict) -> Tensor:
        blocks = cdiv(c, tile.blocks["CHANNELS"])
        groups = share_rows(u.y, True, tile.blocks["ROWS"], blocks)
        sums = vectors(u.y, n, groups.parts, c)
        launch(_pool, groups.count * blocks, u.y.device, sums=sums, **arguments, **{**shape, **groups._asdict()})
        return sums

    return mean_of_parts(_run("pool", u.y, True, run))


def mean_of_parts(parts: Tensor) -> Tensor:
    """``[N, parts, C]`` of a mean -> ``[N, C]``."""
    return parts.flatten(1) if parts.shape[1] == 1 else parts.sum(1)
