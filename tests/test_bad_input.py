"""Wrong arguments: one sentence, `op: argument: expected ..., got ...`, and nothing is changed by the attempt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import stock
import torch
from junk import raised
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSqueezeExcite,
    functional,
)


def depthwise(**changes) -> Callable[[], object]:
    def call() -> Tensor:
        arguments = {
            "x": torch.randn(2, 3, 5, 4), "weight": torch.randn(3, 1, 3, 3), "bn_weight": torch.ones(3),
            "bn_bias": torch.zeros(3), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
        }  # fmt: skip
        return functional.depthwise_conv_bn_act(**(arguments | changes))

    return call


def pointwise(**changes) -> Callable[[], object]:
    def call() -> Tensor:
        arguments = {
            "x": torch.randn(2, 3, 5, 4), "weight": torch.randn(6, 3, 1, 1), "bn_weight": torch.ones(6),
            "bn_bias": torch.zeros(6), "running_mean": torch.zeros(6), "running_var": torch.ones(6),
        }  # fmt: skip
        return functional.pointwise_conv_bn_act(**(arguments | changes))

    return call


def squeeze_excite(**changes) -> Callable[[], object]:
    def call() -> Tensor:
        arguments = {
            "x": torch.randn(2, 8, 5, 4), "w1": torch.randn(2, 8), "b1": torch.zeros(2),
            "w2": torch.randn(8, 2), "b2": torch.zeros(8),
        }  # fmt: skip
        return functional.squeeze_excite(**(arguments | changes))

    return call


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def double(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


SIGNATURE = (4, 3, 12, 4, True, "hs", 1)

# (call, exception, argument that the message names)
ALWAYS = (
    (depthwise(x=torch.randn(3, 5, 4)), ValueError, "x"),
    (depthwise(x=torch.randn(1, 2, 3, 5, 4)), ValueError, "x"),
    (depthwise(x=torch.tensor(1.0)), ValueError, "x"),
    (depthwise(x=integers(2, 3, 5, 4)), TypeError, "x"),
    (depthwise(x=torch.zeros(2, 3, 5, 4, dtype=torch.complex64)), TypeError, "x"),
    (depthwise(x=torch.zeros(2, 3, 5, 4).to_sparse()), TypeError, "x"),
    (depthwise(x=[1.0]), TypeError, "x"),
    (depthwise(x=None), TypeError, "x"),
    (depthwise(x=torch.randn(2, 4, 5, 4)), ValueError, "weight"),
    (depthwise(weight=torch.randn(4, 1, 3, 3)), ValueError, "weight"),
    (depthwise(weight=torch.randn(3, 3, 3, 3)), ValueError, "weight"),  # groups != channels
    (depthwise(weight=torch.randn(6, 1, 3, 3)), ValueError, "weight"),  # a channel multiplier
    (depthwise(weight=torch.randn(3, 3, 3)), ValueError, "weight"),
    (depthwise(weight=torch.randn(3)), ValueError, "weight"),
    (depthwise(weight=torch.randn(3, 1, 2, 2)), ValueError, "weight"),
    (depthwise(weight=torch.randn(3, 1, 3, 4)), ValueError, "weight"),
    (depthwise(weight=torch.randn(3, 1, 0, 0)), ValueError, "weight"),
    (depthwise(weight=double(3, 1, 3, 3)), TypeError, "weight"),
    (depthwise(weight=integers(3, 1, 3, 3)), TypeError, "weight"),
    (depthwise(weight=meta(3, 1, 3, 3)), ValueError, "weight"),
    (depthwise(weight="weight"), TypeError, "weight"),
    (depthwise(bn_weight=torch.ones(4)), ValueError, "bn_weight"),
    (depthwise(bn_weight=torch.ones(3, 1)), ValueError, "bn_weight"),
    (depthwise(bn_weight=double(3)), TypeError, "bn_weight"),
    (depthwise(bn_weight=integers(3)), TypeError, "bn_weight"),
    (depthwise(bn_weight=meta(3)), ValueError, "bn_weight"),
    (depthwise(bn_weight=None), ValueError, "bn_weight"),
    (depthwise(bn_weight=1.0), TypeError, "bn_weight"),
    (depthwise(bn_bias=torch.ones(2)), ValueError, "bn_bias"),
    (depthwise(bn_bias=None), ValueError, "bn_bias"),
    (depthwise(bn_bias=double(3)), TypeError, "bn_bias"),
    (depthwise(running_mean=torch.zeros(4)), ValueError, "running_mean"),
    (depthwise(running_mean=double(3)), TypeError, "running_mean"),
    (depthwise(running_mean=meta(3)), ValueError, "running_mean"),
    (depthwise(running_mean=0), TypeError, "running_mean"),
    (depthwise(running_mean=None), ValueError, "running_mean"),
    (depthwise(running_var=None), ValueError, "running_var"),
    (depthwise(running_var=torch.ones(1)), ValueError, "running_var"),
    (depthwise(running_var=integers(3)), TypeError, "running_var"),
    (depthwise(stride=0), ValueError, "stride"),
    (depthwise(stride=-1), ValueError, "stride"),
    (depthwise(stride=1.5), TypeError, "stride"),
    (depthwise(stride=True), TypeError, "stride"),
    (depthwise(stride=(1, 1, 1)), TypeError, "stride"),
    (depthwise(padding=-1), ValueError, "padding"),
    (depthwise(padding=(0, 0, -1, 0)), ValueError, "padding"),
    (depthwise(padding="same"), TypeError, "padding"),
    (depthwise(padding=(1, 1, 1)), TypeError, "padding"),
    (depthwise(dilation=0), ValueError, "dilation"),
    (depthwise(dilation=(1, None)), TypeError, "dilation"),
    (depthwise(dilation=3), ValueError, "x"),  # the window is larger than the padded map
    (depthwise(act="gelu"), ValueError, "act"),
    (depthwise(act=None), ValueError, "act"),
    (depthwise(act=nn.ReLU()), ValueError, "act"),
    (depthwise(act=["relu"]), ValueError, "act"),
    (depthwise(training=1), TypeError, "training"),
    (depthwise(training="yes"), TypeError, "training"),
    (depthwise(momentum=None), TypeError, "momentum"),
    (depthwise(momentum="0.1"), TypeError, "momentum"),
    (depthwise(eps=-1e-5), ValueError, "eps"),
    (depthwise(eps=float("nan")), ValueError, "eps"),
    (depthwise(eps=None), TypeError, "eps"),
    (pointwise(x=torch.randn(3, 5, 4)), ValueError, "x"),
    (pointwise(x=torch.randn(2, 4, 5, 4)), ValueError, "weight"),
    (pointwise(x=torch.randn(2, 3, 0, 4)), ValueError, "x"),
    (pointwise(weight=torch.randn(6, 3, 3, 3)), ValueError, "weight"),
    (pointwise(weight=torch.randn(6, 3)), ValueError, "weight"),
    (pointwise(weight=torch.randn(6, 3, 1, 1).bfloat16()), TypeError, "weight"),
    (pointwise(bn_weight=torch.ones(3)), ValueError, "bn_weight"),
    (pointwise(running_var=torch.ones(3)), ValueError, "running_var"),
    (pointwise(act="hs"), ValueError, "act"),
    (pointwise(residual=torch.randn(2, 3, 5, 4)), ValueError, "residual"),
    (pointwise(residual=torch.randn(6, 5, 4)), ValueError, "residual"),
    (pointwise(residual=meta(2, 6, 5, 4)), ValueError, "residual"),
    (pointwise(residual=1.0), TypeError, "residual"),
    (squeeze_excite(x=torch.randn(8, 5, 4)), ValueError, "x"),
    (squeeze_excite(x=integers(2, 8, 5, 4)), TypeError, "x"),
    (squeeze_excite(w1=torch.randn(2, 4)), ValueError, "w1"),
    (squeeze_excite(w1=torch.randn(8)), ValueError, "w1"),
    (squeeze_excite(w1=torch.tensor(1.0)), ValueError, "w1"),
    (squeeze_excite(w1=double(2, 8)), TypeError, "w1"),
    (squeeze_excite(w1=meta(2, 8)), ValueError, "w1"),
    (squeeze_excite(b1=torch.zeros(3)), ValueError, "b1"),
    (squeeze_excite(b1=None), TypeError, "b1"),
    (squeeze_excite(w2=torch.randn(8, 3)), ValueError, "w2"),
    (squeeze_excite(b2=torch.zeros(2)), ValueError, "b2"),
    (squeeze_excite(act="tanh"), ValueError, "act"),
    (squeeze_excite(gate="softmax"), ValueError, "gate"),
    (lambda: FusedInvResBlock(4, 2, 12, 4, True, "hs", 1), ValueError, "k"),
    (lambda: FusedInvResBlock(4, 0, 12, 4, True, "hs", 1), ValueError, "k"),
    (lambda: FusedInvResBlock(4, 3.0, 12, 4, True, "hs", 1), TypeError, "k"),
    (lambda: FusedInvResBlock(0, 3, 12, 4, True, "hs", 1), ValueError, "in_channels"),
    (lambda: FusedInvResBlock(4, 3, -12, 4, True, "hs", 1), ValueError, "exp_channels"),
    (lambda: FusedInvResBlock(4, 3, 12, "4", True, "hs", 1), TypeError, "out_channels"),
    (lambda: FusedInvResBlock(4, 3, 12, 4, True, "gelu", 1), ValueError, "nl"),
    (lambda: FusedInvResBlock(4, 3, 12, 4, True, None, 1), ValueError, "nl"),
    (lambda: FusedInvResBlock(4, 3, 12, 4, True, "hs", 0), ValueError, "s"),
    (lambda: FusedInvResBlock(4, 3, 12, 4, True, "hs", 1, squeeze_divisor=0), ValueError, "squeeze_divisor"),
    (lambda: FusedInvResBlock(2, 3, 3, 4, True, "hs", 1), ValueError, "squeeze_channels"),  # 3 // 4 is no width
    (lambda: FusedSqueezeExcite(0), ValueError, "channels"),
    (lambda: FusedSqueezeExcite(2, 4), ValueError, "squeeze_channels"),
    (lambda: FusedSqueezeExcite(8, 0), ValueError, "r"),
    (lambda: FusedDepthwiseConvBNAct(4, 4), ValueError, "k"),
    (lambda: FusedDepthwiseConvBNAct(4, 3, stride=0), ValueError, "stride"),
    (lambda: FusedDepthwiseConvBNAct(4, 3, dilation=0), ValueError, "dilation"),
    (lambda: FusedDepthwiseConvBNAct(4, 3, padding=-1), ValueError, "padding"),
    (lambda: FusedDepthwiseConvBNAct(4, 3, act="gelu"), ValueError, "act"),
    (lambda: FusedPointwiseConvBNAct(4, 0), ValueError, "out_channels"),
    (lambda: FusedPointwiseConvBNAct(4, 8, act=3), ValueError, "act"),
    (lambda: FusedDepthwiseSeparable(4, 8, 2), ValueError, "k"),
    (lambda: FusedDepthwiseSeparable(4, 8, 3, 0), ValueError, "s"),
    (lambda: FusedDepthwiseSeparable(4, 8, nl="hsw"), ValueError, "nl"),
    (lambda: FusedInvResBlock(*SIGNATURE)(torch.randn(2, 5, 6, 6)), ValueError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE)(torch.randn(4, 6, 6)), ValueError, "x"),
    (lambda: FusedInvResBlock(*SIGNATURE)([1]), TypeError, "x"),
    (lambda: FusedInvResBlock(*SIGNATURE)(torch.randn(2, 4, 6, 6).double()), TypeError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE)(meta(2, 4, 6, 6)), ValueError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE).to("meta")(torch.randn(2, 4, 6, 6)), ValueError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE).eval()(torch.randn(2, 5, 6, 6)), ValueError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE).eval()(torch.randn(4, 6, 6)), ValueError, "x"),
    (lambda: FusedInvResBlock(*SIGNATURE).eval()(torch.randn(2, 4, 6, 6).double()), TypeError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE).eval()(meta(2, 4, 6, 6)), ValueError, "weight"),
    (lambda: FusedInvResBlock(*SIGNATURE).eval().to("meta")(torch.randn(2, 4, 6, 6)), ValueError, "weight"),
)  # fmt: skip


def name_of(row: tuple) -> str:
    return f"{getattr(row[0], '__qualname__', '').split('.')[0]}-{row[2]}".replace("<lambda>", "module")


@pytest.mark.parametrize("gradients", (True, False), ids=("gradients", "no-gradients"))
@pytest.mark.parametrize("row", ALWAYS, ids=name_of)
def test_message(backend: str, row: tuple, gradients: bool) -> None:
    """The same words whichever path would have run."""
    call, kind, argument = row
    with torch.set_grad_enabled(gradients):
        assert raised(call, kind)["argument"] == argument


@pytest.mark.parametrize("row", [r for r in ALWAYS if r[0].__qualname__.split(".")[0] in ("depthwise", "pointwise")],
                         ids=name_of)  # fmt: skip
def test_message_in_training(backend: str, row: tuple, monkeypatch) -> None:
    call, kind, argument = row
    for name in ("depthwise_conv_bn_act", "pointwise_conv_bn_act"):
        f = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *, training=True, f=f, **kwargs: f(training=training, **kwargs))
    if argument == "running_mean" and call.__closure__ and call.__closure__[0].cell_contents == {"running_mean": None}:
        pytest.skip("covered by the pair's own rule")
    assert raised(call, kind)["argument"] in (argument, "running_mean", "running_var")


@pytest.mark.parametrize("shape", ((1, 4, 1, 1), (1, 4, 2, 1)))
def test_one_value_per_channel(backend: str, shape: tuple[int, ...]) -> None:
    """As stock, which says it in other words; with a stride of 2 it is the second stage that has a single value."""
    stride = shape[2]
    for cls in (FusedInvResBlock, stock.InvResBlock):
        module = cls(4, 3, 12, 6, True, "hs", stride)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            module(torch.randn(shape))
        if cls is FusedInvResBlock:
            assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        module.eval()(torch.randn(shape))


def test_float16_on_the_cpu() -> None:
    if mbn_kernels.available_backends()["cpu"] != "available":
        pytest.skip("the cpu backend is not built")
    block = FusedInvResBlock(*SIGNATURE).half()
    x = torch.randn(2, 4, 6, 6).half()
    for training in (True, False):
        with mbn_kernels.use_backend("cpu"):
            assert raised(lambda: block(x), TypeError)["argument"] == "x"
            with torch.no_grad():
                assert raised(lambda: block(x), TypeError)["argument"] == "x"
        with mbn_kernels.use_backend("reference"):
            assert block(x).dtype == torch.float16
        block.train(not training)


@pytest.mark.parametrize("wrong", (torch.randn(2, 5, 6, 6), torch.randn(4, 6, 6), torch.randn(2, 4, 6, 6).double(),
                                   torch.randn(1, 4, 1, 1)), ids=lambda t: str(tuple(t.shape)))  # fmt: skip
def test_a_failed_call_changes_nothing(backend: str, wrong: Tensor) -> None:
    block = stock.randomize(FusedInvResBlock(*SIGNATURE))
    state = {k: v.clone() for k, v in block.state_dict().items()}
    with pytest.raises((ValueError, TypeError)):
        block(wrong)
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())
    assert block.training and block.why_not_fused() is None


def test_a_wrong_gradient(backend: str) -> None:
    block = FusedInvResBlock(*SIGNATURE)
    out = block(torch.randn(2, 4, 6, 6))
    with pytest.raises(RuntimeError):
        out.backward(torch.randn(2, 4, 6, 5))


def test_raw_operator_without_saved_tensors(backend: str) -> None:
    """Asking for gradients of a call that saved nothing is an error, not a wrong gradient."""
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    spec = "op: pointwise 1,1 1,1 0,0,0,0 1,1 none 0 0.0 relu -"
    with pytest.raises(RuntimeError, match="save: expected True"):
        torch.ops.mbn.chain(x, [torch.randn(3, 3, 1, 1)], spec, False, False, backend)


def test_reading_the_message_is_not_needed_twice(backend: str) -> None:
    """Errors name the module that was called."""
    assert raised(lambda: FusedDepthwiseSeparable(4, 8)(torch.randn(2, 3, 5, 5)), ValueError)["op"] == (
        "FusedDepthwiseSeparable"
    )
    assert raised(depthwise(act="x"), ValueError)["op"] == "depthwise_conv_bn_act"
