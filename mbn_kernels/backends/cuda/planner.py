"""Which stages of a chain one kernel takes in evaluation, and in which tile: by what each way moves and computes.

A *way* runs a chain's stages one by one but for one run of them, which is fused: expand, depthwise and project; or
depthwise and project; or expand and depthwise, where squeeze-excite follows. The gate of squeeze-excite is made and
applied by the kernel of the stage behind it, or by kernels of its own. The estimate of a way is the sum over its
kernels of a start and the longest of what it waits for; it orders the ways. Where shapes are tuned
(:mod:`mbn_kernels.backends.triton.tuning`), the first tiles of each kind of way are measured and the fastest is taken.

The rates were fitted to an H100 (80 GB HBM3, 132 multiprocessors): 43 times of the whole-block kernel, in blocks of V1,
V2 and V3-Large at batch 256 and two of V3-Large at batch 1, each of which the fit meets within 25%, most within 10%.
What a fused kernel waits for is itself: for each chunk of expanded channels, its phases one after the other, behind
barriers. So it pays where there is little work, and a layer's start would be most of its time. ``python -m
benchmarks.gpu`` prints each estimate beside what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ...chain import Stage
from ..triton.config import Config
from ..triton.launch import cdiv, multiprocessors
from .config import shared_limit

#: csrc/cuda/kernels.h and inverted_residual_memory.h: expanded channels at a time, threads, neighbouring pixels.
_CHUNK, _THREADS, _RUN = 32, 256, 4
#: Blocks of threads of the whole-block kernel on a multiprocessor.
_RESIDENT = 2
#: How much longer than its estimate the fused kernel is taken to be: so far off is the fit on average.
_DOUBT = 1.08
_MOST_PIXELS = 128
#: Instructions for each number that a stage makes: normalise, activate, round, store.
_ELEMENT = 7
#: Tiles of each kind of way that are worth measuring.
_MEASURED = 2
_HEIGHTS, _WIDTHS = (4, 7, 8, 14, 16), (4, 7, 8, 12, 14, 16, 28)


class Rates(NamedTuple):
    """Of a GPU, in seconds, bytes a second and multiply-adds a second.

    ``start``: the least a kernel takes whose operands are not in the cache; ``next``: the start of one that follows
    another and takes longer; ``pointwise`` and ``depthwise``: bytes of a layer's own kernel, ``products``:
    multiply-adds of a pointwise one. Of the fused kernel ``tile``: to load and to store one, ``chunk``: the barriers of
    a chunk, and, for each instruction of a warp of what a chunk does, ``expand``, ``window`` (the depthwise
    convolution) and ``project``.
    """

    start: float = 6.8e-6
    next: float = 2e-6
    pointwise: float = 2.6e12
    depthwise: float = 1.75e12
    products: float = 6e13
    tile: float = 3.2e-6
    chunk: float = 1.23e-6
    expand: float = 0.66e-9
    window: float = 1.03e-9
    project: float = 9.0e-9


class Way(NamedTuple):
    """Stages ``first`` to ``first + count`` fused, in tiles of ``height`` by ``width`` output pixels; none where count
    is 0. The stages behind a gate together with it, in tiles of ``gate_height`` by ``gate_width``; alone where those
    are 0.
    """

    first: int = 0
    count: int = 0
    height: int = 0
    width: int = 0
    gate_height: int = 0
    gate_width: int = 0

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What it fuses, in whatever tile."""
        return self.first, self.count, bool(self.gate_height)

    def config(self) -> Config:
        return Config(self._asdict())

    @staticmethod
    def of(config: Config) -> Way:
        return Way(**config.blocks)


def most_out_channels(pixels: int) -> int:
    """``most_out_channels`` of ``csrc/cuda/kernels.h``."""
    return 160 if pixels <= 64 else 80


def _is_fused(stages: Sequence[Stage]) -> bool:
    """Whether the whole-block kernel takes these stages: their kinds, windows and norms."""
    kinds = tuple(stage.conv for stage in stages)
    if kinds not in (("pointwise", "depthwise", "pointwise"), ("depthwise", "pointwise"), ("pointwise", "depthwise")):
        return False
    depthwise = stages[kinds.index("depthwise")]
    (k, _), (s, _) = depthwise.kernel, depthwise.stride
    square = depthwise.kernel == (k, k) and depthwise.stride == (s, s) and depthwise.dilation == (1, 1)
    gates = [i for i, stage in enumerate(stages) if stage.gate]
    inner_gate = gates and (gates != [len(stages) - 1] or kinds[-1] != "depthwise")
    return square and k in (3, 5) and s in (1, 2) and not inner_gate


class Sizes(NamedTuple):
    """The map that goes into each stage and out of the last: (channels, height, width)."""

    images: int
    maps: tuple[tuple[int, int, int], ...]
    hidden: tuple[int, ...]  # of each stage's squeeze-excite, 0 where there is none
    itemsize: int

    def bytes(self, i: int) -> int:
        c, h, w = self.maps[i]
        return self.images * c * h * w * self.itemsize


def sizes_of(
    shape: Sequence[int], stages: Sequence[Stage], outer: Sequence[int], hidden: Sequence[int], itemsize: int
) -> Sizes:
    """``outer``: each stage's output channels."""
    maps = [tuple(shape)]
    for stage, channels in zip(stages, outer, strict=True):
        maps.append(stage.output_shape(maps[-1], (channels,)))
    return Sizes(shape[0], tuple(m[1:] for m in maps), tuple(hidden), itemsize)


def _layer_seconds(stage: Stage, sizes: Sizes, i: int, rates: Rates) -> float:
    """The time of one stage's own kernel."""
    (inner, _, _), (outer, height, width) = sizes.maps[i : i + 2]
    moved = sizes.bytes(i) + sizes.bytes(i + 1)
    if stage.conv == "depthwise":
        work = moved / rates.depthwise
    else:
        work = max(moved / rates.pointwise, sizes.images * height * width * inner * outer / rates.products)
    return max(rates.start, rates.next + work)


def _waves(blocks: int, device: torch.device) -> float:
    """How often a multiprocessor takes as many blocks of the fused kernel as it holds at once: two, by registers."""
    return max(blocks / (_RESIDENT * multiprocessors(device)), 1.0)


def fused_seconds(way: Way, stages: Sequence[Stage], sizes: Sizes, device: torch.device, rates: Rates) -> float:
    """The whole-block kernel's time, without its start."""
    taken = stages[way.first : way.first + way.count]
    depthwise = next(i for i, stage in enumerate(taken) if stage.conv == "depthwise")
    k, s = taken[depthwise].kernel[0], taken[depthwise].stride[0]
    channels, (_, height, width) = sizes.maps[way.first + depthwise][0], sizes.maps[way.first + depthwise + 1]
    blocks = sizes.images * cdiv(height, way.height) * cdiv(width, way.width)
    in_height, in_width = (way.height - 1) * s + k, (way.width - 1) * s + k
    expand = window = project = 0  # instructions of all warps of a block, for a chunk
    if depthwise:
        products = cdiv(sizes.maps[way.first][0], 16) * (1 + 3 * _CHUNK // 16)
        expand = cdiv(in_height * in_width, 16) * (products + _ELEMENT * 16 * _CHUNK // 32)
    taps = k * ((_RUN - 1) * s + k) * 3 + k * k * (1 + 2 * _RUN)
    window = _runs(way.height, way.width) * (taps + _RUN * 2 * _ELEMENT)
    if depthwise + 1 < way.count:
        project = _projected(way.height, way.width, sizes.maps[way.first + way.count][0])
    chunk = rates.chunk + expand * rates.expand + window * rates.window + project * rates.project
    return _waves(blocks, device) * (rates.tile + cdiv(channels, _CHUNK) * chunk)


def _runs(height: int, width: int) -> int:
    """Warps' turns at a tile's runs of neighbouring pixels, for a chunk."""
    return cdiv(height * cdiv(width, _RUN), 16) * _THREADS // 32


def _projected(height: int, width: int, channels: int) -> int:
    """Instructions to multiply a chunk into the sums of the project stage."""
    return cdiv(height * width, 64) * 4 * cdiv(channels, 16) * 2 * 3


def _gated_seconds(way: Way, i: int, sizes: Sizes, device: torch.device, rates: Rates) -> float:
    """The time of stage i with the gate in front of it, without its start."""
    (channels, height, width), hidden = sizes.maps[i], sizes.hidden[i - 1]
    blocks = sizes.images * cdiv(height, way.gate_height) * cdiv(width, way.gate_width)
    project = _projected(way.gate_height, way.gate_width, sizes.maps[i + 1][0])
    window = _runs(way.gate_height, way.gate_width) * _RUN * 2 * _ELEMENT
    chunk = rates.chunk + window * rates.window + project * rates.project
    gate = 2 * channels * hidden / 32 * 3 * rates.project  # every block makes the gate, waiting for its weights
    return _waves(blocks, device) * (rates.tile + cdiv(channels, _CHUNK) * chunk + gate)


def seconds(way: Way, stages: Sequence[Stage], sizes: Sizes, device: torch.device, rates: Rates | None = None) -> float:
    """The estimate of a chain's time."""
    rates, total = rates or Rates(), 0.0
    if way.count:
        total += rates.start + _DOUBT * fused_seconds(way, stages, sizes, device, rates)
    for i, stage in enumerate(stages):
        behind_gate = i > 0 and stages[i - 1].gate
        if behind_gate and way.gate_height:
            total += rates.start + _DOUBT * _gated_seconds(way, i, sizes, device, rates)
        elif not way.first <= i < way.first + way.count:
            total += _layer_seconds(stage, sizes, i, rates)
        if stage.gate and not (way.gate_height and i + 1 < len(stages)):
            total += 2 * rates.start  # its two layers
    return total


def _shared_limit(device: torch.device) -> int:
    """At most half of what a multiprocessor of an H100 has: two blocks should fit."""
    return min(shared_limit(device), 113 * 1024)


def ways(stages: tuple[Stage, ...], sizes: Sizes, residual: bool, device: torch.device) -> list[Way]:
    """The ways to run a chain that are worth measuring, the quickest by estimate first; one by one is among them."""
    fused = [Way()]
    for first in range(len(stages)):
        for count in (2, 3):
            taken = stages[first : first + count]
            if len(taken) == count and _is_fused(taken) and not (first and stages[first - 1].gate):
                adds = residual and first + count == len(stages) and not taken[-1].gate
                if taken[-1].conv == "pointwise" or not adds:  # only a project stage adds a residual
                    fused += _fused_ways(taken, first, sizes, device)
    found = fused + [
        way._replace(gate_height=h, gate_width=w) for way in fused for h, w in _gate_tiles(way, stages, sizes, device)
    ]
    ordered = sorted(found, key=lambda way: seconds(way, stages, sizes, device))
    kept: list[Way] = []
    for way in ordered:
        if sum(other.kind == way.kind for other in kept) < _MEASURED:
            kept.append(way)
    return kept


def _gate_tiles(way: Way, stages: tuple[Stage, ...], sizes: Sizes, device: torch.device) -> list[tuple[int, int]]:
    """Tiles in which every stage behind a gate can take the gate in, where that is a pointwise stage without one."""
    gated = [i for i, stage in enumerate(stages[:-1]) if stage.gate]
    if not gated or any(stages[i + 1].conv != "pointwise" or stages[i + 1].gate for i in gated):
        return []
    if any(way.first <= i + 1 < way.first + way.count for i in gated):
        return []
    found = []
    for h, w in _tiles(*sizes.maps[gated[0] + 1][1:]):
        fits = all(
            max(a % 8, b % 8) == 0
            and b <= most_out_channels(h * w)
            and _shared((0, a, b), 1, 1, h, w, sizes.hidden[i]) <= _shared_limit(device)
            for i in gated
            for a, b in [(sizes.maps[i + 1][0], sizes.maps[i + 2][0])]
        )
        found += [(h, w)] if fits else []
    return found


def _fused_ways(taken: Sequence[Stage], first: int, sizes: Sizes, device: torch.device) -> list[Way]:
    """Those stages in every tile that fits."""
    maps, depthwise = sizes.maps[first : first + len(taken) + 1], [stage.conv for stage in taken].index("depthwise")
    if any(channels % 8 for channels, _, _ in maps):
        return []
    window = taken[depthwise].kernel[0], taken[depthwise].stride[0]
    out_channels, height, width = maps[-1]
    projected = out_channels if taken[-1].conv == "pointwise" else 0
    channels = (maps[0][0] if depthwise else 0, maps[depthwise][0], projected)
    return [
        Way(first, len(taken), h, w)
        for h, w in _tiles(height, width)
        if projected <= most_out_channels(h * w) and _shared(channels, *window, h, w, 0) <= _shared_limit(device)
    ]


def _tiles(height: int, width: int) -> list[tuple[int, int]]:
    """Tiles of at most _MOST_PIXELS, no larger than the map but for what fills a run."""
    heights = sorted({min(h, height) for h in _HEIGHTS})
    widths = sorted({min(w, width) for w in _WIDTHS})
    return [(h, w) for h in heights for w in widths if h * w <= _MOST_PIXELS]


@lru_cache(maxsize=4096)
def _shared(channels: tuple[int, ...], kernel: int, stride: int, height: int, width: int, hidden: int) -> int:
    """Bytes of shared memory of a block of threads."""
    return torch.ops.mbn.cuda_inverted_residual_shared(list(channels), kernel, stride, [height, width], hidden)
