"""Whole networks on a GPU: a training step, evaluation, and, as CUDA graphs, which take the CPU's time out of both, a
training step and the evaluation of one image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from mbn_kernels import models

from .gpu_contestants import (
    COMPILE,
    EAGER,
    MAX_AUTOTUNE,
    NCHW,
    REDUCE_OVERHEAD,
    Contestant,
    among,
    autocast,
    build,
    default_of,
    forward_of,
    turn,
)
from .gpu_timing import in_one_line, median_seconds
from .implementations import Call

LARGE = "mobilenet_v3_large"


class Case(NamedTuple):
    """``targets``: how many times as fast as these the network should be, on V3-Large. ``essential``: also if quick."""

    direction: str
    batch: int
    prepare: Callable[..., Call]
    stock: tuple[Contestant, ...]
    targets: dict[str, float]
    essential: bool = False


def network_evaluation(contestant: Contestant, model: str, batch: int, options: argparse.Namespace) -> Call:
    """Of a network without gradients."""
    net = build(contestant, getattr(models, model), options.device).to(options.dtype).eval()
    x = torch.randn(batch, 3, options.resolution, options.resolution, dtype=options.dtype, device=options.device)
    x, forward = x.contiguous(memory_format=contestant.memory_format), forward_of(contestant, net)

    def call() -> None:
        with torch.no_grad():
            forward(x)

    return call


def network_graph(contestant: Contestant, model: str, batch: int, options: argparse.Namespace) -> Call:
    """The same as a CUDA graph; torch.compile makes its own."""
    call = network_evaluation(contestant, model, batch, options)
    return call if contestant.mode else captured(call)


def captured(call: Call) -> Call:
    """A call as a CUDA graph that is replayed, after a few calls on a side stream, as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_kept: Call = call) -> None:  # the graph reads the call's tensors
        graph.replay()

    return replay


def network_training(contestant: Contestant, model: str, batch: int, options: argparse.Namespace) -> Call:
    """A step of a network in float32 under autocast: forward, cross-entropy, backward, SGD."""
    net = build(contestant, getattr(models, model), options.device).train()
    x = torch.randn(batch, 3, options.resolution, options.resolution, device=options.device)
    x = x.contiguous(memory_format=contestant.memory_format)
    labels = torch.randint(1000, (batch,), device=options.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    forward = forward_of(contestant, net)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(options.device, options.dtype):
            loss = nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()

    return call


def network_training_graph(contestant: Contestant, model: str, batch: int, options: argparse.Namespace) -> Call:
    """The same step as a CUDA graph."""
    return captured(network_training(contestant, model, batch, options))


def network_cases(batch: int) -> list[Case]:
    """The one for which torch.compile takes longest comes last of the essential ones."""
    every, small = (NCHW, EAGER, COMPILE), [n for n in (1, 16) if n != batch]
    return [
        Case("training step", batch, network_training, every, {"eager": 2.0, "compile": 1.7}, True),
        Case("training step as a CUDA graph", batch, network_training_graph, (EAGER,), {}, True),
        Case("CUDA graph", 1, network_graph, (EAGER, REDUCE_OVERHEAD), {"reduce-overhead": 1.3}, True),
        Case("evaluation", batch, network_evaluation, (NCHW, EAGER, MAX_AUTOTUNE), {"max-autotune": 1.6}, True),
        *(Case("evaluation", n, network_evaluation, every, {"compile": 1.4}) for n in small),
    ]


def compare(seconds: dict[str, float], targets: dict[str, float]) -> dict:
    """How many times as fast as each of the others the backend that runs by default is; ``met``: None where one of the
    targets' contestants has no time.
    """
    best = default_of(seconds)
    ratios = {name: t / seconds[best] for name, t in seconds.items() if name != best} if best else {}
    known = bool(targets) and all(name in ratios for name in targets)
    return {"ratios": ratios, "met": all(ratios[name] >= t for name, t in targets.items()) if known else None}


def measure_network(model: str, case: Case, options: argparse.Namespace) -> dict:
    seconds, failed = {}, {}
    for contestant in among(case.stock, not options.no_compile):
        print(f"{model}, {case.direction}, batch {case.batch}: {contestant.name}", flush=True)  # it may take minutes
        with turn(contestant):
            try:
                seconds[contestant.name] = _seconds(contestant, model, case, options)
            except Exception as error:  # the others are worth measuring still
                failed[contestant.name] = in_one_line(error)
    row = {"kind": "network", "model": model, "direction": case.direction, "batch": case.batch, "seconds": seconds}
    targets = case.targets if model == LARGE else {}
    return {**row, "failed": failed, "targets": targets, **compare(seconds, targets)}


def _seconds(contestant: Contestant, model: str, case: Case, options: argparse.Namespace) -> float:
    call = case.prepare(contestant, model, case.batch, options)
    return median_seconds(call, options.network_milliseconds, ahead=False)
