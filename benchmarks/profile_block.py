"""One block of a network under a profiler, its stages as named ranges (mbn_kernels/ranges.py).

python -m benchmarks.profile_block --model mobilenet_v3_large --block 13 --iterations 20

On a GPU the loop is bracketed with the CUDA profiler API, which `nsys profile --capture-range=cudaProfilerApi` waits
for. On a CPU, and with --trace also on a GPU, torch.profiler records it: the ranges are printed as a table, and the
trace is written for Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mbn_kernels import models, ranges, use_backend
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import BlockShape, layer_shapes

from .implementations import Call, default_device
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
    parser.add_argument("--backend", help="of mbn_kernels (default: the one that it chooses)")
    parser.add_argument("--trace", type=Path, metavar="PATH", help="where torch.profiler's trace goes")
    options = parser.parse_args(arguments)
    options.device = default_device()
    on_gpu = options.device.type == "cuda"
    options.batch = options.batch or (256 if on_gpu else 16)
    options.dtype = DTYPES[options.dtype or ("bfloat16" if on_gpu else "float32")]
    shapes = layer_shapes(options.model, options.resolution)
    if not 0 <= options.block < len(shapes):
        parser.error(f"argument --block: expected 0 to {len(shapes) - 1} for {options.model}, got {options.block}")
    if options.iterations < 1 or options.batch < 1:
        parser.error("arguments --iterations and --batch: expected positive numbers")
    options.shape = shapes[options.block]
    if not on_gpu:
        options.trace = options.trace or Path(f"profile-{options.model}-{options.block}.json")
    return options


def call_of(shape: BlockShape, options: argparse.Namespace) -> Call:
    """A training step of the block, to the gradients of its input and parameters, or its evaluation."""
    torch.manual_seed(0)
    training, device, dtype = options.direction == "training", options.device, options.dtype
    module = build_block(shape).to(device).train(training)
    x = torch.randn(options.batch, shape.in_channels, shape.height, shape.width, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    if not training:
        module = module.to(dtype)

        def evaluate() -> None:
            with torch.no_grad():
                module(x)

        return evaluate
    leaves = [x.requires_grad_(), *module.parameters()]

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return module(x)

    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, gradient)


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


def rows_of(profile: torch.profiler.profile, iterations: int) -> tuple[dict[str, tuple[float, float, float]], float]:
    """(of each range: times an iteration, microseconds of the host in it, of the GPU's kernels started in it; the
    microseconds of an iteration), in the order in which they ran first.
    """
    # A range has a second event on a GPU, of the kernels' span there.
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    found: dict[str, list[float]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith("mbn::") and "/" in event.name:
            row = found.setdefault(event.name, [0.0, 0.0, 0.0])
            for i, value in enumerate((1, event.cpu_time_total, event.device_time_total)):
                row[i] += value / iterations
    whole = sum(event.cpu_time_total for event in events if event.name == ITERATION) / iterations
    return {name: tuple(row) for name, row in found.items()}, whole


def table_of(rows: dict[str, tuple[float, float, float]], whole: float, on_gpu: bool) -> Table:
    table = Table(title="Ranges, microseconds an iteration", title_justify="left")
    table.add_column("range", no_wrap=True)
    for name in ("calls", "host", "of the iteration", *(["GPU"] if on_gpu else [])):
        table.add_column(name, justify="right", no_wrap=True)
    outside = whole - sum(host for _, host, _ in rows.values())
    for name, (calls, host, gpu) in {**rows, "outside of them": (1.0, outside, 0.0)}.items():
        table.add_row(name, f"{calls:g}", f"{host:.1f}", f"{host / whole:.1%}", *([f"{gpu:.1f}"] if on_gpu else []))
    table.add_section()
    device = [f"{sum(gpu for *_, gpu in rows.values()):.1f}"] if on_gpu else []
    table.add_row("an iteration", "1", f"{whole:.1f}", "100.0%", *device)
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
        ranges.enable()
        if options.trace is None:
            bracketed(call, options)
            console.print(f"{options.iterations} iterations ran between cudaProfilerStart and cudaProfilerStop.")
            return
        profile = recorded(call, options)
    console.print(table_of(*rows_of(profile, options.iterations), on_gpu))
    console.print(f"The trace is in {options.trace}: open it in Perfetto or chrome://tracing.", soft_wrap=True)


if __name__ == "__main__":
    main()
