"""One group per network, block shape and direction; one row per implementation."""

from __future__ import annotations

import dataclasses

import pytest

from mbn_kernels.models import build_block

from .implementations import IMPLEMENTATIONS, block_training, evaluation
from .layers import BATCH, DIRECTIONS, block_cases, label, minimum_evaluation_bytes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = block_cases(full=metafunc.config.option.benchmark_full)
    metafunc.parametrize(
        ("network", "shape", "repeats"), cases, ids=[f"{network}-{label(shape)}" for network, shape, _ in cases]
    )
    metafunc.parametrize("direction", DIRECTIONS)
    # The last one varies fastest: the implementations of a group run next to each other.
    metafunc.parametrize("implementation", IMPLEMENTATIONS, ids=lambda implementation: implementation.name)


def test_block(timed, device, network, shape, repeats, direction, implementation):
    batch = BATCH[direction]
    info = {"network": network, "batch": batch, "repeats": repeats, **dataclasses.asdict(shape)}
    if direction == "evaluation":
        info["minimum_bytes"] = minimum_evaluation_bytes(shape, batch)

    prepare = evaluation if direction == "evaluation" else block_training
    input_shape = (batch, shape.in_channels, shape.height, shape.width)
    call = prepare(implementation, lambda fused: build_block(shape, fused=fused), input_shape, device)
    timed(f"{network} {label(shape)} {direction}", implementation, call, **info)
