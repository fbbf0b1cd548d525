"""Checks of channels whose numbers are special, for the tests of every backend: the one in use is held to stock."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from oracle import Case, Tensors, fused_chain, fused_functional, hold, prepare, run, stock_chain
from torch import Tensor

TINY = 1e-40  # denormal in float32 and bfloat16


def identity(t: Tensors) -> Tensors:
    """Convolutions that return their input: what is normalised has the input's mean and variance."""
    stages = []
    for p in t.stages:
        w = torch.zeros_like(p["weight"])
        if w.shape[1] == 1:
            w[:, 0, w.shape[2] // 2, w.shape[3] // 2] = 1
        else:
            w.flatten(1).fill_diagonal_(1)
        stages.append({**p, "weight": w})
    return Tensors(t.x, stages, t.dout)


def hold_tiny_variance(case: Case, eps: float, deviation: float, dtype: torch.dtype) -> None:
    """A stage whose input has this deviation about zero; with a momentum of 1 running statistics are the batch's."""
    case = replace(case, stages=tuple(replace(s, eps=eps) for s in case.stages))
    t = identity(prepare(case, dtype, True).map(lambda v: v.to(dtype)))
    t.x = ((t.x.double() - 0.3) * deviation).to(dtype)
    fused, own = (functools.partial(f, momentum=1.0) for f in (fused_functional, stock_chain))
    hold(run(fused, case, t, True), lambda t: run(own, case, t, True), t, dtype)


def without_norm(t: Tensors) -> Tensors:
    """Batch norms that change nothing, so that what is small stays small."""
    numbers = {"bn_weight": 1.0, "bn_bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    stages = [{n: torch.full_like(v, numbers[n]) if n in numbers else v for n, v in p.items()} for p in t.stages]
    return Tensors(t.x, stages, t.dout)


def hold_denormals(case: Case, small: str) -> None:
    """A chain without activations that saturate, in evaluation; ``small`` is "x", "weight" or "dout"."""

    def scaled(t: Tensor, wanted: bool) -> Tensor:
        return t * TINY if wanted else t

    t = without_norm(prepare(case, torch.float32, False).map(torch.Tensor.float))
    # Only the first weight, or products of several would be 0 in any arithmetic of this range.
    stages = [{n: scaled(v, small == n and i == 0) for n, v in p.items()} for i, p in enumerate(t.stages)]
    t = Tensors(scaled(t.x, small == "x"), stages, scaled(t.dout, small == "dout"))
    exact = run(stock_chain, case, t.map(torch.Tensor.double), False)
    got, own = run(fused_chain, case, t, False), run(stock_chain, case, t, False)
    step, found = 2.0**-149, 0
    for name, e in exact.items():
        if 0 < e.abs().max() < 1e-37:
            found += 1
            errors = [(r[name].double() - e).abs().max().item() for r in (got, own)]
            assert errors[0] <= 2 * errors[1] + 64 * step, f"{name}: {errors[0] / step} steps, stock {errors[1] / step}"
            assert (got[name] != 0).sum() >= (own[name] != 0).sum() * 0.99
    assert found


def hold_denormal_variance(case: Case, dtype: torch.dtype) -> None:
    """In evaluation with an eps of 0, so that all is scaled up by 1e20."""
    t = prepare(case, dtype, False).map(lambda v: v.to(dtype))
    stages = [{n: torch.full_like(v, TINY) if n == "running_var" else v for n, v in p.items()} for p in t.stages]
    t = Tensors(t.x, stages, t.dout)
    own = run(stock_chain, case, t, False)
    assert own["out"].isfinite().all() and own["out"].abs().max() > 1e18
    hold(run(fused_chain, case, t, False), lambda t: run(stock_chain, case, t, False), t, dtype)


def hold_overflow(case: Case, dtype: torch.dtype) -> None:
    """In evaluation: infinite where the exact result is far beyond the range, finite where it is well within."""
    most = torch.finfo(dtype).max
    t = without_norm(prepare(case, dtype, False).map(lambda v: v.to(dtype)))
    stages = [{n: 8 * v.abs() if n == "weight" else v for n, v in p.items()} for p in t.stages]  # no inf - inf
    for part in (1.0, 2**-40):
        x = torch.full_like(t.x, most * part)
        x[0] *= -1
        given = Tensors(x, stages, t.dout)
        exact = run(stock_chain, case, given.map(torch.Tensor.double), False)
        got, own = run(fused_chain, case, given, False), run(stock_chain, case, given, False)
        for name in ("out", "out without gradients"):
            beyond, within = exact[name].abs() > 8 * most, exact[name].abs() < most / 64
            assert beyond.any() if part == 1 else within.all()
            assert torch.equal(got[name][beyond], own[name][beyond]) and got[name][beyond].isinf().all()
            assert got[name][within].isfinite().all() and own[name][within].isfinite().all()


def hold_nan_in_gradient(case: Case, training: bool, dtype: torch.dtype) -> None:
    """At one pixel of dout; no activation of the case may have a derivative of 0, behind which stock hides NaN."""
    t = prepare(case, dtype, training).map(lambda v: v.to(dtype))
    t.dout[0, 2, 3, 3] = math.nan
    got, own = run(fused_chain, case, t, training), run(stock_chain, case, t, training)
    assert got["out"].isfinite().all() and own["grad x"].isnan().any()
    for name, g in got.items():
        assert torch.equal(g.isnan(), own[name].isnan()), name
