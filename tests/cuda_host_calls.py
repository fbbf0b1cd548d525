"""Calls of the CUDA kernels on the CPU, and the fixture that makes them a backend, for the tests of both.

tests/cuda_host compiles the very device code for the CPU, tests/cuda_host_build.py builds it. What is not CUDA C++ runs
in Triton's interpreter, so these tests need a process with TRITON_INTERPRET=1: ``make test`` starts one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from zlib import crc32

import pytest
import torch
from cuda_host_build import Host, compiler
from oracle import ACTS, Case, dw, make_tensors, pw
from torch import Tensor

import mbn_kernels
from mbn_kernels import backends, chain
from mbn_kernels.backends import triton
from mbn_kernels.chain import Gradient, Norm, Stage, Value

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1: `make test` starts one", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")
if compiler() is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)

from mbn_kernels.backends.cuda import blocks, config, depthwise, planner
from mbn_kernels.backends.cuda.kernels import CudaKernels
from mbn_kernels.backends.cuda.planner import Way
from mbn_kernels.backends.triton import config as triton_config
from mbn_kernels.backends.triton import convolutions, launch, tuning

GATE = ("relu", "hardsigmoid")


@pytest.fixture(scope="session", name="library")
def cuda_library() -> Host:
    return Host()


@pytest.fixture(autouse=True, name="host")
def cuda_on_host(request: pytest.FixtureRequest, library: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The backend on this build; few blocks, so that each takes several units. Half of the tests run in each order."""
    monkeypatch.setitem(backends._LOADERS, "cuda", lambda: backends.Backend(CudaKernels(), None, triton.supports))
    backends._backend.cache_clear()
    for module in (config, launch, planner, triton_config):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(tuning, "_plans", {})
    monkeypatch.setattr(triton_config, "largest_block", 16)
    monkeypatch.setattr(config, "_RESIDENT", 64)
    library.order(crc32(request.node.name.encode()) % 2 == 1)
    library.launches()
    with mbn_kernels.use_backend("cuda"):
        yield library
    library.skip()
    backends._backend.cache_clear()


# Cases ----------------------------------------------------------------------------------------------------------------

WINDOWS = [
    Case(f"{k}x{k}-stride-{s}", (2, 8, 2 * k + 1, k + 4), (dw(k, ACTS[(k + s) % 5], stride=s),))
    for k, s in product((3, 5, 7), (1, 2))
]
WHOLE = [
    Case(f"{k}x{k}-stride-{s}", (2, 24, 9, 10), (pw(40, "hardswish"), dw(k, "relu", stride=s), pw(24)), s == 1)
    for k, s in product((3, 5), (1, 2))
]
GATED = Case("gated", (2, 16, 6, 7), (pw(40, "relu"), dw(5, "hardswish", gate=GATE), pw(16)), True)


def stage_of(case: Case, i: int = 0) -> Stage:
    return chain.parse(chain.chain_spec("c", [stage.spec(True) for stage in case.stages])).stages[i]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


# Calls ----------------------------------------------------------------------------------------------------------------


def forward(case: Case, dtype: torch.dtype = torch.float32, pool: bool = False, training: bool = True) -> list[Tensor]:
    """One call of the forward kernel, with everything deferred; all that it writes."""
    u, weight = operands(case, dtype)
    after = convolutions.RAW
    if not training:
        c = u.y.shape[1]
        after = {**after, "mean": torch.randn(c), "var": torch.rand(c) + 0.5, "OUT_ACT": 3, "eps": 1e-5}
    y, found, pooled = depthwise.depthwise_forward(u, weight, stage_of(case), training, after, pool)
    return [y, *([found.counts, found.moments] if found else []), *([pooled] if pool else [])]


def backward(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Likewise of the backward kernel."""
    (u, weight), stage = operands(case, dtype), stage_of(case)
    (n, c), shape = u.y.shape[:2], stage.output_shape(u.y.shape, None)
    dv, y = (channels_last(torch.randn(shape, dtype=dtype)) for _ in range(2))
    a, b, d, scale, shift, mean, rstd = torch.randn(7, c).unbind(0)
    gradient = Gradient(dv, Value(y, scale, shift, "relu6", torch.rand(n, c)), torch.randn(n, c), a, b, d)
    norm = Norm(u.scale, u.shift, mean, rstd)
    return list(depthwise.depthwise_backward(gradient, weight, stage, u, norm, None, True, True, True))


def operands(case: Case, dtype: torch.dtype) -> tuple[Value, Tensor]:
    torch.manual_seed(1)
    n, c, *_ = case.shape
    x, (k, _) = channels_last(torch.randn(case.shape, dtype=dtype)), case.stages[0].kernel
    u = Value(x, *torch.randn(2, c).unbind(0), "hardswish", torch.rand(n, c))
    return u, torch.randn(c, 1, k, k).to(dtype)


def block(case: Case, way: Way) -> list[Tensor]:
    """One call of the whole-block kernel, and one with a gate if the way has it."""
    torch.manual_seed(1)
    t = make_tensors(case).map(lambda v: v.to(torch.bfloat16))
    stages = chain.parse(chain.chain_spec("c", [stage.spec(False) for stage in case.stages])).stages
    part = slice(way.first, way.first + way.count)
    x = channels_last(t.x if way.first == 0 else torch.randn(*case.shape[:1], 40, *case.shape[2:]).bfloat16())
    out, pooled = blocks.inverted_residual(x, stages[part], t.stages[part], way, None)
    if not way.gate_height:
        return [out, *([] if pooled is None else [pooled])]
    gate, own, tile = stages[1], t.stages[2], (way.gate_height, way.gate_width)
    return [blocks.gated_project(out, pooled, gate, t.stages[1], stages[2], own, tile, None)]


LARGE = Case("large", (3, 16, 11, 9), (dw(5, "relu"),))
WIDE = Case(
    "wide", (1, 64, 9, 9), (dw(5, "relu"),)
)  # several warps a block; its last row lies where statistics are merged
EDGE = Case(
    "edge", (1, 64, 4, 9), (dw(3, "relu", padding=(4, 3, 1, 1)),)
)  # rows of the output without one of the input
WIDE_GATED = Case("gated", (1, 16, 6, 7), (pw(136, "relu"), dw(3, "relu", gate=GATE), pw(40)))
#: What together waits at every barrier: by file, some calls that do.
CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "forward": lambda: forward(LARGE),
    "forward, evaluation": lambda: forward(LARGE, pool=True, training=False),
    "forward, several warps": lambda: forward(WIDE),
    "forward, nothing but padding": lambda: forward(EDGE),
    "backward": lambda: backward(LARGE),
    "backward, several warps": lambda: backward(WIDE),
    "block": lambda: block(Case("b", (1, 16, 9, 9), (pw(72, "relu"), dw(3, "relu"), pw(24))), Way(0, 3, 4, 8)),
    "block without expand": lambda: block(WHOLE[0], Way(1, 2, 4, 8)),
    "block with squeeze-excite": lambda: block(GATED, Way(0, 2, 4, 4)),
    "gate and project": lambda: block(WIDE_GATED, Way(0, 2, 4, 8, 4, 8)),
}
