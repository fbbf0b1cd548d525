"""How compiled Triton kernels are started, with a driver that records what would be: what is started again directly is
what Triton's own launch, which looks at every argument, would have started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton_record as record  # noqa: E402
from oracle import Case, dw, pw  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from mbn_kernels.backends.triton import config, device, launch, norm, tuning  # noqa: E402
from mbn_kernels.backends.triton.kernels import TritonKernels  # noqa: E402

pytestmark = pytest.mark.skipif(device.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")

CASE = Case("v3", (2, 16, 9, 8), (pw(16, "hardswish"), dw(3, "hardswish", gate=("relu", "hardsigmoid")), pw(16)), True)


class Start(NamedTuple):
    grid: tuple[int, int, int]
    stream: int
    function: int
    metadata: object
    arguments: tuple


class Driver:
    """Stands for Triton's driver of an H100: loads nothing and starts nothing."""

    def __init__(self) -> None:
        self.starts: list[Start] = []
        self.hooks: list = []
        self.stream, self.utils, self.launcher_cls = 7, self, lambda source, metadata: self.record

    def record(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        self.starts.append(Start((x, y, z), stream, function, metadata, arguments))
        self.hooks.append(enter)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 1000  # what Triton remembers of it is no real GPU's

    def get_current_stream(self, index: int) -> int:
        return self.stream

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, index: int) -> tuple[None, int, int, int, int]:
        return None, id(binary), 32, 0, 1024  # module (there is none to unload), function, registers, spills, threads


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Plans are kept, as they are for a GPU, but for this test only."""
    found, plans = Driver(), {}

    def best(key: tuple, candidates: Callable, device: torch.device, plan: Callable, run: Callable):
        if key not in plans:
            plans[key] = plan(candidates()[0])
        return run(plans[key])

    monkeypatch.setattr(tuning, "best", best)
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    return found


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton was asked to find, or to compile."""
    found, execute = [], launch.execute

    def counted(kernel, programs: int, arguments: dict):
        found.append(kernel.fn.__name__)
        return execute(kernel, programs, arguments)

    monkeypatch.setattr(launch, "execute", counted)
    return found


def make_input(dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Channels-last, ``offset`` numbers behind an address that is a multiple of 16."""
    n, c, h, w = CASE.shape
    return torch.zeros(n * h * w * c + offset, dtype=dtype)[offset:].view(n, h, w, c).permute(0, 3, 1, 2)


def run(x: Tensor) -> None:
    """Training, forward and backward, and evaluation of the block."""
    record.step(x, *record.chain_of(CASE, x.dtype, True, "cpu"), CASE.residual)
    parsed, params, _ = record.chain_of(CASE, x.dtype, False, "cpu")
    TritonKernels().evaluate(x, (parsed,), params, (CASE.residual,))


def described(v: object) -> object:
    """An argument; of a tensor, which is an address where a kernel is started again, how that is aligned."""
    address = v.data_ptr() if isinstance(v, Tensor) else v if isinstance(v, int) and v > 1 << 32 else None
    return v if address is None else ("address", address % 16)


def test_started_again_is_what_triton_starts(driver: Driver, looked_up: list[str]) -> None:
    x = make_input(torch.bfloat16)
    run(x)
    first, kernels = driver.starts.copy(), len(looked_up)
    assert kernels > 25
    assert len({start.function for start in first}) > 12
    driver.starts.clear()
    run(x)
    assert len(looked_up) == kernels  # none was looked for again
    assert len(driver.starts) == len(first)
    for again, once in zip(driver.starts, first, strict=True):
        assert again[:4] == once[:4]
        assert [described(v) for v in again.arguments] == [described(v) for v in once.arguments]
    assert driver.starts[0].arguments[0] == x.data_ptr()

    driver.starts.clear()
    driver.stream = 8
    run(x)
    assert {start.stream for start in driver.starts} == {8}


def test_other_types_and_addresses_are_looked_up(driver: Driver, looked_up: list[str]) -> None:
    """What Triton compiles depends on both."""
    run(make_input(torch.bfloat16))
    functions = {start.function for start in driver.starts}
    driver.starts.clear()
    looked_up.clear()
    run(make_input(torch.bfloat16, offset=1))
    readers = sum(any(isinstance(v, Tensor) and v.data_ptr() % 16 for v in s.arguments) for s in driver.starts)
    assert all(v % 16 == 0 for s in driver.starts for v in s.arguments if isinstance(v, int) and v > 1 << 32)
    assert len(looked_up) == readers > 2
    assert {start.function for start in driver.starts} - functions  # without wide loads

    looked_up.clear()
    run(make_input(torch.bfloat16, offset=1))
    assert len(looked_up) == readers  # not kept in the place of the others
    looked_up.clear()
    run(make_input(torch.bfloat16))
    assert not looked_up


def test_a_profiler_is_told_of_what_is_started_again(driver: Driver, looked_up: list[str]) -> None:
    x, told = make_input(torch.bfloat16), []
    run(x)
    hook = triton.knobs.runtime.launch_enter_hook
    driver.starts.clear()
    driver.hooks.clear()
    looked_up.clear()
    hook.add(told.append)
    try:
        run(x)
    finally:
        hook.remove(told.append)
    assert not looked_up
    assert driver.starts
    assert driver.hooks == [hook] * len(driver.starts)


def test_absent_arguments_are_looked_up(driver: Driver, looked_up: list[str]) -> None:
    plan = launch.Plan(1, launch.Groups(1, 8, 1, 1, 1), config.merge(16, 1).arguments())
    v = torch.zeros(16)
    numbers = {"rows": 1, "parts": 1, "channels": 16, "inverse_count": 0.5}
    given = {"sums": torch.zeros(1, 1, 2, 16), "gate": None, "q": None, "norm": torch.zeros(4, 16), "dweight": v}
    every = {**given, "dbias": v, "b_out": v, "c_out": v, **numbers}
    for arguments in (every, {**every, "b_out": None, "c_out": None}):
        for count in (0.5, 0.25):  # a number's value is no other code
            launch.launch(norm._norm_backward, plan, v.device, {**arguments, "inverse_count": count})
    assert len(looked_up) == 2
    assert len({start.function for start in driver.starts}) == 2
    assert [start.arguments[11] for start in driver.starts] == [0.5, 0.25, 0.5, 0.25]


def test_nothing_is_started_for_nothing(driver: Driver) -> None:
    launch.launch(None, launch.Plan(0, launch.Groups(0, 0, 1, 0, 1), {}), torch.device("cpu"), {})
    assert not driver.starts
