"""Which tile sizes a kernel runs with: those measured best on this GPU, or the likely best where nothing was measured.

With ``MBN_TRITON_TUNE=1`` the first call of a kernel on new shapes times every candidate of :mod:`config` and keeps the
fastest in a file, one for each GPU name and version of this package and of Triton, in ``MBN_CACHE_DIR`` (default:
``~/.cache/mbn_kernels``; :mod:`cache` reads and writes it). Without it, what the file has is used, and nothing is
measured. While a CUDA graph is captured nothing is measured.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
import triton

from . import cache
from .config import Config
from .device import INTERPRETED

#: What a GPU says of a tile that is too large for it.
_UNFIT = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)

Planned, Result = TypeVar("Planned"), TypeVar("Result")


def enabled() -> bool:
    return os.environ.get("MBN_TRITON_TUNE", "0") == "1"


def cache_file(gpu: str) -> Path:
    """Where the choices for a GPU of that name are kept."""
    from ... import __version__

    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return cache.folder() / f"triton-{name}-{__version__}-triton-{triton.__version__}.json"


def read(file: Path) -> dict[str, Config]:
    """The choices in a file, by key."""
    return {key: Config(**entry) for key, entry in cache.read(file).items()}


def write(file: Path, key: str, chosen: Config) -> None:
    """Adds a choice to the file."""
    cache.write(file, key, chosen._asdict())


@lru_cache
def _choices(gpu: str) -> dict[str, Config]:
    try:
        return read(cache_file(gpu))
    except RuntimeError:  # there is no home directory
        return {}


@lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def seconds(run: Callable[[], object]) -> float:
    """Median time of a call; infinite where the GPU has not what it needs, or not the memory to find out."""
    try:
        return triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")
    except (*_UNFIT, torch.OutOfMemoryError):
        return float("inf")


#: The plans of this process, by GPU and key.
_plans: dict[tuple, object] = {}


def best(
    key: tuple,
    candidates: Callable[[], Sequence[Config]],
    device: torch.device,
    plan: Callable[[Config], Planned],
    run: Callable[[Planned], Result],
) -> Result:
    """``run(plan(config))`` with the candidate to use for ``key``, which names everything that decides which is fastest
    and what the plan is: it is made once.
    """
    known = _plans.get((device, key))
    if known is not None:
        try:
            return run(known)
        except _UNFIT:  # the kernel needs more here than where the plan was made
            del _plans[device, key]
    found = candidates()
    if INTERPRETED or device.type != "cuda":
        return run(plan(found[0]))
    with torch.cuda.device(device):  # what is timed, and what may be capturing
        chosen = _choose(key, found, _gpu_name(device.index), plan, run)
        settled = not (enabled() and torch.cuda.is_current_stream_capturing())  # else it is measured after the capture
    unfit = None
    for config in (chosen, *found):
        planned = plan(config)
        try:
            result = run(planned)
        except _UNFIT as error:
            unfit = error
            continue
        if settled:
            _plans[device, key] = planned
        return result
    raise RuntimeError(f"{key[0]}: no tile size fits this GPU ({_gpu_name(device.index)})") from unfit


def _choose(key: tuple, candidates: Sequence[Config], gpu: str, plan: Callable, run: Callable) -> Config:
    known, text = _choices(gpu), str(key)
    if known.get(text) in candidates:  # whatever the file says, nothing else runs
        return candidates[candidates.index(known[text])]  # where true stood for 1, it stands no longer
    if not enabled() or len(candidates) == 1 or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = {i: seconds(partial(run, plan(c))) for i, c in enumerate(candidates)}
    fastest = min(times, key=times.get)
    known[text] = chosen = candidates[fastest]
    if times[fastest] < float("inf"):
        try:
            write(cache_file(gpu), text, chosen)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            _warn_unwritable(error)
    return chosen


_warned = False


def _warn_unwritable(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"mbn_kernels: tile sizes are tuned for this process only: {error}", stacklevel=2)
