"""How the depthwise kernels' work is shared among blocks of threads: for each shape a few ways, the likely best first.

A thread takes two channels and a group of neighbouring columns, and slides down rows (``csrc/cuda/depthwise.cuh``). The
others differ in one thing each from the first: fewer threads, or half the rows. Where shapes are tuned
(:mod:`mbn_kernels.backends.triton.tuning`), :data:`TRITON` is measured beside them.
"""

from __future__ import annotations

import torch

from ..triton.config import Config
from ..triton.launch import Groups, cdiv, multiprocessors, share

#: Stands for Triton's kernel.
TRITON = Config({})
#: Threads of a block, and of a multiprocessor: enough to keep memory busy while others wait at a barrier.
_BLOCK, _RESIDENT = 128, 512
#: Output columns of a thread of the forward kernel: kForwardColumns of ``csrc/cuda/kernels.h``.
FORWARD_COLUMNS = 7


def channel_vector(dtype: torch.dtype) -> int:
    """Channels in 16 bytes."""
    return 16 // dtype.itemsize


def backward_columns(kernel: int, stride: int) -> int:
    """Steps of ``stride`` input columns of a thread of the backward kernel, as in ``csrc/cuda/kernels.h``."""
    return 4 if kernel > 5 or stride > 1 else 7


def _block(channels: int, columns: int, halo: float, dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """(vectors of channels, groups of columns) of a block: those that leave the fewest threads idle and read the least
    twice. ``columns`` counts groups, ``halo`` is what a tile reads beyond them.
    """
    whole, pairs = channels // channel_vector(dtype), channel_vector(dtype) // 2

    def block(vectors: int) -> tuple[float, int, int]:
        groups = min(columns, max(threads // (vectors * pairs), 1))
        groups = cdiv(columns, cdiv(columns, groups))
        rounded = cdiv(vectors * pairs * groups, 32) * 32
        used = whole * pairs * columns / (cdiv(whole, vectors) * cdiv(columns, groups) * rounded)
        sectors = 1.0 if vectors % 2 == 0 or vectors == whole else 0.95  # memory is read 32 bytes at a time,
        lines = 1.0 if vectors * 16 >= 128 or vectors == whole else 0.9  # and best in lines of 128
        return used * sectors * lines / (1 + 0.3 * halo / groups), vectors, groups

    _, vectors, groups = max(block(v) for v in range(1, min(whole, threads // pairs, 16) + 1))
    return vectors, groups


def depthwise(
    images: int,
    channels: int,
    steps: int,
    columns: int,
    each: int,
    halo: float,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Config]:
    """``columns`` and ``steps`` of rows are to be covered, ``each`` columns by a thread; ``halo``: what a tile of one
    group reads beyond its own, as a part of that.
    """
    found = []
    for threads in (_BLOCK, _BLOCK // 2, _BLOCK * 3 // 4):
        vectors, groups = _block(channels, cdiv(columns, each), halo, dtype, threads)
        own = vectors * (channel_vector(dtype) // 2) * groups
        blocks = images * cdiv(channels, vectors * channel_vector(dtype)) * cdiv(columns, groups * each)
        strip = steps
        while strip > 4 and blocks * cdiv(steps, strip) * own < _RESIDENT * multiprocessors(device):
            strip = cdiv(strip, 2)
        found += [Config({"vectors": vectors, "groups": groups}, strip=s) for s in (strip, max(strip // 2, 1))]
    ordered = found[::2] + found[1::2]
    return [c for i, c in enumerate(ordered) if c not in ordered[:i]]


def shared(tile: Config, images: int, channels: int, steps: int, columns: int, each: int, dtype, device) -> Groups:
    """Which block takes what: groups whose "pixels" are units, strips of a tile of columns."""
    vectors, groups = tile.blocks["vectors"], tile.blocks["groups"]
    units = cdiv(steps, tile.strip) * cdiv(columns, groups * each)
    threads = cdiv(vectors * (channel_vector(dtype) // 2) * groups, 32) * 32
    slices = cdiv(channels, vectors * channel_vector(dtype))
    return share(device, images, units, units, slices, programs=max(_RESIDENT // threads, 1))
