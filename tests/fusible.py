"""A block and a network as users write them, for the tests of fuse()."""

from __future__ import annotations

import copy
from collections.abc import Callable

import stock
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbn_kernels import fuse


class Separable(nn.Module):
    """A block as a user writes it: functions and modules mixed, squeeze-excite by hand, its own names."""

    def __init__(self, c: int = 8, gate: bool = True, stride: int = 1, p: float = 0.0) -> None:
        super().__init__()
        self.wide = nn.Conv2d(c, 3 * c, 1, bias=False)
        self.norm = nn.BatchNorm2d(3 * c)
        self.deep = nn.Sequential(
            nn.Conv2d(3 * c, 3 * c, 3, stride, 1, groups=3 * c, bias=False), nn.BatchNorm2d(3 * c), nn.SiLU()
        )
        self.down, self.up = nn.Linear(3 * c, 4), nn.Linear(4, 3 * c)
        self.narrow = nn.Sequential(nn.Conv2d(3 * c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.drop = nn.Dropout2d(p)
        self.gate, self.skip, self.out_channels = gate, stride == 1, c

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(F.relu6(self.norm(self.wide(x))))
        if self.gate:
            b, c, _, _ = y.size()
            g = self.up(F.relu(self.down(y.mean(dim=(2, 3)))))
            y = y * torch.sigmoid(g).view(b, c, 1, 1)
        y = self.drop(self.narrow(y))
        return x + y if self.skip else y


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(blocks or (Separable(), Separable(stride=2), Separable(gate=False))))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def net(*blocks: nn.Module) -> Net:
    return stock.randomize(Net(*blocks))


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 14, 13, generator=torch.Generator().manual_seed(0))


def both(make: Callable[[], nn.Module] = net) -> tuple[nn.Module, nn.Module]:
    """(as it was, fused): the same weights."""
    plain = make()
    model = copy.deepcopy(plain)
    fuse(model)
    return plain, model


def layers(stride: int = 1) -> list[nn.Module]:
    """A V1 network as a flat list."""
    dense = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    deep = [nn.Conv2d(8, 8, 3, stride, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    wide = [nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    last = [nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)]
    return [*dense, *deep, *wide, nn.Tanh(), *last]


class InPlaceGate(nn.Module):
    """Squeeze-excite that writes into its input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d((1, 1))
        layers = nn.Linear(c, c // 4), nn.ReLU(inplace=True), nn.Linear(c // 4, c), nn.Hardsigmoid(inplace=True)
        self.excitation = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.squeeze(x)
        x *= self.excitation(gate.reshape(gate.shape[0], -1)).unsqueeze(2).unsqueeze(3)
        return x


class InPlaceBlock(nn.Module):
    """An inverted residual block in which everything writes into its input, and two stages share one activation."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        act = nn.Hardswish(inplace=True)
        wide = nn.Conv2d(c, 3 * c, 1, bias=False), nn.BatchNorm2d(3 * c, momentum=0.99), act
        deep = nn.Conv2d(3 * c, 3 * c, 5, 1, 2, groups=3 * c, bias=False), nn.BatchNorm2d(3 * c), act
        narrow = nn.Conv2d(3 * c, c, 1, bias=False), nn.BatchNorm2d(c)
        gate = InPlaceGate(3 * c)
        self.layers = nn.Sequential(nn.Sequential(*wide), nn.Sequential(*deep), gate, nn.Sequential(*narrow))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
