"""Times on a GPU, and what a reader must know of it to believe them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mbn_kernels import available_backends

from .timing import system_info

#: In a second no GPU counts many more: one that waits for so many waits as long as it should, or longer.
CYCLES = 2e9
#: Seconds that the GPU waits at most for a call to be started.
MOST_AHEAD = 0.005


class Setting(NamedTuple):
    """What a run measures with. ``copy``: bytes a second of :func:`copy_bandwidth`."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    copy: float
    milliseconds: float  # of calls, for each time


@lru_cache
def _other_memory(device: torch.device) -> Tensor:
    return torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=device)


def median_seconds(
    call: Callable[..., object],
    milliseconds: float = 100,
    *,
    given: Callable[[], tuple] | None = None,
    ahead: bool = True,
) -> float:
    """The median time of ``call(*given())`` on the GPU, that of ``given`` not counted, from about so many milliseconds.

    The second-level cache is emptied before each call. With ``ahead`` the GPU waits until the call is likely to have
    started all its kernels, so that the time is the GPU's alone; without, it is as if nothing else were queued.
    """
    other, lead = _other_memory(torch.device("cuda", torch.cuda.current_device())), 0.0

    def once() -> tuple[torch.cuda.Event, torch.cuda.Event, float]:
        arguments = given() if given else ()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        if lead:
            torch.cuda._sleep(int(lead * CYCLES))
        start.record()
        began = time.perf_counter()
        call(*arguments)
        took = time.perf_counter() - began
        end.record()
        return start, end, took

    for _ in range(3):  # compiles and tunes; takes workspaces; tells how long a call is
        start, end, took = once()
        torch.cuda.synchronize()
    lead = min(2 * took + 5e-5, MOST_AHEAD) if ahead else 0.0
    each = max(start.elapsed_time(end), 1e3 * (took + lead), 0.1)
    pairs = [once()[:2] for _ in range(min(max(int(milliseconds / each), 7), 200))]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of torch's copy_ between tensors of eight times the second-level cache."""
    source = torch.zeros(8 * l2_bytes(device), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), 200)


def in_one_line(error: Exception) -> str:
    """For a result that is not there: why."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def gpu_system_info(device: torch.device) -> dict[str, str | float]:
    """As timing.system_info, with what else decides a GPU's speed."""
    return {
        **system_info(device),
        "cuda_backend": available_backends()["cuda"],
        "tuned": os.environ.get("MBN_TRITON_TUNE", "0"),
        "l2_bytes": l2_bytes(device),
    }
