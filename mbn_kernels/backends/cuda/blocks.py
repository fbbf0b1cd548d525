"""Starts the whole-block kernel of ``csrc/cuda/inverted_residual.cuh``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...chain import Stage
from ..reference import empty_channels_last
from ..triton.elementwise import mean_of_parts
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
    """(the output of the fused stages plus the residual, where the last has a gate its mean over each image)."""
    shape, flat = tuple(x.shape), []
    for stage, p in zip(stages, params, strict=True):
        shape = stage.output_shape(shape, p["weight"].shape)
        flat.append(p["weight"])
        flat += [p[name].float() for name in ("bn_weight", "bn_bias", "running_mean", "running_var") if name in p]
    depthwise = next(stage for stage in stages if stage.conv == "depthwise")
    out, pooled = empty_channels_last(x, shape), None
    if stages[-1].gate:
        pooled = vectors(x, shape[0], cdiv(shape[2], way.height) * cdiv(shape[3], way.width), shape[1])
    torch.ops.mbn.cuda_inverted_residual.default(
        *(x, flat, [n for stage in stages for n in _layer(stage)], [stage.eps for stage in stages]),
        *(depthwise.stride[0], [depthwise.padding[0], depthwise.padding[2]], residual, [way.height, way.width]),
        *(pooled, out),
    )
    return out, None if pooled is None else mean_of_parts(pooled)


def _layer(stage: Stage) -> tuple[int, int, int]:
    return int(stage.conv == "depthwise"), int(stage.affine), ACTIVATIONS[stage.act].code
