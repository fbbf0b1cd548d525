"""Whole networks on a GPU: a training step, evaluation, and, as CUDA graphs, which take the CPU's time out of both, a
training step and the evaluation of one image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbn_kernels import models

from .correct import allowed, factored
from .gpu_checks import Exact, exact_of
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
    drawn,
    forward_of,
    turn,
)
from .gpu_timing import in_one_line, median_seconds
from .implementations import Call, Prepared

#: Calls before a CUDA graph is recorded.
WARM_UP = 3
#: A first step's loss may be off by so much, as a part of it.
LOSS = 0.02
LARGE = "mobilenet_v3_large"


class Case(NamedTuple):
    """``targets``: how many times as fast as these the network should be, on V3-Large. ``essential``: also if quick."""

    direction: str
    batch: int
    prepare: Callable[..., Prepared]
    stock: tuple[Contestant, ...]
    targets: dict[str, float]
    essential: bool = False

    def limits(self, dtype: torch.dtype, errors: list[float]) -> list[float]:
        """How far off each result may be, from eager PyTorch's errors."""
        if not self.direction.startswith("training step"):
            return allowed(errors, dtype)
        loss, logits, gradients = errors
        # A new network's loss is all but log(1000), whatever its logits are: they, and the gradients, tell more.
        return [max(LOSS, factored(loss)), *allowed([logits], dtype), *allowed([gradients], dtype, kinks=True)]


def network_of(contestant: Contestant, model: str, options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """Without dropout, of which each contestant would draw another mask."""
    return build(contestant, partial(getattr(models, model), dropout=0.0), options.device, dtype)


def images(contestant: Contestant, batch: int, options: argparse.Namespace, dtype: torch.dtype) -> Tensor:
    return drawn(contestant, (batch, 3, options.resolution, options.resolution), dtype, options.device)


def network_evaluation(
    contestant: Contestant, model: str, batch: int, options: argparse.Namespace, graph: bool = False
) -> Prepared:
    """Of a network without gradients: its logits. With ``graph`` as a CUDA graph; torch.compile makes its own."""
    net = network_of(contestant, model, options, options.dtype).eval()
    x, forward = images(contestant, batch, options, options.dtype), forward_of(contestant, net)

    def call() -> Tensor:
        with torch.no_grad():
            return forward(x)

    if contestant.mode:
        warm_up(call)  # what is compared is then what a graph of torch.compile gives
    run = captured(call) if graph and not (contestant.mode or contestant.exact) else call
    return Prepared(run, lambda: [run()])


def warm_up(call: Call) -> None:
    for _ in range(WARM_UP):
        call()


def captured(call: Call) -> Call:
    """A call as a CUDA graph that is replayed, after a few calls on a side stream, as PyTorch asks for. It returns the
    tensors that the call returned while it was recorded, which each replay writes anew.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay(_kept: Call = call) -> object:  # the graph reads the call's tensors
        graph.replay()
        return found

    return replay


def network_training(
    contestant: Contestant, model: str, batch: int, options: argparse.Namespace, graph: bool = False
) -> Prepared:
    """A step of a network in float32 under autocast: forward, cross-entropy, backward, SGD. With ``graph`` as a CUDA
    graph. The results are a first step's: loss, logits, all gradients as one vector.
    """
    net = network_of(contestant, model, options, torch.float32).train()
    x, labels = images(contestant, batch, options, torch.float32), torch.arange(batch, device=options.device) % 1000
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    forward = forward_of(contestant, net)

    def call() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(contestant, options.device, options.dtype):
            logits = forward(x)
            loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    run = call
    if graph and not contestant.exact:
        first = {name: t.clone() for name, t in net.state_dict().items()}
        run = captured(call)
        net.load_state_dict(first)  # the calls before have trained it

    def results() -> list[Tensor]:
        loss, logits = run()
        # As one vector: of single small gradients deep in a network, rounding is most of what is left.
        return [loss, logits, torch.cat([p.grad.flatten() for p in net.parameters()])]

    return Prepared(run, results)


def network_cases(batch: int) -> list[Case]:
    """The one for which torch.compile takes longest comes last of the essential ones."""
    every, small = (NCHW, EAGER, COMPILE), [n for n in (1, 16) if n != batch]
    step, evaluation = (partial(prepare, graph=True) for prepare in (network_training, network_evaluation))
    return [
        Case("training step", batch, network_training, every, {"eager": 2.0, "compile": 1.7}, True),
        Case("training step as a CUDA graph", batch, step, (EAGER,), {}, True),
        Case("CUDA graph", 1, evaluation, (EAGER, REDUCE_OVERHEAD), {"reduce-overhead": 1.3}, True),
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
    """A row, with the time of everyone who is right."""
    row = {"kind": "network", "model": model, "direction": case.direction, "batch": case.batch}
    row |= {"seconds": {}, "failed": {}, "errors": {}}

    def results(contestant: Contestant) -> list[tuple[str, list[Tensor]]]:
        return [(case.direction, case.prepare(contestant, model, case.batch, options).results())]

    def limits(_: str, errors: list[float]) -> list[float]:
        return case.limits(options.dtype, errors)

    exact = exact_of([case.direction], results, limits)[case.direction]
    for contestant in among(case.stock, not options.no_compile):
        print(f"{model}, {case.direction}, batch {case.batch}: {contestant.name}", flush=True)  # it may take minutes
        with turn(contestant):
            try:
                _measure(row, contestant, model, case, exact, options)
            except Exception as error:  # the others are worth measuring still
                row["failed"][contestant.name] = in_one_line(error)
    targets = case.targets if model == LARGE else {}
    return {**row, "targets": targets, **compare(row["seconds"], targets)}


def _measure(
    row: dict, contestant: Contestant, model: str, case: Case, exact: Exact, options: argparse.Namespace
) -> None:
    prepared = case.prepare(contestant, model, case.batch, options)
    wrong = exact.sentence(prepared.results(), contestant.name, row["errors"])
    if wrong:
        row["failed"][contestant.name] = wrong
    else:
        took = median_seconds(prepared.call, options.network_milliseconds, ahead=False)
        row["seconds"][contestant.name] = took
