"""Starts the kernels of pointwise.py and depthwise.py: allocates what they write, shares out the work."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton.language as tl
from torch import Tensor

from ...activations import ACTIVATIONS
from ...chain import Gradient, Norm, Stage, Value
from ..reference import empty_channels_last
from . import config, depthwise, library, norm, pointwise, tuning
from .arguments import gradient_arguments, norm_arguments, value_arguments
from .config import LIBRARY, OWN, Config
from .elementwise import empty_sums
from .launch import Groups, Plan, cdiv, channel_unit, launch, rows_of, share, share_rows, vectors


def epilogue(stage: Stage | None, p: dict, residual: Tensor | None = None) -> dict:
    """What a convolution does with its product: nothing in training; in evaluation the whole stage."""
    names = {"mean": "running_mean", "var": "running_var", "bn_weight": "bn_weight", "bias": "bn_bias"}
    found = {name: p.get(parameter) for name, parameter in names.items()}
    act, eps = (stage.act, stage.eps) if stage else ("identity", 0.0)
    return {**found, "residual": residual, "OUT_ACT": ACTIVATIONS[act].code, "eps": eps}


RAW = epilogue(None, {})
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def precision(dtype: torch.dtype, conv: bool = True) -> str:
    """How float32 products are rounded: as torch is told to for convolutions, or for the gate's two products."""
    if dtype != torch.float32 or torch.version.hip:  # not every AMD GPU has it
        return "ieee"
    wanted = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    return "tf32" if wanted.fp32_precision == "tf32" else "ieee"


def _statistics(y: Tensor, wanted: bool, groups: Groups) -> tuple[norm.Statistics | None, dict]:
    if not wanted:
        return None, {"counts": None, "moments": None}
    found = norm.Statistics(y, groups.count, y.shape[1])
    return found, found.arguments()


def _given(after: dict) -> tuple[bool, bool]:
    """What an epilogue reads: part of a key, as the best tile and what it takes depend on it."""
    return after["var"] is not None, after["residual"] is not None


def asked(g: Gradient, residual: Tensor | None) -> tuple[bool, bool, bool]:
    """What a gradient reads, likewise."""
    return g.of.act != "identity", g.b is not None, residual is not None


def added(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight's gradient from its parts."""
    return (parts[0] if len(parts) == 1 else norm.sum_parts(parts)).view(shape)


# 1x1 convolutions -----------------------------------------------------------------------------------------------------


def pointwise_forward(u: Value, weight: Tensor, statistics: bool, after: dict, rounding: str):
    """(y, its statistics); ``after`` is an :func:`epilogue`, ``rounding`` a :func:`precision`."""
    (n, inner, h, w), outer, by_image, dtype = u.y.shape, weight.shape[0], u.gate is not None, u.y.dtype
    deferred, allowed = library.is_deferred(u), _same_rounding(dtype, rounding)

    def tiles() -> list[Config]:
        sizes = rows_of(u.y, by_image)[1], inner, outer
        own = config.pointwise_forward(*sizes, dtype, rounding, statistics, deferred, n * h * w)
        return _both(own, allowed, config.library_forward(n * h * w, inner, outer, statistics))

    def plan(tile: Config) -> Plan | Config:
        if tile == LIBRARY:
            return LIBRARY
        return product_plan(u, weight, by_image, tile, cdiv(outer, tile.blocks["OUT_BLOCK"]), 1, dtype, rounding)

    def run(plan: Plan | Config):
        if plan is LIBRARY:
            return library.pointwise_forward(u, weight, statistics, after)
        y = empty_channels_last(u.y, (n, outer, h, w))
        found, parts = _statistics(y, statistics, plan.groups)
        arguments = {**value_arguments(u), **after, **parts, "weight": weight, "y": y}
        launch(pointwise.pointwise_forward, plan, y.device, arguments)
        return y, found

    key = ("pointwise_forward", *u.y.shape, outer, dtype, rounding, by_image, statistics, *_given(after))
    return tuning.best((*key, deferred, allowed), tiles, u.y.device, plan, run)


def _same_rounding(dtype: torch.dtype, rounding: str) -> bool:
    """Whether PyTorch is told to round its products as its convolutions; else they are no way to run one."""
    return precision(dtype, conv=False) == rounding


def _both(own: list[Config], allowed: bool, first: bool) -> list[Config]:
    """``own`` ways and, where ``allowed``, PyTorch's products: these first where they are the likely best."""
    if not allowed:
        return own
    return [LIBRARY, *own[:7]] if first else [*own[:7], LIBRARY]


def product_plan(
    u: Value, weight: Tensor, by_image: bool, tile: Config, blocks: int, least: int, dtype: torch.dtype, rounding: str
) -> Plan:
    """For the kernels of :mod:`pointwise`: groups of at least ``least`` tiles, products in ``dtype``."""
    outer, inner = weight.shape[:2]
    groups = share_rows(u.y, by_image, tile.blocks["ROWS"], blocks, least)
    i, o = channel_unit(inner), channel_unit(outer)
    sizes = {**groups._asdict(), "in_units": inner // i, "IN_UNIT": i, "out_units": outer // o, "OUT_UNIT": o}
    sizes |= {"DTYPE": _DTYPES[dtype], "PRECISION": rounding}
    return Plan(groups.count * blocks, groups, {**sizes, **tile.arguments()})


def pointwise_backward(
    g: Gradient, weight: Tensor, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool, rounding: str,
):  # fmt: skip
    """(du, sums, dweight)."""
    (n, inner, h, w), outer, dtype, wants = u.y.shape, weight.shape[0], u.y.dtype, (want_du, want_sums, want_dweight)
    by_image = u.gate is not None or g.of.gate is not None
    key = (*u.y.shape, outer, dtype, rounding, by_image, *asked(g, residual))
    allowed = _same_rounding(dtype, rounding)

    def ways() -> list[Config]:
        return _both([OWN], allowed, config.library_backward(n * h * w, inner, outer, by_image))

    def run(way: Config):
        if way == LIBRARY:
            return library.pointwise_backward(g, weight, u, norm_of, residual, *wants)
        return _own_backward(key, g, weight, u, norm_of, residual, *wants, by_image, rounding)

    more = library.is_deferred(u), *wants, allowed
    return tuning.best(("pointwise_gradients", *key, *more), ways, u.y.device, _itself, run)


def _itself(way: Config) -> Config:
    return way


def _own_backward(
    key: tuple, g: Gradient, weight: Tensor, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool, by_image: bool, rounding: str,
):  # fmt: skip
    """By one kernel where a block holds all output channels, else by one for du and sums and one for dweight."""
    together = want_du and want_dweight and config.holds(weight.shape[0], u.y.dtype)
    du = sums = parts = None
    if want_du:
        wants = want_sums, together
        du, sums, parts = _input_gradient(key, g, weight, u, norm_of, residual, *wants, by_image, rounding)
    if want_dweight and not together:
        parts = _weight_gradient(key, g, weight, u, by_image, rounding)
    return du, sums, added(parts, weight.shape) if want_dweight else None


def _input_gradient(
    key: tuple, g: Gradient, weight: Tensor, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_sums: bool, want_dweight: bool, by_image: bool, rounding: str,
):  # fmt: skip
    """(du, sums, parts of dweight)."""
    outer, inner, dtype = *weight.shape[:2], u.y.dtype
    sums_of = 0 if not want_sums else 2 if u.gate is None else 5

    def tiles() -> list[Config]:
        pixels = rows_of(u.y, by_image)[1]
        return config.pointwise_backward(pixels, inner, outer, dtype, rounding, want_dweight, sums_of)

    def plan(tile: Config) -> Plan:
        least = _least_tiles(inner, outer, tile, dtype) if want_dweight else 1
        return product_plan(u, weight, by_image, tile, cdiv(inner, tile.blocks["IN_BLOCK"]), least, dtype, rounding)

    def run(plan: Plan):
        du = empty_channels_last(u.y, tuple(u.y.shape))
        sums = empty_sums(u, plan.groups) if want_sums else None
        parts = vectors(u.y, plan.groups.count, outer, inner) if want_dweight else None
        arguments = {**gradient_arguments(g), **value_arguments(u), **norm_arguments(norm_of)}
        arguments |= {"weight": weight, "residual": residual, "du": du, "sums": sums, "dweight": parts}
        if not (want_sums or want_dweight):
            arguments |= {"x": None, "scale": None, "shift": None, "gate": None}  # du alone does not depend on u
        launch(pointwise.pointwise_backward, plan, du.device, arguments)
        return du, sums, parts

    return tuning.best(("pointwise_backward", *key, want_dweight, sums_of), tiles, u.y.device, plan, run)


def _weight_gradient(key: tuple, g: Gradient, weight: Tensor, u: Value, by_image: bool, rounding: str) -> Tensor:
    """Parts of dweight."""
    outer, inner, dtype = *weight.shape[:2], u.y.dtype

    def tiles() -> list[Config]:
        return config.pointwise_weight(rows_of(u.y, by_image)[1], inner, outer, dtype, rounding)

    def plan(tile: Config) -> Plan:
        blocks = cdiv(inner, tile.blocks["IN_BLOCK"]) * cdiv(outer, tile.blocks["OUT_BLOCK"])
        least = _least_tiles(inner, outer, tile, dtype)
        return product_plan(u, weight, by_image, tile, blocks, least, dtype, rounding)

    def run(plan: Plan) -> Tensor:
        parts = vectors(u.y, plan.groups.count, outer, inner)
        arguments = {**gradient_arguments(g), **value_arguments(u), "dweight": parts}
        launch(pointwise.pointwise_weight, plan, parts.device, {**arguments, "dbias": None})
        return parts

    return tuning.best(("pointwise_weight", *key), tiles, u.y.device, plan, run)


def _least_tiles(inner: int, outer: int, tile: Config, dtype: torch.dtype) -> int:
    """Tiles a group for which writing and reading a part of dweight costs a sixteenth of reading the tiles."""
    part, row = 2 * 4 * inner * outer, 2 * (inner + outer) * dtype.itemsize
    return cdiv(16 * part, max(tile.blocks["ROWS"] * row, 1))


# Depthwise convolutions -----------------------------------------------------------------------------------------------


def _rows(stage: Stage) -> tuple[int, int, int]:
    """(phases, STEP, GAP): see depthwise.py."""
    stride, dilation = stage.stride[0], stage.dilation[0]
    gap = gcd(stride, dilation)
    return dilation // gap, stride // gap, gap


def depthwise_key(name: str, u: Value, stage: Stage, *more: object) -> tuple:
    return name, *u.y.shape, u.y.dtype, stage.kernel, stage.stride, stage.padding, stage.dilation, *more


def depthwise_forward(u: Value, weight: Tensor, stage: Stage, statistics: bool, after: dict, pool: bool):
    """(y, its statistics, the means over parts of each image, to be added for squeeze-excite)."""
    n, c, _, _ = u.y.shape
    _, _, oh, ow = shape = stage.output_shape(u.y.shape, weight.shape)
    by_image = u.gate is not None or pool

    def tiles() -> list[Config]:
        phases, step, _ = _rows(stage)
        sizes = n, c, cdiv(oh, phases), ow
        return config.depthwise_forward(*sizes, stage.kernel, step, statistics, u.y.dtype, u.y.device)

    def plan(tile: Config) -> Plan:
        phases, step, _ = _rows(stage)
        window = {"STEP": step, "RING": (stage.kernel[0] - 1) // step + 1, "NEW": max(stage.kernel[0] - step, 0)}
        window |= {"left": stage.padding[2], "factor": 1.0 / max(oh * ow, 1)}
        return _units_plan(u.y, (oh, ow), stage, tile, cdiv(oh, phases), ow, by_image, window)

    def run(plan: Plan):
        y = empty_channels_last(u.y, shape)
        found, parts = _statistics(y, statistics, plan.groups)
        pooled = vectors(y, n, plan.groups.parts, c) if pool else None
        arguments = {**value_arguments(u), **after, **parts, "weight": weight, "y": y, "pooled": pooled}
        launch(depthwise.depthwise_forward, plan, y.device, arguments)
        return y, found, pooled

    key = depthwise_key("depthwise_forward", u, stage, by_image, statistics, *_given(after))
    return tuning.best(key, tiles, u.y.device, plan, run)


def depthwise_backward(
    g: Gradient, weight: Tensor, stage: Stage, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool,
):  # fmt: skip
    """(du, sums, dweight), by one kernel."""
    (n, c, _, width), (kh, kw) = u.y.shape, stage.kernel
    by_image, columns = u.gate is not None or g.of.gate is not None, cdiv(width, stage.stride[1])

    def tiles() -> list[Config]:
        sizes = n, c, _backward_steps(stage, u.y.shape[2])[1], columns
        return config.depthwise_backward(*sizes, stage.kernel, u.y.dtype, u.y.device)

    def plan(tile: Config) -> Plan:
        _, step, gap = _rows(stage)
        first, steps = _backward_steps(stage, u.y.shape[2])
        stride, dilation, left = stage.stride[1], stage.dilation[1], stage.padding[2]
        reached = {s + left - j * dilation for s in range(stride) for j in range(kw)}
        offsets = tuple(sorted(r // stride for r in reached if r % stride == 0))
        window = {"LEFT": left, "STEP": step, "GAP": gap, "RING": max(kh, step), "FIRST": first}
        window |= {"OFFSETS": offsets, "COUNT": len(offsets)}
        return _units_plan(u.y, tuple(g.dv.shape[2:]), stage, tile, steps, columns, by_image, window)

    def run(plan: Plan):
        du = empty_channels_last(u.y, tuple(u.y.shape)) if want_du else None
        sums = empty_sums(u, plan.groups) if want_sums else None
        parts = vectors(u.y, plan.groups.count, c, kh * kw) if want_dweight else None
        arguments = {**gradient_arguments(g), **value_arguments(u), **norm_arguments(norm_of)}
        arguments |= {"weight": weight, "residual": residual, "du": du, "sums": sums, "dweight": parts}
        launch(depthwise.depthwise_backward, plan, u.y.device, arguments)
        return du, sums, parts

    key = depthwise_key("depthwise_backward", u, stage, by_image, want_du, want_sums, want_dweight, *asked(g, residual))
    du, sums, parts = tuning.best(key, tiles, u.y.device, plan, run)
    return du, sums, added(parts, weight.shape) if want_dweight else None


def _backward_steps(stage: Stage, height: int) -> tuple[int, int]:
    """(the first step, how many): from the one whose rows begin the image to the one whose rows end it."""
    phases, step, _ = _rows(stage)
    first = 0 if phases == 1 else -1
    return first, max((height - 1 + stage.padding[0]) // (stage.dilation[0] * step) + 1 - first, 1)


def _units_plan(
    x: Tensor, out: tuple[int, int], stage: Stage, tile: Config, steps: int, columns: int, by_image: bool, window: dict
) -> Plan:
    (n, c, height, width), (kh, kw), (sh, sw), (dh, dw) = x.shape, stage.kernel, stage.stride, stage.dilation
    column_blocks, strips, phases = cdiv(columns, tile.blocks["COLUMNS"]), cdiv(steps, tile.strip), _rows(stage)[0]
    blocks, per_image = cdiv(c, tile.blocks["CHANNELS"]), phases * strips * column_blocks
    images, units = (n, per_image) if by_image else (1, n * per_image)
    groups, unit = share(x.device, images, units, units, blocks), channel_unit(c)
    sizes = {
        **{"H": height, "W": width, "OH": out[0], "OW": out[1], "top": stage.padding[0]},
        **{"KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw},
        **{"phases": phases, "strips": strips, "strip": tile.strip, "column_blocks": column_blocks},
        **{"units": c // unit, "UNIT": unit, "ALL": not by_image},
    }
    return Plan(groups.count * blocks, groups, {**sizes, **groups._asdict(), **window, **tile.arguments()})
