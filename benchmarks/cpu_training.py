"""Training steps on a CPU (forward, cross-entropy, backward, SGD) against stock PyTorch and torch.compile.

python -m benchmarks.cpu_training --json result.json

The gradients of each implementation's first step are compared with eager PyTorch's: who is wrong has no time. Then
they take turns. The memory of a step is what a process holds at its peak beyond what it holds between steps, its
parameters and input among that: the operating system's count, which no allocator escapes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import models

from . import cpu_charts
from .cpu_contestants import FUSED, Case, timed
from .cpu_processes import Died, Message, answers
from .cpu_runs import DASH, add_options, announce, command, markdown, names_of, new_result, run, table, timing, title
from .gpu_timing import in_one_line
from .implementations import IMPLEMENTATIONS, network_training

BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
CPU = torch.device("cpu")
#: Of |g - g'| / |g'| over all gradients, in float32. Stock's own layouts are 0.04 apart: depth magnifies rounding.
TOLERANCE = 0.1
#: glibc gives every freed block from this size on back at once: what is freed leaves the count.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 1 << 20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(models.NETWORKS), choices=models.NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    add_options(parser, rounds=5)
    return parser.parse_args(arguments)


def step_of(name: str, case: Case) -> tuple[nn.Module, Callable[[], object]]:
    """The model and a call that trains it for a step; all have the same weights, images and labels."""
    built: list[nn.Module] = []

    def build(fused: bool) -> nn.Module:
        # Each would draw another dropout.
        built.append(getattr(models, case.model)(width_mult=case.width, dropout=0.0, fused=fused))
        return built[0]

    shape = (case.batch, 3, case.resolution, case.resolution)
    call = network_training(BY_NAME[name], build, shape, CPU)
    return built[0], call


def gradients(model: nn.Module) -> Tensor:
    """All of them in a row."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# Memory ---------------------------------------------------------------------------------------------------------------


def status(name: str) -> int:
    """A size that Linux tells of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def settle(model: nn.Module) -> None:
    """Gives back what a step leaves: gradients, memory that is kept for the next one, garbage."""
    model.zero_grad(set_to_none=True)
    mbn_kernels.empty_cache()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak(arguments: dict) -> Iterator[Message]:
    """Bytes of a step above those between steps. The first step, which compiles and loads code, is not counted."""
    model, call = step_of(arguments["name"], Case(*arguments["case"]))
    call()
    settle(model)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    yield "peak", status("VmHWM") - before


def peaks(names: list[str], case: Case) -> Iterator[Message]:
    """("peak", (name, bytes)) of each, in a process of its own."""
    for name in names:
        yield "step", f"memory of {name}"
        given = {"name": name, "case": case}
        for _, found in answers("benchmarks.cpu_training:peak", given, threads=case.threads, environment=EXACT):
            yield "peak", (name, found)


# Time -----------------------------------------------------------------------------------------------------------------


def measure(arguments: dict) -> Iterator[Message]:
    """One row: times, errors of the gradients and, if wanted, memory."""
    case = Case(*arguments["case"])
    calls, errors, failed, memory, expected = {}, {}, {}, {}, None
    for name in arguments["names"]:
        yield "step", name
        try:
            model, call = step_of(name, case)
            call()
            found = gradients(model)
        except Exception as problem:
            failed[name] = in_one_line(problem)
            continue
        expected = found if expected is None else expected
        errors[name] = (torch.linalg.norm(found - expected) / torch.linalg.norm(expected)).item()
        if errors[name] < TOLERANCE:
            calls[name] = call
        else:
            failed[name] = f"its gradients are off by {errors.pop(name):.1e}, more than {TOLERANCE:.0e}"
    yield "step", "taking turns"
    load = round(os.getloadavg()[0], 1)
    seconds = timed(calls, arguments["timing"])
    try:
        for kind, value in peaks(list(calls), case) if arguments["memory"] else ():
            if kind == "peak":
                memory[value[0]] = value[1]
            else:
                yield kind, value
    except Died as problem:
        failed["memory"] = str(problem)
    found = {"seconds": seconds, "peak_bytes": memory, "errors": errors, "failed": failed, "load_average": load}
    yield "row", {**case._asdict(), **found}


def measure_all(options: argparse.Namespace) -> tuple[dict, bool]:
    """The result, and whether it is complete."""
    result = new_result({}, {})
    announce(result)
    names = [name for name, i in BY_NAME.items() if not (i.compiled and options.no_compile)]
    given = {"names": names, "timing": timing(options), "memory": not options.no_memory}
    requests = [
        (Case(model, batch, threads, resolution=options.resolution, width=options.width), given)
        for threads, model, batch in product(options.threads, options.model, options.batch)
    ]
    return result, run(result, "benchmarks.cpu_training:measure", requests, options.json, options.keep)


def memory_table(result: dict) -> str:
    """Megabytes of a step, and ours as part of the least of the others; empty where no row has any."""
    rows = [row for row in result["rows"] if row["peak_bytes"]]
    names = names_of([{"seconds": row["peak_bytes"], "failed": {}} for row in rows])

    def cells(row: dict) -> Iterator[str]:
        yield title(row)
        memory = row["peak_bytes"]
        yield from (f"{memory[name] / MIB:.0f}" if name in memory else DASH for name in names)
        least = min((size for name, size in memory.items() if name != FUSED), default=None)
        yield f"{memory[FUSED] / least:.2f}" if least and FUSED in memory else DASH

    heads = ["MiB at the peak of a step", *names, f"{FUSED} as part of the least of the others"]
    return markdown(heads, [list(cells(row)) for row in rows]) if rows else ""


def tables(result: dict) -> str:
    return "\n\n".join(filter(None, (table(result), memory_table(result))))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command(options, lambda: measure_all(options), tables, cpu_charts.bars)


if __name__ == "__main__":
    main()
