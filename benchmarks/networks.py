"""Whole networks, a training step and the evaluation of one image, every implementation taking turns in one run.

python -m benchmarks.networks --threads 2 --json result.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mbn_kernels import models

from .implementations import IMPLEMENTATIONS, Implementation, default_device, evaluation, network_training
from .timing import medians, system_info, take_turns

TITLES = {
    "mobilenet_v1": "V1",
    "mobilenet_v2": "V2",
    "mobilenet_v3_large": "V3-Large",
    "mobilenet_v3_small": "V3-Small",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(models.NETWORKS), choices=models.NETWORKS)
    parser.add_argument("--batch", type=int, default=16, help="images of a training step")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each implementation")
    parser.add_argument("--burst", type=int, help="calls a turn (default: 4 steps, 20 evaluations)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each turn")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result here")
    parser.add_argument("--table", type=Path, metavar="PATH", help="measure nothing: print the table of this JSON file")
    return parser.parse_args(arguments)


def measure(
    options: argparse.Namespace, model: str, prepare: Callable, batch: int, burst: int, step: Callable[[str], None]
) -> dict[str, float]:
    """Median seconds of each implementation."""
    calls = {}
    shape = (batch, 3, options.resolution, options.resolution)
    for implementation in chosen(options):
        step(implementation.name)
        calls[implementation.name] = prepare(
            implementation, lambda fused: getattr(models, model)(fused=fused), shape, options.device
        )
        for _ in range(2):  # compile and warm up outside the turns
            calls[implementation.name]()
    step("taking turns")
    return medians(take_turns(calls, rounds=options.rounds, burst=options.burst or burst, pause=options.pause))


def chosen(options: argparse.Namespace) -> list[Implementation]:
    return [i for i in IMPLEMENTATIONS if not (i.compiled and options.no_compile)]


def table(result: dict) -> str:
    """The result as the README's table: milliseconds, and how many times as fast as the best of stock ours is."""
    names = [i.name for i in IMPLEMENTATIONS if all(i.name in row["seconds"] for row in result["rows"])]
    lines = [" | ".join(["", "", *names, "fused against the best of the others", ""]).strip()]
    lines += ["|".join(["", "---", *["---:"] * (len(names) + 1), ""])]
    for row in result["rows"]:
        seconds = row["seconds"]
        ratio = min(t for name, t in seconds.items() if name != "fused") / seconds["fused"]
        title = f"{TITLES[row['model']]}, {row['direction']}, batch {row['batch']}"
        lines.append(f"| {title} | " + " | ".join(f"{seconds[n] * 1e3:.1f}" for n in names) + f" | {ratio:.2f}× |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        return print(table(json.loads(options.table.read_text())))
    if options.threads:
        torch.set_num_threads(options.threads)
    result = {"resolution": options.resolution, "system": system_info(options.device), "rows": []}
    print(", ".join(f"{name} {value}" for name, value in result["system"].items()))
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        total = len(options.model) * 2 * (len(chosen(options)) + 1)
        task = progress.add_task("", total=total)
        for model in options.model:
            for direction, prepare, batch, burst in (
                ("training step", network_training, options.batch, 4),
                ("evaluation", evaluation, 1, 20),
            ):

                def step(what: str, label: str = f"{model} {direction}") -> None:
                    progress.update(task, advance=1, description=f"{label}: {what}")

                seconds = measure(options, model, prepare, batch, burst, step)
                result["rows"].append({"model": model, "direction": direction, "batch": batch, "seconds": seconds})
                if options.json:
                    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
