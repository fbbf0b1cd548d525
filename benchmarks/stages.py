"""Single stages of a network: a convolution with batch norm and an activation, or squeeze-excite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from mbn_kernels import FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct, FusedSqueezeExcite
from mbn_kernels.models.tables import layer_shapes


class StageShape(NamedTuple):
    """A convolution with batch norm and an activation, on an input of ``height`` x ``width``; ``conv`` "gate" is
    squeeze-excite.
    """

    conv: str
    inner: int
    outer: int
    k: int
    s: int
    height: int
    width: int
    act: str

    def __str__(self) -> str:
        window = {"depthwise": f"-k{self.k}-s{self.s}", "pointwise": f"-o{self.outer}", "gate": ""}[self.conv]
        return f"{self.conv} {self.inner}x{self.height}x{self.width}{window}-{self.act}"

    def bytes(self, batch: int, dtype: torch.dtype) -> tuple[int, int]:
        """(U, D): of the input, of the output."""
        pixels, after = self.height * self.width, -(-self.height // self.s) * -(-self.width // self.s)
        return batch * self.inner * pixels * dtype.itemsize, batch * self.outer * after * dtype.itemsize

    def module(self, *, fused: bool = True) -> nn.Module:
        if self.conv == "depthwise":
            return FusedDepthwiseConvBNAct(self.inner, self.k, stride=self.s, act=self.act, fused=fused)
        if self.conv == "gate":
            return FusedSqueezeExcite(self.inner, fused=fused)
        return FusedPointwiseConvBNAct(self.inner, self.outer, act=self.act, fused=fused)


def stage_shapes(network: str) -> list[StageShape]:
    """The network's depthwise stages, all with hard-swish, then its pointwise ones: each once."""
    found: dict[str, list[StageShape]] = {"depthwise": [], "pointwise": []}
    for b in layer_shapes(network):
        after = -(-b.height // b.s), -(-b.width // b.s)
        expanded = b.exp_channels
        found["depthwise"].append(StageShape("depthwise", expanded, expanded, b.k, b.s, b.height, b.width, "hardswish"))
        if expanded != b.in_channels:
            expansion = StageShape("pointwise", b.in_channels, expanded, 1, 1, b.height, b.width, "hardswish")
            found["pointwise"].append(expansion)
        found["pointwise"].append(StageShape("pointwise", expanded, b.out_channels, 1, 1, *after, "identity"))
    return list(dict.fromkeys(found["depthwise"] + found["pointwise"]))


def all_stages(network: str) -> tuple[StageShape, ...]:
    """These, and its squeeze-excites."""
    gates = [
        StageShape("gate", b.exp_channels, b.exp_channels, 1, 1, -(-b.height // b.s), -(-b.width // b.s), "hardsigmoid")
        for b in layer_shapes(network)
        if b.se
    ]
    return (*stage_shapes(network), *dict.fromkeys(gates))


def deferred_bytes(shape: StageShape, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """What each pass must move through memory within a block, where the value is left to the next stage
    (docs/design.md, "What it costs"): weights and halo are left out.
    """
    u, d = shape.bytes(batch, dtype)
    return {"evaluation": u + d, "forward": u + d, "backward": 2 * u + 4 * d}


def alone_bytes(shape: StageShape, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """The same of a stage alone, whose value is stored: training reads the raw output again to normalise it. Either
    gradient takes two readings of the raw output and its gradient: for the sums, and with them. Squeeze-excite reads
    its input twice; its input's gradient takes the output's once more.
    """
    u, d = shape.bytes(batch, dtype)
    if shape.conv == "gate":
        return {"evaluation": 3 * u, "forward": 3 * u, "dx": 4 * u, "dw": 2 * u}
    return {"evaluation": u + d, "forward": u + 3 * d, "dx": u + 4 * d, "dw": u + 4 * d}
