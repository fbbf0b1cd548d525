"""The operators as PyTorch sees them: opcheck, torch.compile, autocast, double backward."""

from __future__ import annotations

import pytest
import stock
import torch
from oracle import Case, dense, dw, make_tensors, pw, se
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSqueezeExcite,
    backends,
    chain,
    functional,
    schemas,
)

GATE = ("relu", "hardsigmoid")
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
CASES = (
    Case("depthwise", (2, 3, 7, 5), (dw(3, "hardswish", stride=2, padding=(0, 1, 2, 1)),)),
    Case("pointwise-residual", (2, 3, 4, 5), (pw(3, "relu6"),), True),
    Case("squeeze-excite", (2, 8, 4, 5), (se(),)),
    Case("stem", (2, 3, 7, 5), (dense(6, 3, "hardswish", stride=2), dw(3, "relu"), pw(4))),
    Case("dense-four-pads", (2, 1, 6, 5), (dense(3, 3, "relu6", padding=(0, 1, 2, 1)),)),
    Case("not-affine", (2, 3, 4, 5), (pw(5, "silu", affine=False), dw(3, "relu", affine=False))),
    Case("v3", (2, 4, 6, 5), (pw(8, "hardswish"), dw(5, "hardswish", gate=GATE), pw(4)), True),
)


def chain_arguments(case: Case, training: bool, save: bool, backend: str) -> tuple:
    t = make_tensors(case).map(torch.Tensor.float)
    specs = [stage.spec(training) for stage in case.stages]
    params = [v for p in t.stages for k, v in p.items() if not (training and k.startswith("running"))]
    return t.x, params, chain.chain_spec(case.name, specs), case.residual, save, backend


def test_every_backend_of_this_machine_is_built() -> None:
    """The other tests skip a backend that is missing."""
    assert mbn_kernels.available_backends()["reference"] == "available"
    assert mbn_kernels.available_backends()["cpu"] == "available"


# opcheck --------------------------------------------------------------------------------------------------------------


EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FAKE = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_opcheck_chain(backend: str, case: Case, training: bool) -> None:
    x, params, *rest = chain_arguments(case, training, True, backend)
    differentiable = [v.requires_grad_() for v in (x, *params) if training]  # in evaluation, nothing is wanted
    assert bool(differentiable) == training
    torch.library.opcheck(torch.ops.mbn.chain.default, (x, params, *rest))
    torch.library.opcheck(torch.ops.mbn.chain.default, chain_arguments(case, training, False, backend))


@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_opcheck_chain_backward(backend: str, case: Case, training: bool) -> None:
    x, params, spec, residual, save, _ = chain_arguments(case, training, True, backend)
    out, _, saved = torch.ops.mbn.chain(x, params, spec, residual, save, backend)
    names = [name for stage in chain.parse(spec).stages for name in stage.parameter_names]
    for i, keep in enumerate((lambda name: True, lambda name: name.startswith("bn_"), lambda name: name == "x")):
        needs = [keep(name) and not name.startswith("running") for name in ("x", *names)]
        arguments = torch.randn_like(out), x, params, saved, spec, residual, needs, backend
        torch.library.opcheck(
            torch.ops.mbn.chain_backward.default, arguments, test_utils=EVERYTHING if i == 0 else FAKE
        )


class Recorder:
    """Stands in for torch.ops.mbn and keeps every call of a kernel."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple]] = []

    def __getattr__(self, name: str):
        if name == "evaluate_release":  # the calls of what is held are made again
            return lambda held: None

        def call(*args):
            self.calls.append((name, tuple(a.clone() if isinstance(a, Tensor) else a for a in args)))
            return getattr(torch.ops.mbn, name)(*args)

        return call


def kernel_calls(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> dict[str, list[tuple]]:
    """Arguments that the engine gives to each kernel operator, for blocks with and without squeeze-excite."""
    recorder, found = Recorder(), {}
    monkeypatch.setattr(backends.cpu, "_ops", recorder)
    with mbn_kernels.use_backend("cpu"):
        for se_ in (True, False):
            for training in (True, False):
                block = FusedInvResBlock(4, 3, 8, 4, se_, "hs", 1).to(dtype).train(training)
                x = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
                block(x).sum().backward()
        with torch.no_grad():
            block(x)
            mbn_kernels.freeze(mbn_kernels.FusedSequential(block).eval(), x)(x)
        FusedSqueezeExcite(8).to(dtype)(torch.randn(2, 8, 5, 6, dtype=dtype, requires_grad=True)).sum().backward()
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(dtype)
        mbn_kernels.FusedSequential(stem)(torch.randn(2, 3, 7, 8, dtype=dtype)).sum().backward()
    monkeypatch.undo()
    for name, args in recorder.calls:
        if name in schemas.KERNEL_SCHEMAS:  # the others make no tensor of what they are given
            found.setdefault(name, []).append(args)
    return found


def test_opcheck_kernels(needs_cpu, monkeypatch) -> None:
    calls = kernel_calls(monkeypatch)
    assert calls.keys() == schemas.KERNEL_SCHEMAS.keys()
    for name, found in calls.items():
        for args in found:
            op = getattr(torch.ops.mbn, name).default
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        torch.library.opcheck(op, found[0])


def wrong_tensors(t: Tensor):
    yield "a row less", t[:-1] if t.dim() else t
    yield "twice as large", torch.cat([t, t], t.dim() - 1)
    yield "another dtype", t.to(torch.float64 if t.dtype != torch.float64 else torch.float32)
    yield "an integer dtype", t.to(torch.int32)
    yield "empty", t.new_zeros(0)
    yield "a stride of 2", torch.stack([t, t], -1)[..., 0]
    if t.dim() == 4:
        yield "sparse", t.to_sparse()
        yield "without batch", t[0]


def test_kernels_refuse_wrong_tensors(needs_cpu, monkeypatch) -> None:
    """Raw operators check what they touch: a tensor of a wrong shape, dtype or layout raises, never crashes."""
    accepted = []
    # Any height and width can be pooled; of any number of values there are statistics.
    fitting = (("pool", 0, "twice as large"), ("statistics", 0, "twice as large"), ("statistics", 0, "a row less"))
    for name, found in kernel_calls(monkeypatch).items():
        op = getattr(torch.ops.mbn, name)
        for call, args in enumerate(found):
            for i, a in enumerate(args):
                for label, wrong in wrong_tensors(a) if isinstance(a, Tensor) else ():
                    try:
                        op(*args[:i], wrong, *args[i + 1 :])
                    except (RuntimeError, ValueError, TypeError, NotImplementedError):
                        continue
                    if (name, i, label) not in fitting:
                        accepted.append(f"{name}, call {call}, argument {i} {tuple(a.shape)}: {label}")
    assert not accepted, "\n".join(accepted)


def test_kernels_refuse_wrong_numbers(needs_cpu, monkeypatch) -> None:
    calls = kernel_calls(monkeypatch)
    for name in ("depthwise_forward", "depthwise_backward"):
        (args, *_), op = calls[name], getattr(torch.ops.mbn, name)
        lists = [i for i, a in enumerate(args) if isinstance(a, (tuple, list))]
        for i, wrong in zip(lists, ((0, 1), (-1, 1, 1, 1), (0, 1)), strict=True):
            with pytest.raises(RuntimeError):
                op(*args[:i], wrong, *args[i + 1 :])
        for wrong in ((1, 1), (1, 1, 1, 1, 1)):
            with pytest.raises((RuntimeError, TypeError)):
                op(*args[: lists[1]], wrong, *args[lists[1] + 1 :])
    for name, found in calls.items():
        names = [argument.name for argument in getattr(torch.ops.mbn, name).default._schema.arguments]
        for args in found:
            for i in range(len(args)):
                if names[i].endswith("_act"):
                    for wrong in (-1, 7, 1 << 40):
                        with pytest.raises(RuntimeError):
                            getattr(torch.ops.mbn, name)(*args[:i], wrong, *args[i + 1 :])


# torch.compile --------------------------------------------------------------------------------------------------------

MODULES = {
    "v3-gate": lambda: FusedInvResBlock(4, 3, 12, 4, True, "hs", 1),
    "v3-stride": lambda: FusedInvResBlock(4, 5, 12, 6, False, "relu", 2),
    "v2": lambda: FusedInvResBlock(4, 3, 24, 4, False, "relu6", 1, bn_momentum=0.1),
    "v1": lambda: FusedDepthwiseSeparable(4, 8, 3, 2),
    "depthwise": lambda: FusedDepthwiseConvBNAct(4, 5),
    "pointwise": lambda: FusedPointwiseConvBNAct(4, 9, act="silu"),
    "squeeze-excite": lambda: FusedSqueezeExcite(4, 2),
    "two-blocks": lambda: nn.Sequential(
        FusedInvResBlock(4, 3, 12, 4, True, "hs", 1), nn.Hardswish(), FusedDepthwiseSeparable(4, 8)
    ),
}


def steps(f, module: nn.Module, training: bool) -> list[Tensor]:
    """Outputs and gradients of three calls, and the state after them."""
    found = []
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(2, 4, 6, 5, generator=g).requires_grad_()
        module.zero_grad()
        out = f(x)
        stock.pull(out)
        found += [out.detach(), x.grad, *(p.grad for p in module.parameters())]
    if not training:
        with torch.no_grad():
            found.append(f(x))
    return found + [v.clone() for v in module.state_dict().values()]


def same_as_eager(make, training: bool, compiler: str) -> None:
    torch._dynamo.reset()
    module = stock.randomize(make()).train(training)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    expected = steps(module, module, training)
    module.load_state_dict(state)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=training):  # no_grad is another graph, as it should be
        got = steps(compiled, module, training)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride() or a.dim() != 4


@pytest.mark.parametrize("name", MODULES)
@MODES
def test_compile_equals_eager(backend: str, name: str, training: bool) -> None:
    same_as_eager(MODULES[name], training, "aot_eager")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile_with_inductor(training: bool) -> None:
    same_as_eager(MODULES["v3-gate"], training, "inductor")


@pytest.mark.filterwarnings("ignore:.*runs the reference backend")
@MODES
def test_compile_looks_for_a_backend(training: bool) -> None:
    """For all but the CPU the first that can is looked for, which loads it: here for tensors without memory."""
    torch._dynamo.reset()
    module, x = MODULES["v3-gate"]().to("meta").train(training), torch.empty(2, 4, 6, 5, device="meta")
    assert torch.compile(module, fullgraph=True, backend="aot_eager")(x).shape == module(x).shape


def test_compile_with_other_sizes(backend: str) -> None:
    torch._dynamo.reset()
    module = stock.randomize(MODULES["v3-gate"]())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 4, 6, 5), (3, 4, 6, 5), (4, 4, 9, 7), (1, 4, 8, 11)):
        x = torch.randn(shape)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        got = compiled(x)
        module.load_state_dict(state)
        torch.testing.assert_close(got, module(x))


def test_compile_blocks_one_by_one(backend: str) -> None:
    """Blocks share code but differ in every attribute; each is its own graph, without a break."""
    torch._dynamo.reset()
    x = torch.randn(2, 4, 8, 9)
    for i, (exp, k, s, act) in enumerate(((12, 3, 1, "hs"), (16, 5, 2, "relu"), (20, 3, 1, "silu"), (24, 7, 2, "hs"))):
        bn = {"bn_eps": 1e-5 * (i + 1), "bn_momentum": 0.1 * (i + 1)}
        block = stock.randomize(FusedInvResBlock(4, k, exp, 4, True, act, s, **bn))
        state = {name: v.clone() for name, v in block.state_dict().items()}
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        after = {name: v.clone() for name, v in block.state_dict().items()}
        block.load_state_dict(state)
        torch.testing.assert_close(got, block(x))
        torch.testing.assert_close(after, dict(block.state_dict()))


def test_export(backend: str) -> None:
    block = stock.randomize(MODULES["two-blocks"]()).eval()
    x = torch.randn(2, 4, 6, 5)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (2, 5):
        x = torch.randn(batch, 4, 6, 5)
        torch.testing.assert_close(exported.module()(x), block(x))


def test_compile_functional(backend: str) -> None:
    torch._dynamo.reset()
    t = make_tensors(CASES[0]).map(torch.Tensor.float)
    p, (stage,) = t.stages[0], CASES[0].stages

    def f(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        norm = p["bn_weight"], p["bn_bias"], running_mean, running_var
        window = {"stride": stage.stride, "padding": stage.padding}
        return functional.depthwise_conv_bn_act(x, p["weight"], *norm, training=True, **window)

    running = [(p["running_mean"].clone(), p["running_var"].clone()) for _ in range(2)]
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(t.x, *running[0])
    torch.testing.assert_close(got, f(t.x, *running[1]))
    torch.testing.assert_close(running[0], running[1])


# Autocast -------------------------------------------------------------------------------------------------------------


def v3(out: int) -> tuple[nn.Module, nn.Module]:
    return tuple(cls(4, 3, 12, out, True, "hs", 1) for cls in (FusedInvResBlock, stock.InvResBlock))


AUTOCAST = {
    "v3": lambda: v3(6),
    "v3-residual": lambda: v3(4),
    "v1": lambda: (FusedDepthwiseSeparable(4, 8), stock.Separable(4, 8)),
    "squeeze-excite": lambda: (FusedSqueezeExcite(8, 2), stock.SqueezeExcite(8, 4)),
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@MODES
def test_autocast(backend: str, name: str, dtype: torch.dtype, training: bool) -> None:
    shape = 3, 8 if name == "squeeze-excite" else 4, 8, 7
    stock.compare_under_autocast(*AUTOCAST[name](), shape, dtype, torch.bfloat16, training)


@MODES
def test_autocast_leaves_float64_alone(backend: str, training: bool) -> None:
    block = stock.randomize(FusedInvResBlock(4, 3, 12, 4, True, "hs", 1)).double().train(training)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float64


def test_autocast_under_compile(backend: str) -> None:
    torch._dynamo.reset()
    block = stock.randomize(FusedInvResBlock(4, 3, 12, 6, True, "hs", 1)).eval()
    x = torch.randn(2, 4, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


# Differentiating twice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_double_backward_says_that_it_is_not_supported(backend: str, case: Case, training: bool) -> None:
    x, params, *rest = chain_arguments(case, training, True, backend)
    out, _, _ = torch.ops.mbn.chain(x.requires_grad_(), [p.requires_grad_() for p in params[:1]] + params[1:], *rest)
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"double backward.*not supported"):
        g.sum().backward()
