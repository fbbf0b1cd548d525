"""One group per network, block shape and direction; one row per implementation."""

from __future__ import annotations

import pytest

from mbn_kernels.models import build_block

from .conftest import across
from .counts import TIMES, forward_flops
from .implementations import Pass
from .layers import BLOCK_DIRECTIONS, block_cases, images, label, minimum_bytes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = block_cases(full=metafunc.config.option.benchmark_full)
    names = [f"{network}-{label(shape)}" for network, shape, _ in cases]
    metafunc.parametrize(("network", "shape", "times"), cases, ids=names)
    across(metafunc, BLOCK_DIRECTIONS)


def test_block(timed, device, dtype, network, shape, times, direction, implementation):
    batch = images(direction, device.type)
    size = (batch, shape.in_channels, shape.height, shape.width)
    given = Pass(direction, lambda fused: build_block(shape, fused=fused), size, device, dtype)
    info = {"kind": "block", "network": network, "layer": label(shape), "times": times, "batch": batch}
    info["minimum_bytes"] = minimum_bytes(shape, batch, dtype.itemsize)[direction]
    info["flops"] = TIMES[direction] * forward_flops(build_block(shape, fused=False), size)
    timed(f"{network} {label(shape)} {direction}", implementation, given, **info)
