"""Fused depthwise convolution, batch norm, activation and squeeze-excite for MobileNets in PyTorch."""

from . import functional
from .backends import available_backends, empty_cache, use_backend
from .fusing import fuse, unfuse
from .modules import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSequential,
    FusedSqueezeExcite,
    freeze,
)

__version__ = "0.1.0"

__all__ = [
    "FusedDepthwiseConvBNAct",
    "FusedDepthwiseSeparable",
    "FusedInvResBlock",
    "FusedPointwiseConvBNAct",
    "FusedSequential",
    "FusedSqueezeExcite",
    "available_backends",
    "empty_cache",
    "freeze",
    "functional",
    "fuse",
    "unfuse",
    "use_backend",
]
