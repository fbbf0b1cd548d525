"""The CUDA kernels themselves, run on the CPU by fibers, against the float64 oracle.

Small maps of few channels: several units a block, several blocks, and tails everywhere. See cuda_host_calls.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from cuda_host_build import ROOT, Host
from cuda_host_calls import GATE, GATED, WHOLE, WINDOWS, channels_last, cuda_library, cuda_on_host, stage_of  # noqa: F401
from oracle import ACTS, Case, Tensors, compare_case, dw, fused_chain, hold, make_tensors, mode_id, pw, stock_chain
from property_cases import CUDA
from property_checks import check_many
from special import hold_denormals, hold_nan_in_gradient, hold_overflow, hold_tiny_variance
from torch import Tensor

from mbn_kernels import chain
from mbn_kernels.backends.cuda import config, depthwise, planner
from mbn_kernels.backends.cuda.kernels import CudaKernels
from mbn_kernels.backends.cuda.planner import Way
from mbn_kernels.backends.triton import launch
from mbn_kernels.chain import Value
from mbn_kernels.models.tables import NETWORKS, layer_shapes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))


def compare(host: Host, case: Case, dtype: torch.dtype, training: bool, **options: object) -> None:
    """Holds a case to the tolerance, and that it ran here."""
    compare_case(fused_chain, case, dtype, training, **options)
    assert host.launches() > 0


# Depthwise convolutions -----------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("deviation, eps", ((1e-10, 1e-5), (1e-19, 1e-37)), ids=str)
def test_tiny_variance(host: Host, deviation: float, eps: float) -> None:
    hold_tiny_variance(Case("depthwise", (2, 8, 6, 5), (dw(3),)), eps, deviation, torch.float32)
    assert host.launches() > 0


@pytest.mark.parametrize("small", ("x", "weight", "dout"))
def test_denormals_are_numbers(host: Host, small: str) -> None:
    hold_denormals(Case("depthwise", (2, 8, 6, 5), (dw(3, "relu", eps=0.0),)), small)
    assert host.launches() > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the overflow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow(host: Host, dtype: torch.dtype) -> None:
    hold_overflow(Case("depthwise", (2, 8, 6, 5), (dw(3, "relu", eps=0.0),)), dtype)
    assert host.launches() > 0


@MODES
def test_nan_in_the_gradient(host: Host, training: bool) -> None:
    case = Case("gate", (2, 8, 5, 6), (pw(16, "silu"), dw(3, "silu", gate=("silu", "sigmoid")), pw(8)))
    hold_nan_in_gradient(case, training, torch.float32)
    assert host.launches() > 0


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


def test_random_calls(host: Host) -> None:
    """As tests/test_properties.py, smaller, of windows and widths that these kernels take."""
    check_many(0, 24, ("cuda",), CUDA, Counter())
    assert host.launches() >= 12  # some have no image, some are refused


# Whole blocks ---------------------------------------------------------------------------------------------------------

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
    ((1, 8, 32, 28, 3), (256, 8, 32, 112, 0), (1, 160, 960, 7, 0)),
    ids=("little work", "many tiles", "many chunks of a tile"),
)
def test_the_planner_weighs_work_and_starts(
    monkeypatch: pytest.MonkeyPatch, images: int, inner: int, expanded: int, size: int, count: int
) -> None:
    monkeypatch.setattr(planner, "multiprocessors", lambda device: 132)
    stages = chain.parse(chain.chain_spec("c", [stage.spec(False) for stage in WHOLE[0].stages])).stages
    sizes = planner.sizes_of((images, inner, size, size), stages, (expanded, expanded, inner), (0, 0, 0), 2)
    found = planner.ways(stages, sizes, True, torch.device("cpu"))
    assert found[0].count == count and Way() in found
    assert all(way.height * way.width <= planner._MOST_PIXELS for way in found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_two_blocks_fit_in_shared_memory(record_property: Callable, network: str, dtype: torch.dtype) -> None:
    """Of an H100's multiprocessor, for each depthwise layer at batch 256, in the tile that is tried first."""
    for layer in set(layer_shapes(network)):
        stage = stage_of(Case("layer", (1, 8, 7, 7), (dw(layer.k, "relu", stride=layer.s),)))
        shape = (256, layer.exp_channels, layer.height, layer.width)
        for of in (depthwise.forward_work, depthwise.backward_work):
            work = of(shape, stage, dtype, torch.device("cpu"))
            taken = config.shared_bytes(work, *config.depthwise(work)[0].blocks.values())
            assert 2 * (taken + 1024) <= 228 * 1024
            name = f"depthwise_{'backward' if work.backward else 'forward'}<{str(dtype)[6:]}, {layer.k}, {layer.s}>"
            record_property("cuda_shared", [name, taken])


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
