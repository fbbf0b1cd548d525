"""Every block of a network: training and evaluation, by stock PyTorch, torch.compile and each backend; and the ways in
which the CUDA backend may evaluate it, beside what its planner expects of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import islice
from multiprocessing import get_context

import torch

from mbn_kernels import backends, chain
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import BlockShape, layer_shapes

from .gpu_checks import exact_passes, measure_passes, results_of
from .gpu_contestants import (
    COMPILE,
    EAGER,
    Contestant,
    Timed,
    among,
    autocast,
    build,
    default_of,
    drawn,
    forward_of,
    turn,
)
from .gpu_timing import Setting, in_one_line, median_seconds
from .layers import label, minimum_bytes

#: A time that is longer by less may be chance.
CHANCE = 1.02


def blocks(network: str, quick: bool) -> Counter[BlockShape]:
    """The network's blocks, each once, and how often it has them; if quick, the first, the last and one between."""
    found = Counter(layer_shapes(network))
    shapes = list(found)
    chosen = [shapes[0], shapes[len(shapes) // 2], shapes[-1]] if quick else shapes
    return Counter({shape: found[shape] for shape in chosen})


def input_shape(shape: BlockShape, setting: Setting) -> tuple[int, int, int, int]:
    return setting.batch, shape.in_channels, shape.height, shape.width


def block_calls(contestant: Contestant, shape: BlockShape, setting: Setting) -> Iterator[Timed]:
    """The passes over a block: evaluation in the setting's dtype, training under autocast to it. They return the
    output, and the gradients of input and parameters.
    """
    device, dtype = setting.device, setting.dtype
    x = drawn(contestant, input_shape(shape, setting), dtype, device)
    module = build(contestant, partial(build_block, shape), device, dtype).eval()
    evaluated = forward_of(contestant, module)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return evaluated(x)

    yield "evaluation", evaluate, None
    module = build(contestant, partial(build_block, shape), device).train()
    trained, leaf = forward_of(contestant, module), x.requires_grad_()
    leaves = [leaf, *module.parameters()]

    def train() -> torch.Tensor:
        with autocast(contestant, device, dtype):
            return trained(leaf)

    gradient = drawn(contestant, train().shape, dtype, device, seed=2)
    yield "forward", train, None
    yield "backward", lambda out: torch.autograd.grad(out, leaves, gradient), lambda: (train(),)


def slower_than(seconds: dict[str, float]) -> list[str]:
    """Whom the backend that runs by default does not beat: there the choice of a backend should fall on another."""
    best = default_of(seconds)
    return [name for name, t in seconds.items() if best and name != best and seconds[best] > CHANCE * t]


def measure_block(network: str, shape: BlockShape, times: int, setting: Setting, compiles: bool) -> Iterator[dict]:
    """One row a pass; ``times``: how often the network has the block."""
    rows = {
        name: {
            **{"kind": "block", "model": network, "block": label(shape), "times": times, "pass": name},
            **{"batch": setting.batch, "minimum_bytes": moved},
            **{"seconds": {}, "share": {}, "failed": {}, "errors": {}},
        }
        for name, moved in minimum_bytes(shape, setting.batch, setting.dtype.itemsize).items()
    }
    contestants = among((EAGER, COMPILE), compiles)
    measure_passes(rows, contestants, lambda contestant: block_calls(contestant, shape, setting), setting)
    for row in rows.values():
        yield {**row, "slower_than": slower_than(row["seconds"])}


# Compiling before measuring -------------------------------------------------------------------------------------------


def compile_ahead(shapes: list[BlockShape], setting: Setting, compiles: bool, jobs: int) -> list[str]:
    """Runs every call once, in so many processes, so that what Triton and torch.compile make is in their caches: one
    process alone compiles for minutes. Returns what failed, which the measurement will meet again.
    """
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_initialize) as pool:
        running = {pool.submit(_run_once, shape, setting, compiles): shape for shape in shapes}
        for done in as_completed(running):
            if done.exception():
                failed.append(f"{label(running[done])}: {in_one_line(done.exception())}")
    return failed


def _initialize() -> None:
    os.environ["MBN_TRITON_TUNE"] = "0"  # times would be those of a busy GPU
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # there are processes enough


def _run_once(shape: BlockShape, setting: Setting, compiles: bool) -> None:
    for contestant in among((EAGER, COMPILE), compiles)[1:]:
        with turn(contestant):
            for _, call, given in block_calls(contestant, shape, setting):
                call(*(given() if given else ()))


# Ways to evaluate a block ---------------------------------------------------------------------------------------------


def describe(way, stages: tuple[chain.Stage, ...]) -> str:
    """A way in a few characters, as "pointwise+depthwise 8x8, gate+pointwise 7x7": what each kernel takes."""
    found, i = [], 0
    while i < len(stages):
        count = way.count if way.count and i == way.first else 1
        kernel = "+".join(stage.conv for stage in stages[i : i + count])
        tile = f" {way.height}x{way.width}" if count > 1 else ""
        if i and stages[i - 1].gate:
            kernel = f"gate+{kernel} {way.gate_height}x{way.gate_width}" if way.gate_height else f"gate, {kernel}"
        found.append(kernel + tile)
        i += count
    return ", ".join(found)


def measure_ways(network: str, shape: BlockShape, setting: Setting) -> Iterator[dict]:
    """One row for each way that the planner would have measured, the first of them the one that it expects most of."""
    from mbn_kernels.backends.cuda import planner

    cuda = Contestant("cuda", backend="cuda")
    module = build(cuda, partial(build_block, shape), setting.device, setting.dtype).eval()
    call = module.call()
    stages = chain.parse(call.spec).stages
    params = chain.stage_parameters(stages, [p.detach() for p in call.params])
    x = drawn(cuda, input_shape(shape, setting), setting.dtype, setting.device)
    outer = [p["weight"].shape[0] for p in params]
    hidden = [p["w1"].shape[0] if stage.gate else 0 for stage, p in zip(stages, params, strict=True)]
    sizes = planner.sizes_of(x.shape, stages, outer, hidden, x.element_size())
    ways = planner.ways(stages, sizes, call.residual, x.device)
    if len(ways) < 2:
        return

    def evaluation(contestant: Contestant) -> Iterator[Timed]:
        return islice(block_calls(contestant, shape, setting), 1)

    exact = exact_passes(["evaluation"], evaluation, setting)["evaluation"]
    for way in ways:
        run = partial(_evaluate, x, stages, params, x if call.residual else None, way)
        row = {"kind": "way", "model": network, "block": label(shape), "batch": setting.batch, **way._asdict()}
        row |= {"way": describe(way, stages), "first_choice": way == ways[0]}
        row |= {"estimate": planner.seconds(way, stages, sizes, x.device), "seconds": None, "failed": None}
        row["errors"] = {}
        with turn(cuda):
            try:
                row["failed"] = exact.sentence(results_of(run), cuda.name, row["errors"])
                if not row["failed"]:
                    row["seconds"] = median_seconds(run, setting.milliseconds)
            except Exception as error:  # the others are worth measuring still
                row["failed"] = in_one_line(error)
        yield row


@torch.no_grad()
def _evaluate(x: torch.Tensor, stages: tuple, params: list[dict], residual: torch.Tensor | None, way) -> torch.Tensor:
    """The backend's evaluation of a chain, in a way that is given instead of chosen."""
    return backends.get("cuda").kernels._evaluate(x, stages, params, residual, way)
