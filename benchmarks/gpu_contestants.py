"""Who takes part on a GPU: stock PyTorch, torch.compile, and mbn_kernels with each of its backends for GPUs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbn_kernels import available_backends, use_backend

#: (pass, call, what makes its arguments outside of the time); the call returns what must be right.
Timed = tuple[str, Callable[..., object], Callable[[], tuple] | None]
#: The one that runs where nothing is chosen comes last.
BACKENDS = ("triton", "cuda")


class Contestant(NamedTuple):
    """``backend`` is that of mbn_kernels; the others run the plain twin, stock PyTorch, ``mode`` is torch.compile's.
    Who is ``exact`` runs it in float64, from the numbers as the others round them.
    """

    name: str
    backend: str | None = None
    mode: str | None = None
    memory_format: torch.memory_format = torch.channels_last
    exact: bool = False


EAGER = Contestant("eager")
EXACT = Contestant("float64", exact=True)
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


def build(
    contestant: Contestant, make: Callable[..., nn.Module], device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """``make(fused=...)`` with the weights that all contestants have, rounded to the dtype."""
    torch.manual_seed(0)
    module = make(fused=contestant.backend is not None).to(device, dtype, memory_format=contestant.memory_format)
    return module.double() if contestant.exact else module


def drawn(
    contestant: Contestant, shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 1
) -> Tensor:
    """Normal numbers, the same for all contestants, rounded to the dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator)
    x = x.contiguous(memory_format=contestant.memory_format)
    return x.double() if contestant.exact else x


def forward_of(contestant: Contestant, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What is called: the module, compiled for those that are. In evaluation torch.compile may freeze the weights, as
    users would, where its mode leaves that open.
    """
    if contestant.mode is None:
        return module
    if contestant.mode != "default":
        return torch.compile(module, fullgraph=True, mode=contestant.mode)
    return torch.compile(module, fullgraph=True, options=None if module.training else {"freezing": True})


def autocast(contestant: Contestant, device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What training runs under: none for float32, nor where it is exact."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32 and not contestant.exact)
