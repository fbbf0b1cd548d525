"""Whole networks at 224x224: one group per network and direction, one row per implementation."""

from __future__ import annotations

import pytest

from mbn_kernels import models
from mbn_kernels.models.tables import layer_shapes

from .conftest import across
from .counts import forward_flops
from .implementations import Pass
from .layers import NETWORK_DIRECTIONS, images, minimum_bytes, network_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.option.benchmark_full
    metafunc.parametrize("network", network_cases(full))
    # Compiling a whole network takes minutes: the quick subset compiles blocks alone.
    across(metafunc, NETWORK_DIRECTIONS, compiles=full)


def test_network(timed, device, dtype, network, direction, implementation):
    batch = images(direction, device.type)
    size = (batch, 3, 224, 224)

    def build(fused: bool):
        return getattr(models, network)(fused=fused, dropout=0.0)  # each would draw another dropout

    blocks = [minimum_bytes(shape, batch, dtype.itemsize) for shape in layer_shapes(network)]
    passes = ("evaluation",) if direction == "evaluation" else ("forward", "backward")
    flops = forward_flops(build(False), size)
    if direction == "training":  # each gradient costs what the forward does, but nobody asks for the image's
        flops = 3 * flops - forward_flops(build(False).conv1, size)
    info = {"kind": "network", "network": network, "times": 1, "batch": batch, "flops": flops}
    info["minimum_bytes"] = sum(moved[name] for moved in blocks for name in passes)  # stem and classifier left out
    timed(f"{network} batch {batch} {direction}", implementation, Pass(direction, build, size, device, dtype), **info)
