"""Starts the kernels of ``csrc/cuda/depthwise_*.cuh``: allocates what they write, shares out the work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...chain import Gradient, Norm, Stage, Value
from ..reference import empty_channels_last
from ..triton import convolutions, tuning
from ..triton.arguments import gradient_arguments
from ..triton.config import Config
from ..triton.elementwise import empty_sums
from ..triton.launch import ALIGNED, Groups, cdiv, vectors
from ..triton.norm import Statistics
from . import config
from .config import TRITON, Work

_GRADIENT = ("g_dv", "g_y", "g_scale", "g_shift", "g_gate", "G_ACT", "g_q", "g_a", "g_b", "g_c")


class Plan(NamedTuple):
    """Which blocks take what; None where Triton's kernel runs."""

    groups: Groups | None
    share: list[int] | None


def fits(stage: Stage, *tensors: Tensor | None) -> bool:
    """Whether there is a kernel for this window and these tensors: a square one of 3, 5 or 7 with one stride of 1 or 2,
    and channels in whole, aligned pieces of 16 bytes.
    """
    k, s = stage.kernel[0], stage.stride[0]
    if stage.kernel != (k, k) or stage.stride != (s, s) or stage.dilation != (1, 1) or k not in (3, 5, 7) or s > 2:
        return False
    first = tensors[0]
    if first.shape[1] % config.channel_vector(first.dtype) or not first.numel():
        return False
    return all(t is None or t.data_ptr() % ALIGNED == 0 for t in tensors)


def _tiles(work: Work) -> list[Config]:
    return [*config.depthwise(work), TRITON]


def _plan(work: Work, tile: Config) -> Plan:
    if tile == TRITON:
        return Plan(None, None)
    groups = config.shared(tile, work)
    share = [tile.blocks["vectors"], tile.blocks["groups"], tile.strip, groups.parts, groups.run, groups.span]
    return Plan(groups, share)


def forward_work(shape: Sequence[int], stage: Stage, dtype: torch.dtype, device: torch.device) -> Work:
    """What there is to do for an input of this shape."""
    window = stage.kernel[0], stage.stride[0]
    return Work(*stage.output_shape(shape, None), config.FORWARD_COLUMNS, window, False, dtype, device)


def backward_work(shape: Sequence[int], stage: Stage, dtype: torch.dtype, device: torch.device) -> Work:
    (kernel, _), (stride, _) = stage.kernel, stage.stride
    before = stage.padding[0], stage.padding[2]
    steps = [cdiv(size + pad, stride) - pad // stride for size, pad in zip(shape[2:], before, strict=True)]
    return Work(*shape[:2], *steps, config.backward_columns(kernel, stride), (kernel, stride), True, dtype, device)


def depthwise_forward(u: Value, weight: Tensor, stage: Stage, statistics: bool, after: dict, pool: bool):
    """(y, its statistics, parts of its mean over each image), as :func:`convolutions.depthwise_forward`."""
    if not fits(stage, u.y, after["residual"]):
        return convolutions.depthwise_forward(u, weight, stage, statistics, after, pool)
    shape, work = stage.output_shape(u.y.shape, None), forward_work(u.y.shape, stage, u.y.dtype, u.y.device)

    def run(plan: Plan):
        if plan.share is None:
            return convolutions.depthwise_forward(u, weight, stage, statistics, after, pool)
        y = empty_channels_last(u.y, shape)
        found = Statistics(y, plan.groups.count, shape[1]) if statistics else None
        pooled = vectors(y, shape[0], plan.groups.parts, shape[1]) if pool else None
        torch.ops.mbn.cuda_depthwise_forward.default(
            *(u.y, u.scale, u.shift, u.gate, ACTIVATIONS[u.act].code),
            *(weight, stage.stride[0], [stage.padding[0], stage.padding[2]]),
            *((found.counts, found.moments) if found else (None, None)),
            *(after[name] for name in ("mean", "var", "bn_weight", "bias")),
            *(after["eps"], after["OUT_ACT"], after["residual"], pooled, plan.share, y),
        )
        return y, found, pooled

    wants = statistics, pool, after["var"] is not None, after["residual"] is not None
    key = convolutions.depthwise_key("cuda_depthwise_forward", u, stage, *wants)
    return tuning.best(key, partial(_tiles, work), u.y.device, partial(_plan, work), run)


def depthwise_backward(
    g: Gradient, weight: Tensor, stage: Stage, u: Value, norm_of: Norm | None, residual: Tensor | None,
    want_du: bool, want_sums: bool, want_dweight: bool,
):  # fmt: skip
    """(du, sums, dweight), by one kernel and, for dweight, one that adds its parts."""
    wants = want_du, want_sums, want_dweight
    if not fits(stage, u.y, g.dv, g.of.y, residual):
        return convolutions.depthwise_backward(g, weight, stage, u, norm_of, residual, *wants)
    work = backward_work(u.y.shape, stage, u.y.dtype, u.y.device)

    def run(plan: Plan):
        if plan.share is None:
            return convolutions.depthwise_backward(g, weight, stage, u, norm_of, residual, *wants)
        du = empty_channels_last(u.y, tuple(u.y.shape)) if want_du else None
        sums = empty_sums(u, plan.groups) if want_sums else None
        parts = vectors(u.y, plan.groups.count, *weight.shape) if want_dweight else None
        of = gradient_arguments(g)
        torch.ops.mbn.cuda_depthwise_backward.default(
            *(of[name] for name in ("g_dv", "g_y", "g_scale", "g_shift", "g_gate", "G_ACT")),
            *(of[name] for name in ("g_q", "g_a", "g_b", "g_c")),
            *(u.y, u.scale, u.shift, u.gate, ACTIVATIONS[u.act].code),
            *(stage.stride[0], [stage.padding[0], stage.padding[2]], plan.share, weight, residual),
            *((norm_of.mean, norm_of.rstd) if norm_of else (None, None)),
            *(du, sums, parts),
        )
        return du, sums, convolutions.added(parts, weight.shape) if want_dweight else None

    key = convolutions.depthwise_key("cuda_depthwise_backward", u, stage, *wants, *convolutions.asked(g, residual))
    return tuning.best(key, partial(_tiles, work), u.y.device, partial(_plan, work), run)
