"""MobileNet V3, Large and Small: hard-swish and squeeze-excite (arXiv:1905.02244)."""

from __future__ import annotations

from ..checks import check_bool, integer
from ..modules import FusedPointwiseConvBNAct, FusedSqueezeExcite, make_divisible
from .network import MobileNet, build_blocks, checked_options, classifier_v3, conv_bn_act
from .tables import layer_shapes


def mobilenet_v3_large(num_classes: int = 1000, width_mult: float = 1.0, **options) -> MobileNet:
    """MobileNetV3-Large, (N, in_channels, H, W) -> (N, num_classes), for any H and W; options as for `mobilenet_v3`.

    >>> models.mobilenet_v3_large(num_classes=10, width_mult=0.35)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return mobilenet_v3("mobilenet_v3_large", 1280, num_classes, width_mult, **options)


def mobilenet_v3_small(num_classes: int = 1000, width_mult: float = 1.0, **options) -> MobileNet:
    """MobileNetV3-Small, (N, in_channels, H, W) -> (N, num_classes), for any H and W; options as for `mobilenet_v3`.

    >>> plain = models.mobilenet_v3_small(num_classes=10, width_mult=0.35, fused=False)
    >>> models.mobilenet_v3_small(num_classes=10, width_mult=0.35).load_state_dict(plain.state_dict())
    <All keys matched successfully>
    """
    return mobilenet_v3("mobilenet_v3_small", 1024, num_classes, width_mult, **options)


def mobilenet_v3(
    network: str,
    hidden: int,
    num_classes: int,
    width_mult: float,
    *,
    in_channels: int = 3,
    dropout: float = 0.2,
    bn_eps: float = 1e-3,
    bn_momentum: float = 0.01,
    squeeze_divisor: int = 8,
    last_se: bool = False,
    fused: bool = True,
) -> MobileNet:
    """The paper's network by default; options turn it into other people's reading of the paper.

    squeeze_divisor: squeeze-excite narrows C channels to C/4 rounded to a multiple of it; 1 means C // 4.
    last_se: squeeze-excite after the last convolution, too (the paper's Table 2 can be read so for Small).
    bn_eps, bn_momentum: of every batch norm; the defaults are those of the published weights.
    fused: False builds the plain twin, stock PyTorch with the same state_dict.
    """
    given = num_classes, in_channels, dropout, bn_eps, bn_momentum
    num_classes, in_channels, dropout, bn = checked_options(network, *given)
    squeeze_divisor = integer(network, "squeeze_divisor", squeeze_divisor)
    check_bool(network, "last_se", last_se)
    shapes = layer_shapes(network, width_mult=width_mult)
    # 960 and 576 at width 1.
    features = 6 * shapes[-1].out_channels
    squeeze = features // 4 if squeeze_divisor == 1 else make_divisible(features / 4, squeeze_divisor)
    hidden = make_divisible(hidden * float(width_mult))
    return MobileNet(
        conv_bn_act(in_channels, shapes[0].in_channels, 3, stride=2, padding=1, act="hardswish", **bn),
        build_blocks(shapes, fused=fused, squeeze_divisor=squeeze_divisor, **bn),
        classifier_v3(features, hidden, num_classes, dropout),
        last_conv=FusedPointwiseConvBNAct(shapes[-1].out_channels, features, act="hardswish", fused=fused, **bn),
        se_block=FusedSqueezeExcite(features, squeeze_channels=squeeze, fused=fused) if last_se else None,
    )
