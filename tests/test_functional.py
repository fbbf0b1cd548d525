"""The functional operators against the oracle. A new operator is a row of OPS' default cases and of CASES."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from oracle import (
    ACTS,
    Case,
    Expected,
    StageCase,
    Tensors,
    compare_case,
    dw,
    fused_functional,
    in_each_mode,
    make_tensors,
    mode_id,
    prepare,
    pw,
    run,
    se,
    stock_chain,
)
from torch import Tensor

from mbn_kernels import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def case(name: str, shape: tuple[int, ...], stage: StageCase, residual: bool = False) -> Case:
    return Case(name, shape, (stage,), residual)


# One plain case of each operator, for the sweeps over layouts, gradients and activations.
OPS = (
    case("depthwise", (2, 17, 7, 6), dw(3, "hardswish")),
    case("pointwise", (2, 17, 7, 6), pw(20, "hardswish")),
    case("squeeze_excite", (3, 17, 7, 6), se()),
)

CASES = (
    *OPS,
    *(case(f"depthwise-{act}", (2, 5, 8, 7), dw(3, act, stride=2)) for act in ACTS),
    *(case(f"pointwise-{act}", (2, 5, 8, 7), pw(9, act)) for act in ACTS),
    *(case(f"squeeze-excite-{act}-{gate}", (3, 6, 5, 4), se(act, gate)) for act, gate in
      (("relu", "sigmoid"), ("silu", "hardsigmoid"), ("relu6", "sigmoid"), ("hardswish", "hardswish"),
       ("identity", "identity"), ("sigmoid", "silu"))),
    *(case(f"depthwise-c{c}-k{k}", (2, c, 9, 11), dw(k, "hardswish")) for c in (1, 3, 17) for k in (1, 3, 5, 7)),
    *(case(f"depthwise-s{s}-{h}x{w}", (2, 3, h, w), dw(5, "relu6", stride=s)) for s in (2, 3) for h, w in
      ((7, 7), (8, 5), (5, 8))),
    case("depthwise-strides-differ", (2, 4, 9, 10), dw(3, "relu", stride=(2, 1))),
    case("depthwise-no-padding", (2, 4, 9, 10), dw(5, "relu", padding=0)),
    case("depthwise-kernel-3x5", (2, 4, 9, 10), dw((3, 5), "hardswish")),
    case("depthwise-kernel-7x1", (2, 4, 9, 10), dw((7, 1), "hardswish", stride=(1, 2))),
    case("depthwise-dilation-2", (2, 17, 9, 10), dw(3, "hardswish", dilation=2)),
    case("depthwise-dilation-2-stride-2", (2, 5, 11, 9), dw(5, "hardswish", dilation=2, stride=2)),
    case("depthwise-dilations-differ", (2, 5, 11, 9), dw(3, "hardswish", dilation=(1, 3))),
    case("depthwise-four-pads", (2, 5, 8, 7), dw(3, "hardswish", padding=(0, 1, 2, 3))),
    case("depthwise-tf-pads", (2, 5, 8, 7), dw(5, "hardswish", stride=2, padding=(1, 2, 1, 2))),
    case("depthwise-windows-in-the-padding", (2, 3, 4, 5), dw(3, "hardswish", padding=5)),
    case("depthwise-window-larger-than-map", (3, 17, 2, 3), dw(7, "hardswish")),
    case("depthwise-window-is-map", (3, 17, 5, 5), dw(5, "hardswish", padding=0)),
    case("depthwise-1x1-map", (5, 17, 1, 1), dw(5, "hardswish")),
    case("depthwise-one-row", (2, 17, 1, 23), dw(3, "hardswish")),
    case("depthwise-one-column", (2, 17, 23, 1), dw(3, "hardswish", stride=2)),
    case("depthwise-one-image", (1, 33, 14, 14), dw(3, "relu")),
    case("depthwise-no-image", (0, 5, 8, 7), dw(3, "hardswish")),
    case("depthwise-not-affine", (2, 5, 8, 7), dw(3, "silu", affine=False)),
    case("depthwise-large-eps", (2, 5, 8, 7), dw(3, "hardswish", eps=0.5)),
    *(case(f"pointwise-{i}-to-{o}", (2, i, 5, 7), pw(o, "hardswish")) for i in (1, 3, 17) for o in (1, 3, 17)),
    case("pointwise-wide", (2, 64, 9, 9), pw(33, "relu")),
    case("pointwise-deep", (1, 7, 9, 9), pw(200, "relu6")),
    case("pointwise-1x1-map", (7, 17, 1, 1), pw(5, "hardswish")),
    case("pointwise-one-image", (1, 17, 13, 1), pw(5, "hardswish")),
    case("pointwise-no-image", (0, 5, 8, 7), pw(9, "hardswish")),
    case("pointwise-not-affine", (2, 5, 8, 7), pw(9, "silu", affine=False)),
    case("pointwise-residual", (2, 17, 8, 7), pw(17, "hardswish"), residual=True),
    case("pointwise-linear-residual", (2, 5, 8, 7), pw(5), residual=True),
    case("pointwise-residual-no-image", (0, 5, 8, 7), pw(5), residual=True),
    *(case(f"squeeze-excite-c{c}", (2, c, 5, 7), se()) for c in (1, 3, 64)),
    case("squeeze-excite-1x1-map", (3, 17, 1, 1), se()),
    case("squeeze-excite-one-image", (1, 17, 6, 3), se()),
    case("squeeze-excite-no-image", (0, 5, 6, 3), se()),
)  # fmt: skip


@pytest.mark.parametrize("case, training", in_each_mode(CASES), ids=mode_id)
@BY_DTYPE
def test_matches_the_oracle(backend: str, case: Case, training: bool, dtype: torch.dtype) -> None:
    compare_case(fused_functional, case, dtype, training)


@pytest.mark.parametrize("c", (1, 3, 17))
def test_one_value_per_channel_in_evaluation(backend: str, c: int) -> None:
    for stage in (dw(3, "hardswish"), pw(5, "hardswish")):
        compare_case(fused_functional, case("one value", (1, c, 1, 1), stage), torch.float32, False)


def test_the_tolerance_notices(backend: str) -> None:
    """An error of 16 roundings in one element of any result is beyond the tolerance."""
    t = prepare(OPS[0], torch.float32, True).map(torch.Tensor.float)
    got, stock = (run(f, OPS[0], t, True) for f in (fused_functional, stock_chain))
    expected = Expected(torch.float32, run(stock_chain, OPS[0], t.map(torch.Tensor.double), True), stock)
    for name in got:
        wrong = dict(got)
        wrong[name] = got[name].clone(memory_format=torch.contiguous_format)
        wrong[name].view(-1)[got[name].abs().argmax()] *= 1 + 16 * torch.finfo(torch.float32).eps
        assert any(name in breach for breach in expected.breaches(wrong)), name


# Strides --------------------------------------------------------------------------------------------------------------


def nan_around(x: Tensor) -> Tensor:
    """x inside a larger buffer of NaN, where a kernel that reads beyond its input takes harm."""
    buffer = x.new_full((x.numel() + 256,), float("nan"))
    place = buffer[128 : 128 + x.numel()].view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    return place.copy_(x)


def sliced(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_full((n + 1, 2 * c, h + 2, 3 * w), float("nan"))[1:, ::2, 1:-1, 1::3].copy_(x)


LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": sliced,
    "channels-sliced": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "offset": nan_around,
    "one-image-expanded": lambda x: x[:1].expand(x.shape),
    "one-pixel-expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "one-channel-expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", OPS, ids=str)
@BY_DTYPE
def test_input_strides(backend: str, case: Case, layout: str, dtype: torch.dtype) -> None:
    training = layout != "one-pixel-expanded"  # there a channel of constants amplifies every rounding

    def change(t: Tensors) -> Tensors:
        return Tensors(LAYOUTS[layout](t.x), t.stages, t.dout)

    compare_case(fused_functional, case, dtype, training, change=change)


@pytest.mark.parametrize("shape", ((2, 1, 5, 4), (1, 5, 4, 3), (3, 5, 1, 1), (2, 5, 1, 4)), ids=str)
@pytest.mark.parametrize("layout", ("sliced", "channels-sliced", "permuted", "transposed", "offset"))
def test_strides_of_sizes_that_are_1(backend: str, shape: tuple[int, ...], layout: str) -> None:
    for plain in OPS:
        compare_case(
            fused_functional,
            replace(plain, shape=shape),
            torch.float32,
            True,
            change=lambda t: Tensors(LAYOUTS[layout](t.x), t.stages, t.dout),
        )


def spread(v: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension, NaN between them."""
    return v.new_full((*v.shape[:-1], 2 * v.shape[-1]), float("nan"))[..., ::2].copy_(v)


def channels_last(v: Tensor) -> Tensor:
    return v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v


def reversed_dims(v: Tensor) -> Tensor:
    dims = tuple(reversed(range(v.dim())))
    return v.permute(dims).contiguous().permute(dims)


@pytest.mark.parametrize("layout", (spread, channels_last, reversed_dims), ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", OPS, ids=str)
def test_parameter_strides(backend: str, case: Case, layout) -> None:
    def change(t: Tensors) -> Tensors:
        return Tensors(t.x, [{k: layout(v) for k, v in p.items()} for p in t.stages], t.dout)

    for training in (True, False):
        compare_case(fused_functional, case, torch.float32, training, change=change)


DOUTS = {
    "expanded scalar": lambda g: g.new_tensor(0.5).expand(g.shape),
    "nchw": lambda g: g.contiguous(),
    "sliced": sliced,
    "transposed": LAYOUTS["transposed"],
    "one channel expanded": LAYOUTS["one-channel-expanded"],
    "offset": nan_around,
}


@pytest.mark.parametrize("layout", DOUTS)
@pytest.mark.parametrize("case", OPS, ids=str)
def test_gradient_strides(backend: str, case: Case, layout: str) -> None:
    def change(t: Tensors) -> Tensors:
        return Tensors(t.x, t.stages, DOUTS[layout](t.dout))

    compare_case(fused_functional, case, torch.float32, False, change=change)
    compare_case(fused_functional, case, torch.bfloat16, False, change=change)


def test_outputs_are_channels_last(backend: str) -> None:
    for plain in OPS:
        t = prepare(plain, torch.float32, True).map(torch.Tensor.float)
        out = fused_functional(plain, t, True)
        assert out.is_contiguous(memory_format=torch.channels_last)


# What is asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", (*OPS, CASES[-8]), ids=str)
@MODES
def test_any_subset_of_gradients(backend: str, case: Case, training: bool) -> None:
    """Each gradient is the same whatever else is asked for."""
    t = prepare(case, torch.float64, training)
    full = run(fused_functional, case, t, training)
    names = list(t.leaves())
    for size in range(1, len(names)):
        for wanted in itertools.combinations(names, size):
            again = t.map(torch.Tensor.clone)
            leaves = {name: again.leaves()[name].requires_grad_() for name in wanted}
            out = fused_functional(case, again, training)
            grads = torch.autograd.grad(out, list(leaves.values()), t.dout)
            torch.testing.assert_close(out, full["out"], rtol=1e-12, atol=1e-12)
            for name, g in zip(wanted, grads, strict=True):
                torch.testing.assert_close(g, full[f"grad {name}"], rtol=1e-10, atol=1e-11, msg=f"{name} of {wanted}")


@pytest.mark.parametrize("case", OPS[:2], ids=str)
@pytest.mark.parametrize("momentum", (0.0, 0.01, 0.99, 1.0, 1))
def test_momentum(backend: str, case: Case, momentum: float) -> None:
    t = make_tensors(case, torch.float32).map(torch.Tensor.float)
    stock = t.map(torch.Tensor.clone)
    for _ in range(2):
        fused_functional(case, t, True, momentum)
        stock_chain(case, stock, True, momentum)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(t.stages[0][name], stock.stages[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", OPS[:2], ids=str)
def test_training_needs_no_running_statistics(backend: str, case: Case) -> None:
    t = prepare(case, torch.float64, True)
    expected = fused_functional(case, t.map(torch.Tensor.clone), True)
    t.stages = [{k: v for k, v in p.items() if not k.startswith("running")} for p in t.stages]
    assert torch.equal(fused_functional(case, t, True), expected)


@pytest.mark.parametrize("case", OPS[:2], ids=str)
@MODES
def test_float32_batch_norm_of_bfloat16(backend: str, case: Case, training: bool) -> None:
    """The parameters' dtypes under autocast: batch norm's stay float32."""

    def change(t: Tensors) -> Tensors:
        stages = [{k: v if k == "weight" else v.float() for k, v in p.items()} for p in t.stages]
        return Tensors(t.x, stages, t.dout)

    compare_case(fused_functional, case, torch.bfloat16, training, change=change)


def test_another_residual(backend: str) -> None:
    plain = case("residual", (2, 5, 8, 7), pw(9, "hardswish"))
    t = prepare(plain, torch.float64, False)
    p, r = t.stages[0], torch.randn(2, 9, 8, 7, dtype=torch.float64, requires_grad=True)
    out = functional.pointwise_conv_bn_act(t.x, *p.values(), residual=r)
    torch.testing.assert_close(out, stock_chain(plain, t, False) + r, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.autograd.grad(out, r, t.dout)[0], t.dout)


# Geometry -------------------------------------------------------------------------------------------------------------

small = st.integers(1, 9)
GEOMETRY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a failure add Phase.shrink, and a minute
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@GEOMETRY
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 20), small, small),
    kernel=st.tuples(*[st.sampled_from((1, 3, 5, 7))] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
    training=st.booleans(),
)
def test_depthwise_geometry(backend: str, shape, kernel, stride, dilation, padding, training) -> None:
    h = shape[2] + padding[0] + padding[1] - dilation[0] * (kernel[0] - 1)
    w = shape[3] + padding[2] + padding[3] - dilation[1] * (kernel[1] - 1)
    assume(h > 0 and w > 0)
    values = shape[0] * -(-h // stride[0]) * -(-w // stride[1])
    stage = dw(kernel, "hardswish", stride=stride, padding=padding, dilation=dilation)
    # Of a few values per channel batch norm returns little but rounding errors, in stock as here.
    compare_case(fused_functional, case("geometry", shape, stage), torch.float32, training and values > 4)


@GEOMETRY
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), small, small),
    out=st.integers(1, 40),
    act=st.sampled_from(ACTS),
    training=st.booleans(),
)
def test_pointwise_geometry(backend: str, shape, out, act, training) -> None:
    values = shape[0] * shape[2] * shape[3]
    compare_case(fused_functional, case("geometry", shape, pw(out, act)), torch.float32, training and values > 4)
