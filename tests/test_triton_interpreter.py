"""The Triton kernels themselves, run by Triton's interpreter on CPU tensors, against the float64 oracle.

The interpreter has to be chosen before kernels are defined, so these tests need a process of their own, with
TRITON_INTERPRET=1: ``make test`` starts one. Blocks are cut to 16, so that the smallest tensors take several tiles and
end in the middle of one, in every dimension.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from oracle import (
    ACTS,
    Case,
    StageCase,
    Tensors,
    compare_case,
    dense,
    dw,
    fused_chain,
    make_tensors,
    mode_id,
    pw,
    run,
    se,
)
from property_cases import TRITON
from property_checks import check_many
from special import hold_denormals, hold_nan_in_gradient, hold_overflow, hold_tiny_variance
from torch import Tensor

import mbn_kernels
from mbn_kernels import chain
from mbn_kernels.activations import ACTIVATIONS
from mbn_kernels.chain import Value

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1: `make test` starts one", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from mbn_kernels.backends.triton import config, device, launch, library  # noqa: E402
from mbn_kernels.backends.triton.kernels import TritonKernels  # noqa: E402

GATE = ("relu", "hardsigmoid")
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


@pytest.fixture(autouse=True, scope="module")
def quicker_interpreter() -> Iterator[None]:
    """Calling one device function from another, the interpreter patches Triton's language anew, which takes longer than
    all the rest; within this package the kernel's own patch is in force already.
    """
    call = interpreter.InterpretedFunction.__call__

    def quick(self, *args, **kwargs):
        if self.fn.__module__.startswith("mbn_kernels"):
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", quick)
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(config, "largest_block", 16)
    for module in (config, launch):  # few programs, so that each takes several tiles
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    with mbn_kernels.use_backend("triton"):
        yield


# Against the oracle ---------------------------------------------------------------------------------------------------

STAGES = (
    Case("pointwise", (3, 5, 5, 3), (pw(19, "relu6"),)),
    Case("pointwise-residual", (2, 21, 3, 3), (pw(21),), True),
    Case("pointwise-no-norm", (2, 17, 4, 5), (pw(6, "silu", norm=False),)),
    Case("pointwise-not-affine", (2, 3, 4, 5), (pw(18, "hardswish", affine=False),)),
    Case("one-channel", (2, 1, 5, 4), (pw(1, "relu"), dw(3, "relu"))),
    Case("3x3", (2, 19, 5, 18), (dw(3, "hardswish"),)),
    Case("3x3-stride-2", (2, 3, 7, 35), (dw(3, "relu", stride=2),)),
    Case("5x5", (1, 5, 6, 7), (dw(5, "hardswish"),)),
    Case("5x5-stride-2", (2, 3, 9, 6), (dw(5, "relu6", stride=2),)),
    Case("7x7", (1, 3, 8, 5), (dw(7, "silu"),)),
    Case("7x7-stride-2", (1, 2, 9, 8), (dw(7, "relu", stride=2),)),
    Case("1x1-depthwise-stride-2", (2, 3, 5, 4), (dw(1, "relu", stride=2),)),
    Case("3x5-window", (2, 3, 5, 6), (dw((3, 5), "relu", stride=(2, 1)),)),
    Case("stride-3", (2, 3, 10, 8), (dw(3, "relu", stride=3),)),
    Case("stride-over-window", (1, 3, 9, 8), (dw(2, "relu", stride=3, padding=0),)),
    Case("dilation-2", (2, 3, 9, 8), (dw(3, "relu", dilation=2),)),
    Case("dilation-1-3", (1, 3, 8, 9), (dw(3, "relu", dilation=(1, 3)),)),
    Case("stride-2-dilation-2", (1, 3, 11, 10), (dw(3, "relu", stride=2, dilation=2),)),
    Case("stride-2-dilation-3", (1, 3, 11, 12), (dw(3, "relu", stride=2, dilation=3, padding=1),)),
    Case("four-pads", (2, 3, 8, 7), (dw(5, "relu", stride=2, padding=(1, 2, 0, 3)),)),
    Case("padding-over-window", (1, 3, 4, 3), (dw(3, "hardswish", padding=(4, 3, 5, 0)),)),
    Case("window-larger-than-registers", (1, 3, 9, 8), (dw(9, "relu"), pw(4))),
    Case("squeeze-excite", (3, 18, 5, 4), (se(),)),
    Case("squeeze-excite-silu", (2, 5, 3, 7), (se("silu", "sigmoid"),)),
)
BLOCKS = (
    Case("v1", (2, 7, 9, 8), (dw(3, "relu", stride=2), pw(19, "relu"))),
    Case("v2-residual", (2, 5, 6, 7), (pw(17, "relu6"), dw(3, "relu6"), pw(5)), True),
    Case("v2-stride-2", (2, 6, 9, 7), (pw(20, "relu6"), dw(3, "relu6", stride=2), pw(9))),
    Case("v3", (3, 5, 6, 5), (pw(19, "hardswish"), dw(3, "hardswish", gate=GATE), pw(5)), True),
    Case("v3-stride-2", (2, 4, 7, 6), (pw(18, "relu"), dw(5, "relu", stride=2, gate=GATE), pw(6))),
    Case("v3-no-expansion", (2, 17, 5, 4), (dw(3, "relu", gate=GATE), pw(6))),
    Case("gate-first", (2, 4, 5, 4), (pw(17, "relu", gate=GATE), dw(3, "relu"), pw(5))),
    Case("two-gates", (5, 3, 4, 5), (pw(5, "relu", gate=GATE), dw(3, "silu", gate=("silu", "sigmoid")), pw(3)), True),
    Case("gate-last-residual", (2, 3, 5, 4), (dw(3, "hardswish", gate=GATE),), True),
    Case("no-image", (0, 4, 6, 5), (pw(8, "hardswish"), dw(3, "hardswish", gate=GATE), pw(4)), True),
    Case("1x1-map", (5, 3, 1, 1), (pw(6, "hardswish"), dw(5, "hardswish", gate=GATE), pw(3)), True),
    Case("stem", (2, 3, 9, 7), (dense(19, 3, "hardswish", stride=2), dw(3, "relu", gate=GATE), pw(6))),
    Case("dense-between", (2, 4, 5, 6), (pw(5, "relu"), dense(3, 3, "silu", padding=(0, 1, 2, 1)), dw(3, "relu"))),
)


def with_modes(cases: tuple[Case, ...]) -> list[tuple[Case, bool]]:
    return [(c, t) for c in cases for t in (True, False) if not t or any(s.norm for s in c.stages)]


@pytest.mark.parametrize("case, training", with_modes(STAGES), ids=mode_id)
def test_stage(case: Case, training: bool) -> None:
    compare_case(fused_chain, case, torch.float32, training)


@pytest.mark.parametrize("case, training", with_modes(STAGES[:1] + STAGES[5:9] + STAGES[22:23]), ids=mode_id)
def test_stage_in_bfloat16(case: Case, training: bool) -> None:
    compare_case(fused_chain, case, torch.bfloat16, training)


@DTYPES
@pytest.mark.parametrize("case, training", with_modes(BLOCKS), ids=mode_id)
def test_block(case: Case, training: bool, dtype: torch.dtype) -> None:
    compare_case(fused_chain, case, dtype, training)


def choose_products(patch: pytest.MonkeyPatch, chosen: bool) -> list[str]:
    """Has all 1x1 convolutions run PyTorch's products, or none; returns which of them did, as they run."""
    found: list[str] = []
    for name in ("library_forward", "library_backward"):
        patch.setattr(config, name, lambda *_: chosen)
    for name in ("pointwise_forward", "pointwise_backward"):
        run = getattr(library, name)

        def counted(*args, name=name, run=run):
            found.append(name)
            return run(*args)

        patch.setattr(library, name, counted)
    patch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as products are rounded by default
    return found


@DTYPES
@pytest.mark.parametrize(
    "case, training", with_modes((*STAGES[1:3], BLOCKS[0], *BLOCKS[3:5], *BLOCKS[6:8], BLOCKS[10])), ids=mode_id
)
def test_pytorchs_products(monkeypatch: pytest.MonkeyPatch, case: Case, training: bool, dtype: torch.dtype) -> None:
    """Between passes of their own, with gates, residuals and frozen batch norm: the other way to run what the tests
    above run in Triton, as so few pixels would not be worth starting them.
    """
    ran = choose_products(monkeypatch, True)
    compare_case(fused_chain, case, dtype, training)
    assert "pointwise_forward" in ran
    assert "pointwise_backward" in ran


def test_products_are_not_cast_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward may run where autocast is on although its forward did not."""
    ran = choose_products(monkeypatch, True)
    t = make_tensors(BLOCKS[1]).map(torch.Tensor.float)
    t.dout = torch.randn(BLOCKS[1].shape)
    expected = run(fused_chain, BLOCKS[1], t, True)
    leaves = t.leaves()
    for v in leaves.values():
        v.requires_grad_()
    out = fused_chain(BLOCKS[1], t, True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(out, list(leaves.values()), t.dout)
    assert len(ran) == 8
    for name, g in zip(leaves, grads, strict=True):
        assert torch.equal(g, expected[f"grad {name}"]), name


def test_products_round_as_convolutions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch is told to round products in another way, they are no way to run a convolution."""
    ran = choose_products(monkeypatch, True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    compare_case(fused_chain, BLOCKS[1], torch.float32, True)
    assert not ran


@MODES
def test_block_in_float16(training: bool) -> None:
    compare_case(fused_chain, BLOCKS[3], torch.float16, training)


@MODES
def test_block_in_the_tiles_of_a_real_shape(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """The sizes that a GPU would run with, for all of which these tensors are a tail."""
    monkeypatch.setattr(config, "largest_block", 1 << 20)
    compare_case(fused_chain, BLOCKS[3], torch.bfloat16, training)


@pytest.mark.parametrize("programs", (2, 7), ids="{} multiprocessors".format)
def test_any_split_of_the_work(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Parts of images, and groups of images, with a gate and without."""
    for module in (config, launch):
        monkeypatch.setattr(module, "multiprocessors", lambda device: programs)
    compare_case(fused_chain, BLOCKS[3], torch.float32, True)


def strided(t: Tensors) -> Tensors:
    def change(v: Tensor) -> Tensor:
        return v.repeat_interleave(2, -1)[..., ::2]

    return Tensors(change(t.x), [{k: change(v) for k, v in p.items()} for p in t.stages], change(t.dout))


@MODES
def test_any_strides(training: bool) -> None:
    compare_case(fused_chain, BLOCKS[4], torch.float32, training, change=strided)


def test_saved_tensors_in_another_layout() -> None:
    """Hooks on saved tensors may give them back contiguous, as torch.autograd.graph.save_on_cpu does."""
    t = make_tensors(BLOCKS[3]).map(torch.Tensor.float)
    t.dout = torch.randn(BLOCKS[3].shape)
    expected = run(fused_chain, BLOCKS[3], t, True)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, torch.Tensor.contiguous):
        got = run(fused_chain, BLOCKS[3], t, True)
    for name, v in expected.items():
        assert torch.equal(got[name], v), name


@pytest.mark.parametrize("number", (float("nan"), float("inf")), ids=("nan", "inf"))
@MODES
def test_not_finite(number: float, training: bool) -> None:
    def change(t: Tensors) -> Tensors:
        x = t.x.clone()
        x[0, 1, 2, 3] = number
        return Tensors(x, t.stages, t.dout)

    compare_case(fused_chain, BLOCKS[1], torch.float32, training, change=change, not_finite=True)


SPECIAL = (
    Case("depthwise", (2, 3, 5, 4), (dw(3, "relu", eps=0.0),)),
    Case("pointwise", (2, 5, 4, 4), (pw(6, "relu", eps=0.0),)),
)


@pytest.mark.parametrize("deviation, eps", ((1e-10, 1e-5), (1e-19, 1e-37)), ids=str)
@pytest.mark.parametrize("case", (dw(3), pw(5)), ids=("depthwise", "pointwise"))
def test_tiny_variance(case: StageCase, deviation: float, eps: float) -> None:
    hold_tiny_variance(Case("stage", (2, 5, 5, 4), (case,)), eps, deviation, torch.float32)


@pytest.mark.parametrize("small", ("x", "weight", "dout"))
@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_denormals_are_numbers(case: Case, small: str) -> None:
    hold_denormals(case, small)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the overflow
@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_overflow(case: Case) -> None:
    hold_overflow(case, torch.float32)


@MODES
def test_nan_in_the_gradient(training: bool) -> None:
    case = Case("gate", (2, 4, 5, 6), (pw(6, "silu"), dw(3, "silu", gate=("silu", "sigmoid")), pw(5)))
    hold_nan_in_gradient(case, training, torch.float32)


@pytest.mark.parametrize(
    "case, products", ((STAGES[0], False), (STAGES[0], True), (STAGES[5], False), (STAGES[6], False)), ids=str
)
def test_statistics_far_from_zero(monkeypatch: pytest.MonkeyPatch, case: Case, products: bool) -> None:
    """Mean 1000, deviation 1: a difference of squares would have no digit left."""
    ran = choose_products(monkeypatch, products)
    t = make_tensors(case)
    (stage,), (p,) = case.stages, t.stages
    weight = torch.zeros_like(p["weight"])
    if stage.conv == "pointwise":
        weight[torch.arange(len(weight)), torch.arange(len(weight)) % weight.shape[1]] = 1
    else:
        weight[:, 0, 1, 1] = 1  # the padding is then not seen
    x = _channels_last((1000 + torch.randn(case.shape)).float())
    kernels = TritonKernels()
    extra = () if stage.conv == "pointwise" else (chain.parse(chain.chain_spec("c", [stage.spec(True)])).stages[0],)
    forward = kernels.pointwise_forward if stage.conv == "pointwise" else kernels.depthwise_forward
    y, statistics = forward(Value(x), weight.float(), *extra, True)
    _, mean, var = kernels.batch_norm(statistics, y.numel() // y.shape[1], None, None, 1e-5)
    assert bool(ran) == products
    exact = y.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(1), rtol=1e-6, atol=0)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


WANTED = {
    "input": lambda name: name == "x",
    "convolutions": lambda name: name.endswith(".weight"),
    "last convolution": lambda name: name == "2.weight",
    "norms": lambda name: ".bn_" in name,
    "all but convolutions": lambda name: not name.endswith(".weight"),
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("case", (BLOCKS[1], BLOCKS[3]), ids=str)
def test_only_wanted_gradients(case: Case, wanted: str) -> None:
    """A gradient is the same whichever others are asked for, although other kernels may make it."""
    t = make_tensors(case).map(torch.Tensor.float)
    t.dout = torch.randn(case.shape)
    expected = run(fused_chain, case, t, True)
    leaves = {name: v for name, v in t.leaves().items() if WANTED[wanted](name)}
    for v in leaves.values():
        v.requires_grad_()
    grads = torch.autograd.grad(fused_chain(case, t, True), list(leaves.values()), t.dout)
    for name, g in zip(leaves, grads, strict=True):
        torch.testing.assert_close(g, expected[f"grad {name}"], rtol=1e-5, atol=1e-5, msg=name)


def test_random_calls() -> None:
    """As tests/test_properties.py, smaller."""
    check_many(0, 36, ("triton",), TRITON, Counter())


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def _activations(x, value, derivative, ACT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    n = tl.load(x + i)
    tl.store(value + i, device.activate(n, ACT))
    tl.store(derivative + i, device.activate_grad(n, ACT))


@pytest.mark.parametrize("name", ACTS)
def test_activations_are_those_of_the_table(name: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.0, -3.0, 6.0])
    x = torch.cat([special, torch.linspace(-8, 8, 56)])
    value, derivative = torch.empty_like(x), torch.empty_like(x)
    table = ACTIVATIONS[name]
    _activations[(1,)](x, value, derivative, ACT=table.code, N=64)
    exact = x.double()
    torch.testing.assert_close(value.double(), table.value(exact), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(derivative.double(), table.derivative(exact), rtol=1e-6, atol=1e-6, equal_nan=True)


@triton.jit
def _far_tile(out, t, first_image, part, run, pixels, ROWS: tl.constexpr):
    image, row, rows = device.tile_rows(t, tl.load(first_image), tl.load(part), run, pixels, ROWS)
    tl.store(out, image)
    tl.store(out + 1, row)
    tl.store(out + 2, rows)


def test_tiles_beyond_31_bits() -> None:
    out = torch.zeros(3, dtype=torch.int64)
    one, part = torch.ones(1, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
    run, pixels = 1 << 24, 3 * 64 * (1 << 24) + 64 + 5
    _far_tile[(1,)](out, 1, one, part, run, pixels, ROWS=64)
    assert out.tolist() == [1, pixels + (3 * run + 1) * 64, 5]


# Memory ---------------------------------------------------------------------------------------------------------------


ACTIVATIONS_OF_A_LAUNCH = ("x", "y", "g_dv", "g_y", "residual", "du", "out")  # the rest is small


class Traffic:
    """Every address that a launch reads and writes."""

    def __init__(self) -> None:
        self.loads: list[np.ndarray] = []
        self.stores: list[np.ndarray] = []

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        builder = type(interpreter.interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(this, ptrs, mask, *rest):
            self.loads.append(ptrs.data[mask.data.astype(bool)].ravel())
            return load(this, ptrs, mask, *rest)

        def watched_store(this, ptrs, value, mask, *rest):
            self.stores.append(ptrs.data[mask.data.astype(bool)].ravel())
            return store(this, ptrs, value, mask, *rest)

        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)


def test_every_launch_reads_what_it_is_given_and_writes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address outside of the tensors, none written by two programs or twice, all of each activation read or
    written: so a launch moves the bytes of its tensors, which is how test_triton_compiled.py counts them.
    """
    seen: set[str] = set()
    execute = launch.execute

    def checked(kernel, programs, arguments) -> None:
        traffic, name = Traffic(), kernel.fn.__name__
        with pytest.MonkeyPatch.context() as patch:
            traffic.watch(patch)
            execute(kernel, programs, arguments)
        loads, stores = (
            np.concatenate(each) if each else np.empty(0, np.uint64) for each in (traffic.loads, traffic.stores)
        )
        assert len(np.unique(stores)) == len(stores), f"{name} writes an address twice"
        touched = np.unique(np.concatenate([loads, stores]))
        owned = np.zeros(len(touched), bool)
        for argument, t in arguments.items():
            if isinstance(t, Tensor):
                begin = t.data_ptr()
                inside = (touched >= begin) & (touched < begin + t.numel() * t.element_size())
                owned |= inside
                if argument in ACTIVATIONS_OF_A_LAUNCH:
                    assert int(inside.sum()) == t.numel(), f"{name} does not touch all of {argument}"
        assert owned.all(), f"{name} goes outside of its tensors"
        seen.add(name)

    monkeypatch.setattr(launch, "execute", checked)
    for case, products in (
        *((c, False) for c in (BLOCKS[2], BLOCKS[4], STAGES[15], STAGES[22], BLOCKS[6])),
        (BLOCKS[3], True),
    ):
        choose_products(monkeypatch, products)
        t = make_tensors(case).map(torch.Tensor.float)
        for training in (True, False):
            out = fused_chain(case, t, training)
            t.dout = torch.randn(out.shape)
            run(fused_chain, case, t, training)
    every = {"pointwise_forward", "pointwise_backward", "pointwise_weight", "depthwise_forward", "depthwise_backward",
             "_materialize", "_materialize_gradient", "_finish", "_reduce_gradient", "_statistics", "_pool",
             "_batch_norm", "_running_norm", "_norm_backward", "_sum_parts"}  # fmt: skip
    assert seen == every
