"""The published figures: parameters, multiply-adds and the paper review's two per-layer tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mbn_kernels import FusedDepthwiseSeparable
from mbn_kernels.models import (
    MobileNetV3,
    layer_shapes,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3_large,
    mobilenet_v3_small,
    review_large_cfgs,
    review_small_cfgs,
)
from mbn_kernels.modules import FusedModule

REVIEW_LARGE = {"squeeze_divisor": 1}
REVIEW_SMALL = {"squeeze_divisor": 1, "last_se": True}

# network, options, parameters, millions of multiply-adds at 224 (None: not published)
FIGURES = [
    (mobilenet_v1, {"width_mult": 1.0}, 4_231_976, 568.7),
    (mobilenet_v1, {"width_mult": 0.75}, 2_585_560, 325.4),
    (mobilenet_v1, {"width_mult": 0.5}, 1_331_592, 149.5),
    (mobilenet_v1, {"width_mult": 0.25}, 470_072, 41.0),
    (mobilenet_v2, {"width_mult": 1.0}, 3_504_872, 300.8),
    (mobilenet_v2, {"width_mult": 1.4}, 6_108_776, 582.2),
    (mobilenet_v2, {"width_mult": 0.75}, 2_636_424, None),
    (mobilenet_v2, {"width_mult": 0.5}, 1_968_680, None),
    (mobilenet_v2, {"width_mult": 0.35}, 1_677_128, None),
    (mobilenet_v3_large, {}, 5_483_032, 216.6),
    (mobilenet_v3_large, REVIEW_LARGE, 5_481_198, 433.24 / 2),
    (mobilenet_v3_small, {}, 2_542_856, 56.5),
    (mobilenet_v3_small, REVIEW_SMALL, 2_703_846, 113.38 / 2),
]
FIGURE_IDS = [f"{build.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for build, options, *_ in FIGURES]

# The review's two printed tables: module, output shape after the batch of 2, parameters.
LARGE_ROWS = """
conv1 16x112x112 -
conv1.0 16x112x112 432
conv1.1 16x112x112 32
conv1.2 16x112x112 0
blocks 160x7x7 -
blocks.0 16x112x112 464
blocks.1 24x56x56 3440
blocks.2 24x56x56 4440
blocks.3 40x28x28 9458
blocks.4 40x28x28 20510
blocks.5 40x28x28 20510
blocks.6 80x14x14 32080
blocks.7 80x14x14 34760
blocks.8 80x14x14 31992
blocks.9 80x14x14 31992
blocks.10 112x14x14 214424
blocks.11 112x14x14 386120
blocks.12 160x7x7 429224
blocks.13 160x7x7 797360
blocks.14 160x7x7 797360
last_conv 960x7x7 -
last_conv.0 960x7x7 153600
last_conv.1 960x7x7 1920
last_conv.2 960x7x7 0
gap 960x1x1 0
classifier 1000 -
classifier.0 1280 1230080
classifier.1 1280 0
classifier.2 1280 0
classifier.3 1000 1281000
"""
SMALL_ROWS = """
conv1 16x112x112 -
conv1.0 16x112x112 432
conv1.1 16x112x112 32
conv1.2 16x112x112 0
blocks 96x7x7 -
blocks.0 16x56x56 612
blocks.1 24x28x28 3864
blocks.2 24x28x28 5416
blocks.3 40x14x14 13736
blocks.4 40x14x14 55340
blocks.5 40x14x14 55340
blocks.6 48x14x14 21486
blocks.7 48x14x14 28644
blocks.8 96x7x7 91848
blocks.9 96x7x7 294096
blocks.10 96x7x7 294096
last_conv 576x7x7 -
last_conv.0 576x7x7 55296
last_conv.1 576x7x7 1152
last_conv.2 576x7x7 0
se_block 576x7x7 -
se_block.squeeze 576x1x1 0
se_block.excitation 576 -
se_block.excitation.0 144 83088
se_block.excitation.1 144 0
se_block.excitation.2 576 83520
se_block.excitation.3 576 0
gap 576x1x1 0
classifier 1000 -
classifier.0 1024 590848
classifier.1 1024 0
classifier.2 1024 0
classifier.3 1000 1025000
"""


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def multiply_adds(module: nn.Module, *shape: int) -> int:
    """Counted by PyTorch, which gives convolutions and linear layers two operations for each multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("build, options, expected, _", FIGURES, ids=FIGURE_IDS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_parameters(build, options, expected, _, fused):
    with torch.device("meta"):
        assert parameters(build(**options, fused=fused)) == expected


@pytest.mark.parametrize("build, options, _, expected", FIGURES, ids=FIGURE_IDS)
def test_multiply_adds(build, options, _, expected):
    fused = multiply_adds(build(**options).eval(), 1, 3, 224, 224)
    assert fused == multiply_adds(build(**options, fused=False).eval(), 1, 3, 224, 224)
    if expected is not None:
        assert fused / 1e6 == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small])
def test_multiply_adds_of_a_training_step(build):
    """Backward costs each convolution's input gradient and weight gradient besides; the stem's input needs none.

    Stock's own count is no yardstick: before torch 2.13 it takes a grouped convolution's gradient for a dense one's.
    """
    model, shape = build(), (2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(shape)).sum().backward()
    forward, stem = 2 * multiply_adds(model, *shape), 2 * multiply_adds(model.conv1, *shape)
    assert counter.get_total_flops() == 3 * forward - stem


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(
    "cfgs, table, total",
    [(review_large_cfgs(), LARGE_ROWS, 5_481_198), (review_small_cfgs(), SMALL_ROWS, 2_703_846)],
    ids=["large", "small"],
)
def test_review_table(cfgs, table, total, fused):
    model = MobileNetV3(3, cfgs, 1000, fused=fused).eval()
    modules = dict(model.named_modules())
    rows = [line.split() for line in table.strip().splitlines()]
    expected = {name: (2, *map(int, shape.split("x"))) for name, shape, _ in rows}
    if fused:
        # A fused module computes its children's work itself, and a hook on a child would make it stop doing so.
        expected = {k: v for k, v in expected.items() if not k.startswith(("last_conv.", "se_block."))}
    else:
        # In the review's table a block's row is its inner Sequential.
        expected |= {f"{k}.layers": shape for k, shape in expected.items() if k.startswith("blocks.")}
    shapes = {}
    for name in expected:
        modules[name].register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)}))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    assert shapes == expected
    assert all(m.why_not_fused() is None for m in model.modules() if isinstance(m, FusedModule)) == fused

    counts = {name: int(count) for name, _, count in rows if count != "-"}
    assert {name: parameters(modules[name]) for name in counts} == counts
    assert parameters(model) == total


V1_LAYERS = sorted({(s.in_channels, s.out_channels, s.s, s.height) for s in layer_shapes("mobilenet_v1")})


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("channels, features, stride, side", V1_LAYERS)
def test_cost_of_a_separable_layer(channels, features, stride, side, k):
    """A depthwise separable layer costs 1/F + 1/K^2 of the dense KxK convolution that it replaces."""
    shape = (1, channels, side, side)
    dense = multiply_adds(nn.Conv2d(channels, features, k, stride, k // 2, bias=False), *shape)
    for fused in (True, False):
        layer = FusedDepthwiseSeparable(channels, features, k, stride, fused=fused).eval()
        assert multiply_adds(layer, *shape) / dense == pytest.approx(1 / features + 1 / k**2, rel=1e-12)


def test_layer_shapes_are_what_the_blocks_see():
    """The table's sizes against a run of the network, at an image of odd sides."""
    for build in (mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small):
        model, seen = build(width_mult=0.5, fused=False).eval(), []

        def record(_, inputs, out, seen=seen):
            seen.append((*inputs[0].shape[1:], out.shape[1]))

        for block in model.blocks:
            block.register_forward_hook(record)
        with torch.no_grad():
            model(torch.zeros(1, 3, 97, 65))
        shapes = layer_shapes(build.__name__, (97, 65), 0.5)
        assert seen == [(s.in_channels, s.height, s.width, s.out_channels) for s in shapes]


def test_layer_shapes_of_bad_input():
    with pytest.raises(ValueError, match=r"^layer_shapes: network: expected one of mobilenet_v1, .* got 'resnet'"):
        layer_shapes("resnet")
    with pytest.raises(ValueError, match="layer_shapes: width_mult: expected more than 0, got 0"):
        layer_shapes("mobilenet_v2", width_mult=0)
