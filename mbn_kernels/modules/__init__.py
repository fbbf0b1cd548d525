"""Drop-in modules; see :mod:`mbn_kernels.modules.blocks`."""

from .blocks import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSqueezeExcite,
    make_divisible,
)
from .frozen import FrozenEvaluation, freeze
from .fused import FusedModule
from .sequence import FusedSequential

__all__ = [
    "FrozenEvaluation",
    "FusedDepthwiseConvBNAct",
    "FusedDepthwiseSeparable",
    "FusedInvResBlock",
    "FusedModule",
    "FusedPointwiseConvBNAct",
    "FusedSequential",
    "FusedSqueezeExcite",
    "freeze",
    "make_divisible",
]
