"""MobileNetV3 as the paper review writes it: its constructor, its cfgs format and its state_dict keys."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import integer, number
from ..errors import fail, short
from ..modules import FusedInvResBlock, FusedPointwiseConvBNAct, FusedSqueezeExcite, make_divisible
from ..stages import MOST
from .network import MOST_CLASSES, MobileNet, classifier_v3, conv_bn_act, sequence
from .tables import V3_LARGE, V3_SMALL


def review_large_cfgs() -> list:
    """Rows (k, exp, out, se, nl, s) of the blocks, the last convolution's row, the classifier's hidden width.

    >>> models.review_large_cfgs()[-2:]
    [(1, None, 960, False, 'hs', 1), 1280]
    """
    return [*V3_LARGE, (1, None, 960, False, "hs", 1), 1280]


def review_small_cfgs() -> list:
    """As `review_large_cfgs`, of MobileNetV3-Small: there squeeze-excite follows the last convolution, too.

    >>> models.review_small_cfgs()[-2:]
    [(1, None, 576, True, 'hs', 1), 1024]
    """
    return [*V3_SMALL, (1, None, 576, True, "hs", 1), 1024]


def _rows(op: str, cfgs: Sequence) -> list:
    """Of the blocks and the last convolution, then the classifier's width."""
    rows = list(cfgs) if isinstance(cfgs, (list, tuple)) else []
    if len(rows) < 2 or not all(isinstance(row, (list, tuple)) and len(row) == 6 for row in rows[:-1]):
        fail(op, "cfgs", "rows (k, exp, out, se, nl, s) and the classifier's width", short(cfgs), TypeError)
    return rows


class MobileNetV3(MobileNet):
    """A drop-in for the review's network, (N, in_channels, H, W) -> (N, num_classes): its state_dict loads both ways.

    cfgs ends with the last convolution's row, of which k, out, se and nl count, and the classifier's hidden width.
    width_exp scales the blocks' output channels and nothing else. zero_init_residual changes nothing, as in the
    review: it is accepted so that existing calls keep working, and the blocks' last batch norms start at 1 either way.
    A last convolution that is not 1x1 is unpadded, as the review's is, and runs as stock PyTorch.

    >>> models.MobileNetV3(3, models.review_small_cfgs(), num_classes=10)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        cfgs: Sequence,
        num_classes: int,
        zero_init_residual: bool = True,
        width_exp: float = 1.0,
        *,
        fused: bool = True,
    ) -> None:
        op = type(self).__name__
        in_channels = integer(op, "in_channels", in_channels)
        width_exp = number(op, "width_exp", width_exp, above=0)
        rows = _rows(op, cfgs)
        hidden = integer(op, "cfgs", rows.pop())
        last_k, _, features, last_se, last_nl, _ = rows.pop()
        last_k, features = integer(op, "cfgs", last_k), integer(op, "cfgs", features)
        num_classes = integer(op, "num_classes", num_classes, most=MOST_CLASSES)
        conv1 = conv_bn_act(in_channels, 16, 3, stride=2, padding=1, act="hardswish", bn_momentum=0.99)
        blocks, channels = [], 16
        for k, exp, out, se, nl, s in rows:
            out = make_divisible(integer(op, "cfgs", out) * width_exp)
            if out > MOST:
                fail(op, "width_exp", f"one with at most {MOST} channels", f"{out} of {width_exp:g}")
            blocks.append(FusedInvResBlock(channels, k, make_divisible(exp), out, se, nl, s, fused=fused))
            channels = out
        se_block = FusedSqueezeExcite(features, fused=fused) if last_se else None
        act = "relu" if last_nl == "relu" else "hardswish"
        if last_k == 1:
            last_conv = FusedPointwiseConvBNAct(channels, features, act=act, fused=fused)
        else:
            last_conv = conv_bn_act(channels, features, last_k, act=act)
        super().__init__(
            conv1,
            sequence(fused)(*blocks),
            classifier_v3(features, hidden, num_classes, dropout=0.2),
            last_conv=last_conv,
            se_block=se_block,
        )
