"""Timing by turns, and what a reader must know about the machine to believe a figure."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

import mbn_kernels


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def output_of(*command: str) -> str:
    """What a program prints, or "unknown" where it cannot run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.splitlines()[0] if found else "unknown"


@lru_cache
def commit() -> str:
    """Of the checkout, with "-dirty" where it has changes."""
    folder = str(Path(__file__).parent)
    return output_of("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


@lru_cache
def driver() -> str:
    """The version of the GPU's."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def system_info(device: torch.device) -> dict[str, str | float]:
    """Versions, threads and hardware, as recorded with every result; the load tells whether the machine was idle."""
    info: dict[str, str | float] = {
        "mbn_kernels": mbn_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit(),
    }
    if device.type == "cuda":
        import triton  # PyTorch for GPUs brings it; one for CPUs does not

        info |= {"gpu": torch.cuda.get_device_name(device), "driver": driver()}
        info |= {"cuda": str(torch.version.cuda), "triton": triton.__version__}
    return info


def seconds(call: Callable[[], object]) -> float:
    """One call's time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(
    calls: dict[str, Callable[[], object]], *, rounds: int, burst: int, pause: float
) -> dict[str, list[float]]:
    """Each call's times, burst by burst in turn.

    A pause before each burst lets the threads of the last one stop spinning; the first call of a burst refills the
    caches and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(pause)
            call()
            times[name] += [seconds(call) for _ in range(burst)]
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list, in seconds."""
    return {name: statistics.median(values) for name, values in times.items()}
