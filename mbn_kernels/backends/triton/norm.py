"""Batch norm's per-channel numbers, made where the parts of its statistics and sums are merged; sums over parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, tuning
from .device import kernel, vector
from .launch import Groups, Plan, cdiv, launch, vectors


class Statistics:
    """Statistics of a raw output in parts: of each part a number near its mean (the pivot), what the mean differs from
    it, and the sum of squared deviations, ``[parts, 3, C]``; and how many values it has, ``[parts]``. Two numbers for a
    mean, since one has not the digits for the variance of numbers far from zero.
    """

    def __init__(self, like: Tensor, parts: int, channels: int) -> None:
        numbers = vectors(like, parts * (3 * channels + 1))
        self.parts, self.moments, self.counts = parts, numbers[: 3 * channels * parts], numbers[3 * channels * parts :]

    def arguments(self) -> dict:
        return {"counts": self.counts, "moments": self.moments}


def one_part(y: Tensor, mean: Tensor, var: Tensor) -> Statistics:
    """Statistics that are whole already."""
    found, count = Statistics(y, 1, len(mean)), y.numel() // len(mean)
    found.counts.fill_(count)
    found.moments.view(3, -1).copy_(torch.stack([mean, torch.zeros_like(mean), var * count]))
    return found


@triton.jit
def _store_norm(norm, c, channels, keep, weight, bias, mean, var, eps):
    """The rows scale, shift, mean, rstd of :class:`mbn_kernels.chain.Norm`."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))  # few, and everything after them depends on them
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + c, mask=keep, other=0.0).to(tl.float32)
    shift = -mean * scale
    if bias is not None:
        shift += tl.load(bias + c, mask=keep, other=0.0).to(tl.float32)
    tl.store(norm + c, scale, mask=keep)
    tl.store(norm + channels + c, shift, mask=keep)
    tl.store(norm + 2 * channels + c, mean, mask=keep)
    tl.store(norm + 3 * channels + c, rstd, mask=keep)


@triton.jit
def _part_means(counts, moments, part, parts, c, channels, keep, pivot):
    """(how many values parts have, what their means differ from the pivot); nothing of a part without values."""
    mask = part < parts
    n = tl.load(counts + part, mask=mask, other=0.0)
    at = part[:, None] * (3 * channels) + c[None, :]
    both = mask[:, None] & keep[None, :]
    own = tl.load(moments + at, mask=both, other=0.0) - pivot
    off = own + tl.load(moments + at + channels, mask=both, other=0.0)
    return n, tl.where((n > 0)[:, None], off, 0.0)


@kernel
def _batch_norm(
    counts, moments, weight, bias, norm, mean_out, var_out,
    parts, channels, eps, unbiased,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < channels
    p = tl.arange(0, PARTS)
    pivot = tl.load(moments + c, mask=keep, other=0.0)[None, :]  # the first part's; every mean is taken from it
    weighted = tl.zeros((PARTS, CHANNELS), tl.float32)
    total = tl.zeros((PARTS,), tl.float32)
    for first in range(0, parts, PARTS):
        n, off = _part_means(counts, moments, first + p, parts, c, channels, keep, pivot)
        weighted += n[:, None] * off
        total += n
    count = tl.sum(total, 0)
    off_mean = tl.sum(weighted, 0) / count
    m2 = tl.zeros((PARTS, CHANNELS), tl.float32)
    for first in range(0, parts, PARTS):
        n, off = _part_means(counts, moments, first + p, parts, c, channels, keep, pivot)
        at = (first + p)[:, None] * (3 * channels) + 2 * channels + c[None, :]
        delta = off - off_mean[None, :]
        within = tl.load(moments + at, mask=(first + p < parts)[:, None] & keep[None, :], other=0.0)
        m2 += within + n[:, None] * delta * delta
    mean = tl.load(moments + c, mask=keep, other=0.0) + off_mean
    var = tl.sum(m2, 0) / count
    _store_norm(norm, c, channels, keep, weight, bias, mean, var, eps)
    tl.store(mean_out + c, mean, mask=keep)
    tl.store(var_out + c, var * unbiased, mask=keep)


@kernel
def _running_norm(mean, var, weight, bias, norm, channels, eps, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < channels
    mu, v = tl.load(mean + c, mask=keep, other=0.0), tl.load(var + c, mask=keep, other=1.0)
    _store_norm(norm, c, channels, keep, weight, bias, mu, v, eps)


@kernel
def _norm_backward(
    sums, gate, q, norm, dweight, dbias, b_out, c_out,
    rows, parts, channels, inverse_count,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    keep = c < channels
    p = tl.arange(0, PARTS)
    db = tl.zeros((PARTS, CHANNELS), tl.float32)
    dw = tl.zeros((PARTS, CHANNELS), tl.float32)
    for first in range(0, rows, PARTS):
        row = first + p
        mask = (row < rows)[:, None] & keep[None, :]
        if gate is None:
            at = row[:, None] * (2 * channels) + c[None, :]
            db += tl.load(sums + at, mask=mask, other=0.0)
            dw += tl.load(sums + at + channels, mask=mask, other=0.0)
        else:  # rows are parts of images
            per_image = (row // parts)[:, None] * channels + c[None, :]
            g = tl.load(gate + per_image, mask=mask, other=0.0)
            squeezed = tl.load(q + per_image, mask=mask, other=0.0)
            at = sums + row[:, None].to(tl.int64) * (5 * channels) + c[None, :]
            t2 = tl.load(at + channels, mask=mask, other=0.0)
            t3 = tl.load(at + 2 * channels, mask=mask, other=0.0)
            t4 = tl.load(at + 3 * channels, mask=mask, other=0.0)
            t5 = tl.load(at + 4 * channels, mask=mask, other=0.0)
            db += g * t2 + squeezed * t3
            dw += g * t4 + squeezed * t5
    dbeta, dgamma = tl.sum(db, 0), tl.sum(dw, 0)
    tl.store(dweight + c, dgamma, mask=keep)
    tl.store(dbias + c, dbeta, mask=keep)
    if b_out is not None:
        scale = vector(norm, c, keep)
        rstd = vector(norm, 3 * channels + c, keep)
        b = -scale * rstd * (dgamma * inverse_count)
        tl.store(b_out + c, b, mask=keep)
        tl.store(c_out + c, -scale * (dbeta * inverse_count) - b * vector(norm, 2 * channels + c, keep), mask=keep)


@kernel
def _sum_parts(parts_of, total, parts, size, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    i = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    keep = i < size
    p = tl.arange(0, PARTS)
    found = tl.zeros((PARTS, CHANNELS), tl.float32)
    for first in range(0, parts, PARTS):
        at = (first + p)[:, None].to(tl.int64) * size + i[None, :]
        found += tl.load(parts_of + at, mask=(first + p < parts)[:, None] & keep[None, :], other=0.0)
    tl.store(total + i, tl.sum(found, 0), mask=keep)


def _per_channel(kernel, tile: Callable, channels: int, parts: int, device: torch.device, arguments: dict) -> None:
    """Starts a kernel that merges ``parts`` of each channel, in the tile that ``tile`` gives for both."""

    def plan(chosen: config.Config) -> Plan:
        programs = cdiv(channels, chosen.blocks["CHANNELS"])
        return Plan(programs, Groups(1, channels, 1, 1, 1), chosen.arguments())

    def run(plan: Plan) -> None:
        launch(kernel, plan, device, arguments)

    tuning.best((kernel.fn.__name__, channels, parts), lambda: [tile(channels, parts)], device, plan, run)


def batch_norm(statistics: Statistics, count: int, weight: Tensor | None, bias: Tensor | None, eps: float):
    channels = statistics.moments.numel() // (3 * statistics.parts)
    norm, mean, var = (vectors(statistics.moments, *shape) for shape in ((4, channels), (channels,), (channels,)))
    arguments = {
        **statistics.arguments(),
        **{"weight": weight, "bias": bias, "norm": norm, "mean_out": mean, "var_out": var},
        **{"parts": statistics.parts, "channels": channels, "eps": eps},
        "unbiased": count / (count - 1) if count > 1 else float("nan"),
    }
    _per_channel(_batch_norm, config.merge, channels, statistics.parts, norm.device, arguments)
    return norm, mean, var


def running_norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    channels = mean.shape[0]
    norm = vectors(mean, 4, channels)
    arguments = {"mean": mean, "var": var, "weight": weight, "bias": bias, "norm": norm}
    arguments |= {"channels": channels, "eps": eps}
    _per_channel(_running_norm, config.merge, channels, 0, norm.device, arguments)
    return norm


def norm_backward(sums: Tensor, gate: Tensor | None, q: Tensor | None, norm: Tensor, count: int | None):
    images, parts, _, channels = sums.shape
    rows = images * parts
    dweight, dbias = vectors(sums, channels), vectors(sums, channels)
    b, c = (None, None) if count is None else (vectors(sums, channels), vectors(sums, channels))
    arguments = {
        **{"sums": sums, "gate": gate, "q": q, "norm": norm},
        **{"dweight": dweight, "dbias": dbias, "b_out": b, "c_out": c},
        **{"rows": rows, "parts": parts, "channels": channels, "inverse_count": 1.0 / (count or 1)},
    }
    _per_channel(_norm_backward, config.merge, channels, max(rows, 1), norm.device, arguments)
    return dweight, dbias, b, c


def sum_parts(parts_of: Tensor) -> Tensor:
    """``[P, ...]`` -> ``[...]``, in float32 and always in the same order."""
    total = vectors(parts_of, *parts_of.shape[1:])
    parts, size = parts_of.shape[0], total.numel()
    arguments = {"parts_of": parts_of, "total": total, "parts": parts, "size": size}
    _per_channel(_sum_parts, config.sum_parts, size, parts, total.device, arguments)
    return total
