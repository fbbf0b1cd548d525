"""A convolution with batch norm and activation, or squeeze-excite, alone: one group per shape and direction."""

from __future__ import annotations

import pytest

from .conftest import across
from .counts import TIMES, forward_flops
from .implementations import Pass
from .layers import STAGE_DIRECTIONS, STAGES_OF, images, stage_cases
from .stages import alone_bytes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.option.benchmark_full
    names = {shape: f"{STAGES_OF}-{shape}".replace(" ", "-") for shape in stage_cases(full)}
    metafunc.parametrize("shape", names, ids=names.values())
    across(metafunc, STAGE_DIRECTIONS)


def test_stage(timed, device, dtype, shape, direction, implementation):
    batch = images(direction, device.type)
    size = (batch, shape.inner, shape.height, shape.width)
    given = Pass(direction, lambda fused: shape.module(fused=fused), size, device, dtype)
    info = {"kind": "stage", "network": STAGES_OF, "layer": str(shape), "times": 1, "batch": batch}
    info["minimum_bytes"] = alone_bytes(shape, batch, dtype)[direction]
    info["flops"] = TIMES[direction] * forward_flops(shape.module(fused=False), size)
    timed(f"{STAGES_OF} {shape} {direction}", implementation, given, **info)
