"""Tile sizes: for each kernel the few that are worth trying for a shape, the likely best first, eight at most.

The first is what runs where nothing was measured (:mod:`tuning`). It is chosen so that the kernel does not spill on any
GPU from sm_80 on: a test compiles all of them. The others differ in one thing each: half the rows, for twice the
programs; twice; fewer or more warps for the same tile; narrower blocks, read more often but with more programs on a
multiprocessor; one stage of prefetching more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton import next_power_of_2

from .launch import PROGRAMS, cdiv, multiprocessors

#: Tests make it small, so that tiny tensors take many tiles and end in the middle of one.
largest_block = 1 << 20


class Config(NamedTuple):
    """Constants of a kernel by name, how many warps share a program, how many tiles it loads ahead, and, of a depthwise
    kernel, the steps of a strip.
    """

    blocks: dict[str, int]
    warps: int = 4
    stages: int = 3
    strip: int = 0

    def arguments(self) -> dict:
        # Fusion is said outright, as Triton's own default changes with its version.
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


#: Stand for a kernel of this package in the tile that is chosen for it, and for PyTorch's products (:mod:`library`).
OWN, LIBRARY = Config({}), Config({"LIBRARY": 1})


def _block(n: int, least: int, most: int) -> int:
    """A power of two that covers n where ``most`` allows it."""
    return max(min(next_power_of_2(n), most, largest_block), least)


def _distinct(configs: list[Config]) -> list[Config]:
    return [c for i, c in enumerate(configs) if c not in configs[:i]]


# One walk over a tensor -----------------------------------------------------------------------------------------------


def elementwise(channels: int, pixels: int, numbers: int = 0) -> list[Config]:
    """Whole rows of channels where they fit, as memory is then read in one run; two 16-byte loads a thread and tensor,
    or half or twice of it: half where a program keeps so many ``numbers`` for each of the tile that registers are few.
    """
    sizes = ((2048, 4), (1024, 4), (4096, 8)) if numbers <= 3 else ((1024, 4), (2048, 8), (2048, 4))
    c = _block(channels, 8, 128)
    return _distinct(
        [Config({"CHANNELS": c, "ROWS": _block(pixels, 1, max(elements // c, 1))}, warps) for elements, warps in sizes]
    )


def merge(channels: int, parts: int) -> Config:
    """Few channels a program, as there are few channels and many parts (0: nothing to merge)."""
    return Config({"CHANNELS": _block(channels, 1, 16), **({"PARTS": _block(parts, 1, 128)} if parts else {})})


def sum_parts(size: int, parts: int) -> Config:
    return Config({"CHANNELS": _block(size, 1, 128), "PARTS": _block(parts, 1, 16)})


# 1x1 convolutions -----------------------------------------------------------------------------------------------------

# What a thread can hold of a tile is a matter of registers, about two for each of the numbers counted here; the limit
# leaves room for addresses, and for two programs or more on a multiprocessor.
_MOST = 76


def _plain(dtype: torch.dtype, precision: str) -> bool:
    """Whether products run on the ordinary float32 units, which need small tiles."""
    return dtype == torch.float32 and precision == "ieee"


def _product(pixels: int, rows: int, blocks: dict, numbers, most: int, stages: int) -> list[Config]:
    """The most rows, up to ``rows``, for which the numbers of a tile fit in eight warps, and what may beat them."""
    while rows > 16 and numbers(rows) > most * 256:
        rows //= 2

    def config(rows: int, stages: int = stages, more_warps: int = 1) -> Config:
        rows = _block(pixels, 16, rows)
        warps = (4 if numbers(rows) <= most * 128 else 8) * more_warps
        return Config({**blocks, "ROWS": rows, "STAGES": stages}, min(warps, 8), stages)

    return _distinct(
        [config(rows), config(rows // 2), config(2 * rows), config(rows, stages + 1), config(rows, more_warps=2)]
    )


# What follows was measured on an H100 with 16-bit numbers at batch 256, for the layers of V1, V2 and V3-Large.

#: Multiply-adds below which starting the library's several kernels takes longer than anything that they save.
_LEAST_PRODUCTS = 1 << 27


def library_forward(pixels: int, inner: int, outer: int, statistics: bool) -> bool:
    """Whether PyTorch's product, behind a pass that stores a deferred operand and in front of one for statistics or the
    epilogue, is the likely faster way.
    """
    if pixels * inner * outer < _LEAST_PRODUCTS:
        return False
    return min(inner, outer) > 64 if statistics else inner * outer >= 1 << 20


def library_backward(pixels: int, inner: int, outer: int, gated: bool) -> bool:
    """The same of both gradients: a gate's five sums and a product together have not enough registers."""
    return pixels * inner * outer >= _LEAST_PRODUCTS and (inner * outer > 1 << 13 or gated)


#: Programs below which tiles are made smaller: a large GPU's multiprocessors.
_FEW = 128


def _forward_tiles(pixels: int, inner: int, outer: int, statistics: bool, deferred: bool, in_all: int) -> list[Config]:
    """Of 16-bit numbers. Programs of four warps and few rows, as several on a multiprocessor wait for memory better
    than one; a deferred operand is evaluated for each block of outputs anew, so that these are wide.
    """
    i = _block(inner, 16, 64)
    one = i >= inner
    widest = (128 if deferred else 64) if one else 128
    rows, warps, stages = (32, 4, 3) if one else (64, 4, 4)
    if statistics and not one:
        widest, rows, warps, stages = (64, 64, 4, 3) if outer <= 64 else (64, 128, 8, 3)
    while cdiv(in_all, rows) * cdiv(outer, widest) < _FEW and (rows > 16 or widest > 32):
        warps = 4
        if widest > 32:
            widest //= 2
        else:
            rows //= 2

    def config(rows: int = rows, warps: int = warps, widest: int = widest, stages: int = stages) -> Config:
        blocks = {"IN_BLOCK": i, "OUT_BLOCK": _block(outer, 16, widest), "ONE_BLOCK": one}
        return Config({**blocks, "ROWS": _block(pixels, 16, rows), "STAGES": stages}, warps, stages)

    other = 64 if widest == 128 else 2 * widest
    return _distinct(
        [config(), config(2 * rows), config(2 * rows, 8), config(widest=other), config(stages=stages + 1),
         config(2 * rows, 8, other), config(max(rows // 2, 16)), config(warps=12 - warps)]
    )  # fmt: skip


def pointwise_forward(
    pixels: int, inner: int, outer: int, dtype: torch.dtype, precision: str,
    statistics: bool, deferred: bool, in_all: int,
) -> list[Config]:  # fmt: skip
    """``pixels`` of an image where anything depends on the image, else ``in_all`` images."""
    plain, found = _plain(dtype, precision), []
    few = cdiv(in_all, 128) * cdiv(outer, 128) < _FEW
    if dtype.itemsize == 2 and (inner > 64 or few or (statistics and outer > 32)):
        return _forward_tiles(pixels, inner, outer, statistics, deferred, in_all)
    # The ordinary units hold the factors in registers, too: fewer of them, and fewer numbers a thread.
    narrow, rows, numbers = (16, 64, 48) if plain else (128 // dtype.itemsize, 128, _MOST)
    i = _block(inner, 16, narrow)
    # A narrow input is cheap to read twice; a wide one is read once where a tile can be as wide as the output.
    widest = 64 if plain else 128 if i >= inner or outer <= 128 or dtype.itemsize == 4 else 256
    i = min(i, 32) if widest == 256 else i
    for most in (widest, widest // 2):
        o = _block(outer, 16, most)
        blocks = {"IN_BLOCK": i, "OUT_BLOCK": o, "ONE_BLOCK": i >= inner}
        found.append(_product(pixels, rows, blocks, lambda rows, o=o: rows * (i + 2 * o), numbers, 3))
    return _distinct(found[0] + found[1][:3])


#: By bytes of a number.
_HELD = {2: 256, 4: 64}


def holds(outer: int, dtype: torch.dtype) -> bool:
    """Whether one block of a backward program can have all output channels, and so make dweight on the way."""
    return outer <= min(_HELD[dtype.itemsize], largest_block)


def pointwise_backward(
    pixels: int, inner: int, outer: int, dtype: torch.dtype, precision: str, together: bool, sums: int
) -> list[Config]:
    """``sums``: how many are taken, 0, 2 or 5."""
    plain, found = _plain(dtype, precision), []
    o = _block(outer, 16, _HELD[dtype.itemsize] if together else 32 if plain else 64)

    def numbers(rows: int, i: int) -> int:
        of_du = {0: 2, 2: 4, 5: 9}[sums]
        if not together:
            return rows * i * of_du + 2 * rows * o
        each = 2 if plain else 1  # the ordinary units hold the factors in registers, too
        return each * (rows * i * of_du + rows * o + o * i)

    i = _block(inner, 16, 128 if dtype.itemsize == 2 else 32 if together else 64)
    if together and dtype.itemsize == 2:
        return _backward_tiles(pixels, i, o, sums)
    while i > 16 and numbers(32, i) > _MOST * 256:
        i //= 2
    for width in (i, max(i // 2, 16)):
        blocks = {"IN_BLOCK": width, "OUT_BLOCK": o, "ONE_BLOCK": o >= outer}
        rows = 32 if dtype.itemsize == 4 else 64
        found.append(_product(pixels, rows, blocks, lambda rows, i=width: numbers(rows, i), _MOST, 2))
    return _distinct(found[0] + found[1][:3])


def _backward_tiles(pixels: int, i: int, o: int, sums: int) -> list[Config]:
    """Of 16-bit numbers, with dweight: four warps that hold 190 numbers a thread, where 32 rows leave it at that; with
    a gate's five sums fewer.
    """
    of_du, most = {0: (2, 190), 2: (4, 190), 5: (9, 128)}[sums]

    def numbers(rows: int, i: int) -> int:
        return rows * i * of_du + rows * o + o * i

    while i > 16 and numbers(32, i) > most * 128:
        i //= 2
    rows = 64 if numbers(64, i) <= most * 128 else 32

    def config(rows: int = rows, warps: int = 4, width: int = i, stages: int = 2) -> Config:
        blocks = {"IN_BLOCK": width, "OUT_BLOCK": o, "ONE_BLOCK": True}
        return Config({**blocks, "ROWS": _block(pixels, 16, rows), "STAGES": stages}, warps, stages)

    half = max(i // 2, 16)
    return _distinct(
        [config(), config(96 - rows), config(64, 8), config(32, 8), config(width=half), config(64, 8, half),
         config(stages=3), config(96 - rows, width=half)]
    )  # fmt: skip


def pointwise_weight(pixels: int, inner: int, outer: int, dtype: torch.dtype, precision: str) -> list[Config]:
    plain, found = _plain(dtype, precision), []
    for most in (64,) if dtype.itemsize == 4 else (128, 64):
        i, o = _block(inner, 16, most), _block(outer, 16, most)
        blocks, rows = {"IN_BLOCK": i, "OUT_BLOCK": o}, 32 if dtype.itemsize == 4 else 64
        found += _product(
            pixels, rows, blocks, lambda rows, i=i, o=o: i * o + 2 * rows * (i + o), 90 if plain else 192, 2
        )[:4]
    return _distinct(found)


# Squeeze-excite's layers ----------------------------------------------------------------------------------------------

# A row is an image, so there are few: narrow blocks of channels for many programs, long ones of what is summed over.


def _gate(blocks: dict, rows: tuple[int, ...], images: int) -> list[Config]:
    return _distinct([Config({**blocks, "ROWS": _block(images, 16, n), "STAGES": 3}, 4, 3) for n in rows])


def _summed(width: int, dtype: torch.dtype) -> int:
    return _block(width, 16, 32 if dtype == torch.float32 else 128)


def gate_forward(images: int, inner: int, outer: int, dtype: torch.dtype) -> list[Config]:
    i = _summed(inner, dtype)
    return _gate({"IN_BLOCK": i, "OUT_BLOCK": _block(outer, 16, 32), "ONE_BLOCK": i >= inner}, (16, 32), images)


def gate_backward(images: int, inner: int, outer: int, dtype: torch.dtype) -> list[Config]:
    o = _summed(outer, dtype)
    return _gate({"IN_BLOCK": _block(inner, 16, 32), "OUT_BLOCK": o, "ONE_BLOCK": o >= outer}, (16, 32), images)


def gate_weight(images: int, inner: int, outer: int, dtype: torch.dtype) -> list[Config]:
    rows = (64, 32) if dtype.itemsize == 2 else (32, 16)
    return _gate({"IN_BLOCK": _block(inner, 16, 32), "OUT_BLOCK": _block(outer, 16, 32)}, rows, images)


# Depthwise convolutions -----------------------------------------------------------------------------------------------


def _depthwise_tile(channels: int, columns: int, a_thread: int) -> dict[str, int]:
    """So many channels a thread as keep the window in registers; channels in blocks of a memory line that fit best."""
    elements = a_thread * 32 * 4
    c = next_power_of_2(channels)
    if channels > 32:
        c = min((64, 32, 128), key=lambda block: cdiv(channels, block) * block)
    w = _block(columns, 1, max(elements // c, 1))
    return {"CHANNELS": _block(c, 1, max(elements // w, 1)), "COLUMNS": w}


def _depthwise(images, channels, steps, columns, device, a_thread: int) -> list[Config]:
    """Units slide over many rows, as each begins by reading rows of the one before; over few if the GPU would else be
    idle.
    """
    found = []
    for each in (a_thread, max(a_thread // 2, 1)):
        blocks = _depthwise_tile(channels, columns, each)
        programs = images * cdiv(channels, blocks["CHANNELS"]) * cdiv(columns, blocks["COLUMNS"])
        strip = min(steps, 32, largest_block)
        while strip > 4 and programs * cdiv(steps, strip) < PROGRAMS * multiprocessors(device):
            strip = cdiv(strip, 2)
        found += [Config(blocks, strip=max(s, 1)) for s in (strip, strip // 2, min(2 * strip, steps))]
    return _distinct(found)


def depthwise_forward(images, channels, steps, columns, kernel, step, statistics, dtype, device) -> list[Config]:
    """``step``: the input rows that a step brings; they are loaded a step ahead. Statistics take registers, too."""
    taps = kernel[0] * kernel[1]
    a_thread = min(16 // dtype.itemsize, (4 if statistics else 8) if taps <= 9 else 4 if taps <= 25 else 2)
    while a_thread > 1 and 2 * min(step, kernel[0]) * kernel[1] * a_thread * dtype.itemsize > 256:
        a_thread //= 2
    return _depthwise(images, channels, steps, columns, device, a_thread)


def depthwise_backward(images, channels, steps, columns, kernel, dtype, device) -> list[Config]:
    taps = kernel[0] * kernel[1]
    a_thread = min(8 // dtype.itemsize, 4 if taps <= 9 else 2 if taps <= 25 else 1)
    return _depthwise(images, channels, steps, columns, device, a_thread)
