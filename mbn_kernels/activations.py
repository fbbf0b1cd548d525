"""Activations and their derivatives, defined once for everything written in Python.

``csrc/activation.h`` is the same table for C++ and CUDA, ``backends/triton/device.py`` for Triton; the codes are part
of the kernel operators' schemas. At a kink the derivative is the subgradient that PyTorch gives; NaN passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """One activation: its code in ``csrc/activation.h``, its value and its derivative, as functions of the input."""

    code: int
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _hardsigmoid(n: Tensor) -> Tensor:
    return (n + 3).clamp(0, 6) / 6


def _hardswish_derivative(n: Tensor) -> Tensor:
    return torch.where(n <= -3, 0.0, torch.where(n >= 3, 1.0, n / 3 + 0.5))


def _silu_derivative(n: Tensor) -> Tensor:
    s = torch.sigmoid(n)
    return s * (1 + n * (1 - s))


def _sigmoid_derivative(n: Tensor) -> Tensor:
    s = torch.sigmoid(n)
    return s * (1 - s)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(0, lambda n: n, torch.ones_like),
    "relu": Activation(1, lambda n: n.clamp(min=0), lambda n: torch.where(n <= 0, 0.0, 1.0).to(n.dtype)),
    "relu6": Activation(2, lambda n: n.clamp(0, 6), lambda n: torch.where((n <= 0) | (n >= 6), 0.0, 1.0).to(n.dtype)),
    "hardswish": Activation(3, lambda n: n * _hardsigmoid(n), _hardswish_derivative),
    "silu": Activation(4, lambda n: n * torch.sigmoid(n), _silu_derivative),
    "hardsigmoid": Activation(
        5, _hardsigmoid, lambda n: torch.where((n > -3) & (n < 3), 1.0, 0.0).to(n.dtype) * (torch.ones_like(n) / 6)
    ),
    "sigmoid": Activation(6, torch.sigmoid, _sigmoid_derivative),
}
