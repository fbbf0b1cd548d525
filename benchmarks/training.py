"""A network's training step and its evaluation of one image, every implementation taking turns in one run.

python -m benchmarks.training --model mobilenet_v3_large --batch 16 --json result.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from mbn_kernels import models

from .implementations import IMPLEMENTATIONS, default_device, evaluation, network_training
from .timing import medians, system_info, take_turns


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v3_large", choices=models.NETWORKS)
    parser.add_argument("--batch", type=int, default=16, help="images of a training step")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=5, help="turns each implementation gets")
    parser.add_argument("--burst", type=int, help="timed calls a turn (default: 4 training, 20 evaluation)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each turn")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result here")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, prepare: Callable, batch: int, burst: int) -> dict[str, float]:
    """Median seconds of each implementation."""
    calls = {}
    for implementation in IMPLEMENTATIONS:
        if implementation.compiled and options.no_compile:
            continue
        calls[implementation.name] = prepare(
            implementation,
            lambda fused: getattr(models, options.model)(fused=fused),
            (batch, 3, options.resolution, options.resolution),
            options.device,
        )
        for _ in range(2):  # compile and warm up outside the turns
            calls[implementation.name]()
    return medians(take_turns(calls, rounds=options.rounds, burst=options.burst or burst, pause=options.pause))


def print_table(title: str, times: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, median in times.items():
        print(f"  {name:<20} {median * 1e3:9.2f} ms   fused is {median / times['fused']:.2f}x as fast")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    info = system_info(options.device)
    print(", ".join(f"{name} {value}" for name, value in info.items()))

    result = {"model": options.model, "resolution": options.resolution, "system": info, "seconds": {}}
    for direction, prepare, batch, burst in (
        ("training step", network_training, options.batch, 4),
        ("evaluation", evaluation, 1, 20),
    ):
        times = measure(options, prepare, batch, burst)
        print_table(f"{options.model} {direction}, batch {batch}, {options.resolution}x{options.resolution}", times)
        result["seconds"][f"{direction}, batch {batch}"] = times
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
