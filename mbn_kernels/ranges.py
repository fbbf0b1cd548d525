"""Named ranges for profilers, ``mbn::<operator>/<stage>/forward`` or ``backward``: what the kernels between belong to.

torch.profiler sees them on any machine; where CUDA is in use they are NVTX ranges as well, which Nsight Systems and
Nsight Compute see. They are off until ``MBN_PROFILE=1`` is set or :func:`enable` is called.

A stage is its place in the chain and its convolution, as ``1.depthwise``; ``output`` is what stands at the chain's end,
and ``whole`` a chain that one call evaluates. ``Name+17`` is that chain and 17 others behind it, in one call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from .errors import fail, short

if TYPE_CHECKING:
    from .chain import Chain

FORWARD, BACKWARD = "forward", "backward"
#: Whether ranges are told; read by callers for whom even an empty context would take too long.
on = os.environ.get("MBN_PROFILE", "0") == "1"
_OFF = nullcontext()


def enable(wanted: bool = True) -> None:
    """Switches the ranges on or off, in all threads.

    >>> enable()
    >>> with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    ...     with stage("Example", 0, "depthwise", FORWARD):
    ...         _ = torch.zeros(1)
    >>> enable(False)
    >>> [event.key for event in profile.key_averages() if event.key.startswith("mbn::")]
    ['mbn::Example/0.depthwise/forward']
    """
    global on
    if not isinstance(wanted, bool):
        fail("enable", "wanted", "True or False", short(wanted), TypeError)
    on = wanted


def stage(operator: str, place: int, kind: str, direction: str) -> AbstractContextManager:
    """The range of one stage."""
    return _Range(f"mbn::{operator}/{place}.{kind}/{direction}") if on else _OFF


def output(operator: str, direction: str) -> AbstractContextManager:
    """The range of what a chain does behind its last convolution."""
    return _Range(f"mbn::{operator}/output/{direction}") if on else _OFF


def whole(operator: str) -> AbstractContextManager:
    """The range of an evaluation in one call."""
    return _Range(f"mbn::{operator}/whole/{FORWARD}") if on else _OFF


def operator_of(chains: Sequence[Chain]) -> str:
    """What an evaluation of these in one call is called."""
    return chains[0].name + (f"+{len(chains) - 1}" if len(chains) > 1 else "")


class _Range:
    def __init__(self, name: str) -> None:
        self._name, self._seen = name, torch.profiler.record_function(name)
        self._nvtx = torch.cuda.is_initialized()  # to ask for a GPU would start its driver

    def __enter__(self) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)
        self._seen.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._seen.__exit__(*exc)
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
