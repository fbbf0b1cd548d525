"""Named ranges: which there are, in which order, and that nothing is left of them where they are off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from mbn_kernels import FusedInvResBlock, FusedSequential, available_backends, freeze, functional, ranges, use_backend

NEEDS_CPU = pytest.mark.skipif(available_backends()["cpu"] != "available", reason="the cpu backend is not available")


@pytest.fixture
def on() -> Iterator[None]:
    ranges.enable()
    yield
    ranges.enable(False)


def block() -> FusedInvResBlock:
    torch.manual_seed(0)
    return FusedInvResBlock(8, 3, 24, 8, True, "hs", 1)


def image(side: int = 6) -> torch.Tensor:
    return torch.randn(2, 8, side, side, generator=torch.Generator().manual_seed(0))


def seen(call: Callable[[], object]) -> list[str]:
    """Names without their prefix, as they began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    found = [e for e in profile.events() if e.name.startswith("mbn::") and "/" in e.name]
    return [e.name.removeprefix("mbn::") for e in sorted(found, key=lambda e: e.time_range.start)]


TRAINING = [
    "FusedInvResBlock/0.pointwise/forward",
    "FusedInvResBlock/1.depthwise/forward",
    "FusedInvResBlock/2.pointwise/forward",
    "FusedInvResBlock/output/forward",
    "FusedInvResBlock/output/backward",
    "FusedInvResBlock/2.pointwise/backward",
    "FusedInvResBlock/1.depthwise/backward",
    "FusedInvResBlock/0.pointwise/backward",
]


def test_a_training_step(on: None) -> None:
    module, x = block(), image()
    assert seen(lambda: module(x).sum().backward()) == TRAINING


def test_off_is_the_default() -> None:
    module, x = block(), image()
    assert not ranges.on
    assert seen(lambda: module(x).sum().backward()) == []
    # One object for all, so that nothing is made at each stage.
    found = [ranges.stage("A", 0, "depthwise", ranges.FORWARD), ranges.output("A", ranges.BACKWARD), ranges.whole("A")]
    assert found[0] is found[1] is found[2]


def test_the_results_are_the_same_bits(on: None) -> None:
    def results() -> list[torch.Tensor]:
        module, x = block(), image().requires_grad_()
        out = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    told = results()
    ranges.enable(False)
    assert all(map(torch.equal, told, results()))


@NEEDS_CPU
def test_an_evaluation_in_one_call(on: None) -> None:
    module, x = block().eval(), image()
    with torch.no_grad():
        for _ in range(3):  # the third runs what was kept
            assert seen(lambda: module(x)) == ["FusedInvResBlock/whole/forward"]
        frozen, both = freeze(module, x), FusedSequential(block(), block()).eval()
        assert seen(lambda: frozen(x)) == ["FusedInvResBlock/whole/forward"]
        for _ in range(3):
            assert seen(lambda: both(x)) == ["FusedInvResBlock+1/whole/forward"]


def test_an_evaluation_stage_by_stage(on: None) -> None:
    module, x = block().eval(), image()
    with torch.no_grad(), use_backend("reference"):
        assert seen(lambda: module(x)) == TRAINING[:4]


def test_functions_and_linked_chains(on: None) -> None:
    x, w = image(), torch.randn(8, 1, 3, 3, requires_grad=True)
    norm = [torch.ones(8), torch.zeros(8)]
    call = lambda: functional.depthwise_conv_bn_act(x, w, *norm, None, None, training=True)  # noqa: E731
    assert seen(call) == ["depthwise_conv_bn_act/0.depthwise/forward", "depthwise_conv_bn_act/output/forward"]
    gate = [torch.randn(2, 8), torch.zeros(2), torch.randn(8, 2, requires_grad=True), torch.zeros(8)]
    assert "squeeze_excite/0.gate/forward" in seen(lambda: functional.squeeze_excite(x, *gate))
    if available_backends()["cpu"] == "available":
        # What the first block hands to the second has no output of its own.
        blocks = FusedSequential(
            FusedInvResBlock(8, 3, 24, 12, False, "hs", 1), FusedInvResBlock(12, 3, 24, 8, False, "hs", 1)
        )
        names = seen(lambda: blocks(x).sum().backward())
        assert names.count("FusedInvResBlock/output/forward") == 1
        assert names.count("FusedInvResBlock/1.depthwise/backward") == 2


def test_under_compile(on: None) -> None:
    module, x = block(), image()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert seen(lambda: compiled(x).sum().backward()) == TRAINING


def test_ranges_of_cuda(on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA is in use each range is pushed and popped, also where something fails in between."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: told.append(name.removeprefix("mbn::")))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    block()(image()).sum().backward()
    assert told[::2] == TRAINING and set(told[1::2]) == {"end"}
    with pytest.raises(ZeroDivisionError), ranges.whole("A"):
        1 / 0  # noqa: B018
    assert told[-2:] == ["A/whole/forward", "end"]


@pytest.mark.parametrize("value, expected", [("1", "True"), ("0", "False"), (None, "False")])
def test_the_variable(value: str | None, expected: str) -> None:
    env = {name: v for name, v in os.environ.items() if name != "MBN_PROFILE"} | (
        {"MBN_PROFILE": value} if value else {}
    )
    command = [sys.executable, "-c", "import mbn_kernels; print(mbn_kernels.ranges.on)"]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == expected


@pytest.mark.cuda
def test_kernels_lie_in_ranges(on: None) -> None:
    """On a GPU each range of a step is there, with kernels in it."""
    profile_block = pytest.importorskip("benchmarks.profile_block", reason="rich is not installed")
    module, x = block().cuda(), image(28).cuda().requires_grad_()
    module(x).sum().backward()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        profile_block.run(lambda: module(x).sum().backward(), 1, x.device)
    rows, whole = profile_block.rows_of(profile.events(), 1)
    assert list(rows) == ["mbn::" + name for name in TRAINING]
    assert all(row.gpu > 0 for row in rows.values())
    assert sum(row.gpu for row in rows.values()) <= whole.gpu * 1.001
