"""Whole networks in evaluation on a CPU, against torch.compile, onnxruntime, OpenVINO and ExecuTorch (XNNPACK).

python -m benchmarks.cpu_peers --json result.json
python -m benchmarks.cpu_peers --table result.json --chart result.png result.svg

The others come with `pip install -e '.[cpu-peers]'`; who is missing is said and left out. All have the same weights,
and each gets the image in the layout that it likes (cpu_contestants.py). First the logits of each are compared with
those of the plain twin in float64: who is wrong has no time. Then they take turns, in bursts after pauses, as threads
of one library that spin would slow the next. Every row is a process of its own, with so many threads.
"""

from __future__ import annotations

import argparse
from itertools import product

from mbn_kernels import models

from . import cpu_charts
from .cpu_contestants import DTYPES, OTHERS, Case, left_out, takes_part, versions
from .cpu_runs import add_options, announce, command, new_result, run, table, timing


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(models.NETWORKS), choices=models.NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--against", nargs="*", choices=OTHERS, default=OTHERS, help="nobody, if nobody is named")
    add_options(parser, rounds=5)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> tuple[dict, bool]:
    """The result, and whether it is complete."""
    out = left_out(options.against, options.dtype)
    result = new_result(out, versions(options.against))
    announce(result)
    requests = []
    for dtype, threads, model, batch in product(options.dtype, options.threads, options.model, options.batch):
        case = Case(model, batch, threads, dtype, options.resolution, options.width)
        requests.append((case, {"names": takes_part(options.against, dtype, out), "timing": timing(options)}))
    return result, run(result, "benchmarks.cpu_contestants:measure", requests, options.json, options.keep)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    command(options, lambda: measure(options), table, cpu_charts.bars)


if __name__ == "__main__":
    main()
