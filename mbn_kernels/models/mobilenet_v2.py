"""MobileNet V2: inverted residuals with linear bottlenecks (arXiv:1801.04381)."""

from __future__ import annotations

from ..modules import FusedPointwiseConvBNAct, make_divisible
from .network import MobileNet, build_blocks, checked_options, classifier, conv_bn_act
from .tables import layer_shapes


def mobilenet_v2(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    *,
    in_channels: int = 3,
    dropout: float = 0.2,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
    fused: bool = True,
) -> MobileNet:
    """The paper's network, (N, in_channels, H, W) -> (N, num_classes), for any H and W.

    As in the paper, a width below 1 leaves the last convolution's 1280 channels alone.
    fused=False builds the plain twin: stock PyTorch, same state_dict.

    >>> models.mobilenet_v2(num_classes=10, width_mult=0.35)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    given = num_classes, in_channels, dropout, bn_eps, bn_momentum
    num_classes, in_channels, dropout, bn = checked_options("mobilenet_v2", *given)
    shapes = layer_shapes("mobilenet_v2", width_mult=width_mult)
    features = make_divisible(1280 * max(1.0, float(width_mult)))
    return MobileNet(
        conv_bn_act(in_channels, shapes[0].in_channels, 3, stride=2, padding=1, act="relu6", **bn),
        build_blocks(shapes, fused=fused, **bn),
        classifier(features, num_classes, dropout),
        last_conv=FusedPointwiseConvBNAct(shapes[-1].out_channels, features, act="relu6", fused=fused, **bn),
    )
