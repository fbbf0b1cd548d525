"""Numerics as a user sees them: what a network reaches in training, and how far off the gradients of a step are.

python -m benchmarks.accuracy                     # writes accuracy.json and gradients.json, prints their tables
python -m benchmarks.accuracy --part gradients --output FOLDER
python -m benchmarks.accuracy --table FOLDER      # measures nothing

Trainings: MobileNetV3-Small on examples/demo.py's digits, stock and fused from the same weights with the same batches,
once for each seed, which also says which digits are the test. Gradients: benchmarks/gradient_errors.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import nn

from . import gradient_errors
from .cpu_runs import COLUMNS, announce, markdown
from .timing import system_info

FOLDER = Path(__file__).parent / "results" / "local"
FILES = {"training": "accuracy.json", "gradients": "gradients.json"}


class Precision(NamedTuple):
    """Of what parameters are, and whether convolutions run in bfloat16 by autocast."""

    dtype: torch.dtype
    autocast: bool


PRECISIONS = {
    "float32": Precision(torch.float32, False),
    "autocast": Precision(torch.float32, True),
    "bfloat16": Precision(torch.bfloat16, False),
}
WORDS = {"float32": "float32", "autocast": "bfloat16 by autocast", "bfloat16": "bfloat16 parameters"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="where the results go")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="measure nothing: print that folder's results")
    training = parser.add_argument_group("training")
    training.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    training.add_argument("--seeds", type=int, default=5)
    training.add_argument("--epochs", type=int, default=10)
    training.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    training.add_argument("--batch", type=int, default=64)
    gradient_errors.add_options(parser.add_argument_group("gradients"))
    options = parser.parse_args(arguments)
    if min(options.seeds, options.draws) < 2 or options.epochs < 1:
        parser.error("expected --seeds and --draws of at least 2, which a deviation needs, and --epochs of at least 1")
    return options


# Trainings ------------------------------------------------------------------------------------------------------------


def train(precision: str, seed: int, options: argparse.Namespace) -> dict:
    """One row: the accuracy after each epoch and the last epoch's mean loss, of stock and of fused."""
    from examples import demo  # here, as tables need no scikit-learn

    kind, begin = PRECISIONS[precision], time.perf_counter()
    given = argparse.Namespace(epochs=options.epochs, batch_size=options.batch, seed=seed, device="cpu")
    training, test = demo.digits(options.size, seed, given.device)
    steps = len(training[1]) // options.batch
    runs = demo.start(given, demo.epoch_batches(training, options.batch, seed)[0], steps)
    accuracy: dict[str, list[float]] = {run.name: [] for run in runs}
    losses: dict[str, float] = {}
    for run, epoch in product(runs, range(options.epochs)):
        model = run.model.to(kind.dtype)
        batches = demo.epoch_batches(training, options.batch, seed * 1000 + epoch)
        losses[run.name] = train_epoch(run, batches, epoch * steps, kind)
        accuracy[run.name].append(accuracy_of(model, test, kind))
    what = {"model": "mobilenet_v3_small", "precision": precision, "seed": seed}
    settings = {"epochs": options.epochs, "size": options.size, "batch": options.batch, "images": len(test[1])}
    found = {"accuracy": accuracy, "loss": losses, "seconds": round(time.perf_counter() - begin, 1)}
    return {**what, **settings, **found, "threads": torch.get_num_threads()}


def train_epoch(run: object, batches: list, first: int, kind: Precision) -> float:
    """The mean loss; ``first`` is the number of steps before, which dropout is seeded with."""
    run.model.train()
    losses = []
    for i, (images, labels) in enumerate(batches, first):
        torch.manual_seed(i)  # both networks drop the same features
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.autocast):
            logits = run.model(images.to(kind.dtype))
        loss = F.cross_entropy(logits.float(), labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.schedule.step()
        losses.append(loss.item())
    return statistics.fmean(losses)


@torch.no_grad()
def accuracy_of(model: nn.Module, data: tuple, kind: Precision) -> float:
    """The part of the images that the model tells, in evaluation and in the precision that it was trained in."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind.autocast):
        logits = model(data[0].to(kind.dtype))
    return (logits.argmax(1) == data[1]).double().mean().item()


def training_rows(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict]]]:
    for precision, seed in product(options.precision, range(options.seeds)):
        yield f"{WORDS[precision]}, seed {seed}", lambda p=precision, s=seed: train(p, s, options)


def last_accuracies(rows: list[dict], precision: str) -> dict[str, list[float]]:
    """In percent, one for each seed."""
    chosen = [row["accuracy"] for row in rows if row["precision"] == precision]
    return {name: [100 * accuracy[name][-1] for accuracy in chosen] for name in ("stock", "fused")}


def mean_and_deviation(numbers: list[float]) -> str:
    return f"{statistics.fmean(numbers):.2f} ± {statistics.stdev(numbers):.2f}"


def training_table(result: dict) -> str:
    """Test accuracy of each precision; bold where the means are further apart than the smaller standard deviation."""
    heads = ["% of the test images, mean ± standard deviation", "stock", "fused", "fused − stock", "in deviations"]
    rows = []
    for precision in dict.fromkeys(row["precision"] for row in result["rows"]):
        found = last_accuracies(result["rows"], precision)
        differences = [f - s for s, f in zip(*found.values(), strict=True)]
        apart = abs(statistics.fmean(differences))
        least = min(statistics.stdev(numbers) for numbers in found.values())
        deviations = f"{apart / least:.2f}" if least else ("0.00" if not apart else "∞")
        cells = [mean_and_deviation(numbers) for numbers in (*found.values(), differences)]
        rows.append([WORDS[precision], *cells, deviations if apart <= least else f"**{deviations}**"])
    return markdown(heads, rows)


# Both -----------------------------------------------------------------------------------------------------------------


def write(result: dict, path: Path) -> None:
    """JSON with each row in one line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in result["rows"])
    rest = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{rest[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def measure(calls: list[tuple[str, Callable[[], dict]]], path: Path) -> dict:
    """Makes the rows, one after the other, and writes what there is after each."""
    system = system_info(torch.device("cpu"))
    system = {name: value for name, value in system.items() if name not in ("threads", "load_average")}
    result = {"system": {**system, "cores": os.cpu_count()}, "left_out": {}, "rows": []}
    announce(result)
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(calls))
        for what, call in calls:
            progress.update(task, description=what)
            result["rows"].append(call())
            write(result, path)
            progress.advance(task)
            progress.console.print(f"{what}: done", markup=False, soft_wrap=True)
    return result


TABLES = {"training": (training_table,), "gradients": (gradient_errors.table, gradient_errors.above_table)}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = {"training": training_rows, "gradients": gradient_errors.rows}
    for part in options.part:
        path = (options.table or options.output) / FILES[part]
        if options.table:
            result = json.loads(path.read_text(encoding="utf-8"))
        else:
            result = measure(list(rows[part](options)), path)
        print(*(make(result) for make in TABLES[part]), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
