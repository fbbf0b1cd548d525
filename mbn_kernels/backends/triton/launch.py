"""How kernels are started: the shape of the work, the right device, and one place through which every launch goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

#: Programs per multiprocessor that reductions are split for: enough to hide latency, few enough partial results.
PROGRAMS = 4
#: What Triton compiles wide loads for: addresses that are multiples of this.
ALIGNED = 16


def cdiv(n: int, d: int) -> int:
    """n / d rounded up, at each launch: Triton's own, which is for constants of kernels too, is slow."""
    return -(-n // d)


def channel_unit(channels: int) -> int:
    """The largest power of two, 16 at most, that divides the count: kernels take a count of channels as so many units,
    from which the compiler knows how far a row's start is aligned and so how wide it may load.
    """
    return gcd(channels, 16)


#: torch.cuda.current_device without its question whether CUDA is initialised: there are tensors on a GPU already.
current_device = getattr(torch._C, "_cuda_getDevice", None)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; where there is none, of an H100, so that what is recorded or interpreted is split as it would be."""
    if device.type != "cuda":
        return 132
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


class Groups(NamedTuple):
    """How tiles are shared among programs. Each of ``images`` has ``pixels`` rows in tiles; a group takes the same
    part, ``run`` tiles, of ``span`` images after each other, and an image has ``parts`` of them. Where nothing depends
    on the image, all rows are one image.
    """

    images: int
    pixels: int
    parts: int
    run: int
    span: int

    @property
    def count(self) -> int:
        return max(cdiv(self.images, self.span), 1) * self.parts


def share(
    device: torch.device, images: int, pixels: int, tiles: int, blocks: int, least: int = 1, programs: int = PROGRAMS
) -> Groups:
    """Groups for programs that take ``blocks`` blocks of channels each: enough to fill the GPU, which is ``programs``
    for each multiprocessor, or fewer, so that each has ``least`` tiles, as long as every multiprocessor has one.
    """
    if not tiles * images:
        return Groups(images, pixels, 1, 0, 1)
    total, processors = images * tiles, multiprocessors(device)
    wanted = max(min(cdiv(programs * processors, blocks), max(cdiv(total, least), cdiv(processors, blocks))), 1)
    if images >= wanted:
        return Groups(images, pixels, 1, tiles, cdiv(images, wanted))
    run = cdiv(tiles, cdiv(wanted, images))
    return Groups(images, pixels, cdiv(tiles, run), run, 1)


def share_rows(y: Tensor, by_image: bool, tile: int, blocks: int, least: int = 1) -> Groups:
    images, pixels = rows_of(y, by_image)
    return share(y.device, images, pixels, cdiv(pixels, tile), blocks, least)


def rows_of(y: Tensor, by_image: bool) -> tuple[int, int]:
    """(images, rows of each): where nothing depends on the image, all rows are one image."""
    n, _, h, w = y.shape
    return (n, h * w) if by_image else (1, n * h * w)


@dataclass(slots=True)
class Plan:
    """How a kernel is started on tensors of known shapes: everything but the tensors."""

    programs: int
    groups: Groups
    arguments: dict  # sizes and constants
    compiled: dict[tuple, Started] = field(default_factory=dict)  # by the types of the other arguments


def vectors(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 numbers."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class Started:
    """A kernel that Triton compiled for a plan and arguments of some types, to start it again.

    Triton's own launch looks at every argument to find the compiled kernel. Sizes and constants are the plan's, the
    same each time, so that the types of the other arguments decide. Tensors come as addresses, which the launcher
    takes as they are; of a tensor it would ask for its address, and then the driver whether that is one.
    """

    def __init__(self, compiled, kernel, plan: Plan, names: Iterable[str]) -> None:
        self._compiled, self._programs = compiled, plan.programs
        self._start, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._values = [plan.arguments.get(name) for name in kernel.arg_names]
        self._places = [kernel.arg_names.index(name) for name in names]

    def __call__(self, values: list[object], index: int) -> None:
        every = self._values.copy()
        for place, v in zip(self._places, values, strict=True):
            every[place] = v
        if _watched(knobs.runtime.launch_enter_hook) or _watched(knobs.runtime.launch_exit_hook):
            return self._compiled[(self._programs, 1, 1)](*every)
        stream = driver.active.get_current_stream(index)
        self._start(self._programs, 1, 1, stream, self._function, self._metadata, None, None, None, *every)


def _watched(hook) -> bool:
    """Whether a profiler asked to be told of launches: a hook is a chain of them, or in older versions one or None."""
    return bool(getattr(hook, "calls", hook))


def execute(kernel, programs: int, arguments: dict):
    """Has Triton find or compile the kernel for these arguments and start it; the compiled kernel, if it was."""
    return kernel[(programs,)](**arguments)


def launch(kernel, plan: Plan, device: torch.device, arguments: dict) -> None:
    """Starts a kernel on the current stream of ``device``, whichever device is the current one."""
    if not plan.programs:
        return
    if device.type == "cuda" and device.index != current_device():
        with torch.cuda.device(device):
            return launch(kernel, plan, device, arguments)
    types, values, addresses = [], [], 0
    for v in arguments.values():
        if v is None or v.__class__ is int:
            types.append(v)
        elif isinstance(v, Tensor):
            types.append(v.dtype)
            v = v.data_ptr()
            addresses |= v
        else:  # whatever a float's value, the code is the same
            types.append(float if v.__class__ is float else v)
        values.append(v)
    key = tuple(types)
    started = plan.compiled.get(key)
    if started is not None and addresses % ALIGNED == 0:
        return started(values, device.index)
    compiled = execute(kernel, plan.programs, {**plan.arguments, **arguments})
    if compiled is not None and addresses % ALIGNED == 0:
        plan.compiled[key] = Started(compiled, kernel, plan, arguments)
