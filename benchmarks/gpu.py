"""On a GPU: single stages against the speed of a copy, blocks and whole networks against stock PyTorch.

python -m benchmarks.gpu --json result.json
python -m benchmarks.gpu --only blocks --model mobilenet_v3_large --jobs 8

What each gives is compared with float64 just before it is timed: who is wrong has no time (gpu_checks.py).

Every time is a median of calls between which the second-level cache is emptied. Those of stages and blocks are the
GPU's alone, as in a network that keeps it busy; those of networks are from a call's start to its end. With
MBN_TRITON_TUNE=1 each kernel's tile size, and how the CUDA backend runs a block, is measured first
(mbn_kernels/backends/triton/tuning.py).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from mbn_kernels import available_backends, models

from .gpu_blocks import blocks, compile_ahead, measure_block, measure_ways
from .gpu_networks import measure_network, network_cases
from .gpu_operators import measure_stage, measured_stages
from .gpu_tables import line, tables
from .gpu_timing import Setting, copy_bandwidth, gpu_system_info

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: "blocks" are the three before it.
PARTS = ("operators", "layers", "ways", "blocks", "networks")
#: Images of the ways' second table: there the starts of kernels weigh most.
ONE = 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="operators: single stages; layers: each block of a network; ways: how the CUDA backend may evaluate a "
        "block; blocks: these three; networks",
    )
    parser.add_argument(
        "--batch", type=int, default=256, help="images of a stage, a block, a training step, the first evaluation"
    )
    parser.add_argument("--model", nargs="+", default=list(models.NETWORKS), choices=models.NETWORKS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--resolution", type=int, default=224, help="of the networks' images")
    parser.add_argument(
        "--quick", action="store_true", help="three blocks of a network, its depthwise stages, no smaller evaluations"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--jobs", type=int, default=0, help="compile the blocks' kernels in so many processes first")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result here, row by row")
    parser.add_argument("--table", type=Path, metavar="PATH", help="measure nothing: print this JSON file's tables")
    options = parser.parse_args(arguments)
    options.dtype = DTYPES[options.dtype]
    options.milliseconds, options.network_milliseconds = (25, 400) if options.quick else (50, 1000)
    return options


def rows(options: argparse.Namespace, copy: float) -> Iterator[dict]:
    """``copy``: bytes a second."""
    setting = Setting(options.device, options.dtype, options.batch, copy, options.milliseconds)
    chosen = {model: blocks(model, options.quick) for model in options.model}
    if wants(options, "operators"):
        shapes = dict.fromkeys(shape for model in options.model for shape in measured_stages(model, setting))
        for shape in shapes:
            if shape.conv == "depthwise" or not options.quick:
                yield from measure_stage(shape, setting)
    if wants(options, "ways") and available_backends()["cuda"] == "available" and options.dtype.itemsize == 2:
        for model, found in chosen.items():
            for batch in (options.batch, ONE):
                for shape in found:
                    yield from measure_ways(model, shape, setting._replace(batch=batch))
    if wants(options, "layers"):
        for model, found in chosen.items():
            for shape, times in found.items():
                yield from measure_block(model, shape, times, setting, not options.no_compile)
    if wants(options, "networks"):
        for model in options.model:
            for case in network_cases(options.batch):
                if case.essential or not options.quick:
                    yield measure_network(model, case, options)


def wants(options: argparse.Namespace, part: str) -> bool:
    return part in options.only or ("blocks" in options.only and part in PARTS[: PARTS.index("blocks")])


def prepare(options: argparse.Namespace, copy: float) -> None:
    """Compiles ahead what the blocks will run."""
    if not options.jobs or not wants(options, "layers"):
        return
    setting = Setting(options.device, options.dtype, options.batch, copy, options.milliseconds)
    shapes = list(dict.fromkeys(shape for model in options.model for shape in blocks(model, options.quick)))
    for failure in compile_ahead(shapes, setting, not options.no_compile, options.jobs):
        print(f"compiling ahead: {failure}", flush=True)


def show(result: dict) -> None:
    console = Console(width=max(Console().width, 180))  # no column is worth cutting off
    console.print(", ".join(f"{name} {value}" for name, value in result["system"].items()), markup=False)
    console.print(f"a copy: {result['copy_bandwidth']:.0f} GB/s")
    for table in tables(result):
        console.print(table)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        return show(json.loads(options.table.read_text()))
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA GPU, and torch.cuda.is_available() is false here.")
    if available_backends()["triton"] != "available":
        raise SystemExit(f"benchmarks.gpu needs the Triton backend: {available_backends()['triton']}.")
    import triton

    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)  # else torch.compile sets another for both
    options.device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True  # stock at its best
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    copy = copy_bandwidth(options.device)
    system = {**gpu_system_info(options.device), "dtype": str(options.dtype)}
    result = {"system": system, "copy_bandwidth": copy / 1e9, "rows": []}
    prepare(options, copy)
    for row in rows(options, copy):
        print(line(row), flush=True)
        result["rows"].append(row)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


if __name__ == "__main__":
    main()
