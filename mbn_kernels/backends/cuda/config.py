"""How the depthwise kernels' work is shared among blocks of threads: for each shape a few ways, the likely best first.

A thread takes two channels and a group of neighbouring columns, and slides down rows (``csrc/cuda/depthwise.cuh``). The
others differ in one thing each from the first: fewer threads, or half the rows. Where shapes are tuned
(:mod:`mbn_kernels.backends.triton.tuning`), :data:`TRITON` is measured beside them.
"""

from __future__ import annotations

from typing import NamedTuple

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


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; where there is no GPU, on the smallest from sm_80 on."""
    if device.type != "cuda":
        return 99 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Work(NamedTuple):
    """What a depthwise kernel has to cover: ``steps`` of rows by ``columns``, ``each`` of these by a thread."""

    images: int
    channels: int
    steps: int
    columns: int
    each: int
    window: tuple[int, int]  # its size and stride
    backward: bool
    dtype: torch.dtype
    device: torch.device


def shared_bytes(work: Work, vectors: int, groups: int) -> int:
    """Of shared memory, that a block takes."""
    itemsize = work.dtype.itemsize
    return torch.ops.mbn.cuda_depthwise_shared(itemsize, *work.window, vectors, groups, work.backward)


def depthwise(work: Work) -> list[Config]:
    kernel, stride = work.window
    read_twice = (kernel - 1) // stride if work.backward else (kernel - stride) / stride
    found = []
    for threads in (_BLOCK, _BLOCK // 2, _BLOCK * 3 // 4):
        columns = cdiv(work.columns, work.each)
        vectors, groups = _block(work.channels, columns, read_twice / work.each, work.dtype, threads)
        if shared_bytes(work, vectors, groups) > shared_limit(work.device):
            continue
        own = vectors * (channel_vector(work.dtype) // 2) * groups
        blocks = work.images * cdiv(work.channels, vectors * channel_vector(work.dtype)) * cdiv(columns, groups)
        strip = work.steps
        while strip > 4 and blocks * cdiv(work.steps, strip) * own < _RESIDENT * multiprocessors(work.device):
            strip = cdiv(strip, 2)
        found += [Config({"vectors": vectors, "groups": groups}, strip=s) for s in (strip, max(strip // 2, 1))]
    ordered = found[::2] + found[1::2]
    return [c for i, c in enumerate(ordered) if c not in ordered[:i]]


def shared(tile: Config, work: Work) -> Groups:
    """Which block takes what: groups whose "pixels" are units, strips of a tile of columns."""
    vectors, groups, vector = tile.blocks["vectors"], tile.blocks["groups"], channel_vector(work.dtype)
    units = cdiv(work.steps, tile.strip) * cdiv(work.columns, groups * work.each)
    threads = cdiv(vectors * (vector // 2) * groups, 32) * 32
    slices = cdiv(work.channels, vectors * vector)
    return share(work.device, work.images, units, units, slices, programs=max(_RESIDENT // threads, 1))
