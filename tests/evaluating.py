"""Evaluation on the CPU in one call: small networks, the oracle that holds them, and who counts the calls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import stock
import torch
from oracle import Tensors, hold
from torch import Tensor, nn

from mbn_kernels import FusedPointwiseConvBNAct
from mbn_kernels.backends import cpu
from mbn_kernels.models import MobileNet, mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small
from mbn_kernels.models.network import build_blocks, classifier_v3, conv_bn_act
from mbn_kernels.models.tables import BlockShape

NETWORKS = {f.__name__: f for f in (mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

_BLOCKS = (
    BlockShape(8, 3, 8, 12, False, "relu", 1, 8, 8, "separable"),
    BlockShape(12, 5, 30, 12, True, "hs", 1, 8, 8, "inverted_residual"),
    BlockShape(12, 3, 40, 16, False, "relu6", 2, 8, 8, "inverted_residual"),
)


def small(fused: bool = True) -> MobileNet:
    """A network with a part of every kind that runs in one call."""
    return MobileNet(
        conv_bn_act(3, 8, 3, stride=2, padding=1, act="hardswish"),
        build_blocks(_BLOCKS, fused=fused),
        classifier_v3(40, 24, 7, 0.2),
        last_conv=FusedPointwiseConvBNAct(16, 40, act="hardswish", fused=fused),
    )


#: The parts of `small` as chains: stem, blocks, last convolution, pool, two linear layers.
SMALL_CHAINS = 1 + len(_BLOCKS) + 1 + 1 + 2


def twins(build: Callable[[bool], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The fused module and its stock twin, in evaluation, with the same random numbers in them."""
    fused, plain = build(True), build(False)
    stock.randomize(plain)
    fused.load_state_dict(plain.state_dict(), strict=True)
    return tuple(m.to(dtype).eval().requires_grad_(False) for m in (fused, plain))


@functools.cache
def networks(name: str, dtype: torch.dtype, width: float = 0.35, in_channels: int = 3) -> tuple[nn.Module, nn.Module]:
    """Made once: who changes one has to copy it."""
    return twins(lambda fused: NETWORKS[name](10, width, in_channels=in_channels, fused=fused), dtype)


def hold_module(out: Tensor, plain: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> None:
    """Holds an output to the tolerance: ``plain`` is stock (under autocast if one is given), in float64 the oracle."""
    exact = copy.deepcopy(plain).double()

    def run(t: Tensors) -> dict[str, Tensor]:
        if t.x.dtype == torch.float64:
            return {"out": exact(t.x)}
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return {"out": plain(t.x)}

    with torch.no_grad():
        hold({"out": out}, run, Tensors(x, []), autocast or x.dtype)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chains each evaluation in the CPU backend has, call by call."""
    found: list[int] = []
    evaluate, run = cpu._ops.evaluate, cpu.Prepared.__call__

    def count(*arguments):
        found.append(arguments[4].numel() // 2)
        return evaluate(*arguments)

    def count_prepared(self, x):
        found.append(self._evaluation.blocks.numel() // 2)
        return run(self, x)

    monkeypatch.setattr(cpu._ops, "evaluate", count)
    monkeypatch.setattr(cpu.Prepared, "__call__", count_prepared)
    return found


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def with_threads(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What the module returns with any number of threads."""
    found = []
    for threads in (1, 3):  # three on two processors take work from each other
        torch.set_num_threads(threads)
        found.append(module(x))
    torch.set_num_threads(1)
    for out in found[1:]:
        assert torch.equal(out.nan_to_num(), found[0].nan_to_num())
    return found[0]
