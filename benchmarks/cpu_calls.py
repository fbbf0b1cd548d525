"""What one block's call costs before and after its arithmetic: a block of 8 channels on an image of one pixel.

python -m benchmarks.cpu_calls --json result.json

One thread. In evaluation the module alone, in a FusedSequential and frozen; in training forward and backward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from mbn_kernels import FusedInvResBlock, FusedSequential, freeze

from .cpu_runs import COLUMNS, DASH, announce, markdown, new_result
from .timing import medians, take_turns

#: Of each row, whether the block has squeeze-excite.
BLOCKS = {"inverted residual": False, "inverted residual with squeeze-excite": True}
STOCK, ALONE, SEQUENTIAL, FROZEN = "stock modules", "fused", "in a FusedSequential", "frozen"


def block(squeezes: bool, fused: bool = True) -> FusedInvResBlock:
    torch.manual_seed(0)  # all have the same numbers
    return FusedInvResBlock(8, 3, 16, 8, squeezes, "hs", 1, fused=fused)


def evaluations(squeezes: bool) -> dict[str, Callable[[], object]]:
    x = torch.randn(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    modules: dict[str, nn.Module] = {
        STOCK: block(squeezes, fused=False),
        ALONE: block(squeezes),
        SEQUENTIAL: FusedSequential(block(squeezes)),
    }
    modules = {name: module.eval() for name, module in modules.items()}
    modules[FROZEN] = freeze(modules[ALONE], x)
    return {name: lambda module=module: module(x) for name, module in modules.items()}


def steps(squeezes: bool) -> dict[str, Callable[[], object]]:
    # Two values for each channel: of one alone there is no variance.
    x = torch.randn(2, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    modules = {STOCK: block(squeezes, fused=False), ALONE: block(squeezes)}

    def step(module: nn.Module) -> torch.Tensor:
        module.zero_grad()
        with torch.enable_grad():
            module(x).square().sum().backward()
        return next(module.parameters()).grad

    return {name: lambda module=module: step(module) for name, module in modules.items()}


def check(name: str, calls: dict[str, Callable[[], object]]) -> None:
    """Stock's own outputs; loosely, as batch norm over two values, in training, magnifies rounding."""
    expected = calls[STOCK]()
    for who, call in calls.items():
        torch.testing.assert_close(
            call(), expected, rtol=1e-3, atol=1e-3, msg=lambda why, who=who: f"{name}, {who}: {why}"
        )


def measure(rounds: int, burst: int) -> dict:
    result = new_result({}, {})
    announce(result)
    torch.set_num_threads(1)
    kinds = [(way, name) for way in ("evaluation", "training") for name in BLOCKS]
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress, torch.no_grad():
        for way, name in progress.track(kinds, description=""):
            calls = (evaluations if way == "evaluation" else steps)(BLOCKS[name])
            check(name, calls)
            times = take_turns(calls, rounds=rounds, burst=burst, pause=0)
            result["rows"].append({"block": name, "way": way, "seconds": medians(times)})
    return result


def table(result: dict) -> str:
    heads = ["µs a call", STOCK, ALONE, SEQUENTIAL, FROZEN]
    rows = [
        [f"{row['block']}, {row['way']}"]
        + [f"{row['seconds'][name] * 1e6:.1f}" if name in row["seconds"] else DASH for name in heads[1:]]
        for row in result["rows"]
    ]
    return markdown(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_calls", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="turns of each")
    parser.add_argument("--burst", type=int, default=500, help="calls a turn")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here")
    options = parser.parse_args(arguments)
    result = measure(options.rounds, options.burst)
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
