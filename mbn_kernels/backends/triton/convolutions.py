"""Starts the kernels of pointwise.py and depthwise.py: allocates what they write, shares out the work."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...chain import Gradient, Norm, Stage, Value
from ..reference import empty_channels_last
from . import config, depthwise, norm, pointwise, tuning
from .arguments import gradient_arguments, norm_arguments, value_arguments
from .config import Config
from .elementwise import empty_sums
from .launch import Groups, cdiv, channel_unit, launch, share, share_rows, vectors


def epilogue(stage: Stage | None, p: dict, residual: Tensor | None = None) -> dict:
    """What a convolution does with its product: nothing in training; in evaluation the whole stage."""
    names = {"mean": "running_mean", "var": "running_var", "bn_weight": "bn_weight", "bias": "bn_bias"}
    found = {name: p.get(parameter) for name, parameter in names.items()}
    act, eps = (stage.act, stage.eps) if stage else ("identity", 0.0)
    return {**found, "residual": residual, "OUT_ACT": ACTIVATIONS[act].code, "eps": eps}


RAW = epilogue(None, {})


def precision(dtype: torch.dtype, conv: bool = True) -> str:
    """How float32 products are rounded: as torch is told to for convolutions, or for the gate's two products."""
    if dtype != torch.float32:
        return "ieee"
    wanted = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    return "tf32" if wanted.fp32_precision == "tf32" else "ieee"


def _statistics(y: Tensor, wanted: bool, groups: Groups) -> tuple[norm.Statistics | None, dict]:
    if not wanted:
        return None, {"counts": None, "moments": None}
    found = norm.Statistics(y, groups.count, y.shape[1])
    return found, found.arguments()


def _added(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight's gradient from its parts."""
    return (parts[0] if len(parts) == 1 else norm.sum_parts(parts)).view(shape)


# 1x1 convolutions -----------------------------------------------------------------------------------------------------


def _channels(inner: int, outer: int) -> dict:
    i, o = channel_unit(inner), channel_unit(outer)
    return {"in_units": inner // i, "IN_UNIT": i, "out_units": outer // o, "OUT_UNIT": o}


def pointwise_forward(u: Value, weight: Tensor, statistics: bool, after: dict, rounding: str):
    """(y, its statistics); ``after`` is an :func:`epilogue`, ``rounding`` a :func:`precision`."""
    (n, inner, h, w), outer, by_image = u.y.shape, weight.shape[0], u.gate is not None
    shared = {**after, **value_arguments(u), **_channels(inner, outer), "weight": weight, "PRECISION": rounding}

    def run(tile: Config):
        y = empty_channels_last(u.y, (n, outer, h, w))
        blocks = cdiv(outer, tile.blocks["OUT_BLOCK"])
        groups = share_rows(u.y, by_image, tile.blocks["ROWS"], blocks)
        found, parts = _statistics(y, statistics, groups)
        arguments = {**shared, **parts, **groups._asdict(), **tile.arguments()}
        launch(pointwise.pointwise_forward, groups.count * blocks, y.device, y=y, **arguments)
        return y, found

    pixels = h * w if by_image else n * h * w
    key = ("pointwise_forward", n, h * w, inner, outer, str(u.y.dtype), rounding, by_image, statistics)
    return tuning.best(
        key, lambda: config.pointwise_forward(pixels, inner, outer, u.y.dtype, rounding), u.y.device, run
    )


def pointwise_backward(
    g: Gradient, weight: Tensor, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool, rounding: str,
):  # fmt: skip
    """(du, sums, dweight): by one kernel where a block holds all output channels, else by one for du and sums and one
    for dweight.
    """
    (n, inner, h, w), outer, dtype, device = u.y.shape, weight.shape[0], u.y.dtype, u.y.device
    by_image = u.gate is not None or g.of.gate is not None
    together = want_du and want_dweight and config.holds(outer, dtype)
    pixels, sums_of = h * w if by_image else n * h * w, 0 if not want_sums else 2 if u.gate is None else 5
    channels = _channels(inner, outer)
    shared = {**gradient_arguments(g), **value_arguments(u), **channels, "PRECISION": rounding}
    key = (n, h * w, inner, outer, str(dtype), rounding, by_image)

    def least(tile: Config) -> int:
        return _least_tiles(inner, outer, tile.blocks["ROWS"], dtype)

    def run(tile: Config):
        blocks = cdiv(inner, tile.blocks["IN_BLOCK"])
        groups = share_rows(u.y, by_image, tile.blocks["ROWS"], blocks, least(tile) if together else 1)
        du = empty_channels_last(u.y, (n, inner, h, w))
        sums = empty_sums(u, groups) if want_sums else None
        parts = vectors(u.y, groups.count, outer, inner) if together else None
        own = {"weight": weight, "residual": residual, "du": du, "sums": sums, "dweight": parts}
        if not (want_sums or together):
            own |= {"x": None, "scale": None, "shift": None, "gate": None}  # du alone does not depend on u
        arguments = {**shared, **own, **norm_arguments(norm_of), **groups._asdict(), **tile.arguments()}
        launch(pointwise.pointwise_backward, groups.count * blocks, device, **arguments)
        return du, sums, parts

    def run_weight(tile: Config):
        blocks = cdiv(inner, tile.blocks["IN_BLOCK"]) * cdiv(outer, tile.blocks["OUT_BLOCK"])
        groups = share_rows(u.y, by_image, tile.blocks["ROWS"], blocks, least(tile))
        parts = vectors(u.y, groups.count, outer, inner)
        arguments = {**shared, **groups._asdict(), **tile.arguments()}
        launch(pointwise.pointwise_weight, groups.count * blocks, device, dweight=parts, **arguments)
        return parts

    du = sums = parts = None
    if want_du:
        du, sums, parts = tuning.best(
            ("pointwise_backward", *key, together, sums_of),
            lambda: config.pointwise_backward(pixels, inner, outer, dtype, rounding, together, sums_of),
            device,
            run,
        )
    if want_dweight and not together:
        parts = tuning.best(
            ("pointwise_weight", *key),
            lambda: config.pointwise_weight(pixels, inner, outer, dtype, rounding),
            device,
            run_weight,
        )
    return du, sums, _added(parts, weight.shape) if want_dweight else None


def _least_tiles(inner: int, outer: int, rows: int, dtype: torch.dtype) -> int:
    """Tiles a group for which writing and reading a part of dweight costs a sixteenth of reading the tiles."""
    part, row = 2 * 4 * inner * outer, 2 * (inner + outer) * dtype.itemsize
    return cdiv(16 * part, max(rows * row, 1))


# Depthwise convolutions -----------------------------------------------------------------------------------------------


def _rows(stage: Stage) -> tuple[int, int, int]:
    """(phases, STEP, GAP): see depthwise.py."""
    stride, dilation = stage.stride[0], stage.dilation[0]
    gap = gcd(stride, dilation)
    return dilation // gap, stride // gap, gap


def _key(name: str, u: Value, stage: Stage, *more: object) -> tuple:
    return name, *u.y.shape, str(u.y.dtype), stage.kernel, stage.stride, stage.padding, stage.dilation, *more


def depthwise_forward(u: Value, weight: Tensor, stage: Stage, statistics: bool, after: dict, pool: bool):
    """(y, its statistics, the means over parts of each image, to be added for squeeze-excite)."""
    n, c, _, _ = u.y.shape
    _, _, oh, ow = shape = stage.output_shape(u.y.shape, weight.shape)
    phases, step, _ = _rows(stage)
    steps, by_image = cdiv(oh, phases), u.gate is not None or pool
    window = {"STEP": step, "RING": (stage.kernel[0] - 1) // step + 1, "NEW": max(stage.kernel[0] - step, 0)}
    shared = {**after, **value_arguments(u), **window, "left": stage.padding[2], "factor": 1.0 / max(oh * ow, 1)}

    def run(tile: Config):
        y = empty_channels_last(u.y, shape)
        groups, blocks, geometry = _units(u.y, y, stage, tile, steps, ow, by_image)
        found, parts = _statistics(y, statistics, groups)
        pooled = vectors(y, n, groups.parts, c) if pool else None
        own = {"weight": weight, "y": y, "pooled": pooled}
        arguments = {**shared, **own, **parts, **geometry}
        launch(depthwise.depthwise_forward, groups.count * blocks, y.device, **arguments)
        return y, found, pooled

    def tiles() -> list[Config]:
        return config.depthwise_forward(n, c, steps, ow, stage.kernel, step, statistics, u.y.dtype, u.y.device)

    return tuning.best(_key("depthwise_forward", u, stage, by_image, statistics), tiles, u.y.device, run)


def depthwise_backward(
    g: Gradient, weight: Tensor, stage: Stage, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool,
):  # fmt: skip
    """(du, sums, dweight), by one kernel."""
    (n, c, height, width), (kh, kw) = u.y.shape, stage.kernel
    phases, step, gap = _rows(stage)
    first = 0 if phases == 1 else -1
    steps = max((height - 1 + stage.padding[0]) // (stage.dilation[0] * step) + 1 - first, 1)
    stride, dilation, left = stage.stride[1], stage.dilation[1], stage.padding[2]
    reached = {s + left - j * dilation for s in range(stride) for j in range(kw)}
    offsets = tuple(sorted(r // stride for r in reached if r % stride == 0))
    by_image, columns = u.gate is not None or g.of.gate is not None, cdiv(width, stride)
    window = {"LEFT": left, "STEP": step, "GAP": gap, "RING": max(kh, step), "FIRST": first}
    window |= {"OFFSETS": offsets, "COUNT": len(offsets), "weight": weight, "residual": residual}
    shared = {**gradient_arguments(g), **value_arguments(u), **norm_arguments(norm_of), **window}

    def run(tile: Config):
        groups, blocks, geometry = _units(u.y, g.dv, stage, tile, steps, columns, by_image)
        du = empty_channels_last(u.y, tuple(u.y.shape)) if want_du else None
        sums = empty_sums(u, groups) if want_sums else None
        parts = vectors(u.y, groups.count, c, kh * kw) if want_dweight else None
        arguments = {**shared, **geometry, "du": du, "sums": sums, "dweight": parts}
        launch(depthwise.depthwise_backward, groups.count * blocks, u.y.device, **arguments)
        return du, sums, parts

    def tiles() -> list[Config]:
        return config.depthwise_backward(n, c, steps, columns, stage.kernel, u.y.dtype, u.y.device)

    key = _key("depthwise_backward", u, stage, by_image, want_du, want_sums, want_dweight)
    du, sums, parts = tuning.best(key, tiles, u.y.device, run)
    return du, sums, _added(parts, weight.shape) if want_dweight else None


def _units(
    x: Tensor, y: Tensor, stage: Stage, tile: Config, steps: int, columns: int, by_image: bool
) -> tuple[Groups, int, dict]:
    """(groups of units, blocks of channels, arguments that both directions take)."""
    (n, c, height, width), (_, _, out_height, out_width) = x.shape, y.shape
    (kh, kw), (sh, sw), (dh, dw), phases = stage.kernel, stage.stride, stage.dilation, _rows(stage)[0]
    column_blocks, strips = cdiv(columns, tile.blocks["COLUMNS"]), cdiv(steps, tile.strip)
    blocks, per_image = cdiv(c, tile.blocks["CHANNELS"]), phases * strips * column_blocks
    images, units = (n, per_image) if by_image else (1, n * per_image)
    groups, unit = share(x.device, images, units, units, blocks), channel_unit(c)
    geometry = {
        **{"H": height, "W": width, "OH": out_height, "OW": out_width, "top": stage.padding[0]},
        **{"KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw},
        **{"phases": phases, "strips": strips, "strip": tile.strip, "column_blocks": column_blocks},
        **{"units": c // unit, "UNIT": unit, "ALL": not by_image},
    }
    return groups, blocks, {**geometry, **groups._asdict(), **tile.arguments()}
