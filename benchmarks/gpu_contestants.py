"""Who takes part on a GPU: stock PyTorch, torch.compile, and mbn_kernels with each of its backends for GPUs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbn_kernels import available_backends, use_backend

from .gpu_timing import Setting, in_one_line, median_seconds

#: (pass, call, what makes its arguments outside of the time).
Timed = tuple[str, Callable[..., object], Callable[[], tuple] | None]
#: The one that runs where nothing is chosen comes last.
BACKENDS = ("triton", "cuda")


class Contestant(NamedTuple):
    """``backend`` is that of mbn_kernels; the others run the plain twin, stock PyTorch, ``mode`` is torch.compile's."""

    name: str
    backend: str | None = None
    mode: str | None = None
    memory_format: torch.memory_format = torch.channels_last


EAGER = Contestant("eager")
NCHW = Contestant("eager-nchw", memory_format=torch.contiguous_format)
COMPILE = Contestant("compile", mode="default")
MAX_AUTOTUNE = Contestant("max-autotune", mode="max-autotune")
REDUCE_OVERHEAD = Contestant("reduce-overhead", mode="reduce-overhead")


def ours() -> list[Contestant]:
    """One for each backend that can be used here."""
    states = available_backends()
    return [Contestant(name, backend=name) for name in BACKENDS if states[name] == "available"]


def among(stock: tuple[Contestant, ...], compiles: bool) -> list[Contestant]:
    """Those of stock, torch.compile only if wanted, and ours."""
    return [c for c in stock if compiles or c.mode is None] + ours()


def default_of(names: list[str] | dict) -> str | None:
    """Which of these runs where nothing is chosen; None where none is ours."""
    return next((name for name in reversed(BACKENDS) if name in names), None)


@contextmanager
def turn(contestant: Contestant) -> Iterator[None]:
    """While it is measured, every call runs its backend; afterwards its memory is there for the next."""
    try:
        with use_backend(contestant.backend):
            yield
    finally:
        if contestant.mode:
            torch.compiler.reset()  # else its graphs count against the limit of recompilations, and keep their memory
            gc.collect()
        torch.cuda.empty_cache()


def build(contestant: Contestant, make: Callable[..., nn.Module], device: torch.device) -> nn.Module:
    """``make(fused=...)`` with the weights that all contestants have."""
    torch.manual_seed(0)
    return make(fused=contestant.backend is not None).to(device, memory_format=contestant.memory_format)


def forward_of(contestant: Contestant, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What is called: the module, compiled for those that are. In evaluation torch.compile may freeze the weights, as
    users would, where its mode leaves that open.
    """
    if contestant.mode is None:
        return module
    if contestant.mode != "default":
        return torch.compile(module, fullgraph=True, mode=contestant.mode)
    return torch.compile(module, fullgraph=True, options=None if module.training else {"freezing": True})


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What training runs under: none for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def measure_passes(
    rows: dict[str, dict], contestant: Contestant, calls: Callable[[], Iterator[Timed]], setting: Setting
) -> None:
    """Times of a contestant's calls, each into the row of its pass; what fails is noted there, as the rest is worth
    measuring still. ``share``: the part of a copy's speed that the least bytes reach.
    """

    def measure() -> None:
        for name, call, given in calls():
            seconds = median_seconds(call, setting.milliseconds, given=given)
            rows[name]["seconds"][contestant.name] = seconds
            rows[name]["share"][contestant.name] = rows[name]["minimum_bytes"] / seconds / setting.copy

    with turn(contestant):
        try:
            measure()
        except Exception as error:
            for row in rows.values():
                if contestant.name not in row["seconds"]:
                    row["failed"][contestant.name] = in_one_line(error)
