"""Evaluation on the CPU: whole networks in one call, blocks and stems of every geometry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import stock
import torch
from evaluating import BY_DTYPE, DTYPES, NETWORKS, counted, hold_module, image, networks, small, twins, with_threads
from oracle import ACTS, Case, Tensors, dw, fused_chain, hold, prepare, pw, stock_chain
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSequential,
)

GATE = ("relu", "hardsigmoid")


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> Iterator[None]:
    torch.set_num_threads(1)  # stock's threads wait for each other longest where a machine is busy
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted(monkeypatch)


# Whole networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@BY_DTYPE
def test_whole_network(calls: list[int], name: str, dtype: torch.dtype) -> None:
    fused, plain = networks(name, dtype)
    for shape in ((1, 3, 33, 47), (3, 3, 96, 64), (5, 3, 32, 32), (8, 3, 40, 33)):
        x = image(*shape, dtype=dtype)
        hold_module(with_threads(fused, x), plain, x)
    assert set(calls) == {len(fused.blocks) + (5 if "v3" in name else 4 if "v2" in name else 3)}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_network_of_full_width(calls: list[int], name: str) -> None:
    fused, plain = networks(name, torch.float32, 1.0)
    x = image(1, 3, 224, 224)
    hold_module(with_threads(fused, x), plain, x)
    networks.cache_clear()  # they are large


@pytest.mark.parametrize("in_channels", (1, 2, 4))
@BY_DTYPE
def test_other_images(calls: list[int], in_channels: int, dtype: torch.dtype) -> None:
    fused, plain = networks("mobilenet_v3_small", dtype, 0.35, in_channels)
    x = image(2, in_channels, 35, 32, dtype=dtype)
    hold_module(with_threads(fused, x), plain, x)
    assert set(calls) == {len(fused.blocks) + 5}


@pytest.mark.parametrize("shape", ((1, 3, 1, 1), (2, 3, 1, 40), (3, 3, 40, 1), (2, 3, 2, 3)), ids=str)
@BY_DTYPE
def test_tiny_images(shape: tuple, dtype: torch.dtype) -> None:
    fused, plain = networks("mobilenet_v3_small", dtype)
    x = image(*shape, dtype=dtype)
    hold_module(with_threads(fused, x), plain, x)


@BY_DTYPE
def test_no_image(calls: list[int], dtype: torch.dtype) -> None:
    fused, _ = networks("mobilenet_v3_small", dtype)
    for _ in range(2):
        out = fused(image(0, 3, 32, 32, dtype=dtype))
        assert (out.shape, out.dtype) == ((0, 10), dtype)
    assert len(calls) == 2


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second column": lambda x: torch.stack([x, x * torch.nan], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.stack([x, x * torch.nan], 3).flatten(2, 3)[:, :, ::2],
    "channels of more": lambda x: torch.cat([x * torch.nan, x, x], 1)[:, 3:6],
    "channels-last of more": lambda x: torch.cat([x * torch.nan, x], 1).to(memory_format=torch.channels_last)[:, 3:],
    "cropped": lambda x: nn.functional.pad(x, (1, 2, 3, 1), value=torch.nan)[:, :, 3:-1, 1:-2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "with gradient": lambda x: x.clone().requires_grad_(),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda name: name.replace(" ", "-"))
@BY_DTYPE
def test_an_image_of_any_strides(calls: list[int], layout: str, dtype: torch.dtype) -> None:
    fused, _ = networks("mobilenet_v2", dtype)
    x = image(2, 3, 33, 35, dtype=dtype)
    expected, other = fused(x), LAYOUTS[layout](x)
    assert torch.equal(other, x) and (other.stride() != x.stride() or other.requires_grad)
    assert torch.equal(with_threads(fused, other), expected)


def test_an_image_repeated() -> None:
    fused, _ = networks("mobilenet_v2", torch.float32)
    x = image(1, 1, 33, 35)
    assert torch.equal(fused(x.expand(3, 3, 33, 35)), fused(x.repeat(3, 3, 1, 1)))


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", NETWORKS)
@BY_DTYPE
def test_a_bad_image_leaves_the_others_alone(name: str, bad: float, dtype: torch.dtype) -> None:
    """One bad pixel: its image's logits are NaN where the oracle's are (in bfloat16, stock makes NaN of infinity). The
    others keep their bits, and so does what comes after it.
    """
    fused, plain = networks(name, dtype)
    x = image(3, 3, 40, 40, dtype=dtype)
    clean, spoiled = fused(x), x.clone()
    spoiled[1, 2, 17, 20] = bad
    out, expected = with_threads(fused, spoiled), copy.deepcopy(plain).double()(spoiled.double())
    assert torch.equal(out.isnan(), expected.isnan())
    if bad != bad:
        assert out[1].isnan().any()
    assert torch.equal(out[::2], clean[::2])
    assert torch.equal(with_threads(fused, x), clean)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@BY_DTYPE
def test_a_bad_pixel_between_odd_blocks(bad: float, dtype: torch.dtype) -> None:
    """Numbers of channels that fill no pair, vector or panel: what lies beyond the last channel reaches nobody."""
    modules = [
        FusedPointwiseConvBNAct(16, 17, act="relu6"),
        FusedPointwiseConvBNAct(17, 24, act="relu6"),
        FusedDepthwiseSeparable(24, 13, nl="relu6"),
        FusedInvResBlock(13, 3, 39, 13, True, "hs", 1),
    ]
    fused = stock.randomize(FusedSequential(*modules)).to(dtype).eval()
    x = image(2, 16, 9, 9, dtype=dtype)
    x[0, 3, 4, 4] = bad
    expected = x.double()
    for n in range(1, 5):
        expected = copy.deepcopy(fused[n - 1]).double().stock_forward(expected)
        out = with_threads(fused[:n], x)
        assert torch.equal(out.isfinite(), expected.isfinite()), n


def test_logits_depend_on_everything() -> None:
    """What the other tests rest on: each parameter of a network, and each pixel, is seen in what they compare."""
    fused, _ = twins(small)
    x = image(2, 3, 12, 13)
    before = fused(x)
    for name, t in [*fused.named_parameters(), *fused.named_buffers(), ("x", x)]:
        if t.is_floating_point():
            kept = t.clone()
            t.copy_((t + 0.5).abs())
            assert (fused(x) - before).abs().max() > 1e-4, name
            t.copy_(kept)
    assert torch.equal(fused(x), before)


# Blocks ---------------------------------------------------------------------------------------------------------------


def window(name: str, **options) -> tuple[Case, ...]:
    """A window alone, before a pointwise, and in a whole block with squeeze-excite, on an odd image."""
    own = {k: options.pop(k) for k in ("k", "act") if k in options}
    stage = dw(own.get("k", 3), own.get("act", "relu6"), **options)
    gated = dw(own.get("k", 3), own.get("act", "hardswish"), gate=GATE, **options)
    return (
        Case(f"{name}-alone", (2, 17, 11, 13), (stage,)),
        Case(f"{name}-project", (1, 31, 11, 13), (stage, pw(9, "relu"))),
        Case(f"{name}-gated", (2, 7, 13, 11), (pw(40, "hardswish"), gated, pw(12))),
    )


def block(name: str, shape: tuple, *stages, residual: bool = False) -> Case:
    return Case(name, shape, stages, residual)


GEOMETRY = (
    *(case for k in (1, 3, 5, 7, 9) for s in (1, 2, 3) for case in window(f"k{k}-s{s}", k=k, stride=s)),
    *window("k2", k=2), *window("k4-s2", k=4, stride=2), *window("k3x5", k=(3, 5)), *window("k7x1", k=(7, 1)),
    *window("k1x9", k=(1, 9)), *window("s2x1", stride=(2, 1)), *window("s1x3", k=5, stride=(1, 3)),
    *window("s5", stride=5), *window("dilated", dilation=2), *window("dilated-5x5", k=5, dilation=2),
    *window("dilated-s2", dilation=(3, 2), stride=2), *window("four-pads", padding=(1, 2, 0, 3)),
    *window("no-pads", k=5, padding=0), *window("many-pads", padding=4), *window("many-pads-s2", padding=6, stride=2),
    block("1xN", (2, 8, 1, 37), pw(24, "relu6"), dw(5, "relu6"), pw(8), residual=True),
    block("1xN-alone", (2, 33, 1, 37), dw(7, "hardswish", stride=2)),
    block("Nx1", (2, 8, 37, 1), pw(24, "relu6"), dw(5, "relu6", gate=GATE), pw(8), residual=True),
    block("1x1", (3, 8, 1, 1), pw(24, "relu6"), dw(5, "relu6", gate=GATE), pw(8), residual=True),
    block("one-channel", (3, 1, 9, 8), pw(1, "relu"), dw(3, "relu"), pw(1), residual=True),
    block("one-channel-widened", (2, 1, 9, 8), pw(5, "relu"), dw(3, "relu", gate=GATE), pw(40)),
    block("primes", (2, 17, 7, 9), pw(31, "hardswish"), dw(3, "hardswish", gate=GATE), pw(17), residual=True),
    block("primes-out", (2, 31, 7, 9), pw(67, "relu"), dw(3, "relu"), pw(37)),
    block("lanes", (1, 16, 6, 7), pw(16, "relu"), dw(3, "relu"), pw(16), residual=True),
    block("panels", (1, 32, 6, 7), pw(64, "relu"), dw(3, "relu", gate=GATE), pw(32), residual=True),
    block("narrow-gated", (1, 3, 5, 6), pw(4, "hardswish"), dw(3, "hardswish", gate=GATE), pw(48)),
    block("narrow-gated-wider", (1, 3, 6, 7), pw(6, "hardswish"), dw(3, "hardswish", gate=GATE), pw(48)),
    block("narrow-gated-many", (6, 3, 6, 7), pw(6, "hardswish"), dw(3, "hardswish", gate=GATE), pw(48)),
    block("wide", (1, 24, 5, 150), pw(40, "relu"), dw(5, "relu", gate=GATE), pw(24), residual=True),
    block("wide-s2", (1, 24, 6, 301), pw(40, "relu"), dw(3, "relu", stride=2), pw(24)),
    block("wide-alone", (2, 40, 4, 261), dw(7, "relu6")),
    block("tall", (1, 8, 230, 20), pw(40, "relu"), dw(3, "relu"), pw(8), residual=True),
    block("tall-s2", (1, 8, 331, 21), pw(72, "hardswish"), dw(5, "hardswish", stride=2), pw(12)),
    block("tall-alone", (2, 40, 200, 17), dw(5, "silu")),
    block("tall-gated", (1, 40, 150, 17), dw(5, "silu", gate=GATE), pw(40), residual=True),
    block("tall-dilated", (1, 40, 150, 33), dw(3, "relu6", dilation=4), pw(40), residual=True),
    block("deep", (1, 300, 5, 6), pw(530, "relu6"), dw(3, "relu6"), pw(300), residual=True),
    block("deep-gated", (1, 300, 4, 3), pw(1100, "hardswish"), dw(5, "hardswish", gate=GATE), pw(300), residual=True),
    block("deep-pointwise", (2, 1030, 3, 5), pw(33, "relu")),
    block("deep-pointwise-residual", (2, 513, 3, 5), pw(513, "hardswish"), residual=True),
    block("deep-pointwise-silu", (2, 1025, 3, 5), pw(1025, "silu"), residual=True),
    block("256", (2, 256, 3, 5), pw(257, "relu"), dw(3, "relu"), pw(256), residual=True),
    block("not-affine", (2, 8, 6, 7), pw(24, "silu", affine=False), dw(3, "silu", affine=False), pw(8, affine=False)),
    block("batch", (11, 24, 7, 7), pw(72, "relu"), dw(5, "relu", stride=2, gate=GATE), pw(40)),
)  # fmt: skip


def run_case(case: Case, dtype: torch.dtype, calls: list[int]) -> None:
    t = prepare(case, dtype, False).map(lambda v: v.to(dtype))
    got = with_threads(lambda x: fused_chain(case, Tensors(x, t.stages), False), t.x)
    assert set(calls) == {1}
    hold({"out": got}, lambda t: {"out": stock_chain(case, t, False)}, t, dtype)


@pytest.mark.parametrize("case", GEOMETRY, ids=str)
@BY_DTYPE
def test_block_of(calls: list[int], case: Case, dtype: torch.dtype) -> None:
    run_case(case, dtype, calls)


@pytest.mark.parametrize("gate", (None, "hardsigmoid", "sigmoid"))
@pytest.mark.parametrize("act", ACTS)
@BY_DTYPE
def test_block_with(calls: list[int], act: str, gate: str | None, dtype: torch.dtype) -> None:
    """Every activation at every place."""
    gates = gate and (act, gate)
    run_case(
        block("residual", (2, 12, 9, 8), pw(40, act), dw(3, act, gate=gates), pw(12, act), residual=True), dtype, calls
    )
    if not gate:
        run_case(block("alone", (2, 40, 9, 8), dw(5, act, stride=2)), dtype, calls)
        run_case(block("pointwise", (2, 40, 4, 8), pw(24, act)), dtype, calls)


# Stems ----------------------------------------------------------------------------------------------------------------

WINDOWS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3-s2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "5x5-s2": {"kernel_size": 5, "stride": 2, "padding": 2},
    "7x7-s2": {"kernel_size": 7, "stride": 2, "padding": 3},
    "7x7": {"kernel_size": 7, "padding": 3},
    "4x4-s4": {"kernel_size": 4, "stride": 4},
    "2x2": {"kernel_size": 2, "padding": 1},
    "1x1": {"kernel_size": 1},
    "3x5-s2x1": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 3)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "dilated-s2": {"kernel_size": 5, "dilation": (1, 3), "stride": (2, 3), "padding": (2, 7)},
    "no-pads": {"kernel_size": 5, "stride": 3},
    "many-pads": {"kernel_size": 3, "stride": 2, "padding": 9},
}  # fmt: skip
BEHIND = {
    "alone": lambda fused: [],
    "separable": lambda fused: [FusedDepthwiseSeparable(20, 24, 3, nl="relu6", fused=fused)],
    "separable-s2": lambda fused: [FusedDepthwiseSeparable(20, 24, 5, 2, fused=fused)],
    "depthwise": lambda fused: [FusedDepthwiseConvBNAct(20, 5, act="silu", fused=fused)],
    "residual": lambda fused: [FusedInvResBlock(20, 3, 20, 20, False, "hs", 1, fused=fused)],
    "gated": lambda fused: [FusedInvResBlock(20, 3, 20, 12, True, "hs", 1, fused=fused)],
    "gated-residual": lambda fused: [FusedInvResBlock(20, 3, 20, 20, True, "hs", 1, fused=fused)],
    "expanded": lambda fused: [FusedInvResBlock(20, 5, 48, 20, True, "hs", 1, fused=fused)],
    "pointwise": lambda fused: [FusedPointwiseConvBNAct(20, 33, act="relu", fused=fused)],
    "two": lambda fused: [
        FusedInvResBlock(20, 3, 20, 20, False, "relu", 1, fused=fused),
        FusedDepthwiseSeparable(20, 24, 3, 2, fused=fused),
    ],
}
STEM_ACTS = (nn.Hardswish, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid, None)


def stem(channels: int, act: type[nn.Module] | None = nn.Hardswish, out: int = 20, **conv) -> nn.Sequential:
    layers = [nn.Conv2d(channels, out, bias=False, **conv), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([act()] if act else []))


def stem_twins(
    dtype: torch.dtype, behind: str, channels: int = 3, act: type[nn.Module] | None = nn.Hardswish, **conv
) -> tuple[nn.Module, nn.Module]:
    def build(fused: bool) -> nn.Module:
        kind = FusedSequential if fused else nn.Sequential
        return kind(stem(channels, act, **conv), *BEHIND[behind](fused))

    return twins(build, dtype)


STEMS = [(name, behind) for name in WINDOWS for behind in BEHIND
         if name == "5x5-s2" or behind in ("alone", "separable", "residual", "gated")]  # fmt: skip


@pytest.mark.parametrize("name, behind", STEMS)
def test_stem(calls: list[int], name: str, behind: str) -> None:
    for dtype in DTYPES:
        fused, plain = stem_twins(dtype, behind, **WINDOWS[name])
        x = image(2, 3, 25, 38, dtype=dtype)
        hold_module(with_threads(fused, x), plain, x)
    assert set(calls) == {len(fused)}


@pytest.mark.parametrize("height", (20, 201, 400))
def test_residual_around_a_stride(height: int) -> None:
    """With padding enough an image keeps its size, but its rows are not wanted in the order in which they come."""
    fused, plain = stem_twins(torch.float32, "residual", **WINDOWS["3x3"])
    for m in (fused, plain):
        m[1].layers[0][0].stride, m[1].layers[0][0].padding = (2, 2), (height // 2 + 1, 16)
    x = image(1, 3, height, 31)
    hold_module(with_threads(fused, x), plain, x)


@pytest.mark.parametrize("channels", (1, 2, 3, 4))
@pytest.mark.parametrize("shape", ((1, 9, 70), (2, 1, 29), (3, 29, 1), (1, 200, 31), (4, 11, 15), (3, 12, 14)), ids=str)
def test_stem_on_images(calls: list[int], channels: int, shape: tuple) -> None:
    for dtype in DTYPES:
        for behind in ("residual", "gated", "alone"):
            fused, plain = stem_twins(dtype, behind, channels, kernel_size=3, stride=2, padding=1)
            x = image(shape[0], channels, *shape[1:], dtype=dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                hold_module(with_threads(fused, x.contiguous(memory_format=layout)), plain, x)
    assert set(calls) == {1, 2}


@pytest.mark.parametrize("act", STEM_ACTS, ids=lambda act: act.__name__ if act else "none")
@BY_DTYPE
def test_stem_with(act: type[nn.Module] | None, dtype: torch.dtype) -> None:
    for behind in ("separable", "alone"):
        fused, plain = stem_twins(dtype, behind, act=act, kernel_size=3, stride=2, padding=1)
        x = image(2, 3, 25, 38, dtype=dtype)
        hold_module(with_threads(fused, x), plain, x)


@pytest.mark.parametrize("out", (1, 7, 16, 33, 100))
def test_stem_of_width(out: int) -> None:
    def alone(fused: bool) -> nn.Module:
        return (FusedSequential if fused else nn.Sequential)(stem(3, nn.ReLU, out, kernel_size=3, padding=1))

    def followed(fused: bool) -> nn.Module:
        return alone(fused).append(FusedDepthwiseSeparable(out, 9, fused=fused))

    for dtype in DTYPES:
        for build in (alone, followed):
            fused, plain = twins(build, dtype)
            x = image(1, 3, 12, 17, dtype=dtype)
            hold_module(with_threads(fused, x), plain, x)


OTHERS = {
    "five channels": stem(5, kernel_size=3),
    "a bias": nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20)),
    "groups": nn.Sequential(nn.Conv2d(4, 20, 3, groups=2, bias=False), nn.BatchNorm2d(20)),
    "reflection": stem(3, kernel_size=3, padding=1, padding_mode="reflect"),
    "same": stem(3, kernel_size=3, padding="same"),
    "another activation": stem(3, nn.GELU, kernel_size=3),
    "no batch norm": nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.ReLU()),
    "four layers": nn.Sequential(*stem(3, kernel_size=3), nn.Identity()),
    "batch statistics": nn.Sequential(
        nn.Conv2d(3, 20, 3, bias=False), nn.BatchNorm2d(20, track_running_stats=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS, ids=lambda name: name.replace(" ", "-"))
def test_another_stem_stays_stock(calls: list[int], name: str) -> None:
    fused = stock.randomize(FusedSequential(copy.deepcopy(OTHERS[name]), *BEHIND["expanded"](True))).eval()
    x = image(2, next(fused.parameters()).shape[1] * (2 if name == "groups" else 1), 15, 12)
    torch.testing.assert_close(fused(x), fused[1].stock_forward(fused[0](x)), rtol=1e-4, atol=1e-4)
    assert calls == [1]


def test_a_stem_further_behind(calls: list[int]) -> None:
    """Behind what runs in the same call it stays stock; behind what does not, it is the first of a call again."""
    build = BEHIND["separable"]
    fused = FusedSequential(FusedPointwiseConvBNAct(20, 3), stem(3, kernel_size=3), *build(True))
    fused.extend([nn.Sequential(nn.Conv2d(24, 3, 1)), stem(3, kernel_size=3), *build(True)])
    fused = stock.randomize(fused).eval()
    x = image(2, 20, 15, 12)
    expected = x
    for m in fused:
        expected = getattr(m, "stock_forward", m)(expected)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    assert calls == [1, 1, 2]
