"""What every network here is made of: a stem of stock modules, fused blocks, a last 1x1 convolution, a classifier."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..checks import check_input, check_tensor, integer, number
from ..errors import fail, short
from ..modules import FusedDepthwiseSeparable, FusedInvResBlock, FusedSequential
from ..modules.ends import Head, explain_stem
from ..modules.kept import KeepsEvaluation
from ..modules.sequence import run_in_turn
from ..modules.watch import has_hook
from .tables import KINDS, BlockShape

MOST_CLASSES = (1 << 31) - 1
_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}


class MobileNet(KeepsEvaluation, nn.Module):
    """conv1, blocks, last_conv, se_block, global average pool, classifier: (N, C, H, W) -> (N, num_classes).

    last_conv and se_block may be absent. The weights are initialised here, so build the parts first.

    >>> stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> blocks = mbn_kernels.FusedSequential(mbn_kernels.FusedDepthwiseSeparable(8, 16))
    >>> models.MobileNet(stem, blocks, nn.Sequential(nn.Linear(16, 10)))(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        conv1: nn.Module,
        blocks: nn.Module,
        classifier: nn.Module,
        *,
        last_conv: nn.Module | None = None,
        se_block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        optional = {name: part for name, part in (("last_conv", last_conv), ("se_block", se_block)) if part is not None}
        for name, part in {"conv1": conv1, "blocks": blocks, "classifier": classifier, **optional}.items():
            if not isinstance(part, nn.Module):
                fail(type(self).__name__, name, "an nn.Module", short(part), TypeError)
        self.conv1 = conv1
        self.blocks = blocks
        # Registered before last_conv, though it runs after it: the order of parameters is part of an optimiser's state.
        self.se_block = se_block
        self.last_conv = last_conv
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier
        initialize(self)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_tensor(type(self).__name__, "x", x)
        check_input(type(self).__name__, x)
        if torch.compiler.is_compiling():
            return self._run(x)
        if x.is_meta:  # stock's batch norm counts the batch before it finds out
            explain_stem(self.conv1, x)
        try:
            return self._run(x)
        except (RuntimeError, AssertionError):
            explain_stem(self.conv1, x)
            raise

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.blocks) is FusedSequential and not has_hook(self.blocks):
            parts = (self.conv1, *self.blocks._modules.values(), self.last_conv, self.se_block)
            head = Head(self.gap, self.classifier)
            return run_in_turn(self, [part for part in parts if part is not None], x, head)
        x = self.blocks(self.conv1(x))
        if self.last_conv is not None:
            x = self.last_conv(x)
        if self.se_block is not None:
            x = self.se_block(x)
        return self.classifier(torch.flatten(self.gap(x), 1))


def initialize(model: nn.Module) -> None:
    """He-normal convolutions (fan out), batch norms 1 and 0, linear weights N(0, 0.01), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def conv_bn_act(
    in_channels: int,
    out_channels: int,
    k: int,
    *,
    stride: int = 1,
    padding: int = 0,
    act: str,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
) -> nn.Sequential:
    """A dense convolution, batch norm and activation of stock PyTorch: the stem."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, k, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels, bn_eps, bn_momentum),
        _ACTIVATIONS[act](inplace=True),
    )


def checked_options(
    op: str, num_classes: int, in_channels: int, dropout: float, bn_eps: float, bn_momentum: float | None
) -> tuple[int, int, float, dict]:
    """(num_classes, in_channels, dropout, {"bn_eps": …, "bn_momentum": …}), checked before anything is built."""
    classes = integer(op, "num_classes", num_classes, most=MOST_CLASSES)
    momentum = None if bn_momentum is None else number(op, "bn_momentum", bn_momentum)
    bn = {"bn_eps": number(op, "bn_eps", bn_eps, least=0), "bn_momentum": momentum}
    return classes, integer(op, "in_channels", in_channels), number(op, "dropout", dropout, least=0, most=1), bn


def build_block(
    shape: BlockShape,
    *,
    fused: bool = True,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
    squeeze_divisor: int = 8,
) -> nn.Module:
    """The module of one row of a layer table; its height and width play no part.

    >>> shape = models.layer_shapes("mobilenet_v2")[1]
    >>> models.build_block(shape)(torch.randn(2, shape.in_channels, 8, 8)).shape
    torch.Size([2, 24, 4, 4])
    """
    if not isinstance(shape, BlockShape) or shape.kind not in KINDS:
        fail("build_block", "shape", f"a BlockShape of kind {' or '.join(KINDS)}", short(shape), TypeError)
    bn = {"bn_eps": bn_eps, "bn_momentum": bn_momentum}
    if shape.kind == "separable":
        return FusedDepthwiseSeparable(
            shape.in_channels, shape.out_channels, shape.k, shape.s, nl=shape.nl, fused=fused, **bn
        )
    return FusedInvResBlock(
        shape.in_channels,
        shape.k,
        shape.exp_channels,
        shape.out_channels,
        shape.se,
        shape.nl,
        shape.s,
        squeeze_divisor=squeeze_divisor,
        fused=fused,
        **bn,
    )


def build_blocks(shapes: Iterable[BlockShape], *, fused: bool = True, **options) -> nn.Sequential:
    """The blocks of a network in order; options are build_block's."""
    return sequence(fused)(*(build_block(shape, fused=fused, **options) for shape in shapes))


def sequence(fused: bool) -> type[nn.Sequential]:
    return FusedSequential if fused else nn.Sequential


def classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Dropout and one linear layer (V1, V2)."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))


def classifier_v3(channels: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    """V3's efficient last stage: the features are widened after the pool, where they are one pixel."""
    return nn.Sequential(
        nn.Linear(channels, hidden),
        nn.Hardswish(inplace=True),
        nn.Dropout(dropout, inplace=True),
        nn.Linear(hidden, num_classes),
    )
