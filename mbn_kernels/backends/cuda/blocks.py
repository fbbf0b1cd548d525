"""Starts the whole-block kernel of ``csrc/cuda/inverted_residual.cuh``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...chain import Stage
from ..reference import empty_channels_last
from ..triton.launch import ALIGNED, cdiv, vectors
from .planner import Way

DTYPES = (torch.float16, torch.bfloat16)


def fits(x: Tensor, params: Sequence[dict[str, Tensor]]) -> bool:
    """Whether these tensors are such as the kernel takes: of 16 bits, and aligned."""
    weights = (p["weight"] for p in params)
    return x.dtype in DTYPES and x.numel() > 0 and all(t.data_ptr() % ALIGNED == 0 for t in (x, *weights))


def inverted_residual(
    x: Tensor, stages: Sequence[Stage], params: Sequence[dict[str, Tensor]], way: Way, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(the output of the fused stages plus the residual, where the last has a gate the parts of its mean over each
    image).
    """
    shape, flat = tuple(x.shape), []
    for stage, p in zip(stages, params, strict=True):
        shape = stage.output_shape(shape, p["weight"].shape)
        flat += _parameters(p)
    depthwise = next(stage for stage in stages if stage.conv == "depthwise")
    out, pooled = empty_channels_last(x, shape), None
    if stages[-1].gate:
        pooled = vectors(x, shape[0], cdiv(shape[2], way.height) * cdiv(shape[3], way.width), shape[1])
    torch.ops.mbn.cuda_inverted_residual.default(
        *(x, flat, [n for stage in stages for n in _layer(stage)], [stage.eps for stage in stages]),
        *(depthwise.stride[0], [depthwise.padding[0], depthwise.padding[2]], residual, [way.height, way.width]),
        *(pooled, out),
    )
    return out, pooled


def gated_project(
    y: Tensor, parts: Tensor, gate: Stage, p: dict[str, Tensor], stage: Stage, own: dict[str, Tensor],
    tile: tuple[int, int], residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gate of one stage and the pointwise ``stage`` behind it, from what the former is without its gate."""
    out = empty_channels_last(y, stage.output_shape(y.shape, own["weight"].shape))
    torch.ops.mbn.cuda_gated_project.default(
        *(y, parts, p["w1"], p["b1"], p["w2"], p["b2"], *(ACTIVATIONS[act].code for act in gate.gate)),
        *(_parameters(own), list(_layer(stage)), stage.eps, residual, list(tile), out),
    )
    return out


def _parameters(p: dict[str, Tensor]) -> list[Tensor]:
    return [p[name] for name in ("weight", "bn_weight", "bn_bias", "running_mean", "running_var") if name in p]


def _layer(stage: Stage) -> tuple[int, int, int]:
    return int(stage.conv == "depthwise"), int(stage.affine), ACTIVATIONS[stage.act].code
