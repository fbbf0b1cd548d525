"""Squeeze-excite's two layers: the kernels of 1x1 convolutions with a bias on 1x1 maps, a row an image.

They multiply in the dtype of the maps, as stock's layers do under autocast and in ``.half()``: 16-bit maps have the
tensor cores. Operands are rounded as they are multiplied; what is stored is float32, as it is little.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...chain import Gradient, Value
from . import config, pointwise, tuning
from .arguments import gradient_arguments, value_arguments
from .config import Config
from .convolutions import RAW, precision, product_plan
from .launch import Groups, Plan, cdiv, launch, rows_of, vectors


def forward(pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]) -> Tensor:
    """``gate_act(act(pooled w1^T + b1) w2^T + b2)``: ``[N, C]`` in float32."""
    dtype, (act, gate_act) = _dtype(p), acts
    hidden = _layer(_map(pooled), p["w1"], p["b1"], act, dtype)
    return _layer(Value(hidden), p["w2"], p["b2"], gate_act, dtype).flatten(1)


def backward(dgate: Tensor, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]) -> tuple[Tensor, dict]:
    """(gradient of pooled, those of the parameters); the two layers are small: computed again, not saved."""
    dtype, squeezed = _dtype(p), _map(pooled)
    hidden = Value(_layer(squeezed, p["w1"], p["b1"], "identity", dtype), act=acts[0])
    logits = Value(_layer(hidden, p["w2"], p["b2"], "identity", dtype), act=acts[1])
    dhidden, dw2, db2 = _layer_backward(Gradient(dgate[:, :, None, None], logits), p["w2"], hidden, dtype)
    dpooled, dw1, db1 = _layer_backward(Gradient(dhidden, hidden), p["w1"], squeezed, dtype)
    return dpooled.flatten(1), {"w1": dw1, "b1": db1, "w2": dw2, "b2": db2}


def _map(pooled: Tensor) -> Value:
    return Value(pooled[:, :, None, None])


def _dtype(p: dict[str, Tensor]) -> torch.dtype:
    """That of the maps, which the convolution's weight has; without a convolution that of the layers' own."""
    return p.get("weight", p["w1"]).dtype


def _rounding(dtype: torch.dtype) -> str:
    return precision(dtype, conv=False)


def _layer(u: Value, weight: Tensor, bias: Tensor, act: str, dtype: torch.dtype) -> Tensor:
    (outer, inner), rounding = weight.shape[:2], _rounding(dtype)

    def plan(tile: Config) -> Plan:
        return product_plan(u, weight, False, tile, cdiv(outer, tile.blocks["OUT_BLOCK"]), 1, dtype, rounding)

    def run(plan: Plan) -> Tensor:
        y = vectors(u.y, len(u.y), outer, 1, 1)
        after = {**RAW, "bias": bias, "OUT_ACT": ACTIVATIONS[act].code}
        arguments = {**value_arguments(u), **after, "counts": None, "moments": None, "weight": weight, "y": y}
        launch(pointwise.pointwise_forward, plan, y.device, arguments)
        return y

    sizes = len(u.y), inner, outer
    key = "gate_forward", *sizes, u.act, act, dtype, rounding
    return tuning.best(key, partial(config.gate_forward, *sizes, dtype), u.y.device, plan, run)


def _layer_backward(g: Gradient, weight: Tensor, u: Value, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias); one group of tiles has all rows, so the latter are whole."""
    (outer, inner), rounding = weight.shape[:2], _rounding(dtype)
    of_output, of_input = gradient_arguments(g), value_arguments(u)
    sizes = len(u.y), inner, outer
    key = *sizes, u.act, g.of.act, dtype, rounding

    def plan_input(tile: Config) -> Plan:
        return product_plan(u, weight, False, tile, cdiv(inner, tile.blocks["IN_BLOCK"]), 1, dtype, rounding)

    def run_input(plan: Plan) -> Tensor:
        du = vectors(u.y, len(u.y), inner, 1, 1)
        absent = dict.fromkeys(("x", "scale", "shift", "gate", "mean", "rstd", "residual", "sums", "dweight"))
        arguments = {**of_output, **of_input, **absent, "weight": weight, "du": du}
        launch(pointwise.pointwise_backward, plan, du.device, arguments)
        return du

    def plan_weight(tile: Config) -> Plan:
        blocks = cdiv(inner, tile.blocks["IN_BLOCK"]) * cdiv(outer, tile.blocks["OUT_BLOCK"])
        images, pixels = rows_of(u.y, False)
        whole = Groups(images, pixels, 1, cdiv(pixels, tile.blocks["ROWS"]), 1)
        found = product_plan(u, weight, False, tile, blocks, 1, dtype, rounding)
        return Plan(blocks, whole, {**found.arguments, **whole._asdict()})

    def run_weight(plan: Plan) -> tuple[Tensor, Tensor]:
        dweight, dbias = vectors(u.y, outer, inner), vectors(u.y, outer)
        arguments = {**of_output, **of_input, "dweight": dweight, "dbias": dbias}
        launch(pointwise.pointwise_weight, plan, dweight.device, arguments)
        return dweight, dbias

    tiles = [partial(each, *sizes, dtype) for each in (config.gate_backward, config.gate_weight)]
    du = tuning.best(("gate_backward", *key), tiles[0], u.y.device, plan_input, run_input)
    return du, *tuning.best(("gate_weight", *key), tiles[1], u.y.device, plan_weight, run_weight)
