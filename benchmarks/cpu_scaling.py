"""How the time of an image grows with batch, resolution and width, and how much of the CPU's peak it reaches.

python -m benchmarks.cpu_scaling --json result.json --chart result.png

One of the three changes at a time, the others stay at --at. The peak is that of a bare loop of fused multiply-adds in
float32, measured in each row's process with its threads; a network's operations are two for each multiply-add.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from mbn_kernels import models

from . import cpu_charts
from .ceilings import peak_gflops
from .cpu_contestants import OTHERS, Case, left_out, takes_part, versions
from .cpu_contestants import measure as measure_case
from .cpu_processes import Message
from .cpu_runs import (
    DASH,
    add_options,
    announce,
    command,
    markdown,
    names_of,
    new_result,
    peaks,
    ratio,
    run,
    share,
    timing,
    title,
)

AXES = ("batch", "resolution", "width")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v3_large", choices=models.NETWORKS)
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--resolution", nargs="*", type=int, default=[96, 128, 160, 192, 224, 256, 288, 320])
    parser.add_argument("--width", nargs="*", type=float, default=[0.35, 0.5, 0.75, 1.0, 1.4])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--at",
        nargs=3,
        type=float,
        default=[1, 224, 1.0],
        metavar=tuple(axis.upper() for axis in AXES),
        help="where the two stay that do not change (default: 1 224 1)",
    )
    parser.add_argument("--against", nargs="*", choices=OTHERS, default=["onnxruntime", "openvino"])
    add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    options.at = {"batch": int(options.at[0]), "resolution": int(options.at[1]), "width": options.at[2]}
    return options


def points(at: dict[str, float], sweeps: dict[str, Iterable[float]]) -> list[dict[str, float]]:
    """Every point of every axis; the one that they share once."""
    found = [{**at, axis: value} for axis in AXES for value in sweeps[axis]]
    return [point for i, point in enumerate(found) if point not in found[:i]]


def multiply_adds(case: Case) -> int:
    """Of one image: those of convolutions and linear layers."""
    model = getattr(models, case.model)(width_mult=case.width, fused=False).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, case.resolution, case.resolution))
    return counter.get_total_flops() // 2


def measure(arguments: dict) -> Iterator[Message]:
    """One row, as that of cpu_contestants.measure, and what it is set against."""
    yield "step", "peak"
    more = {"peak_gflops": peak_gflops(), "multiply_adds": multiply_adds(Case(*arguments["case"]))}
    for kind, value in measure_case(arguments):
        yield kind, {**value, **more} if kind == "row" else value


def measure_all(options: argparse.Namespace) -> tuple[dict, bool]:
    """The result, and whether it is complete."""
    out = left_out(options.against, ["float32"])
    result = {**new_result(out, versions(options.against)), "at": options.at}
    announce(result)
    given = {"names": takes_part(options.against, "float32", out), "timing": timing(options)}
    requests = [
        (Case(options.model, threads=threads, **point), given)
        for threads in options.threads
        for point in points(options.at, vars(options))
    ]
    return result, run(result, "benchmarks.cpu_scaling:measure", requests, options.json, options.keep)


def table(result: dict) -> str:
    """Milliseconds an image and the part of the peak, and ours against the best of the others."""
    rows, names = result["rows"], names_of(result["rows"])
    known = peaks(rows)

    def cell(row: dict, name: str) -> str:
        if name not in row["seconds"]:
            return DASH
        part = share(row, name, known)
        return f"{row['seconds'][name] / row['batch'] * 1e3:.2f}" + (f", {part:.0%}" if part else "")

    heads = ["ms an image, part of the peak", *names, "ours against the best of the others"]
    text = markdown(heads, [[title(row), *(cell(row, name) for name in names), ratio(row)] for row in rows])
    for threads, peak in known.items():
        text += f"\n\nPeak, {threads} thread{'s' * (threads > 1)}: " + (f"{peak:.0f} GFLOP/s" if peak else "not known")
    return text


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command(options, lambda: measure_all(options), table, cpu_charts.curves)


if __name__ == "__main__":
    main()
