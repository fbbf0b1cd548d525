"""Trains MobileNetV3-Small on real handwritten digits twice, stock and fused, from the same weights and batches.

The two networks take turns, an epoch each, so that both are timed on a machine in the same state. A live display shows
both; then come a table and demo.png. The exit status is 0 where both reach 97% on images they have not seen and their
first 20 losses agree to 1e-3.

    python examples/demo.py --output demo.png
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbn_kernels.models import mobilenet_v3_small

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    sys.exit(f"demo: {error.name} is missing: run `pip install -e '.[demo]'`")

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LEAST_ACCURACY = 0.97
COMPARED_STEPS = 20
MOST_DIFFERENCE = 1e-3
LEARNING_RATE = 2e-3
WARM_UP_EPOCHS = 3
SHOWN_STEPS = (1, 5, 10, 20, 50, 100, 200)
MEAN_OF_STEPS = 10  # in the picture

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """One network in training, and what was measured of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    saved_bytes: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="side in pixels to which the 8x8 digits are scaled up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="demo.png", help="where to write the picture of both loss curves")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.size < 8 or args.batch_size < 2:
        parser.error("expected --epochs of at least 1, --size of at least 8 and --batch-size of at least 2")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch.cuda.is_available() is false")
    return args


def digits(size: int, seed: int, device: str) -> tuple[Batch, Batch]:
    """scikit-learn's 1797 digits as (training, test): images [N, 1, size, size] of mean 0 and deviation 1, labels."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None], torch.tensor(data.target)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    split = train_test_split(range(len(labels)), test_size=0.25, stratify=data.target, random_state=seed)
    images = (images - images[split[0]].mean()) / images[split[0]].std()
    images = images.to(device, memory_format=torch.channels_last)
    labels = labels.to(device)
    return (images[split[0]], labels[split[0]]), (images[split[1]], labels[split[1]])


def epoch_batches(data: Batch, batch_size: int, seed: int) -> list[Batch]:
    """The epoch's full batches: the digits in random order, each turned, moved and stretched a little at random."""
    (images, labels), generator = data, torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[: len(labels) // batch_size * batch_size]
    angle, stretch, *move = torch.rand(4, len(order), generator=generator) * 2 - 1
    angle, stretch = angle * math.radians(10), 1 + 0.1 * stretch
    rows = [
        torch.stack([angle.cos(), -angle.sin(), 0.1 * move[0]], 1),
        torch.stack([angle.sin(), angle.cos(), 0.1 * move[1]], 1),
    ]
    affine = stretch[:, None, None] * torch.stack(rows, 1)
    grid = F.affine_grid(affine.to(images.device), [len(order), *images.shape[1:]], align_corners=False)
    images = F.grid_sample(images[order], grid, padding_mode="border", align_corners=False)
    # Copies, so that a batch that is kept for backward does not keep the epoch.
    images = [part.clone(memory_format=torch.channels_last) for part in images.split(batch_size)]
    return list(zip(images, labels[order].split(batch_size), strict=True))


def measure_saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Memory that autograd keeps from a forward pass for its backward, parameters and buffers left out.

    It runs a whole step on a copy, which warms up what the first timed step would have to pay for.
    """
    model = copy.deepcopy(model).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        # Held in the dictionary, a storage cannot be freed and its address taken by the next.
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def start(args: argparse.Namespace, batch: Batch, steps_per_epoch: int) -> list[Run]:
    """The stock and the fused network with the same weights, each with an optimiser of its own."""
    warm_up, total = WARM_UP_EPOCHS * steps_per_epoch, args.epochs * steps_per_epoch
    state, runs = None, []
    for name, fused in (("stock", False), ("fused", True)):
        torch.manual_seed(args.seed)
        # A faster average than the published 0.01, which a few hundred steps would not fill.
        model = mobilenet_v3_small(10, in_channels=1, bn_momentum=0.1, fused=fused)
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state, strict=True)
        model = model.to(args.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
        # Quadratic warm-up, then cosine. Early large steps are chaotic: they would blow float32's rounding up a
        # thousandfold within 20 steps, in stock against stock with another memory layout just the same.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(1.0, (i + 1) / warm_up) ** 2 * (1 + math.cos(math.pi * i / total)) / 2
        )
        runs.append(Run(name, model, optimizer, schedule, measure_saved_bytes(model, batch)))
    return runs


def wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def train_step(run: Run, batch: Batch, seed: int, device: str) -> None:
    torch.manual_seed(seed)  # both networks drop the same features
    wait_for(device)
    begin = time.perf_counter()
    run.optimizer.zero_grad()
    loss = F.cross_entropy(run.model(batch[0]), batch[1])
    loss.backward()
    run.optimizer.step()
    wait_for(device)
    run.seconds.append(time.perf_counter() - begin)
    run.schedule.step()
    run.losses.append(loss.item())


@torch.no_grad()
def measure_accuracy(model: nn.Module, data: Batch) -> float:
    model.eval()
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def train(args: argparse.Namespace, runs: list[Run], training: Batch, test: Batch, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "steps  loss {task.fields[loss]:6.4f}  {task.fields[ms]:5.1f} ms/step  test {task.fields[acc]:5.1%}"
        ),
        TimeElapsedColumn(),
    )
    steps_per_epoch = len(training[1]) // args.batch_size
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {
            run.name: progress.add_task(run.name, total=args.epochs * steps_per_epoch, loss=math.nan, ms=0.0, acc=0.0)
            for run in runs
        }
        for epoch in range(args.epochs):
            batches = epoch_batches(training, args.batch_size, args.seed * 1000 + epoch)
            # Who goes first changes with every epoch.
            for run in runs if epoch % 2 == 0 else runs[::-1]:
                run.model.train()
                for i, batch in enumerate(batches):
                    train_step(run, batch, epoch * steps_per_epoch + i, args.device)
                    progress.update(
                        tasks[run.name], advance=1, loss=run.losses[-1], ms=1e3 * run.step_seconds, acc=run.accuracy
                    )
                run.accuracy = measure_accuracy(run.model, test)
                progress.update(tasks[run.name], acc=run.accuracy)


def relative_differences(runs: list[Run]) -> list[float]:
    return [abs(a - b) / abs(a) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]


def table(args: argparse.Namespace, runs: list[Run]) -> Table:
    stock, fused = runs
    differences = relative_differences(runs)
    steps = [s for s in SHOWN_STEPS if s < len(differences)] + [len(differences)]
    found = Table(
        title=f"MobileNetV3-Small, {args.size}x{args.size} digits, batch {args.batch_size}, {args.device}",
        caption="Losses: relative difference. Later ones part by rounding, as stock's own do in another memory layout.",
    )
    found.add_column("")
    for heading in ("stock PyTorch", "fused", "fused against stock"):
        found.add_column(heading, justify="right")
    for s in steps:
        found.add_row(
            f"loss at step {s}", f"{stock.losses[s - 1]:.6f}", f"{fused.losses[s - 1]:.6f}", f"{differences[s - 1]:.1e}"
        )
    first = differences[:COMPARED_STEPS]
    found.add_row(f"largest of steps 1 to {len(first)}", "", "", f"{max(first):.1e}", end_section=True)
    found.add_row("test accuracy", f"{stock.accuracy:.2%}", f"{fused.accuracy:.2%}", "")
    found.add_row(
        "time per step, median",
        f"{1e3 * stock.step_seconds:.1f} ms",
        f"{1e3 * fused.step_seconds:.1f} ms",
        f"{stock.step_seconds / fused.step_seconds:.2f}x as fast",
    )
    found.add_row(
        "saved for backward",
        f"{stock.saved_bytes / 2**20:.1f} MiB",
        f"{fused.saved_bytes / 2**20:.1f} MiB",
        f"{fused.saved_bytes / stock.saved_bytes:.2f} of stock's",
    )
    return found


def plot(args: argparse.Namespace, runs: list[Run]) -> None:
    """Both loss curves and their distance, told apart by line and marker, not by colour."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6.5), height_ratios=(2, 1), dpi=120)
    steps = range(1, len(runs[0].losses) + 1)
    every = max(1, len(steps) // 20)
    for run, style in zip(runs, ({"color": "0.6", "linewidth": 3}, {"color": "0", "linestyle": "--"}), strict=True):
        marker = {"marker": "o" if run.name == "fused" else "s", "markevery": every, "markerfacecolor": "white"}
        label = f"{run.name}: {1e3 * run.step_seconds:.0f} ms per step, {run.accuracy:.1%} of the test images right"
        means = [statistics.fmean(run.losses[max(0, s - MEAN_OF_STEPS) : s]) for s in steps]
        above.plot(steps, means, label=label, **style, **marker)
    above.set(yscale="log", ylabel=f"cross-entropy loss (nats), mean of {MEAN_OF_STEPS} steps")
    above.set_title("MobileNetV3-Small on handwritten digits, same weights and batches")
    above.legend()
    # Equal losses have no place on a logarithmic axis.
    below.plot(
        steps, [max(d, 1e-9) for d in relative_differences(runs)], color="0", linewidth=1, label="fused against stock"
    )
    compared = min(COMPARED_STEPS, len(steps))
    below.plot([1, compared], [MOST_DIFFERENCE] * 2, color="0", linestyle=":", label=f"allowed in the first {compared}")
    below.set(yscale="log", ylabel="relative difference\n(fraction of the loss)")
    below.set_xlabel(f"training step ({args.batch_size} images each)")
    below.legend()
    figure.tight_layout()
    figure.savefig(args.output)
    plt.close(figure)


def failures(runs: list[Run]) -> list[str]:
    """One sentence for each promise that was not kept."""
    found = [
        f"the {run.name} network got {run.accuracy:.2%} of the test images right, less than {LEAST_ACCURACY:.0%}"
        for run in runs
        if run.accuracy < LEAST_ACCURACY
    ]
    for step, difference in enumerate(relative_differences(runs)[:COMPARED_STEPS], 1):
        if not difference <= MOST_DIFFERENCE:  # NaN is a disagreement, too
            found.append(f"the losses at step {step} differ by {difference:.1e}, more than {MOST_DIFFERENCE:.0e}")
            break
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device.startswith("cuda"):
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # TF32 would round stock's convolutions at 1e-3
    console = Console()
    training, test = digits(args.size, args.seed, args.device)
    steps_per_epoch = len(training[1]) // args.batch_size
    if not steps_per_epoch:
        console.print(f"demo: --batch-size: expected at most {len(training[1])} images, got {args.batch_size}")
        return 2
    runs = start(args, epoch_batches(training, args.batch_size, args.seed)[0], steps_per_epoch)
    train(args, runs, training, test, console)
    console.print(table(args, runs))
    plot(args, runs)
    console.print(f"wrote {args.output}", soft_wrap=True)
    problems = failures(runs)
    for problem in problems:
        console.print(f"FAILED: {problem}", style="bold red", soft_wrap=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
