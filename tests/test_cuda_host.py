"""The CUDA kernels themselves, run on the CPU by fibers, against the float64 oracle.

tests/cuda_host compiles the very device code for the CPU, tests/cuda_host_build.py builds it. What is not CUDA C++ runs
in Triton's interpreter, so these tests need a process with TRITON_INTERPRET=1: ``make test`` starts one. Small maps of
few channels: several units a block, several blocks, and tails everywhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from zlib import crc32

import pytest
import torch
from cuda_host_build import ROOT, SANITIZE, Host, build, compiler
from oracle import ACTS, Case, Tensors, compare_case, dw, fused_chain, hold, make_tensors, mode_id, pw, stock_chain
from torch import Tensor

import mbn_kernels
from mbn_kernels import backends, chain, schemas
from mbn_kernels.backends import triton
from mbn_kernels.chain import Gradient, Norm, Stage, Value

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1: `make test` starts one", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")
if compiler() is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)

from mbn_kernels.backends.cuda import config, depthwise, planner
from mbn_kernels.backends.cuda.kernels import CudaKernels
from mbn_kernels.backends.cuda.planner import Way
from mbn_kernels.backends.triton import config as triton_config
from mbn_kernels.backends.triton import convolutions, launch, tuning

GATE = ("relu", "hardsigmoid")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))


@pytest.fixture(scope="session")
def library() -> Host:
    return Host()


@pytest.fixture(autouse=True)
def host(request: pytest.FixtureRequest, library: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The backend on this build; few blocks, so that each takes several units. Half of the tests run in each order."""
    monkeypatch.setitem(backends._LOADERS, "cuda", lambda: backends.Backend(CudaKernels(), None, triton.supports))
    backends._backend.cache_clear()
    for module in (config, launch, planner, triton_config):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(tuning, "_plans", {})
    monkeypatch.setattr(triton_config, "largest_block", 16)
    monkeypatch.setattr(config, "_RESIDENT", 64)
    library.order(crc32(request.node.name.encode()) % 2 == 1)
    library.launches()
    with mbn_kernels.use_backend("cuda"):
        yield library
    library.skip()
    backends._backend.cache_clear()


def compare(host: Host, case: Case, dtype: torch.dtype, training: bool, **options: object) -> None:
    """Holds a case to the tolerance, and that it ran here."""
    compare_case(fused_chain, case, dtype, training, **options)
    assert host.launches() > 0


# Depthwise convolutions -----------------------------------------------------------------------------------------------

WINDOWS = [
    Case(f"{k}x{k}-stride-{s}", (2, 8, 2 * k + 1, k + 4), (dw(k, ACTS[(k + s) % 5], stride=s),))
    for k, s in product((3, 5, 7), (1, 2))
]
STAGES = (
    Case("one-row-one-column", (3, 16, 1, 1), (dw(5, "hardswish"),)),
    Case("one-image", (1, 24, 7, 30), (dw(3, "relu"),)),
    Case("many-images", (9, 8, 4, 5), (dw(3, "silu"),)),
    Case("several-slices", (1, 88, 5, 6), (dw(3, "hardswish"),)),
    Case("asymmetric-padding", (2, 8, 9, 8), (dw(5, "relu6", stride=2, padding=(1, 2, 0, 3)),)),
    Case("odd-padding", (2, 8, 9, 10), (dw(3, "hardswish", stride=2, padding=(0, 1, 1, 0)),)),
    Case("no-padding", (2, 8, 8, 9), (dw(5, "relu", padding=0),)),
    Case("padding-over-window", (1, 8, 4, 3), (dw(3, "hardswish", padding=(4, 3, 5, 0)),)),
    Case("rows-without-gradient", (3, 8, 10, 8), (dw(3, "relu", stride=2, padding=0),)),
    Case("not-affine", (2, 8, 6, 5), (dw(3, "relu", affine=False),)),
    Case("no-norm", (2, 8, 6, 5), (dw(3, "silu", norm=False),)),
    Case("residual", (2, 8, 6, 5), (dw(3, "hardswish"),), True),
    Case("gate", (3, 16, 5, 6), (dw(3, "hardswish", gate=GATE),)),
    Case("gate-in-front", (3, 8, 5, 6), (pw(16, "relu", gate=GATE), dw(3, "relu"))),
)
BLOCKS = (
    Case("v1", (2, 8, 9, 8), (dw(3, "relu", stride=2), pw(24, "relu"))),
    Case("v2-residual", (2, 8, 6, 7), (pw(24, "relu6"), dw(3, "relu6"), pw(8)), True),
    Case("v2-stride-2", (2, 16, 9, 7), (pw(40, "relu6"), dw(3, "relu6", stride=2), pw(24))),
    Case("v3", (3, 8, 6, 5), (pw(24, "hardswish"), dw(5, "hardswish", gate=GATE), pw(8)), True),
    Case("v3-stride-2", (2, 24, 7, 9), (pw(72, "relu"), dw(5, "relu", stride=2, gate=GATE), pw(40))),
    Case("v3-no-expansion", (2, 16, 5, 4), (dw(3, "relu", gate=GATE), pw(16)), True),
    Case("no-image", (0, 8, 6, 5), (pw(16, "hardswish"), dw(3, "hardswish", gate=GATE), pw(8)), True),
)
OTHERS = (
    Case("prime-channels", (2, 7, 5, 6), (pw(19, "relu"), dw(3, "relu"), pw(7)), True),
    Case("half-a-vector", (2, 6, 5, 6), (dw(3, "relu"),)),
    Case("dilation", (1, 8, 9, 8), (dw(3, "relu", dilation=2),)),
    Case("window-not-square", (1, 8, 5, 6), (dw((3, 5), "relu"),)),
    Case("stride-not-square", (1, 8, 5, 6), (dw(3, "relu", stride=(2, 1)),)),
    Case("larger-window", (1, 8, 9, 8), (dw(9, "relu"), pw(8))),
)


def with_modes(cases: tuple[Case, ...]) -> list[tuple[Case, bool]]:
    return [(c, t) for c in cases for t in (True, False) if not t or any(s.norm for s in c.stages)]


@pytest.mark.parametrize("from_the_last", (False, True), ids=("first-to-last", "last-to-first"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@MODES
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_window(host: Host, case: Case, dtype: torch.dtype, training: bool, from_the_last: bool) -> None:
    """Every depthwise kernel that ships: forward and both gradients."""
    host.order(from_the_last)
    compare(host, case, dtype, training)


@pytest.mark.parametrize("case, training", with_modes(STAGES), ids=mode_id)
def test_stage(host: Host, case: Case, training: bool) -> None:
    compare(host, case, torch.float32, training)


@pytest.mark.parametrize("act", ACTS)
def test_activation(host: Host, act: str) -> None:
    """Deferred in front of the convolution and, in evaluation, behind it."""
    case = Case(act, (2, 8, 4, 5), (pw(8, act), dw(3, act)))
    for training in (True, False):
        compare(host, case, torch.float32, training)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case, training", with_modes(BLOCKS), ids=mode_id)
def test_block(host: Host, case: Case, training: bool, dtype: torch.dtype) -> None:
    compare_case(fused_chain, case, dtype, training)
    assert bool(host.launches()) == bool(case.shape[0])  # nothing to start for no image


@pytest.mark.parametrize("processors", (3, 50), ids="{} multiprocessors".format)
def test_any_split_of_the_work(host: Host, monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    """Parts of images, and groups of images, with a gate and without."""
    for module in (config, launch):
        monkeypatch.setattr(module, "multiprocessors", lambda device: processors)
    for case in (BLOCKS[1], BLOCKS[3]):
        compare(host, case, torch.float32, True)


@pytest.mark.parametrize("case", OTHERS, ids=str)
@MODES
def test_the_rest_is_tritons(host: Host, case: Case, training: bool) -> None:
    compare_case(fused_chain, case, torch.float32, training)
    assert host.launches() == 0


def test_unaligned_memory_is_tritons(host: Host) -> None:
    def shifted(t: Tensors) -> Tensors:
        memory = torch.empty(t.x.numel() + 1, dtype=t.x.dtype)
        n, c, h, w = t.x.shape
        x = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t.x)
        return Tensors(x, t.stages, t.dout)

    compare_case(fused_chain, WINDOWS[0], torch.float32, False, change=shifted)
    case = Case("block", (1, 16, 5, 4), (dw(3, "relu"), pw(8)))
    compare_case(fused_chain, case, torch.bfloat16, False, change=shifted)


@pytest.mark.parametrize("number", (float("nan"), float("inf")), ids=("nan", "inf"))
@MODES
def test_not_finite(host: Host, number: float, training: bool) -> None:
    def change(t: Tensors) -> Tensors:
        x = t.x.clone()
        x[0, 1, 2, 3] = number
        return Tensors(x, t.stages, t.dout)

    compare(host, BLOCKS[1], torch.float32, training, change=change, not_finite=True)


def test_statistics_far_from_zero(host: Host) -> None:
    """Mean 1000, deviation 1: a difference of squares would have no digit left."""
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, 0, 1, 1] = 1  # the padding is then not seen
    x = channels_last(1000 + torch.randn(3, 8, 12, 11))
    y, found = CudaKernels().depthwise_forward(Value(x), weight, stage_of(WINDOWS[0]), True)
    _, mean, var = CudaKernels().batch_norm(found, y.numel() // 8, None, None, 1e-5)
    exact = y.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(1), rtol=1e-6, atol=0)
    assert host.launches() == 1


def stage_of(case: Case, i: int = 0) -> Stage:
    return chain.parse(chain.chain_spec("c", [stage.spec(True) for stage in case.stages])).stages[i]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


# Whole blocks ---------------------------------------------------------------------------------------------------------

WHOLE = [
    Case(f"{k}x{k}-stride-{s}", (2, 24, 9, 10), (pw(40, "hardswish"), dw(k, "relu", stride=s), pw(24)), s == 1)
    for k, s in product((3, 5), (1, 2))
]
GATED = Case("gated", (2, 16, 6, 7), (pw(40, "relu"), dw(5, "hardswish", gate=GATE), pw(16)), True)
PADDED = Case("padded", (1, 8, 9, 8), (pw(16, "silu"), dw(5, "silu", stride=2, padding=(1, 2, 0, 3)), pw(8, "relu")))


def evaluate(monkeypatch: pytest.MonkeyPatch, host: Host, case: Case, dtype: torch.dtype, way: Way) -> None:
    """A case in evaluation, in that way, held to the tolerance."""
    monkeypatch.setattr(planner, "ways", lambda *args: [way])
    t = make_tensors(case, dtype).map(lambda v: v.to(dtype))

    def stock(t: Tensors) -> dict[str, Tensor]:
        return {"out": stock_chain(case, t, False)}

    with torch.no_grad():
        hold({"out": fused_chain(case, t, False)}, stock, t, dtype)
    assert host.launches() > 0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("tile", ((8, 8), (3, 5), (7, 14), (16, 4)), ids=str)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole_block(
    host: Host, monkeypatch: pytest.MonkeyPatch, case: Case, tile: tuple[int, int], dtype: torch.dtype
) -> None:
    evaluate(monkeypatch, host, case, dtype, Way(0, 3, *tile))


@pytest.mark.parametrize("first, count", ((0, 2), (1, 2)), ids=("expand-depthwise", "depthwise-project"))
@pytest.mark.parametrize("case", (WHOLE[1], WHOLE[2]), ids=str)
def test_part_of_a_block(host: Host, monkeypatch: pytest.MonkeyPatch, case: Case, first: int, count: int) -> None:
    evaluate(monkeypatch, host, case, torch.bfloat16, Way(first, count, 4, 7))


@pytest.mark.parametrize("tile", ((8, 8), (2, 4), (7, 14)), ids=str)
@pytest.mark.parametrize("gate_tile", ((0, 0), (8, 8), (3, 7)), ids=("gate-alone", "gate-8x8", "gate-3x7"))
def test_block_with_squeeze_excite(
    host: Host, monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], gate_tile: tuple[int, int]
) -> None:
    """Two kernels, or four where the gate's layers have kernels of their own."""
    evaluate(monkeypatch, host, GATED, torch.bfloat16, Way(0, 2, *tile, *gate_tile))


def test_gate_behind_a_depthwise_stage(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gate", (3, 40, 6, 7), (dw(3, "relu", gate=("silu", "sigmoid")), pw(24, "relu")))
    for dtype in (torch.float16, torch.bfloat16):
        evaluate(monkeypatch, host, case, dtype, Way(0, 0, 0, 0, 6, 8))


def test_parameters_in_float(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms and gates as they are under autocast; other tests have them in 16 bits."""
    monkeypatch.setattr(planner, "ways", lambda *args: [Way(0, 2, 4, 4, 4, 8)])
    t = make_tensors(GATED, torch.bfloat16).map(lambda v: v.to(torch.bfloat16))
    wide = Tensors(t.x, [{k: v if k == "weight" else v.float() for k, v in p.items()} for p in t.stages])
    with torch.no_grad():
        assert torch.equal(fused_chain(GATED, t, False), fused_chain(GATED, wide, False))


@pytest.mark.parametrize("channels", ((8, 8, 160, 8), (160, 8, 16, 64), (24, 104, 8, 64)), ids=str)
def test_widths_of_a_block(host: Host, monkeypatch: pytest.MonkeyPatch, channels: tuple[int, ...]) -> None:
    """Few and many channels of the input, the expansion and the output; all that a tile may have."""
    inner, expanded, outer, pixels = channels
    case = Case("widths", (1, inner, 5, 8), (pw(expanded, "relu"), dw(3, "relu"), pw(outer)))
    evaluate(monkeypatch, host, case, torch.bfloat16, Way(0, 3, pixels // 8, 8))


def test_asymmetric_padding_of_a_block(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(monkeypatch, host, PADDED, torch.bfloat16, Way(0, 3, 3, 4))


@pytest.mark.parametrize(
    "images, inner, expanded, size, count",
    ((256, 16, 64, 112, 3), (1, 24, 72, 56, 3), (256, 160, 960, 7, 0)),
    ids=("a large map of few channels", "one image", "every block would read many weights"),
)
def test_the_planner_weighs_bytes_work_and_starts(
    monkeypatch: pytest.MonkeyPatch, images: int, inner: int, expanded: int, size: int, count: int
) -> None:
    monkeypatch.setattr(planner, "multiprocessors", lambda device: 132)
    stages = chain.parse(chain.chain_spec("c", [stage.spec(False) for stage in WHOLE[0].stages])).stages
    sizes = planner.sizes_of((images, inner, size, size), stages, (expanded, expanded, inner), (0, 0, 0), 2)
    found = planner.ways(stages, sizes, True, torch.device("cpu"))
    assert found[0].count == count and Way() in found
    assert all(way.height * way.width <= planner._MOST_PIXELS for way in found)


def test_widths_are_those_of_the_library() -> None:
    text = (ROOT / "csrc" / "cuda" / "kernels.h").read_text()
    kernel, stride, few, many = re.search(
        r"backward_columns\(.*\) { return kernel > (\d) \|\| stride > (\d) \? (\d) : (\d); }", text
    ).groups()
    for k, s in product((3, 5, 7), (1, 2)):
        assert config.backward_columns(k, s) == int(few if k > int(kernel) or s > int(stride) else many)
    assert f"kForwardColumns = {config.FORWARD_COLUMNS};" in text
    assert f"kMostThreads = {config._BLOCK};" in text
    assert f"kMostPixels = {planner._MOST_PIXELS};" in text
    assert f"kChunk = {planner._CHUNK}, kProducts = 5;" in text


# Operators ------------------------------------------------------------------------------------------------------------


def forward(case: Case, dtype: torch.dtype = torch.float32, pool: bool = False, training: bool = True) -> list[Tensor]:
    """One call of the forward kernel, with everything deferred; all that it writes."""
    u, weight = operands(case, dtype)
    after = convolutions.RAW
    if not training:
        c = u.y.shape[1]
        after = {**after, "mean": torch.randn(c), "var": torch.rand(c) + 0.5, "OUT_ACT": 3, "eps": 1e-5}
    y, found, pooled = depthwise.depthwise_forward(u, weight, stage_of(case), training, after, pool)
    return [y, *([found.counts, found.moments] if found else []), *([pooled] if pool else [])]


def backward(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Likewise of the backward kernel."""
    (u, weight), stage = operands(case, dtype), stage_of(case)
    (n, c), shape = u.y.shape[:2], stage.output_shape(u.y.shape, None)
    dv, y = (channels_last(torch.randn(shape, dtype=dtype)) for _ in range(2))
    a, b, d, scale, shift, mean, rstd = torch.randn(7, c).unbind(0)
    gradient = Gradient(dv, Value(y, scale, shift, "relu6", torch.rand(n, c)), torch.randn(n, c), a, b, d)
    norm = Norm(u.scale, u.shift, mean, rstd)
    return list(depthwise.depthwise_backward(gradient, weight, stage, u, norm, None, True, True, True))


def operands(case: Case, dtype: torch.dtype) -> tuple[Value, Tensor]:
    torch.manual_seed(1)
    n, c, *_ = case.shape
    x, (k, _) = channels_last(torch.randn(case.shape, dtype=dtype)), case.stages[0].kernel
    u = Value(x, *torch.randn(2, c).unbind(0), "hardswish", torch.rand(n, c))
    return u, torch.randn(c, 1, k, k).to(dtype)


def block(case: Case, way: Way) -> list[Tensor]:
    """One call of the whole-block kernel, and one with a gate if the way has it."""
    from mbn_kernels.backends.cuda import blocks

    torch.manual_seed(1)
    t = make_tensors(case).map(lambda v: v.to(torch.bfloat16))
    stages = chain.parse(chain.chain_spec("c", [stage.spec(False) for stage in case.stages])).stages
    part = slice(way.first, way.first + way.count)
    x = channels_last(t.x if way.first == 0 else torch.randn(*case.shape[:1], 40, *case.shape[2:]).bfloat16())
    out, pooled = blocks.inverted_residual(x, stages[part], t.stages[part], way, None)
    if not way.gate_height:
        return [out, *([] if pooled is None else [pooled])]
    gate, own, tile = stages[1], t.stages[2], (way.gate_height, way.gate_width)
    return [blocks.gated_project(out, pooled, gate, t.stages[1], stages[2], own, tile, None)]


LARGE = Case("large", (3, 16, 11, 9), (dw(5, "relu"),))
WIDE = Case(
    "wide", (1, 64, 9, 9), (dw(5, "relu"),)
)  # several warps a block; its last row lies where statistics are merged
EDGE = Case(
    "edge", (1, 64, 4, 9), (dw(3, "relu", padding=(4, 3, 1, 1)),)
)  # rows of the output without one of the input
WIDE_GATED = Case("gated", (1, 16, 6, 7), (pw(136, "relu"), dw(3, "relu", gate=GATE), pw(40)))
#: What together waits at every barrier: by file, some calls that do.
CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "forward": lambda: forward(LARGE),
    "forward, evaluation": lambda: forward(LARGE, pool=True, training=False),
    "forward, several warps": lambda: forward(WIDE),
    "forward, nothing but padding": lambda: forward(EDGE),
    "backward": lambda: backward(LARGE),
    "backward, several warps": lambda: backward(WIDE),
    "block": lambda: block(Case("b", (1, 16, 9, 9), (pw(72, "relu"), dw(3, "relu"), pw(24))), Way(0, 3, 4, 8)),
    "block without expand": lambda: block(WHOLE[0], Way(1, 2, 4, 8)),
    "block with squeeze-excite": lambda: block(GATED, Way(0, 2, 4, 4)),
    "gate and project": lambda: block(WIDE_GATED, Way(0, 2, 4, 8, 4, 8)),
}
BARRIERS = [
    (path.name, number)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"^\s+MBN_(BARRIER|WAIT_COPIES)\(", line)
]


def test_there_are_barriers() -> None:
    assert len(BARRIERS) >= 12


@pytest.mark.parametrize("file, line", BARRIERS, ids=str)
def test_a_missing_barrier_is_noticed(host: Host, file: str, line: int) -> None:
    """Each of them, left out, changes a result in one of the two orders: so the other tests would fail."""
    noticed = reached = False
    for call in CALLS.values():
        for from_the_last in (False, True):
            host.order(from_the_last)
            expected = call()
            host.skip(file, line)
            try:
                got = call()
            except RuntimeError as error:
                assert "barrier was not reached" in str(error)
                got = []
            reached |= host.skip()
            pairs = zip(expected, got, strict=False)
            noticed |= not got or not all(torch.equal(a, b) for a, b in pairs)
    assert reached, "no call waits here"
    assert noticed


def test_same_bits_in_any_order(host: Host) -> None:
    for call in CALLS.values():
        host.order(False)
        expected = call()
        host.order(True)
        assert all(torch.equal(a, b) for a, b in zip(expected, call(), strict=True))


def calls_of_operators(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple]]:
    """Arguments of every operator of the library, as the backend calls it."""
    found: dict[str, list[tuple]] = {}
    for name in schemas.CUDA_SCHEMAS:
        operator = getattr(torch.ops.mbn, name).default

        class Watched:
            def __init__(self, name: str, operator: Callable) -> None:
                self.name, self.operator = name, operator

            def default(self, *args: object) -> None:
                found.setdefault(self.name, []).append(args)
                self.operator(*args)

        monkeypatch.setattr(torch.ops.mbn, name, Watched(name, operator))
    for call in CALLS.values():
        call()
    monkeypatch.undo()
    return found


def test_opcheck(host: Host) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = calls_of_operators(patch)
    assert calls.keys() == schemas.CUDA_SCHEMAS.keys()
    for name, found in calls.items():
        for args in found:
            torch.library.opcheck(getattr(torch.ops.mbn, name).default, args)


def wrong(value: object) -> Iterator[object]:
    if isinstance(value, Tensor):
        yield value[:-1]
        yield torch.cat([value, value], value.dim() - 1)
        yield value.to(torch.float64)
        if value.numel() > 1:
            yield torch.stack([value, value], -1)[..., 0]
        yield value.new_zeros(0)
    elif isinstance(value, list) and value and isinstance(value[0], Tensor):
        for i, t in enumerate(value):
            yield from ([*value[:i], bad, *value[i + 1 :]] for bad in wrong(t))
        yield value[:-1]
    elif isinstance(value, list) and value and isinstance(value[0], int):
        yield value[:-1]
        yield [-1] * len(value)
        yield [1 << 40] * len(value)
    elif isinstance(value, int):
        yield -1
        yield 1 << 40


def described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def test_operators_refuse_what_does_not_fit(host: Host) -> None:
    """A tensor of a wrong shape, dtype or layout and a number out of range raise; nothing is written."""
    with pytest.MonkeyPatch.context() as patch:
        calls = calls_of_operators(patch)
    accepted = []
    for name, found in calls.items():
        operator = getattr(torch.ops.mbn, name).default
        for call, args in enumerate(found):
            for i, argument in enumerate(args):
                for bad in wrong(argument):
                    host.launches()
                    try:
                        operator(*args[:i], bad, *args[i + 1 :])
                    except (RuntimeError, TypeError) as error:
                        assert host.launches() == 0, (name, i, error)
                        continue
                    # The padding at the bottom and at the right is whatever the output's size says.
                    if not (isinstance(bad, Tensor) and bad.shape[:3] == argument.shape[:3] and bad.dim() == 4):
                        accepted.append(f"{name}, call {call}, argument {i}: {described(bad)}")
    assert not accepted, "\n".join(accepted)


# AddressSanitizer -----------------------------------------------------------------------------------------------------


def under_sanitizer(program: str) -> subprocess.CompletedProcess:
    """Runs Python with AddressSanitizer's library, which has to be there before all others."""
    runtime = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no libasan.so")
    options = "detect_leaks=0:abort_on_error=0:exitcode=99:detect_stack_use_after_return=0"
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options, SANITIZE: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")


BEGIN = """
import sys
sys.path.insert(0, ".")
import torch, test_cuda_host as tests
torch.ops.load_library({library!r})
for module in (tests.config, tests.launch):
    module.multiprocessors = lambda device: 1
"""
CALL_EVERYTHING = """
for dtype in (torch.float32, torch.bfloat16):
    for case in tests.WINDOWS:
        tests.forward(case, dtype)
        tests.forward(case, dtype, pool=True, training=False)
        tests.backward(case, dtype)
for call in tests.CALLS.values():
    call()
print("all called")
"""
CALL_WITH_TOO_LITTLE_MEMORY = """
operands = tests.operands
def short(case, dtype):
    u, weight = operands(case, dtype)
    memory = u.y.untyped_storage()
    memory.resize_(memory.nbytes() - 16)
    return u, weight
tests.operands = short
tests.{call}(tests.LARGE)
"""


def test_no_access_out_of_bounds(host: Host) -> None:
    """All kernels, on tensors and shared memory with a fence around."""
    done = under_sanitizer(BEGIN.format(library=str(build(sanitize=True))) + CALL_EVERYTHING)
    assert done.returncode == 0 and "all called" in done.stdout, done.stderr[-4000:]


@pytest.mark.parametrize("call", ("forward", "backward"))
def test_an_access_out_of_bounds_is_noticed(host: Host, call: str) -> None:
    """A tensor whose memory ends 16 bytes before it does, which no operator can see."""
    program = BEGIN.format(library=str(build(sanitize=True))) + CALL_WITH_TOO_LITTLE_MEMORY.format(call=call)
    done = under_sanitizer(program)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
