"""Blocks against the oracle: every block of V1, V2 and both V3 tables at its real shape, and odd ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import stock
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import Case, Tensors, compare_case, dw, fused_chain, hold, pw
from torch import nn

import mbn_kernels
from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock
from mbn_kernels.models.tables import BlockShape, layer_shapes

NETWORKS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
GATE = ("relu", "hardsigmoid")
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))


def pair(b: BlockShape) -> tuple[nn.Module, nn.Module]:
    """The fused block and its stock twin."""
    if b.kind == "separable":
        return tuple(cls(b.in_channels, b.out_channels, b.k, b.s) for cls in (FusedDepthwiseSeparable, stock.Separable))
    signature = (b.in_channels, b.k, b.exp_channels, b.out_channels, b.se, b.nl, b.s)
    return tuple(cls(*signature) for cls in (FusedInvResBlock, stock.InvResBlock))


def built() -> list[str]:
    return [name for name, state in mbn_kernels.available_backends().items() if state == "available"]


def same(t: Tensors) -> Tensors:
    return t


def compare_modules(
    fused: nn.Module, twin: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, training: bool, backends: list[str]
) -> None:
    t = stock.prepare_module(twin, shape, dtype, training)
    twin.train(training), fused.train(training)
    assert fused.why_not_fused() is None
    for name in backends:
        with mbn_kernels.use_backend(name):
            got = stock.run_module(fused, t)
        try:
            hold(got, lambda t: stock.run_module(twin, t), t, dtype, same)
        except AssertionError as error:
            raise AssertionError(f"backend {name}: {error}") from None


# Blocks that repeat within the tables are compared once.
REAL = {b: f"{network}-{i}" for network in reversed(NETWORKS) for i, b in reversed([*enumerate(layer_shapes(network))])}


def test_the_tables_have_every_block() -> None:
    assert [len(layer_shapes(network)) for network in NETWORKS] == [13, 17, 15, 11]
    assert all(b in REAL for network in NETWORKS for b in layer_shapes(network))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("block", REAL, ids=REAL.get)
@MODES
def test_block_at_its_real_shape(block: BlockShape, dtype: torch.dtype, training: bool) -> None:
    batch = 1 if block.height > 28 else 2
    # The reference is held to the oracle at every shape once: it is slow.
    backends = [b for b in built() if b != "reference" or (training and dtype == torch.float32)]
    if not backends:
        pytest.skip("only the reference backend is built")
    compare_modules(*pair(block), (batch, block.in_channels, block.height, block.width), dtype, training, backends)


# Odd blocks -----------------------------------------------------------------------------------------------------------

ODD = (
    Case("one-channel", (2, 1, 6, 5), (pw(1, "relu"), dw(3, "relu"), pw(1)), True),
    Case("three-channels", (3, 3, 6, 5), (pw(17, "hardswish"), dw(5, "hardswish", stride=2, gate=GATE), pw(3))),
    Case("seventeen-channels", (2, 17, 7, 9), (pw(51, "hardswish"), dw(3, "hardswish", gate=GATE), pw(17)), True),
    Case("no-expansion", (2, 17, 7, 9), (dw(3, "relu", gate=GATE), pw(17)), True),
    Case("no-expansion-stride-2", (2, 16, 9, 7), (dw(3, "relu", stride=2, gate=GATE), pw(24))),
    Case("no-image", (0, 4, 6, 5), (pw(8, "hardswish"), dw(3, "hardswish", gate=GATE), pw(4)), True),
    Case("one-image", (1, 8, 13, 11), (pw(40, "silu"), dw(5, "silu", gate=("silu", "sigmoid")), pw(8)), True),
    Case("1x1-map", (9, 8, 1, 1), (pw(40, "hardswish"), dw(5, "hardswish", gate=GATE), pw(8)), True),
    Case("2x1-map-stride-2", (9, 8, 2, 1), (pw(40, "relu6"), dw(3, "relu6", stride=2), pw(8))),
    Case("one-row", (2, 8, 1, 33), (pw(24, "relu6"), dw(3, "relu6"), pw(8)), True),
    Case("one-column", (2, 8, 33, 1), (pw(24, "relu6"), dw(3, "relu6", stride=2, gate=GATE), pw(8))),
    Case("window-larger-than-map", (4, 8, 3, 2), (pw(24, "hardswish"), dw(7, "hardswish", gate=GATE), pw(8)), True),
    Case("stride-3", (2, 8, 11, 8), (pw(24, "relu"), dw(3, "relu", stride=3), pw(12))),
    Case("dilation-2", (2, 8, 11, 8), (pw(24, "relu"), dw(3, "relu", dilation=2), pw(8)), True),
    Case("four-pads", (2, 8, 11, 8), (pw(24, "relu"), dw(5, "relu", stride=2, padding=(1, 2, 0, 3)), pw(12))),
    Case("shrinking", (2, 24, 8, 7), (pw(5, "hardswish"), dw(3, "hardswish", padding=0, gate=GATE), pw(24))),
    Case("wide", (1, 24, 5, 300), (pw(72, "relu"), dw(5, "relu", gate=GATE), pw(24)), True),
    Case("separable", (2, 24, 15, 14), (dw(3, "relu", stride=2), pw(40, "relu"))),
    Case("separable-linear-residual", (2, 24, 15, 14), (dw(3, "relu6"), pw(24)), True),
    Case("activation-last-residual", (2, 8, 6, 7), (pw(24, "relu"), dw(3, "silu"), pw(8, "hardswish")), True),
    Case("depthwise-last-residual", (2, 8, 6, 7), (dw(3, "hardswish"),), True),
    Case("gate-last-residual", (2, 8, 6, 7), (dw(3, "hardswish", gate=GATE),), True),
    Case("gate-first", (2, 8, 6, 7), (pw(24, "relu", gate=GATE), dw(3, "relu"), pw(8))),
    Case("two-gates", (2, 8, 6, 7), (pw(24, "relu", gate=GATE), dw(3, "relu", gate=GATE), pw(8)), True),
    Case("four-stages", (2, 8, 6, 7), (dw(3, "relu"), pw(24, "relu"), dw(3, "relu"), pw(8)), True),
    Case("pointwise-twice", (2, 8, 6, 7), (pw(24, "hardswish"), pw(8, "silu")), True),
    Case("not-affine", (2, 8, 6, 7), (pw(24, "silu", affine=False), dw(3, "silu", affine=False), pw(8, affine=False))),
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", ODD, ids=str)
@MODES
def test_odd_chain(backend: str, case: Case, dtype: torch.dtype, training: bool) -> None:
    compare_case(fused_chain, case, dtype, training)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(2, 19), st.integers(2, 19)),
    expansion=st.integers(1, 70),
    out=st.integers(1, 40) | st.none(),
    k=st.sampled_from((1, 3, 5, 7)),
    stride=st.integers(1, 2),
    act=st.sampled_from(("relu", "relu6", "hardswish", "silu")),
    gate=st.sampled_from((None, GATE)),
    training=st.booleans(),
)
def test_block_geometry(backend: str, shape, expansion, out, k, stride, act, gate, training) -> None:
    stages = pw(expansion, act), dw(k, act, stride=stride, gate=gate), pw(out or shape[1])
    case = Case("geometry", shape, stages, out is None and stride == 1)
    values = shape[0] * -(-shape[2] // stride) * -(-shape[3] // stride)
    compare_case(fused_chain, case, torch.float32, training and values > 8)


# States of batch norm, and what is frozen -----------------------------------------------------------------------------


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def without_running_statistics(module: nn.Module) -> None:
    for m in norms(module):
        m.track_running_stats = False
        m.running_mean = m.running_var = m.num_batches_tracked = None


def without_affine(module: nn.Module) -> None:
    for m in norms(module):
        m.affine, m.weight, m.bias = False, None, None


def cumulative(module: nn.Module) -> None:
    for m in norms(module):
        m.momentum = None


def one_frozen(module: nn.Module) -> None:
    norms(module)[1].eval()


def all_frozen(module: nn.Module) -> None:
    for m in norms(module):
        m.eval()


def one_without_statistics(module: nn.Module) -> None:
    m = norms(module)[0]
    m.track_running_stats = False
    m.running_mean = m.running_var = m.num_batches_tracked = None


CHANGES = (without_running_statistics, without_affine, cumulative, one_frozen, all_frozen, one_without_statistics)
SIGNATURES = ((4, 3, 12, 4, True, "hs", 1), (6, 5, 6, 8, False, "relu", 2))


@pytest.mark.parametrize("signature", SIGNATURES, ids=("expanded", "plain"))
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@MODES
def test_states_of_batch_norm(backend: str, change: Callable, signature: tuple, training: bool) -> None:
    fused, twin = FusedInvResBlock(*signature), stock.InvResBlock(*signature)
    stock.randomize(twin)
    fused.load_state_dict(twin.state_dict())
    x = torch.randn(3, signature[0], 9, 8)
    for module in (fused, twin):
        module.double().train(training)
        change(module)
    assert fused.why_not_fused() is None
    for _ in range(3):
        x = x.double() * 1.1 + 0.1
        results = []
        for module in (fused, twin):
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            out = module(leaf)
            stock.pull(out)
            results.append({"out": out, "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters()})
            results[-1] |= dict(module.named_buffers())
        for name, expected in results[1].items():
            torch.testing.assert_close(results[0][name], expected, rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), twin(x), rtol=1e-10, atol=1e-10)


def parameters(module: nn.Module, *kinds: type) -> list[nn.Parameter]:
    return [p for m in module.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)]


WANTED = {
    "input": lambda m: [],
    "convolutions": lambda m: parameters(m, nn.Conv2d),
    "norms": lambda m: parameters(m, nn.BatchNorm2d),
    "gate": lambda m: parameters(m, nn.Linear),
    "first convolution": lambda m: parameters(m, nn.Conv2d)[:1],
    "last convolution": lambda m: parameters(m, nn.Conv2d)[-1:],
    "last norm's bias": lambda m: parameters(m, nn.BatchNorm2d)[-1:],
    "all but convolutions": lambda m: parameters(m, nn.BatchNorm2d, nn.Linear),
    "all but norms": lambda m: parameters(m, nn.Conv2d, nn.Linear),
    "everything": lambda m: list(m.parameters()),
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("of_input", (True, False), ids=("of input", "input fixed"))
@MODES
def test_only_wanted_gradients(backend: str, wanted: str, of_input: bool, training: bool) -> None:
    if wanted == "input" and not of_input:
        pytest.skip("nothing to differentiate")
    results = []
    for cls in (FusedInvResBlock, stock.InvResBlock):
        module = stock.randomize(cls(4, 3, 12, 4, True, "hs", 1)).double().train(training).requires_grad_(False)
        for p in WANTED[wanted](module):
            p.requires_grad_(True)
        x = torch.linspace(-2, 2, 3 * 4 * 6 * 5, dtype=torch.float64).reshape(3, 4, 6, 5).requires_grad_(of_input)
        stock.pull(module(x))
        results.append({"x": x.grad} | {name: p.grad for name, p in module.named_parameters()})
    for name, expected in results[1].items():
        assert (results[0][name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(results[0][name], expected, rtol=1e-7, atol=1e-8, msg=name)


def test_new_weights_are_seen(backend: str) -> None:
    """Nothing made from the weights may outlive a change of them, whichever way it is made."""
    fused, twin = (cls(4, 3, 12, 4, True, "hs", 1).eval() for cls in (FusedInvResBlock, stock.InvResBlock))
    x = torch.randn(1, 4, 6, 5)

    def changes():
        yield lambda m: stock.randomize(m, 1)
        yield lambda m: m.load_state_dict(
            stock.randomize(stock.InvResBlock(4, 3, 12, 4, True, "hs", 1), 2).state_dict()
        )
        yield lambda m: [p.data.mul_(0.5) for p in m.parameters()]
        yield lambda m: [setattr(p, "data", p.data * 3) for p in m.parameters()]
        yield lambda m: [n.running_var.mul_(2) for n in norms(m)]
        yield lambda m: [setattr(n, "eps", 0.1) for n in norms(m)]

    with torch.no_grad():
        for change in changes():
            for module in (fused, twin):
                change(module)
            torch.testing.assert_close(fused(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divisor, squeeze", ((1, 18), (8, 24), (4, 20)))
def test_squeeze_divisor(backend: str, divisor: int, squeeze: int) -> None:
    signature = (16, 3, 75, 16, True, "hs", 1)
    fused = FusedInvResBlock(*signature, squeeze_divisor=divisor, bn_eps=1e-3, bn_momentum=0.01)
    twin = stock.InvResBlock(*signature, squeeze=squeeze, bn={"eps": 1e-3, "momentum": 0.01})
    compare_modules(fused, twin, (2, 16, 7, 6), torch.float32, True, [backend])


@MODES
def test_saved_tensors_in_another_layout(backend: str, training: bool) -> None:
    """Hooks on saved tensors may give them back contiguous, as torch.autograd.graph.save_on_cpu does."""
    block, x = stock.randomize(FusedInvResBlock(4, 3, 12, 4, True, "hs", 1)).train(training), torch.randn(2, 4, 6, 5)
    results = []
    for pack in (lambda t: t, torch.Tensor.contiguous):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, pack):
            stock.pull(block(leaf))
        results.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for plain, moved in zip(*results, strict=True):
        assert torch.equal(plain, moved)


def test_input_is_left_alone(backend: str) -> None:
    """The review's squeeze-excite multiplies its input in place; these do not."""
    for module in (mbn_kernels.FusedSqueezeExcite(8), FusedInvResBlock(8, 3, 8, 8, True, "relu", 1)):
        x = torch.randn(2, 8, 5, 4)
        before = x.clone()
        assert module(x).data_ptr() != x.data_ptr()
        assert torch.equal(x, before)
