"""What a machine can do at most, measured: a copy's bandwidth, and multiply-adds of a loop that needs no memory."""

from __future__ import annotations

import statistics
from functools import lru_cache
from typing import NamedTuple

import torch

from .gpu_timing import copy_bandwidth as gpu_copy_bandwidth
from .gpu_timing import median_seconds
from .timing import seconds

#: Seconds for which the CPU's peak is measured.
PEAK = 0.3
#: Bytes of a CPU's copy: beyond every cache.
COPIED = 256 << 20
#: Side of the matrices of a GPU's product.
SIDE = 8192


class Ceilings(NamedTuple):
    """Bytes a second, read and written; floating-point operations a second, two for each multiply-add. None where it
    cannot be measured.
    """

    copy_bandwidth: float
    peak_flops: float | None


@lru_cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured at the first call: on a CPU with the current number of threads."""
    if device.type == "cuda":
        return Ceilings(gpu_copy_bandwidth(device), _product(device, dtype))
    gflops = peak_gflops()
    return Ceilings(copy_bandwidth(), gflops and gflops * 1e9)


def copy_bandwidth() -> float:
    """Of torch's copy_ in memory."""
    source = torch.zeros(COPIED // 4)
    target = torch.zeros_like(source)
    return 2 * COPIED / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(9))


def peak_gflops() -> float | None:
    """Of float32 with the current number of threads, in a bare loop of fused multiply-adds; None where the CPU library
    cannot tell.
    """
    operator = getattr(torch.ops.mbn, "cpu_peak", None)
    try:
        return operator(PEAK) if operator else None
    except (NotImplementedError, RuntimeError):
        return None


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """Of PyTorch's product of two large matrices."""
    a = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    return 2 * SIDE**3 / median_seconds(lambda: a @ a, 200)
