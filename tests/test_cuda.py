"""The Triton and CUDA backends on a GPU: against the oracle, in every way that PyTorch lets one run there.

The CUDA backend's tests are those of what is its own: the depthwise convolutions and whole blocks.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import stock
import torch
from oracle import Case, Tensors, compare_case, dw, fused_chain, hold, pw
from test_blocks import GATE, MODES, ODD, REAL, pair
from torch import Tensor, nn

from mbn_kernels import FusedInvResBlock, available_backends, backends, chain, functional, models, use_backend
from mbn_kernels.models.tables import BlockShape
from mbn_kernels.schemas import CUDA_SCHEMAS

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:.*runs the reference backend")]

HALF = (torch.float16, torch.bfloat16)
BY_DTYPE = pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=lambda d: str(d)[6:])
CASES = (
    Case("v3", (4, 16, 29, 28), (pw(64, "hardswish"), dw(5, "hardswish", gate=GATE), pw(16)), True),
    Case("v2", (4, 16, 29, 28), (pw(96, "relu6"), dw(3, "relu6", stride=2), pw(24))),
    Case("v1", (4, 17, 15, 14), (dw(3, "relu", stride=2), pw(33, "relu"))),
    # However many rows a program of the depthwise kernels takes, the last one is left with a single row.
    Case("one-row-left", (4, 16, 33, 28), (pw(64, "hardswish"), dw(3, "hardswish"), pw(16)), True),
)
BLOCK = (40, 5, 120, 40, True, "hs", 1)  # of MobileNetV3, with everything that a block can have


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """float32 products as exact as on the CPU."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [s.allow_tf32 for s in settings]
    for s in settings:
        s.allow_tf32 = False
    yield
    for s, allowed in zip(settings, before, strict=True):
        s.allow_tf32 = allowed


def need(backend: str) -> None:
    reason = available_backends()[backend]
    if reason != "available":
        pytest.skip(reason)


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Nothing falls back to the reference, which would pass these tests, too."""
    need(backend)
    with pytest.MonkeyPatch.context() as patch, use_backend(backend):
        if backend == "cuda":  # whatever was measured on this machine, its own kernels run and not Triton's
            from mbn_kernels.backends.triton import tuning

            patch.setattr(tuning, "_choices", lambda gpu: {})
            patch.delenv("MBN_TRITON_TUNE", raising=False)
        yield


@pytest.fixture
def needs_triton() -> None:
    need("triton")


@pytest.fixture(name="on_triton")
def triton_alone() -> Iterator[None]:
    with only("triton"):
        yield


@pytest.fixture(name="on_cuda")
def cuda_alone() -> Iterator[None]:
    with only("cuda"):
        yield


@pytest.fixture(params=("triton", "cuda"))
def on_each(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each of both; its name."""
    with only(request.param):
        yield request.param


class Counted:
    """An operator of the CUDA library, and how often it was called."""

    def __init__(self, name: str, calls: Counter[str]) -> None:
        self.name, self.calls, self.operator = name, calls, getattr(torch.ops.mbn, name).default

    def default(self, *args: object) -> None:
        self.calls[self.name] += 1
        self.operator(*args)


@pytest.fixture(name="calls")
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator of the CUDA library was called: it leaves to Triton what it has no kernel for."""
    found: Counter[str] = Counter()
    for name in CUDA_SCHEMAS:
        monkeypatch.setattr(torch.ops.mbn, name, Counted(name, found))
    return found


def to_cuda(t: Tensors) -> Tensors:
    return t.map(torch.Tensor.cuda)


def block(dtype: torch.dtype = torch.float32) -> FusedInvResBlock:
    return stock.randomize(FusedInvResBlock(*BLOCK)).to("cuda", dtype)


def images(n: int = 8, size: int = 14, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, BLOCK[0], size, size, device="cuda").to(dtype)


def results(module: nn.Module, x: Tensor, change: Callable[[nn.Module], Callable] = lambda m: m) -> list[Tensor]:
    """Output, gradients of x and of every parameter, and buffers afterwards, of one step of a copy of the module."""
    module = copy.deepcopy(module)
    leaf = x.detach().requires_grad_()  # with the strides of x
    out = change(module)(leaf)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], gradient), *module.buffers()]


def results_and_evaluation(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Likewise, and what evaluation without gradients gives, for which there are kernels of its own."""
    found = results(module, x)
    with torch.no_grad():
        return found if module.training else [*found, module(x)]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(expected)


def choose_ways(monkeypatch: pytest.MonkeyPatch, choose: Callable[[list], list]) -> None:
    """From now on only those ways are there that ``choose`` leaves of all that fit, the likely best first."""
    from mbn_kernels.backends.cuda import planner
    from mbn_kernels.backends.triton import tuning

    ways = planner.ways
    monkeypatch.setattr(planner, "_MEASURED", 1 << 20)
    monkeypatch.setattr(planner, "ways", lambda *args: choose(ways(*args)))
    monkeypatch.setattr(tuning, "_plans", {})  # of the way that was chosen before


def prefer_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that fuses most runs, whatever its estimate."""
    choose_ways(monkeypatch, lambda ways: sorted(ways, key=lambda way: -way.count - bool(way.gate_height)))


# Against the oracle ---------------------------------------------------------------------------------------------------


@BY_DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_matches_the_oracle(on_each: str, case: Case, dtype: torch.dtype, training: bool) -> None:
    compare_case(fused_chain, case, dtype, training, change=to_cuda)


@BY_DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_pytorchs_products_match_the_oracle(
    on_triton, monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, training: bool
) -> None:
    """The other way to run 1x1 convolutions, which is for larger ones than these."""
    from mbn_kernels.backends.triton import config, library, tuning

    ran, product = [], library.pointwise_forward
    monkeypatch.setattr(library, "pointwise_forward", lambda *args: ran.append(args) or product(*args))
    monkeypatch.setattr(tuning, "_plans", {})  # of the way that was chosen before
    for name in ("library_forward", "library_backward"):
        monkeypatch.setattr(config, name, lambda *_: True)
    compare_case(fused_chain, case, dtype, training, change=to_cuda)
    assert ran


def test_tf32_is_rounded(on_triton) -> None:
    """Of positive numbers digits cut off would show: every product would be too small, by 7e-4 on the average."""
    torch.backends.cudnn.allow_tf32 = True
    g = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.rand(shape, device="cuda", generator=g) + 0.5 for shape in ((8, 960, 14, 14), (64, 960, 1, 1)))
    kernels = backends.get("triton").kernels
    y, _ = kernels.pointwise_forward(chain.Value(x.contiguous(memory_format=torch.channels_last)), weight, False)
    off = y.double() / torch.nn.functional.conv2d(x.double(), weight.double()) - 1
    assert 1e-7 < off.abs().max() < 1e-3  # TF32 it is
    assert off.mean().abs() < 2e-5


@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_matches_the_oracle_in_float64(case: Case, training: bool) -> None:
    """By the reference backend: there are no kernels for it."""
    compare_case(fused_chain, case, torch.float64, training, change=to_cuda)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", ODD, ids=str)
@MODES
def test_odd_chain(on_each: str, case: Case, dtype: torch.dtype, training: bool) -> None:
    compare_case(fused_chain, case, dtype, training, change=to_cuda)


def prepared(twin: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> Tensors:
    """As stock.prepare_module, but on the GPU: at a real batch the CPU would take longer than everything else."""
    twin = stock.randomize(copy.deepcopy(twin)).to("cuda", dtype).double().train(training)
    x = (0.3 + torch.randn(shape, device="cuda")).to(dtype).double()
    stock.avoid_kinks(twin, x, dtype)
    with torch.no_grad():
        dout = torch.randn_like(copy.deepcopy(twin)(x))
    state = {k: v for k, v in twin.state_dict().items() if v.is_floating_point()}
    return Tensors(x, [state], dout).map(lambda v: v.to(dtype))


@BY_DTYPE
@pytest.mark.parametrize("shape", REAL, ids=REAL.get)
@MODES
def test_block_at_its_real_shape(
    on_each: str, calls: Counter, shape: BlockShape, dtype: torch.dtype, training: bool
) -> None:
    fused, twin = pair(shape)
    t = prepared(twin, (8, shape.in_channels, shape.height, shape.width), dtype, training)
    fused, twin = (m.cuda().train(training) for m in (fused, twin))
    assert fused.why_not_fused() is None
    got = stock.run_module(fused, t)
    wanted = {"cuda_depthwise_forward", "cuda_depthwise_backward"} if on_each == "cuda" else set()
    assert wanted <= calls.keys() and bool(calls) == bool(wanted)
    hold(got, lambda t: stock.run_module(twin, t), t, dtype)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@MODES
def test_nan_in_one_pixel(on_each: str, case: Case, training: bool) -> None:
    """It comes out where stock has it, and nowhere else."""

    def change(t: Tensors) -> Tensors:
        x = t.x.clone()
        x[0, 2, 3, 4] = float("nan")
        return to_cuda(Tensors(x, t.stages, t.dout))

    compare_case(fused_chain, case, torch.float32, training, change=change, not_finite=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
@pytest.mark.parametrize("conv, backend", (("pointwise", "triton"), ("depthwise", "triton"), ("depthwise", "cuda")))
def test_statistics_far_from_zero(conv: str, backend: str, dtype: torch.dtype) -> None:
    """Mean 1000, deviation 1: no digit of a difference of squares would be right. What is normalised is x itself."""
    with only(backend):
        check_statistics_far_from_zero(conv, dtype)


def check_statistics_far_from_zero(conv: str, dtype: torch.dtype) -> None:
    c = 24
    x = (1000 + torch.randn(16, c, 57, 33, device="cuda")).to(dtype)
    mean, var = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
    options = {"act": "identity", "training": True, "momentum": 1.0}
    if conv == "pointwise":
        weight = torch.eye(c, dtype=dtype, device="cuda")[:, :, None, None]
        functional.pointwise_conv_bn_act(x, weight, None, None, mean, var, **options)
    else:
        weight = torch.zeros(c, 1, 3, 3, dtype=dtype, device="cuda")
        weight[:, :, 1, 1] = 1
        functional.depthwise_conv_bn_act(x, weight, None, None, mean, var, padding=1, **options)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-5, atol=0)


# Backends and devices -------------------------------------------------------------------------------------------------


def test_backend_by_dtype(needs_triton, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend where it is built, else Triton's; float64 runs the reference, and one warning says so."""
    first = next(name for name in ("cuda", "triton") if available_backends()[name] == "available")
    monkeypatch.setattr(backends, "_warned", set())
    device, module, x = torch.device("cuda", 0), block(torch.float64), images(dtype=torch.float64)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        chosen = [backends.choose(device, dtype) for dtype in (torch.float32, *HALF)]
        assert not [w for w in seen if "mbn_kernels" in str(w.message)]
        module(x), module(x)
        assert backends.choose(device, torch.float64) == "reference"
    assert chosen == [first] * 3
    assert len([w for w in seen if "runs the reference backend" in str(w.message)]) == 1


def test_mixed_devices_are_refused(on_triton) -> None:
    module, x = block(), images()
    with pytest.raises(ValueError, match="weight: expected a tensor on cuda:0"):
        copy.deepcopy(module).cpu()(x)
    with pytest.raises(ValueError, match="weight: expected a tensor on cpu"):
        module(x.cpu())
    with pytest.raises(TypeError, match="backend 'triton' expected a tensor on cuda"):
        module.cpu()(x.cpu())
    with pytest.raises(TypeError, match="backend 'triton' expected float32, float16 or bfloat16"):
        block(torch.float64)(x.double())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@MODES
def test_a_gpu_that_is_not_the_current_one(
    on_each: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, training: bool
) -> None:
    if on_each == "cuda":
        prefer_whole_blocks(monkeypatch)
    module, x = block(dtype).train(training), images(dtype=dtype)
    expected = results_and_evaluation(module, x)
    got = results_and_evaluation(copy.deepcopy(module).to("cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {t.device.index for t in got} == {1}
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    stock.assert_same([t.to("cuda:0") for t in got], expected, tolerance)
    with torch.no_grad():
        moved = copy.deepcopy(module).to("cuda:1")(x.to("cuda:1")).to("cuda:0")
    stock.assert_same([moved], expected[:1], tolerance)
    assert torch.cuda.current_device() == 0


# The same every time, whatever else runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@MODES
def test_same_bits_every_run(on_each: str, dtype: torch.dtype, training: bool) -> None:
    module, x = block(dtype).train(training), images(16, 28, dtype)
    expected = results_and_evaluation(module, x)
    for _ in range(4):
        assert_equal(results_and_evaluation(module, x), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@MODES
def test_a_stream_that_is_not_the_default(
    on_each: str, calls: Counter, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, training: bool
) -> None:
    """The input arrives late there, so that what ran anywhere else would have met NaN."""
    if on_each == "cuda":
        prefer_whole_blocks(monkeypatch)
    module, x = block(dtype).train(training), images(dtype=dtype)
    expected = results_and_evaluation(module, x)
    late, stream = torch.full_like(x, float("nan")), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.copy_(x)
        got = results_and_evaluation(module, late)
    torch.cuda.synchronize()
    assert_equal(got, expected)
    whole = on_each == "cuda" and dtype == torch.bfloat16 and not training
    assert bool(calls["cuda_inverted_residual"]) == bool(calls["cuda_gated_project"]) == whole


def test_two_streams_at_once(on_each: str) -> None:
    work = [(block(torch.bfloat16), images(64, 28, torch.bfloat16)), (block(), images(64, 28))]
    alone = [results(module, x) for module, x in work]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in work], []
    for _ in range(5):
        for stream, (module, x) in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                found.append(results(module, x))
    torch.cuda.synchronize()
    for i, got in enumerate(found):
        assert_equal(got, alone[i % 2])


def warm_up(f: Callable[[], object]) -> None:
    """On a side stream, as PyTorch asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@MODES
def test_graph_of_a_step(on_triton, dtype: torch.dtype, training: bool) -> None:
    module, x = block(dtype).train(training), images(dtype=dtype).requires_grad_()
    state, gradient = copy.deepcopy(module.state_dict()), images(dtype=dtype)
    leaves = [x, *module.parameters()]

    def step() -> list[Tensor]:
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(images(dtype=dtype))
        module.load_state_dict(state)
        graph.replay()
        got = [t.clone() for t in (*found, *module.buffers())]
        module.load_state_dict(state)
        assert_equal(got, [*step(), *module.buffers()])


@torch.no_grad()
def test_graph_of_a_network_in_evaluation(on_triton) -> None:
    net, x = models.mobilenet_v3_small(num_classes=10).cuda().eval(), torch.randn(2, 3, 64, 64, device="cuda")
    warm_up(lambda: net(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = net(x)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(logits, net(x), rtol=1e-5, atol=1e-5)


@MODES
def test_compiled(on_triton, training: bool) -> None:
    torch._dynamo.reset()
    module, x = block().train(training), images()
    got = results(module, x, lambda m: torch.compile(m, fullgraph=True))
    stock.assert_same(got, results(module, x))
    if not training:
        with torch.no_grad():
            stock.assert_same([torch.compile(module, fullgraph=True)(x)], [module(x)])


# Mixed precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=("float16", "bfloat16"))
@pytest.mark.parametrize("out", (6, 4), ids=("plain", "residual"))
@MODES
def test_autocast(needs_triton, dtype: torch.dtype, out: int, training: bool) -> None:
    """The oracle runs in float64, so the backend is left to the choice by dtype."""
    fused, twin = (cls(4, 3, 12, out, True, "hs", 1) for cls in (FusedInvResBlock, stock.InvResBlock))
    stock.compare_under_autocast(fused, twin, (3, 4, 8, 7), torch.float32, dtype, training, "cuda")


@pytest.mark.parametrize("dtype", HALF, ids=("float16", "bfloat16"))
def test_mixed_precision_step(on_triton, dtype: torch.dtype) -> None:
    module, x = block(), images()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.autocast("cuda", dtype=dtype):
        out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)
    scaler.scale((out.float() * weights).mean()).backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale  # no gradient overflowed
    for p, old in zip(module.parameters(), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)
    running = {name: b for name, b in module.named_buffers() if "running" in name}
    assert {b.dtype for b in running.values()} == {torch.float32}
    assert all(b.isfinite().all() for b in running.values())


@pytest.mark.parametrize("make", (models.mobilenet_v1, models.mobilenet_v2, models.mobilenet_v3_large,
                                  models.mobilenet_v3_small), ids=lambda f: f.__name__)  # fmt: skip
def test_training_step(on_triton, make) -> None:
    torch.manual_seed(0)
    fused = make(num_classes=10).cuda()
    plain = make(num_classes=10, fused=False).cuda()
    plain.load_state_dict(fused.state_dict())
    x, labels = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
    losses = []
    for model in (fused, plain):
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):  # the second loss shows the first step's gradients; later ones amplify rounding
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[:2], losses[2:], rtol=2e-3, atol=2e-3)
