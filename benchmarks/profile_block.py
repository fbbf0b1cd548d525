"""One block of a network under a profiler, its stages as named ranges (mbn_kernels/ranges.py).

python -m benchmarks.profile_block --model mobilenet_v3_large --block 13 --iterations 20

On a GPU the loop is bracketed with the CUDA profiler API, which `nsys profile --capture-range=cudaProfilerApi` waits
for. On a CPU, and with --trace also on a GPU, torch.profiler records it: the ranges are printed as a table, and the
trace is written for Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType

from mbn_kernels import available_backends, models, ranges, use_backend
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import BlockShape, layer_shapes

from .implementations import FUSED, Call, Pass, default_device, prepare
from .layers import label

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTIONS = ("training", "evaluation")
#: Calls before those that are looked at: kernels are compiled, weights packed, caches warm.
WARM_UP = 5
ITERATION = "iteration"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_block", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v3_large", choices=models.NETWORKS)
    parser.add_argument("--block", type=int, default=13, help="which of the network's blocks, from 0")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--direction", choices=DIRECTIONS, default="training", help="forward and backward, or forward")
    parser.add_argument("--batch", type=int, help="images (default: 256 on a GPU, 16 on a CPU)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, under autocast in training; float32"
    )
    parser.add_argument("--resolution", type=int, default=224, help="of the network's images")
    backends = available_backends()
    parser.add_argument("--backend", choices=backends, help="of mbn_kernels (default: the one that it chooses)")
    parser.add_argument("--trace", type=Path, metavar="PATH", help="where torch.profiler's trace goes")
    options = parser.parse_args(arguments)
    options.device = default_device()
    on_gpu = options.device.type == "cuda"
    if options.batch is None:
        options.batch = 256 if on_gpu else 16
    options.dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    for name in ("iterations", "batch", "resolution"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected a positive number, got {getattr(options, name)}")
    shapes = layer_shapes(options.model, options.resolution)
    if not 0 <= options.block < len(shapes):
        parser.error(f"argument --block: expected 0 to {len(shapes) - 1} for {options.model}, got {options.block}")
    state = backends.get(options.backend, "available")
    if state != "available":
        parser.error(f"argument --backend: {options.backend}: {state}")
    options.shape = shapes[options.block]
    if not on_gpu:
        options.trace = options.trace or Path(f"profile-{options.model}-{options.block}.json")
    return options


def call_of(shape: BlockShape, options: argparse.Namespace) -> Call:
    """A training step of the block, to the gradients of its input and parameters, or its evaluation."""
    size = (options.batch, shape.in_channels, shape.height, shape.width)
    direction = "backward" if options.direction == "training" else "evaluation"
    given = Pass(direction, lambda fused: build_block(shape, fused=fused), size, options.device, options.dtype)
    prepared = prepare(FUSED, given)
    return lambda: prepared.call(*prepared.given())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(call: Call, iterations: int, device: torch.device) -> None:
    for _ in range(iterations):
        with torch.profiler.record_function(ITERATION):
            call()
            synchronize(device)


def bracketed(call: Call, options: argparse.Namespace) -> None:
    """The loop between cudaProfilerStart and cudaProfilerStop."""
    torch.cuda.profiler.start()
    run(call, options.iterations, options.device)
    torch.cuda.profiler.stop()


def recorded(call: Call, options: argparse.Namespace) -> torch.profiler.profile:
    """The loop under torch.profiler, its trace written."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run(call, options.iterations, options.device)
    options.trace.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(options.trace))
    return profile


class Row(NamedTuple):
    """Of a range or of all, in an iteration: how often, microseconds of the host, of the GPU's kernels."""

    calls: float
    host: float
    gpu: float


def rows_of(events: list, iterations: int) -> tuple[dict[str, Row], Row]:
    """(each range, in the order in which they began; an iteration)."""
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA]
    kernels = [e for e in on_gpu if not is_range(e) and e.name != ITERATION]
    found: dict[str, list[float]] = {}
    for event in sorted(on_host, key=start_of):
        if is_range(event):
            row = found.setdefault(event.name, [0.0, 0.0, 0.0])
            row[0] += 1 / iterations
            row[1] += duration(event) / iterations
    # On a GPU a range is a second event, from its first kernel's start to its last one's end.
    for event in filter(is_range, on_gpu):
        inside = (k for k in kernels if start_of(event) <= start_of(k) < event.time_range.end)
        found[event.name][2] += sum(map(duration, inside)) / iterations
    host = sum(duration(e) for e in on_host if e.name == ITERATION) / iterations
    return {name: Row(*row) for name, row in found.items()}, Row(1.0, host, sum(map(duration, kernels)) / iterations)


def is_range(event) -> bool:
    return event.name.startswith("mbn::") and event.name.count("/") == 2


def start_of(event) -> float:
    return event.time_range.start


def duration(event) -> float:
    return event.time_range.elapsed_us()


def table_of(rows: dict[str, Row], whole: Row, on_gpu: bool) -> Table:
    table = Table(title="Ranges, microseconds an iteration", title_justify="left")
    table.add_column("range", no_wrap=True)
    for name in ("calls", "host", "of the iteration", *(["GPU", "of its time"] if on_gpu else [])):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, row: Row) -> None:
        gpu = [f"{row.gpu:.1f}", f"{row.gpu / (whole.gpu or 1):.1%}"] if on_gpu else []
        table.add_row(name, f"{row.calls:g}", f"{row.host:.1f}", f"{row.host / whole.host:.1%}", *gpu)

    for name, row in rows.items():
        add(name, row)
    left = [total - sum(row[i] for row in rows.values()) for i, total in enumerate(whole)]
    add("outside of them", Row(1.0, *left[1:]))
    table.add_section()
    add("an iteration", whole)
    return table


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console, on_gpu = Console(), options.device.type == "cuda"
    console = Console(width=max(console.width, 120))
    where = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    what = f"{options.model}, block {options.block} ({label(options.shape)}), {options.direction}"
    console.print(f"{what}, batch {options.batch}, {options.dtype}, {where}", markup=False, highlight=False)
    with use_backend(options.backend):
        call = call_of(options.shape, options)
        console.print(f"{WARM_UP} calls to warm up, then {options.iterations}", highlight=False)
        for _ in range(WARM_UP):
            call()
        synchronize(options.device)
        before = ranges.on
        ranges.enable()
        try:
            profile = recorded(call, options) if options.trace else bracketed(call, options)
        finally:
            ranges.enable(before)
    if profile is None:
        console.print(f"{options.iterations} iterations ran between cudaProfilerStart and cudaProfilerStop.")
        return
    console.print(table_of(*rows_of(profile.events(), options.iterations), on_gpu))
    console.print(f"The trace is in {options.trace}: open it in Perfetto or chrome://tracing.", soft_wrap=True)


if __name__ == "__main__":
    main()
