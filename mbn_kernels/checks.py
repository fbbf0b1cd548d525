"""Every check of a caller's arguments. Messages are one sentence: ``op: argument: expected …, got …``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .chain import BIAS, RUNNING, Stage, accumulate_dtype, stage_parameters


def fail(op: str, argument: str, expected: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{op}: {argument}: expected {expected}, got {got}")


def check_tensor(op: str, argument: str, value: Any, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, Tensor):
        fail(op, argument, "a tensor", type(value).__name__, TypeError)


def check_bool(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(op, argument, "True or False", repr(value), TypeError)


def check_number(op: str, argument: str, value: Any, *, least: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, argument, "a number", repr(value), TypeError)
    if least is not None and not value >= least:
        fail(op, argument, f"at least {least:g}", value)


def check_act(op: str, argument: str, name: Any) -> None:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        fail(op, argument, f"one of {', '.join(ACTIVATIONS)}", repr(name))


def integers(op: str, argument: str, value: Any, counts: Sequence[int], least: int) -> tuple[int, ...]:
    """An int, or a sequence of as many ints as one of ``counts``, each at least ``least``; an int is repeated
    counts[0] times.
    """
    values = (value,) * counts[0] if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or len(values) not in counts:
        lengths = " or ".join(str(c) for c in counts)
        fail(op, argument, f"an integer or {lengths} integers", repr(value), TypeError)
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int):
            fail(op, argument, "integers", repr(value), TypeError)
        if v < least:
            fail(op, argument, f"at least {least}", repr(value))
    return tuple(values)


def check_beside(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Checks a parameter: dense, on x's device, of x's dtype or (but for a weight) the one that x accumulates in."""
    if t.device != x.device:
        fail(op, name, f"a tensor on {x.device} as x is", f"one on {t.device}")
    if t.layout != torch.strided:
        fail(op, name, "a dense tensor", f"layout {t.layout}", TypeError)
    wider = accumulate_dtype(x.dtype)
    if t.dtype != x.dtype and (name == "weight" or t.dtype != wider):
        also = "" if name == "weight" or wider == x.dtype else f" or {wider}"
        fail(op, name, f"{x.dtype}{also} for x of {x.dtype}", t.dtype, TypeError)


def check_chain(
    op: str, x: Tensor, stages: Sequence[Stage], params: Sequence[Tensor], residual: bool
) -> tuple[int, ...]:
    """Checks every tensor of a chain against its stages: rank, shape, dtype, device, layout; returns the output's
    shape.
    """
    check_input(op, x)
    count = sum(len(stage.parameter_names) for stage in stages)
    if len(params) != count:
        fail(op, "params", f"{count} tensors", len(params))
    shape = tuple(x.shape)
    for stage, p in zip(stages, stage_parameters(stages, params), strict=True):
        shape = _check_stage(op, x, shape, stage, p)
    if residual and shape != tuple(x.shape):
        fail(op, "residual", f"the output's shape {shape}", tuple(x.shape))
    return shape


def check_input(op: str, x: Tensor) -> None:
    """Checks that x is dense, of floating point, and ``[N, C, H, W]``."""
    if x.layout != torch.strided or x.is_quantized:
        fail(op, "x", "a dense tensor", "a quantized one" if x.is_quantized else f"layout {x.layout}", TypeError)
    if not x.dtype.is_floating_point:
        fail(op, "x", "a floating-point tensor", x.dtype, TypeError)
    if x.dim() != 4:
        fail(op, "x", "4 dimensions (N, C, H, W)", f"{x.dim()}")


def _check_stage(op: str, x: Tensor, shape: tuple[int, ...], stage: Stage, p: dict[str, Tensor]) -> tuple[int, ...]:
    for name, t in p.items():
        check_beside(op, name, t, x)
    channels, weight = shape[1], p.get("weight")
    if weight is not None:
        kernel, groups = tuple(stage.kernel), channels if stage.conv == "depthwise" else 1
        expected = (channels, 1, *kernel) if groups > 1 or stage.conv == "depthwise" else ("out", channels, *kernel)
        given = tuple(weight.shape) + ((1, 1) if stage.norm == "bias" and weight.dim() == 2 else ())  # a linear layer's
        if len(given) != 4 or given[1:] != expected[1:] or (stage.conv == "depthwise" and given[0] != channels):
            text = f"({', '.join(str(e) for e in expected)}) for an input of {channels} channels"
            fail(op, "weight", f"shape {text}", given)
    shape = stage.output_shape(shape, None if weight is None else weight.shape)
    if min(shape[2:]) < 1:
        fail(op, "x", f"height and width that the {stage.kernel[0]}x{stage.kernel[1]} window fits in", tuple(x.shape))
    for name in ("bn_weight", "bn_bias", *RUNNING, *BIAS):
        if name in p and tuple(p[name].shape) != (shape[1],):
            fail(op, name, f"shape ({shape[1]},)", tuple(p[name].shape))
    alone = stage.norm == "batch" and stage.group is None  # other processes' batches may hold more
    if alone and shape[0] * shape[2] * shape[3] == 1:
        fail(op, "x", "more than 1 value per channel when training", f"{shape} at the normalised stage")
    if stage.gate:
        _check_gate(op, shape[1], p)
    return shape


def _check_gate(op: str, channels: int, p: dict[str, Tensor]) -> None:
    hidden = p["w1"].shape[0] if p["w1"].dim() else 0
    expected = {"w1": (hidden, channels), "b1": (hidden,), "w2": (channels, hidden), "b2": (channels,)}
    for name, want in expected.items():
        given = tuple(p[name].shape)
        if given != want and given != (*want, 1, 1):
            fail(op, name, f"shape {want}", given)
