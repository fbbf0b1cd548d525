"""What the tests on the CPU would notice: a barrier left out, an access out of bounds, arguments that do not fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_host_build import ROOT, SANITIZE, Host, build, compiler
from cuda_host_calls import CALLS, cuda_library, cuda_on_host  # noqa: F401
from torch import Tensor

from mbn_kernels import schemas

BARRIERS = [
    (path.name, number)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"^\s+MBN_(BARRIER|WAIT_COPIES)\(", line)
]


def test_there_are_barriers() -> None:
    assert len(BARRIERS) >= 12


@pytest.mark.parametrize("file, line", BARRIERS, ids=str)
def test_a_missing_barrier_is_noticed(host: Host, file: str, line: int) -> None:
    """Each of them, left out, changes a result in one of the two orders: so the other tests would fail."""
    noticed = reached = False
    for call in CALLS.values():
        for from_the_last in (False, True):
            host.order(from_the_last)
            expected = call()
            host.skip(file, line)
            try:
                got = call()
            except RuntimeError as error:
                assert "barrier was not reached" in str(error)
                got = []
            reached |= host.skip()
            pairs = zip(expected, got, strict=False)
            noticed |= not got or not all(torch.equal(a, b) for a, b in pairs)
    assert reached, "no call waits here"
    assert noticed


def test_same_bits_in_any_order(host: Host) -> None:
    for call in CALLS.values():
        host.order(False)
        expected = call()
        host.order(True)
        assert all(torch.equal(a, b) for a, b in zip(expected, call(), strict=True))


def calls_of_operators(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple]]:
    """Arguments of every operator of the library, as the backend calls it."""
    found: dict[str, list[tuple]] = {}
    for name in schemas.CUDA_SCHEMAS:
        operator = getattr(torch.ops.mbn, name).default

        class Watched:
            def __init__(self, name: str, operator: Callable) -> None:
                self.name, self.operator = name, operator

            def default(self, *args: object) -> None:
                found.setdefault(self.name, []).append(args)
                self.operator(*args)

        monkeypatch.setattr(torch.ops.mbn, name, Watched(name, operator))
    for call in CALLS.values():
        call()
    monkeypatch.undo()
    return found


def test_opcheck(host: Host) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = calls_of_operators(patch)
    assert calls.keys() == schemas.CUDA_SCHEMAS.keys()
    for name, found in calls.items():
        for args in found:
            torch.library.opcheck(getattr(torch.ops.mbn, name).default, args)


def wrong(value: object) -> Iterator[object]:
    if isinstance(value, Tensor):
        yield value[:-1]
        yield torch.cat([value, value], value.dim() - 1)
        yield value.to(torch.float64)
        if value.numel() > 1:
            yield torch.stack([value, value], -1)[..., 0]
        yield value.new_zeros(0)
    elif isinstance(value, list) and value and isinstance(value[0], Tensor):
        for i, t in enumerate(value):
            yield from ([*value[:i], bad, *value[i + 1 :]] for bad in wrong(t))
        yield value[:-1]
    elif isinstance(value, list) and value and isinstance(value[0], int):
        yield value[:-1]
        yield [-1] * len(value)
        yield [1 << 40] * len(value)
    elif isinstance(value, int):
        yield -1
        yield 1 << 40


def described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


def test_operators_refuse_what_does_not_fit(host: Host) -> None:
    """A tensor of a wrong shape, dtype or layout and a number out of range raise; nothing is written."""
    with pytest.MonkeyPatch.context() as patch:
        calls = calls_of_operators(patch)
    accepted = []
    for name, found in calls.items():
        operator = getattr(torch.ops.mbn, name).default
        for call, args in enumerate(found):
            for i, argument in enumerate(args):
                for bad in wrong(argument):
                    host.launches()
                    try:
                        operator(*args[:i], bad, *args[i + 1 :])
                    except (RuntimeError, TypeError) as error:
                        assert host.launches() == 0, (name, i, error)
                        continue
                    # The padding at the bottom and at the right is whatever the output's size says.
                    if not (isinstance(bad, Tensor) and bad.shape[:3] == argument.shape[:3] and bad.dim() == 4):
                        accepted.append(f"{name}, call {call}, argument {i}: {described(bad)}")
    assert not accepted, "\n".join(accepted)


# AddressSanitizer -----------------------------------------------------------------------------------------------------


def under_sanitizer(program: str) -> subprocess.CompletedProcess:
    """Runs Python with AddressSanitizer's library, which has to be there before all others, and C++'s, of which it
    looks for a part when it starts.
    """
    libraries = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("the compiler has no libasan.so, or no libstdc++.so.6")
    options = "detect_leaks=0:abort_on_error=0:exitcode=99:detect_stack_use_after_return=0"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": options,
        SANITIZE: "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")


BEGIN = """
import sys
sys.path.insert(0, ".")
import torch, cuda_host_calls as tests
torch.ops.load_library({library!r})
for module in (tests.config, tests.launch):
    module.multiprocessors = lambda device: 1
"""
CALL_EVERYTHING = """
for dtype in (torch.float32, torch.bfloat16):
    for case in tests.WINDOWS:
        tests.forward(case, dtype)
        tests.forward(case, dtype, pool=True, training=False)
        tests.backward(case, dtype)
for call in tests.CALLS.values():
    call()
print("all called")
"""
CALL_WITH_TOO_LITTLE_MEMORY = """
operands = tests.operands
def short(case, dtype):
    u, weight = operands(case, dtype)
    memory = u.y.untyped_storage()
    memory.resize_(memory.nbytes() - 16)
    return u, weight
tests.operands = short
tests.{call}(tests.LARGE)
"""


def test_no_access_out_of_bounds(host: Host) -> None:
    """All kernels, on tensors and shared memory with a fence around."""
    done = under_sanitizer(BEGIN.format(library=str(build(sanitize=True))) + CALL_EVERYTHING)
    assert done.returncode == 0 and "all called" in done.stdout, done.stderr[-4000:]


@pytest.mark.parametrize("call", ("forward", "backward"))
def test_an_access_out_of_bounds_is_noticed(host: Host, call: str) -> None:
    """A tensor whose memory ends 16 bytes before it does, which no operator can see."""
    program = BEGIN.format(library=str(build(sanitize=True))) + CALL_WITH_TOO_LITTLE_MEMORY.format(call=call)
    done = under_sanitizer(program)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
