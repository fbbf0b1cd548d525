"""The chain engine: the forward and backward order of every block, once, for every backend.

A block is a chain of stages; a stage is a convolution (pointwise or depthwise), batch norm, an activation and,
optionally, a squeeze-excite gate. Only each convolution's raw output ``y`` is stored. Everything after it is a
:class:`Value`, applied by the next kernel as it loads:

    value = act(scale*y + shift) * gate        scale = gamma*rstd, shift = beta - mean*scale

The gradient of a raw output is a :class:`Gradient`, applied on load as well. With dv the gradient of the value, n =
scale*y + shift, x = (y - mean)*rstd and M values per channel:

    dy = a*((dv*gate + q)*act'(n)) + b*y + c    a = gamma*rstd
                                                b = -gamma*rstd^2 * dgamma/M
                                                c = -gamma*rstd * dbeta/M - b*mean

where q, the gradient that reaches the value through the squeezed mean, is 0 without a gate, and b = c = 0 where the
statistics are not the batch's. Where a stage has a process group, M and the sums are those of all its processes
(:mod:`mbn_kernels.synchronize`). The kernel that computes dv accumulates, in the same pass, the sums from which dbeta,
dgamma, the gate's gradient and so a, b, c follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import dense, ranges, synchronize
from .stages import Chain, Stage, chain_spec, parse, stage_parameters, stage_spec  # noqa: F401  (a chain is also text)


class Value(NamedTuple):
    """A tensor that is not stored: ``act(scale*y + shift) * gate``; None stands for 1, 0 and no gate."""

    y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "identity"
    gate: Tensor | None = None


class Gradient(NamedTuple):
    """The gradient of a raw output, not stored: ``a*((dv*gate + q)*act'(scale*y + shift)) + b*y + c``; None stands for
    1 and 0.
    """

    dv: Tensor
    of: Value
    q: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None


class Norm(NamedTuple):
    """The per-channel numbers of a normalised stage, in the accumulation dtype: the rows of what ``norm_forward``
    returns.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


class Kernels(Protocol):
    """What a backend implements. Activations are channels-last; per-channel numbers are in :func:`accumulate_dtype`.

    ``forward`` kernels return (y, statistics of y, or None unless ``statistics``). ``backward`` kernels return (du,
    sums, dweight), each None where not wanted; ``du`` is the gradient of the value ``u`` plus ``residual``, and
    ``sums`` are those of :meth:`reduce_gradient` at ``u``, whose stage has ``norm``.

    Statistics and sums are the backend's own: whole or in parts, as its ``batch_norm``, ``norm_backward`` and
    ``gate_backward`` take them.
    """

    evaluate_checks: bool  # whether `evaluate` takes unchecked arguments, with a RuntimeError for those that do not fit

    def prepared(
        self, x: Tensor, chains: tuple[Chain, ...], flat: list[Tensor], residuals: tuple[bool, ...]
    ) -> Callable[[Tensor], Tensor] | None:
        """:meth:`evaluate` as a function of x, quicker to call where only x changes; None: there is no such way."""

    def evaluates(self, chain: Chain, residual: bool) -> bool:
        """Whether :meth:`evaluate` runs this chain; no stage then normalises by its batch."""

    def evaluate(
        self, x: Tensor, chains: tuple[Chain, ...], flat: Sequence[Tensor], residuals: tuple[bool, ...]
    ) -> Tensor:
        """Whole chains, one behind the other, in one call, where nothing is saved for backward; ``flat`` holds the
        parameters of all.
        """

    def pointwise_forward(self, u: Value, weight: Tensor, statistics: bool): ...
    def depthwise_forward(self, u: Value, weight: Tensor, stage: Stage, statistics: bool): ...
    def statistics(self, y: Tensor):
        """Those of a raw output that PyTorch made."""

    def pool(self, u: Value) -> Tensor:
        """Mean of the value over H and W: ``[N, C]``."""

    def gate_forward(self, pooled: Tensor, p: dict, acts: tuple[str, str]) -> Tensor:
        """``gate_act(act(pooled w1^T + b1) w2^T + b2)``: ``[N, C]``."""

    def gate_backward(self, sums, pooled: Tensor, p: dict, acts: tuple[str, str]):
        """(gradient of pooled, {"w1": …, "b1": …, "w2": …, "b2": …}) from the sums of the gated stage."""

    def batch_norm(self, statistics, count: int, weight: Tensor | None, bias: Tensor | None, eps: float):
        """(the rows of :class:`Norm` ``[4, C]``, mean, unbiased var) from the statistics of ``count`` values."""

    def running_norm(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """The rows of :class:`Norm` from running statistics."""

    def norm_backward(self, sums, gate: Tensor | None, q: Tensor | None, norm: Tensor, count: int | None):
        """(gradient of weight, gradient of bias, b, c) from the stage's sums; with running statistics ``count`` and so
        b and c are None.
        """

    def materialize(self, u: Value, residual: Tensor | None) -> Tensor: ...
    def materialize_gradient(self, g: Gradient, residual: Tensor | None) -> Tensor: ...
    def reduce_gradient(self, dv: Tensor, u: Value, norm: Norm | None):
        """The sums of a stage's backward. With d = act'(n): dv*d and dv*d*x for each channel; with a gate dv*act(n),
        dv*d, d, dv*d*x and d*x for each image and channel.
        """

    def pointwise_backward(self, g: Gradient, weight, u: Value, norm, residual, want_du, want_sums, want_dweight): ...
    def depthwise_backward(
        self, g: Gradient, weight, stage, u: Value, norm, residual, want_du, want_sums, want_dweight
    ): ...


def channels_last(t: Tensor) -> Tensor:
    """As the kernels take it. Where it has to be copied, PyTorch would read memory that was freed, as of a sharded
    parameter, and end the process.
    """
    if t.is_contiguous(memory_format=torch.channels_last):
        return t
    if not (t.is_meta or t.data_ptr()) and t.numel():
        raise RuntimeError("channels_last: t: expected a tensor with memory, got one whose memory was freed")
    return t.contiguous(memory_format=torch.channels_last)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Link(NamedTuple):
    """How a chain meets its neighbours: one may leave its last value to the next, which applies it as it loads the raw
    output.
    """

    act: str = "identity"  # of the value that x is the raw output of, if the chain before left one
    open: bool = False  # whether this chain leaves its own


NO_LINK = Link()


def forward(
    kernels: Kernels,
    x: Tensor,
    chain: Chain,
    flat: Sequence[Tensor],
    residual: bool,
    save: bool,
    rows: Tensor | None = None,
    link: Link = NO_LINK,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Runs the chain: (output, [mean, unbiased var of each batch-normalised stage], what :func:`backward` needs
    besides x and parameters). With ``rows``, those of :class:`Norm`, x is a raw output. Of an open chain the output
    is raw, and its rows are what was saved last.
    """
    u, statistics, saved = _entry(x, rows, link).value, [], []
    for i, (stage, p) in enumerate(zip(chain.stages, stage_parameters(chain.stages, flat), strict=True)):
        with ranges.stage(chain.name, i, stage.kind, ranges.FORWARD):
            u, mean_and_var, kept = _stage_forward(kernels, stage, p, u)
        statistics += mean_and_var
        if save:
            saved += kept
    if link.open:
        return u.y, statistics, saved
    with ranges.output(chain.name, ranges.FORWARD):
        return kernels.materialize(u, x if residual else None), statistics, saved


def _stage_forward(kernels: Kernels, stage: Stage, p: dict, u: Value) -> tuple[Value, list[Tensor], list[Tensor]]:
    """(the stage's value, [mean, unbiased var] where they are the batch's, what backward needs of it)."""
    batch = stage.norm == "batch"
    if stage.conv == "pointwise":
        y, found = kernels.pointwise_forward(u, p["weight"], batch)
    elif stage.conv == "depthwise":
        y, found = kernels.depthwise_forward(u, p["weight"], stage, batch)
    elif stage.conv == "dense":
        y = dense.convolve(kernels, u, p["weight"], stage)
        found = kernels.statistics(y) if batch else None
    else:
        y, found = u.y, None
    kept = [] if stage.conv == "none" else [y]
    u, mean_and_var = Value(y, act=stage.act), []
    if stage.norm != "none":
        rows, mean_and_var, share = _norm(kernels, stage, p, y, found)
        u = Value(y, *rows[:2].unbind(0), stage.act)
        kept += [rows, *share]
    if stage.gate:
        pooled = kernels.pool(u)
        u = u._replace(gate=kernels.gate_forward(pooled, p, stage.gate))
        kept += [pooled, u.gate]
    return u, mean_and_var, kept


def _norm(kernels: Kernels, stage: Stage, p: dict, y: Tensor, statistics) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(rows, [mean, unbiased var] where the statistics are the batch's, [this process's share of the values] where
    they are those of a group's batches).
    """
    dtype = accumulate_dtype(y.dtype)
    weight, bias = (p["bn_weight"].to(dtype), p["bn_bias"].to(dtype)) if stage.affine else (None, None)
    if stage.norm == "running":
        mean, var = p["running_mean"].to(dtype), p["running_var"].to(dtype)
        return kernels.running_norm(mean, var, weight, bias, stage.eps), [], []
    count = y.numel() // max(y.shape[1], 1)
    rows, mean, unbiased = kernels.batch_norm(statistics, count, weight, bias, stage.eps)
    if stage.group is None:
        return rows, [mean, unbiased], []
    merged = synchronize.merge_statistics(mean, unbiased, count, stage.group)
    rows = kernels.running_norm(merged.mean, merged.var, weight, bias, stage.eps)
    return rows, [merged.mean, merged.unbiased], [merged.share]


class _Point(NamedTuple):
    """The value between two stages, as backward needs it: stage i maps point i to point i + 1."""

    value: Value
    norm: Norm | None = None
    rows: Tensor | None = None  # of the norm, as one tensor
    share: Tensor | None = None  # of the values of all processes, where they share statistics
    pooled: Tensor | None = None


def _entry(x: Tensor, rows: Tensor | None, link: Link) -> _Point:
    if rows is None:
        return _Point(Value(x))
    norm = Norm(*rows.unbind(0))
    return _Point(Value(x, norm.scale, norm.shift, link.act), norm, rows)


def _points(entry: _Point, stages: Sequence[Stage], saved: Sequence[Tensor]) -> list[_Point]:
    x, items, points = entry.value.y, iter(saved), [entry]
    for stage in stages:
        y = x if stage.conv == "none" else next(items)
        rows = None if stage.norm == "none" else next(items)
        norm = None if rows is None else Norm(*rows.unbind(0))
        share = None if stage.group is None else next(items)
        pooled, gate = (next(items), next(items)) if stage.gate else (None, None)
        value = Value(y, norm and norm.scale, norm and norm.shift, stage.act, gate)
        points.append(_Point(value, norm, rows, share, pooled))
    return points


def backward(
    kernels: Kernels,
    dout: Tensor,
    x: Tensor,
    chain: Chain,
    flat: Sequence[Tensor],
    saved: Sequence[Tensor],
    residual: bool,
    needs: Sequence[bool],
    rows: Tensor | None = None,
    link: Link = NO_LINK,
    sums: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """(gradients of x and of every parameter, None where ``needs`` says so; the sums of the value that x is the raw
    output of), from the gradient of the output; of an open chain: from that of its last value, and its sums.
    """
    stages = chain.stages
    parameters, wanted = stage_parameters(stages, flat), stage_parameters(stages, needs[1:])
    points = _points(_entry(x, rows, link), stages, saved)
    gradients: list[dict] = [{} for _ in stages]
    dx, dv = None, dout
    if not link.open:
        with ranges.output(chain.name, ranges.BACKWARD):
            sums = kernels.reduce_gradient(dout, points[-1].value, points[-1].norm)
    for i in reversed(range(len(stages))):
        want_du = needs[0] or any(any(w.values()) for w in wanted[:i])
        wants = (want_du, want_du and (i > 0 or rows is not None), wanted[i].get("weight", False))
        skip = dout if residual and i == 0 else None
        with ranges.stage(chain.name, i, stages[i].kind, ranges.BACKWARD):
            given = (stages[i], parameters[i], points[i], points[i + 1], dv, sums, skip)
            dv, sums, gradients[i] = _stage_backward(kernels, *given, *wants)
        if not want_du:
            break
        dx = dv
    found = [gradients[i].get(name) for i, stage in enumerate(stages) for name in stage.parameter_names]
    typed = [_gradient_of(p, g) if need else None for g, p, need in zip(found, flat, needs[1:], strict=True)]
    return [dx if needs[0] else None, *typed], sums if needs[0] and rows is not None else None


def _stage_backward(
    kernels: Kernels, stage, p: dict, source: _Point, point: _Point, dv, sums, skip, want_du, want_sums, want_dweight
) -> tuple[Tensor | None, Tensor | None, dict]:
    """(gradient of the value that the stage takes in, plus ``skip``; its sums; the parameters' gradients), from the
    gradient of the stage's own value and its sums.
    """
    g, gradients = _through_norm(kernels, stage, p, point, dv, sums)
    if stage.conv == "none":
        return kernels.materialize_gradient(g, skip) if want_du else None, None, gradients
    behind = (source.value, source.norm, skip, want_du, want_sums, want_dweight)
    if stage.conv == "pointwise":
        found = kernels.pointwise_backward(g, p["weight"], *behind)
    elif stage.conv == "depthwise":
        found = kernels.depthwise_backward(g, p["weight"], stage, *behind)
    else:
        found = dense.backward(kernels, g, p["weight"], stage, *behind)
    du, sums, gradients["weight"] = found
    return du, sums, gradients


def _gradient_of(p: Tensor, g: Tensor) -> Tensor:
    """In the parameter's dtype and shape, and its very strides, also of dimensions of size 1: DDP compares them."""
    g = g.to(p.dtype).reshape(p.shape).contiguous()
    return g if g.stride() == p.stride() else g.as_strided(p.shape, p.stride())


def _through_norm(kernels: Kernels, stage: Stage, p: dict, point: _Point, dv: Tensor, sums) -> tuple[Gradient, dict]:
    """From the gradient of a stage's value and its sums: the gradient of its raw output, and those of its norm and
    gate.
    """
    value, found, q = point.value, {}, None
    if stage.gate:
        dpooled, found = kernels.gate_backward(sums, point.pooled, p, stage.gate)
        q = dpooled / (value.y.shape[2] * value.y.shape[3])
    if point.norm is None:
        return Gradient(dv, value, q), found
    count = max(value.y.numel() // max(value.y.shape[1], 1), 1) if stage.norm == "batch" else None
    dweight, dbias, b, c = kernels.norm_backward(sums, value.gate, q, point.rows, count)
    if stage.group is not None:
        b, c = synchronize.sum_gradients(b, c, point.share, stage.group)
    if stage.affine:
        found["bn_weight"], found["bn_bias"] = dweight, dbias
    return Gradient(dv, value, q, point.norm.scale, b, c), found
