"""Whole networks at 224x224: one group per network and direction, one row per implementation."""

from __future__ import annotations

import pytest

from mbn_kernels import models

from .implementations import IMPLEMENTATIONS, evaluation, network_training
from .layers import BATCH, DIRECTIONS, network_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.option.benchmark_full
    # Compiling a whole network takes minutes: the quick subset compiles blocks alone.
    implementations = [implementation for implementation in IMPLEMENTATIONS if full or not implementation.compiled]
    # The last one varies fastest: the implementations of a group run next to each other.
    metafunc.parametrize("network", network_cases(full))
    metafunc.parametrize("direction", DIRECTIONS)
    metafunc.parametrize("implementation", implementations, ids=lambda implementation: implementation.name)


def test_network(timed, device, network, direction, implementation):
    batch = BATCH[direction]
    prepare = evaluation if direction == "evaluation" else network_training
    call = prepare(implementation, lambda fused: getattr(models, network)(fused=fused), (batch, 3, 224, 224), device)
    timed(f"{network} batch {batch} {direction}", implementation, call, network=network, batch=batch)
