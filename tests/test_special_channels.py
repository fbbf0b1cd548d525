"""Channels whose numbers are special: hardly any variance, denormals, overflow, NaN in a gradient, negative zero."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
from collections.abc import Iterator

import pytest
import stock
import torch
from oracle import Case, Tensors, dw, fused_chain, fused_functional, hold, prepare, pw, run, stock_chain
from special import (
    TINY,
    hold_denormal_variance,
    hold_denormals,
    hold_nan_in_gradient,
    hold_overflow,
    hold_tiny_variance,
    identity,
)
from torch import Tensor

import mbn_kernels
from mbn_kernels import FusedInvResBlock, FusedSequential

GATE = ("relu", "hardsigmoid")
INF, NAN = math.inf, math.nan
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
STAGES = (
    Case("depthwise", (2, 17, 9, 8), (dw(3, "identity"),)),
    Case("pointwise", (2, 17, 9, 8), (pw(17),)),
)
BLOCK = Case("block", (2, 8, 9, 8), (pw(40, "hardswish"), dw(3, "relu", gate=GATE), pw(8)), True)


# Variances ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STAGES, ids=str)
@pytest.mark.parametrize("eps", (1e-5, 1e-12, 1e-37), ids="eps={}".format)
@pytest.mark.parametrize("deviation", (1e-5, 1e-10, 1e-19), ids="deviation={}".format)
@DTYPES
def test_tiny_variance(backend: str, case: Case, eps: float, deviation: float, dtype: torch.dtype) -> None:
    """Variances of 1e-10, 1e-20 and 1e-38 about zero, with the usual eps and where eps does not drown them."""
    hold_tiny_variance(case, eps, deviation, dtype)


@pytest.mark.parametrize("case", STAGES, ids=str)
@pytest.mark.parametrize("mean", (1e-3, 1.0, -1000.0, 1e6), ids="mean={}".format)
@DTYPES
def test_a_rounding_of_variance(backend: str, case: Case, mean: float, dtype: torch.dtype) -> None:
    """All values are one of two neighbours: the least variance that a mean other than zero can have."""
    t = identity(prepare(case, dtype, True).map(lambda v: v.to(dtype)))
    low = torch.tensor(mean, dtype=dtype)
    t.x = torch.where(t.x > 0.3, low, low * (1 + torch.finfo(dtype).eps))
    fused, own = (functools.partial(f, momentum=1.0) for f in (fused_functional, stock_chain))
    hold(run(fused, case, t, True), lambda t: run(own, case, t, True), t, dtype)


# Denormals ------------------------------------------------------------------------------------------------------------

EVALUATED = (
    Case("depthwise", (2, 17, 9, 8), (dw(3, "relu", eps=0.0),)),
    Case("pointwise", (2, 17, 9, 8), (pw(20, "relu", eps=0.0),)),
    Case("block", (2, 17, 9, 8), (pw(40, eps=0.0), dw(3, eps=0.0), pw(17, eps=0.0)), True),
)


def control_word() -> int:
    """Of the processor's register MXCSR what is set, not what happened: rounding, masks, and both ways to flush."""
    environment = (ctypes.c_uint32 * 8)()
    assert ctypes.CDLL("libm.so.6").fegetenv(environment) == 0
    return environment[7] & ~0x3F


@pytest.fixture(params=(False, True), ids=("denormals", "flushed"))
def flushing(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such setting")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("case", EVALUATED, ids=str)
@pytest.mark.parametrize("small", ("x", "weight", "dout"))
def test_denormals_are_numbers(backend: str, case: Case, small: str) -> None:
    """Within a few steps of the smallest denormal of what float64 makes of them, as stock's are."""
    hold_denormals(case, small)


@pytest.mark.parametrize("case", EVALUATED[:2], ids=str)
@DTYPES
def test_denormal_variance(backend: str, case: Case, dtype: torch.dtype) -> None:
    hold_denormal_variance(case, dtype)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads a register of x86")
@MODES
@DTYPES
def test_the_control_register_is_left_alone(backend: str, flushing: bool, training: bool, dtype: torch.dtype) -> None:
    before = control_word()
    assert bool(before & 0x8040) == flushing
    for case in (*STAGES, BLOCK):
        run(fused_chain, case, prepare(case, dtype, training).map(lambda v: v.to(dtype)), training)
        assert control_word() == before


def test_other_threads_flush_as_before(needs_cpu: None) -> None:
    """A worker that a kernel ran on multiplies denormals afterwards, as it did before."""
    torch.set_num_threads(2)
    x = torch.full((1 << 20,), TINY)
    block = FusedInvResBlock(16, 3, 64, 16, True, "hs", 1)
    for training in (True, False):
        block.train(training)
        with mbn_kernels.use_backend("cpu"):
            block(torch.randn(4, 16, 28, 28)).sum()
        assert ((x * 0.5) != 0).all()


# Overflow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVALUATED, ids=str)
@DTYPES
def test_overflow(backend: str, case: Case, dtype: torch.dtype) -> None:
    """What exceeds the range is infinite with stock's sign, what is well within is finite.

    Between them it depends on the order of a sum, in stock as here.
    """
    hold_overflow(case, dtype)


@pytest.mark.parametrize("case", STAGES, ids=str)
@DTYPES
def test_a_variance_beyond_float32(backend: str, case: Case, dtype: torch.dtype) -> None:
    """As in stock the running variance is infinite then and the output is the bias; just below, all is as usual."""
    t = identity(prepare(case, dtype, True).map(lambda v: v.to(dtype)))
    fused, own = (functools.partial(f, momentum=1.0) for f in (fused_functional, stock_chain))
    for size in (1e20, 1e35):
        large = Tensors(((t.x.double() - 0.3) * size).to(dtype), t.stages, t.dout)
        got, expected = (run(f, case, large, True) for f in (fused, own))
        for name in ("out", "0.running_var"):
            assert torch.equal(got[name], expected[name]), name
        assert expected["0.running_var"].isinf().all() and expected["out"].isfinite().all()
    t.x = ((t.x.double() - 0.3) * 1e18).to(dtype)
    hold(run(fused, case, t, True), lambda t: run(own, case, t, True), t, dtype)


# NaN and infinity -----------------------------------------------------------------------------------------------------

SMOOTH = (
    *STAGES,
    Case("silu", (2, 17, 9, 8), (dw(3, "silu"), pw(9, "silu"))),
    Case("gate", (2, 8, 9, 8), (pw(24, "silu"), dw(3, "silu", stride=2, gate=("silu", "sigmoid")), pw(6))),
)


def spoilt(dout: Tensor, value: float) -> Tensor:
    dout = dout.clone()
    dout[0, 2, 3, 4] = value
    return dout


@pytest.mark.parametrize("case", SMOOTH, ids=str)
@MODES
@DTYPES
def test_nan_in_the_gradient(backend: str, case: Case, training: bool, dtype: torch.dtype) -> None:
    """It comes out where stock has it and nowhere else; derivatives here are not 0, which would hide it in stock."""
    hold_nan_in_gradient(case, training, dtype)


@pytest.mark.parametrize("value", (NAN, INF))
@DTYPES
def test_a_bad_gradient_touches_its_image_and_channel(backend: str, value: float, dtype: torch.dtype) -> None:
    """Behind kinks, too: all else is the same to the last bit."""
    for case in (BLOCK, Case("depthwise", (2, 17, 9, 8), (dw(5, "relu6"),))):
        t = prepare(case, dtype, False).map(lambda v: v.to(dtype))
        clean = run(fused_chain, case, t, False)
        bad = run(fused_chain, case, Tensors(t.x, t.stages, spoilt(t.dout, value)), False)
        assert not bad["grad x"][0].isfinite().all()
        assert torch.equal(bad["grad x"][1], clean["grad x"][1]) and torch.equal(bad["out"], clean["out"])
        if len(case.stages) == 1:
            others = torch.arange(case.shape[1]) != 2
            for name in clean:
                if name.startswith("grad 0."):
                    assert torch.equal(bad[name][others], clean[name][others]), name


def blocks(fused: bool) -> torch.nn.Sequential:
    """With and without gate, residual, stride and expansion; in training on the CPU the last two are linked."""
    kind = FusedInvResBlock if fused else stock.InvResBlock
    signatures = ((8, 3, 24, 8, False, "relu", 1), (8, 5, 40, 8, True, "hs", 1))
    signatures += ((8, 3, 24, 12, True, "hs", 1), (12, 3, 12, 16, True, "relu", 2))
    return (FusedSequential if fused else torch.nn.Sequential)(*(kind(*s) for s in signatures))


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@MODES
@DTYPES
def test_one_bad_pixel_through_blocks(backend: str, value: float, training: bool, dtype: torch.dtype) -> None:
    """NaN is where stock has it, in outputs; another image of the batch comes out as if it were not there."""
    fused, twin = (stock.randomize(blocks(f)).to(dtype).train(training) for f in (True, False))
    twin.load_state_dict(fused.state_dict())
    clean = torch.randn(3, 8, 9, 8).to(dtype)
    x = clean.clone()
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        outs = [fused(x), twin(x)] + ([] if training else [fused(clean)])
    outs += [fused(x.clone().requires_grad_()).detach()]
    for out in (outs[0], outs[-1]):
        assert torch.equal(out.isfinite(), outs[1].isfinite()) and not out[1].isfinite().all()
    if not training:
        assert torch.equal(outs[0][[0, 2]], outs[2][[0, 2]])


# Negative zero --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", (*STAGES, BLOCK), ids=str)
@MODES
def test_negative_zero(backend: str, case: Case, training: bool) -> None:
    """As an input and as a gradient it is zero: the same numbers come out as for a positive one."""
    t = prepare(case, torch.float32, training).map(torch.Tensor.float)
    results = []
    for zero in (0.0, -0.0):
        x = torch.where(t.x > 0.3, t.x, zero)
        results.append(run(fused_chain, case, Tensors(x, t.stages, torch.where(t.dout > 0, t.dout, zero)), training))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]) and results[0][name].isfinite().all(), name
