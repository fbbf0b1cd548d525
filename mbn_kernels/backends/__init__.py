"""Backends: each is a table of kernels (:class:`mbn_kernels.chain.Kernels`). The engine asks for one by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from ..chain import Kernels
from ..errors import fail, short
from . import cpu, cuda, triton
from .reference import ReferenceKernels


class Backend(NamedTuple):
    kernels: Kernels
    missing: str | None  # why it cannot be used, or None
    supports: Callable[[torch.device, torch.dtype], str | None]  # why not with tensors like these, or None


def _reference_supports(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _cpu_supports(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"a tensor on the CPU, got one on {device}"
    if dtype not in cpu.DTYPES:
        return f"float32, float64 or bfloat16 on the CPU, got {dtype}"
    return None


_SUPPORTS: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {
    "reference": _reference_supports,
    "cpu": _cpu_supports,
    "triton": triton.supports,
    "cuda": cuda.supports,
}
_LOADERS: dict[str, Callable[[], Backend]] = {
    "reference": lambda: Backend(ReferenceKernels(), None, _reference_supports),
    "cpu": lambda: Backend(cpu.CpuKernels(), cpu.load(), _cpu_supports),
    # Looking for a GPU starts its driver, which a process that forks later must not have done: not before it is needed.
    "triton": lambda: Backend(*triton.load(), triton.supports),
    "cuda": lambda: Backend(*cuda.load(), cuda.supports),
}


def constant_when_compiled(f: Callable) -> Callable:
    """Marks a function whose result a graph may hold as a constant, as ``torch.compiler.assume_constant_result`` does,
    which imports all of torch.compile, a second's work, to set this one attribute.
    """
    f._dynamo_marked_constant = True
    return f


_CPU = torch.device("cpu")  # compared in a tenth of the time that a device takes to say its type
#: For tensors on a GPU, the first that can.
_ON_GPU = ("cuda", "triton")


@lru_cache
def _backend(name: str) -> Backend:
    return _LOADERS[name]()


_backend("cpu")  # registers its operators
_chosen: str | None = None


def available_backends() -> dict[str, str]:
    """Every backend by name, with "available" or one line that says why it is not.

    >>> mbn_kernels.available_backends()["reference"]
    'available'
    """
    return {name: _backend(name).missing or "available" for name in _LOADERS}


def is_available(name: str) -> bool:
    """Whether the backend can be used here."""
    return _backend(name).missing is None


def empty_cache() -> None:
    """Gives memory back that the CPU kernels keep for later calls: that of former activations, and packed weights.

    >>> mbn_kernels.empty_cache()
    """
    if is_available("cpu"):
        cpu.empty_cache()


def get(name: str) -> Backend:
    """The backend of that name; ValueError for an unknown one, RuntimeError for one that cannot be used here."""
    if not isinstance(name, str) or name not in _LOADERS:
        fail("use_backend", "name", f"one of {', '.join(_LOADERS)}", short(name))
    backend = _backend(name)
    if backend.missing:
        raise RuntimeError(f"use_backend: {name}: {backend.missing}")
    return backend


class use_backend:
    """Chooses the backend for every call from now on, in all threads; None goes back to the choice by device.

    As a context manager, the former choice comes back at the end of the block.

    >>> with mbn_kernels.use_backend("reference"):
    ...     y = mbn_kernels.FusedSqueezeExcite(8)(torch.randn(2, 8, 4, 4))
    >>> y.shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        if name is not None:
            get(name)
        self._former, _chosen = _chosen, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _chosen
        _chosen = self._former


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for tensors like these."""
    if _chosen is not None:
        return _chosen
    return "cpu" if device == _CPU or device.type == "cpu" else _choose_on_gpu(device, dtype)


@constant_when_compiled  # torch.compile cannot trace how a backend is loaded
def _choose_on_gpu(device: torch.device, dtype: torch.dtype) -> str:
    for name in _ON_GPU:
        found = _backend(name)
        reason = found.missing or found.supports(device, dtype)
        if not reason:
            return name
    _warn_reference(device.type, dtype, reason)
    return "reference"


def why_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the backend for tensors like these expects instead of them; None where it takes them. torch.compile can
    trace the question.
    """
    return _SUPPORTS[choose(device, dtype)](device, dtype)


_warned: set[tuple[str, torch.dtype]] = set()


def _warn_reference(device_type: str, dtype: torch.dtype, reason: str) -> None:
    if (device_type, dtype) not in _warned and not torch.compiler.is_compiling():
        _warned.add((device_type, dtype))
        warnings.warn(
            f"mbn_kernels: {dtype} on {device_type} runs the reference backend, plain PyTorch, which is no faster than "
            f"stock: backend 'triton' expected {reason}",
            stacklevel=4,
        )
