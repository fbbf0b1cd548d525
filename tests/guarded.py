"""Tensors that end, or begin, where memory may not be touched, and kernels that are given nothing else.

    python guarded.py float32,bfloat16 1,3 end,begin    # dtypes, numbers of threads, which end; from tests/

runs chains of every stage kind and odd shapes so, and prints each one's name before it: a read or write beyond a
tensor ends the process. With one number more every tensor's last bytes, so many, are where it does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from oracle import Case, dense, dw, fused_chain, in_each_mode, make_tensors, pw, run, se
from torch import Tensor

import mbn_kernels
from mbn_kernels.backends import cpu

PAGE = mmap.PAGESIZE
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NO_ACCESS = 0
_SLACK = 0xFF  # in every byte a tensor's page has beyond it: NaN


class Guarded:
    """A copy of a tensor between two pages that may not be touched: its end is the second's begin, or its begin the
    first's end. ``beyond``: of the bytes at its end, how many lie on the second, which a kernel must not survive.
    """

    def __init__(self, t: Tensor, at_end: bool, beyond: int = 0) -> None:
        extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        size = extent * t.element_size()
        room = -(-size // PAGE) * PAGE
        pages = torch.frombuffer(mmap.mmap(-1, room + 2 * PAGE), dtype=torch.uint8)
        self._room = pages[PAGE : PAGE + room].fill_(_SLACK)
        self._begin = room - size if at_end else 0
        self._end = self._begin + size
        self._place = self._room[self._begin : self._end]
        if size and beyond:
            self._place = pages[PAGE + room + beyond - size : PAGE + room + beyond]
        flat = self._place.view(t.dtype)
        flat.copy_(t.as_strided((extent,), (1,)))
        self.tensor = flat.as_strided(t.shape, t.stride(), flat.storage_offset())
        self._before = self._place.clone()
        for page in (0, PAGE + room):
            if _mprotect(pages.data_ptr() + page, PAGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")

    def written(self) -> bool:
        return not torch.equal(self._place, self._before)

    def written_beside(self) -> bool:
        return bool((self._room[: self._begin] != _SLACK).any() or (self._room[self._end :] != _SLACK).any())


class GuardedOperators:
    """In the place of ``cpu._ops``: every tensor that an operator reads or writes is a guarded one."""

    def __init__(self, at_end: bool, beyond: int = 0) -> None:
        self.at_end, self.beyond, self.calls = at_end, beyond, Counter[str]()

    def __getattr__(self, name: str) -> Callable:
        operator = getattr(torch.ops.mbn, name).default
        arguments = operator._schema.arguments

        def call(*given: object) -> object:
            self.calls[name] += 1
            guards: list[tuple[Tensor, Guarded, bool]] = []

            def guarded(value: object, is_output: bool) -> object:
                if isinstance(value, list):
                    return [guarded(v, is_output) for v in value]
                if not isinstance(value, Tensor):
                    return value
                guards.append((value, Guarded(value, self.at_end, self.beyond), is_output))
                return guards[-1][1].tensor

            outputs = (a.alias_info is not None and a.alias_info.is_write for a in arguments)
            result = operator(*map(guarded, given, outputs))
            for original, guard, is_output in guards:
                assert not guard.written_beside(), f"{name} wrote beside {tuple(original.shape)}"
                if is_output:
                    original.copy_(guard.tensor)
                else:
                    assert not guard.written(), f"{name} wrote to an input {tuple(original.shape)}"
            return result

        setattr(self, name, call)
        return call


GATE = ("relu", "hardsigmoid")
# Around one, two and four vectors of 2 to 16 numbers, and one panel of them.
CHANNELS = (1, 3, 5, 7, 8, 9, 15, 16, 17, 33, 65)
WINDOWS = (
    dw(1, "relu"),
    dw(3, "hardswish", stride=2),
    dw(5, "silu"),
    dw(7, "relu6", stride=2),
    dw((3, 5), "relu", stride=(1, 2)),
    dw((2, 4), "identity", padding=(0, 1, 2, 1)),
    dw(3, "relu", dilation=(2, 3)),
    dw(3, "hardswish", stride=3),
    dw(3, "relu", padding=0),
    dw(9, "relu"),
)


def _cases() -> Iterator[Case]:
    for i, c in enumerate(CHANNELS):
        h, w = ((9, 11), (12, 7), (7, 13))[i % 3]
        other = CHANNELS[-1 - i]
        window, wide = WINDOWS[i % len(WINDOWS)], WINDOWS[(3 * i + 1) % len(WINDOWS)]
        yield Case(f"depthwise-{c}", (2, c, h, w), (window,))
        yield Case(f"pointwise-{c}-{other}", (2, c, 5, 1 + i), (pw(other, "hardswish"),))
        yield Case(f"pointwise-residual-{c}", (2, c, 3, w), (pw(c, "relu6"),), True)
        yield Case(f"squeeze-excite-{c}", (2, c, 3, w), (se(),))
        yield Case(f"separable-{c}", (2, c, h, w), (wide, pw(other)))
        gated = replace(dw(3, "hardswish"), gate=GATE)
        yield Case(f"block-{c}", (2, c, h, w), (pw(other, "relu"), window, pw(c)))
        yield Case(f"gated-{c}", (1 + i % 3, c, h, w), (pw(other, "hardswish"), gated, pw(c, "relu")), True)
        yield Case(f"stem-{c}", (2, 1 + i % 4, h, w), (dense(c, 3, "hardswish", stride=(2, 2)),))
    yield Case("one-pixel", (3, 17, 1, 1), (dw(3, "relu"), pw(5)))
    yield Case("one-row", (1, 9, 1, 23), (dw(3, "relu"), pw(17)))
    yield Case("one-column", (1, 9, 23, 1), (pw(17, "relu"), dw(5, "relu", stride=2), pw(3)))
    yield Case("window-in-the-padding", (1, 3, 4, 5), (dw(3, "hardswish", padding=5),))
    yield Case("no-image", (0, 5, 8, 7), (pw(9, "relu"), dw(3, "relu"), pw(5)), True)
    yield Case("not-affine", (2, 5, 8, 7), (pw(9, "silu", affine=False), dw(3, "relu", affine=False)))
    yield Case("streamed", (1, 32, 258, 256), (dw(3, "relu"),))  # 8 MiB in float32


CASES = tuple(_cases())


def guarded_calls(case: Case, training: bool, dtype: torch.dtype, ends: str, beyond: int) -> Counter[str]:
    """Runs a case, forward and backward; returns how often each operator was called."""
    t = make_tensors(case, dtype).map(lambda v: v.to(dtype))
    with torch.no_grad():
        t.dout = torch.ones_like(fused_chain(case, t.map(torch.clone), training))
    expected, real, calls = run(fused_chain, case, t, training), cpu._ops, Counter()
    for end in ends.split(","):
        cpu._ops = GuardedOperators(end == "end", beyond)
        try:
            found = run(fused_chain, case, t, training)
            calls += cpu._ops.calls
        finally:
            cpu._ops = real
        different = [name for name, value in expected.items() if not equal(found[name], value)]
        assert not different, f"other bits in guarded memory: {', '.join(different)}"
    return calls


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def main(dtypes: str, threads: str, ends: str, beyond: str = "0") -> None:
    faulthandler.enable()
    calls: Counter[str] = Counter()
    with mbn_kernels.use_backend("cpu"):
        for dtype in (getattr(torch, name) for name in dtypes.split(",")):
            for count in map(int, threads.split(",")):
                torch.set_num_threads(count)
                for case, training in in_each_mode(CASES):
                    if case.name == "streamed" and dtype != torch.float32:
                        continue  # nothing else is
                    print(case, ("evaluation", "training")[training], dtype, f"{count} threads", flush=True)
                    calls += guarded_calls(case, training, dtype, ends, int(beyond))
    print("called:", *sorted(calls))


if __name__ == "__main__":
    main(*sys.argv[1:])
