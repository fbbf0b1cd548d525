"""MobileNet V1, V2 and V3 of fused blocks, and the tables they are built from."""

from .mobilenet_v1 import mobilenet_v1
from .mobilenet_v2 import mobilenet_v2
from .mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from .network import MobileNet, build_block
from .review import MobileNetV3, review_large_cfgs, review_small_cfgs
from .tables import NETWORKS, BlockShape, layer_shapes

__all__ = [
    "NETWORKS",
    "BlockShape",
    "MobileNet",
    "MobileNetV3",
    "build_block",
    "layer_shapes",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "review_large_cfgs",
    "review_small_cfgs",
]
