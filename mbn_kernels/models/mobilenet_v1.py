"""MobileNet V1: depthwise separable convolutions (arXiv:1704.04861)."""

from __future__ import annotations

from .network import MobileNet, build_blocks, checked_options, classifier, conv_bn_act
from .tables import layer_shapes


def mobilenet_v1(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    *,
    in_channels: int = 3,
    dropout: float = 0.0,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
    fused: bool = True,
) -> MobileNet:
    """The paper's network, (N, in_channels, H, W) -> (N, num_classes), for any H and W; the paper names no dropout.

    fused=False builds the plain twin: stock PyTorch, same state_dict.

    >>> models.mobilenet_v1(num_classes=10, width_mult=0.25)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    given = num_classes, in_channels, dropout, bn_eps, bn_momentum
    num_classes, in_channels, dropout, bn = checked_options("mobilenet_v1", *given)
    shapes = layer_shapes("mobilenet_v1", width_mult=width_mult)
    return MobileNet(
        conv_bn_act(in_channels, shapes[0].in_channels, 3, stride=2, padding=1, act="relu", **bn),
        build_blocks(shapes, fused=fused, **bn),
        classifier(shapes[-1].out_channels, num_classes, dropout),
    )
