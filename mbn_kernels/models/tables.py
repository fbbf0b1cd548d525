"""The layer tables of MobileNet V1 (arXiv:1704.04861), V2 (arXiv:1801.04381) and V3 (arXiv:1905.02244), as data."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import integers, number
from ..errors import fail, short
from ..modules import make_divisible
from ..stages import MOST

# (output channels, stride) of each depthwise separable layer, after a 3x3 stride 2 stem of 32 channels.
V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

# (expansion t, output channels c, repeats n, stride s of the first repeat), after a stem of 32 channels.
V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# (kernel, expanded channels, output channels, squeeze-excite, non-linearity, stride), after a stem of 16 channels.
V3_LARGE = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hs", 2),
    (3, 200, 80, False, "hs", 1),
    (3, 184, 80, False, "hs", 1),
    (3, 184, 80, False, "hs", 1),
    (3, 480, 112, True, "hs", 1),
    (3, 672, 112, True, "hs", 1),
    (5, 672, 160, True, "hs", 2),
    (5, 960, 160, True, "hs", 1),
    (5, 960, 160, True, "hs", 1),
)
V3_SMALL = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hs", 2),
    (5, 240, 40, True, "hs", 1),
    (5, 240, 40, True, "hs", 1),
    (5, 120, 48, True, "hs", 1),
    (5, 144, 48, True, "hs", 1),
    (5, 288, 96, True, "hs", 2),
    (5, 576, 96, True, "hs", 1),
    (5, 576, 96, True, "hs", 1),
)

# Channels of the 3x3 stride 2 stem at width 1.
STEM_CHANNELS = {"mobilenet_v1": 32, "mobilenet_v2": 32, "mobilenet_v3_large": 16, "mobilenet_v3_small": 16}
NETWORKS = tuple(STEM_CHANNELS)


KINDS = ("separable", "inverted_residual")


@dataclass(frozen=True)
class BlockShape:
    """One block of a network; height and width are its input's. kind: "separable" (V1) or "inverted_residual".

    >>> models.BlockShape(16, 3, 64, 24, False, "relu", 2, 112, 112, "inverted_residual").exp_channels
    64
    """

    in_channels: int
    k: int
    exp_channels: int
    out_channels: int
    se: bool
    nl: str
    s: int
    height: int
    width: int
    kind: str


def _blocks(network: str, in_channels: int, width_mult: float) -> list[tuple[int, int, int, bool, str, int]]:
    """(k, exp_channels, out_channels, se, nl, s) of every block, with the width multiplier applied."""
    if network == "mobilenet_v1":
        rows, channels = [], in_channels
        for out, s in V1:
            rows.append((3, channels, make_divisible(out * width_mult), False, "relu", s))
            channels = rows[-1][2]
        return rows
    if network == "mobilenet_v2":
        rows, channels = [], in_channels
        for t, c, n, s in V2:
            for repeat in range(n):
                rows.append((3, t * channels, make_divisible(c * width_mult), False, "relu6", s if repeat == 0 else 1))
                channels = rows[-1][2]
        return rows
    table = V3_LARGE if network == "mobilenet_v3_large" else V3_SMALL
    return [
        (k, make_divisible(exp * width_mult), make_divisible(out * width_mult), se, nl, s)
        for k, exp, out, se, nl, s in table
    ]


def layer_shapes(network: str, resolution: int | tuple[int, int] = 224, width_mult: float = 1.0) -> list[BlockShape]:
    """Every block of a network ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small") in order.

    resolution is that of the image, one number or (height, width). The stem's output channels are the first
    block's in_channels, the last block's out_channels feed the last 1x1 convolution (V1: the classifier).

    >>> [(shape.k, shape.out_channels, shape.height) for shape in models.layer_shapes("mobilenet_v3_small", 64)[:3]]
    [(3, 16, 32), (3, 24, 16), (3, 24, 8)]
    """
    op = "layer_shapes"
    if not isinstance(network, str) or network not in STEM_CHANNELS:
        fail(op, "network", f"one of {', '.join(NETWORKS)}", short(network))
    width_mult = number(op, "width_mult", width_mult, above=0)
    height, width = integers(op, "resolution", resolution, (2,), 1)
    # Every kernel is odd and padded by (k - 1) // 2, so stride s divides a side and rounds up.
    height, width = -(-height // 2), -(-width // 2)
    channels = make_divisible(STEM_CHANNELS[network] * width_mult)
    widest = max(max(exp, out) for _, exp, out, *_ in _blocks(network, channels, width_mult))
    if widest > MOST:
        fail(op, "width_mult", f"one with at most {MOST} channels", f"{widest} of {width_mult:g}")
    kind = KINDS[network != "mobilenet_v1"]
    shapes = []
    for k, exp, out, se, nl, s in _blocks(network, channels, width_mult):
        shapes.append(BlockShape(channels, k, exp, out, se, nl, s, height, width, kind))
        channels, height, width = out, -(-height // s), -(-width // s)
    return shapes
