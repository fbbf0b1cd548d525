"""Trains an image classifier with fused MobileNet blocks: on one process or many, on the CPU or on GPUs.

    python examples/train.py                                        # handwritten digits, MobileNetV3-Small
    python examples/train.py --data PATH --model mobilenet_v3_large --size 224 --epochs 90 --batch-size 256
    python examples/train.py --data PATH --model timm:mobilenetv3_large_100 --size 224       # or torchvision:NAME
    torchrun --nproc-per-node 2 examples/train.py --sync-bn         # gloo on the CPU, NCCL on GPUs
    torchrun --nproc-per-node 8 examples/train.py --data PATH --size 224 --batch-size 1024 --lr 0.5 --epochs 300 \\
        --amp bfloat16 --ema 0.9999 --checkpoint run.pt --checkpoint-every 500 --resume --json-log run.jsonl

PATH has a folder for each class, or folders train and val that do; without them every fifth image validates.
A run that was killed goes on with --resume, and on the CPU ends with the same weights to the last bit: order and
augmentation depend on (seed, epoch, image) alone, and all other state is in the checkpoint. (With three processes or
more, the first step after it may sum gradients in another order.)
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import pickle
import random
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import mbn_kernels
from mbn_kernels import models

try:
    from PIL import Image
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f"train: {error.name} is missing: run `pip install -e '.[demo]'`")

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = timedelta(minutes=10)  # of each collective: a process whose peer is gone ends instead of waiting for ever
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as published weights expect
PRECISIONS = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUNDS = {  # option: from, to below
    **dict.fromkeys(("epochs", "batch_size", "size", "limit_steps", "checkpoint_every", "log_every"), (1, math.inf)),
    **dict.fromkeys(("lr", "warm_up_epochs", "weight_decay", "workers"), (0, math.inf)),
    **dict.fromkeys(("momentum", "label_smoothing", "ema", "bn_momentum"), (0, 1)),
}
# What a run may change that goes on from a checkpoint; all other options change the numbers.
FREE = {"workers", "device", "checkpoint", "checkpoint_every", "resume", "json_log", "log_every"}

Item = tuple[Path | Image.Image, int]
Batch = tuple[Tensor, Tensor]


def fail(sentence: str) -> NoReturn:
    if RANK != 0:  # most mistakes are everyone's: the first process speaks, and its end has torchrun end the others
        time.sleep(10)
    sys.exit(f"train: {sentence}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="digits", metavar="PATH", help="a folder of images, or digits (scikit-learn's, the default)")
    add("--model", default="mobilenet_v3_small", help=f"{', '.join(models.NETWORKS)}, torchvision:NAME or timm:NAME")
    add("--fuse", action=switch, default=True, help="fused blocks, or stock PyTorch")
    add("--size", type=int, default=64, help="side of the images in pixels")
    add("--epochs", type=int, default=15)
    add("--batch-size", type=int, default=64, help="images of a step, shared out over all processes")
    add("--lr", type=float, default=0.1, help="largest learning rate: linear warm-up, then cosine")
    add("--warm-up-epochs", type=float, default=2)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4, help="of weights; biases and batch norms have none")
    add("--label-smoothing", type=float, default=0.1)
    add("--bn-momentum", type=float, default=0.1, help="of every batch norm; long runs of MobileNetV3 used 0.01")
    add("--sync-bn", action="store_true", help="batch statistics over all processes")
    add("--ema", type=float, default=0, metavar="DECAY", help="validate an average of the weights, as of 0.999")
    add("--amp", choices=PRECISIONS, default="off", help="autocast")
    add("--channels-last", action=switch, default=True)
    add("--compile", action="store_true")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, help="processes that load images, per process that trains (default: digits 0, else 4)")
    add("--limit-steps", type=int, metavar="N", help="at most N steps of training and of validation an epoch")
    add("--checkpoint", type=Path, metavar="PATH", help="written at each epoch's end; weights are in its entry `model`")
    add("--checkpoint-every", type=int, metavar="STEPS", help="written within the epoch, too")
    add("--resume", action="store_true", help="go on from --checkpoint where that file exists")
    add("--json-log", type=Path, metavar="PATH", help="one object a line (torchrun takes --log for its own)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="how often a step's loss is shown and logged")
    args = parser.parse_args(argv)
    for name, (least, end) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value < end:
            fail(f"--{name.replace('_', '-')}: expected a number from {least} to below {end}, got {value}")
    if args.batch_size % WORLD or args.batch_size < 2 * WORLD:
        fail(f"--batch-size: expected a multiple of {WORLD}, {2 * WORLD} or more, got {args.batch_size}")
    if args.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        fail(f"--device cuda: expected {LOCAL_RANK + 1} GPUs or more, got {torch.cuda.device_count()}")
    if args.device == "cpu" and args.amp == "float16":
        fail("--amp float16: expected a GPU; the CPU has bfloat16")
    if not args.checkpoint and (args.resume or args.checkpoint_every):
        fail("--checkpoint: expected a path, as --resume or --checkpoint-every is given")
    if args.checkpoint and args.checkpoint.exists() and not args.resume:
        fail(f"--checkpoint: {args.checkpoint} exists: add --resume to go on from it, or remove it")
    if args.workers is None:
        args.workers = 0 if args.data == "digits" else 4
    args.device = torch.device("cuda", LOCAL_RANK) if args.device == "cuda" else torch.device("cpu")
    return args


class Data(NamedTuple):
    name: str  # tells these images from others
    classes: list[str]
    training: list[Item]
    validation: list[Item]


def split(items: list) -> tuple[list, list]:
    """(training, validation): every fifth item validates, whatever the seed."""
    return [item for i, item in enumerate(items) if i % 5 != 4], items[4::5]


def read_digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fail("scikit-learn is missing: run `pip install -e '.[demo]'`")
    digits = load_digits()  # 8x8 pixels from 0 to 16
    pictures = [Image.fromarray((15.9375 * picture).astype("uint8")) for picture in digits.images]
    return Data("digits", [*"0123456789"], *split(list(zip(pictures, digits.target.tolist(), strict=True))))


def read_folder(root: Path) -> Data:
    def images(folder: Path) -> list[tuple[Path, str]]:
        classes = sorted(p for p in folder.iterdir() if p.is_dir())
        return [(p, c.name) for c in classes for p in sorted(c.rglob("*")) if p.suffix.lower() in SUFFIXES]

    if not root.is_dir():
        fail(f"--data: expected digits or a folder, got {str(root)!r}")
    train, val = root / "train", root / "val"
    parts = (images(train), images(val)) if train.is_dir() and val.is_dir() else split(images(root))
    for part, name in zip(parts, ("training", "validation"), strict=True):
        if not part:
            fail(f"--data: no image of {name} in {root}: expected folders, one a class, of {', '.join(SUFFIXES)}")
    classes = sorted({label for _, label in parts[0]})
    if unknown := {label for _, label in parts[1]} - {*classes}:
        fail(f"--data: class {min(unknown)!r} has images of validation, but none of training")
    digest = hashlib.sha256("\n".join(str(path.relative_to(root)) for part in parts for path, _ in part).encode())
    training, validation = ([(path, classes.index(label)) for path, label in part] for part in parts)
    return Data(f"{len(training)} + {len(validation)} images, {digest.hexdigest()[:8]}", classes, training, validation)


class Images(Dataset):
    """(epoch, index) -> bytes [size, size, 3] of the image, and its label.

    With a seed the image is cropped at random, a photograph also mirrored: seed, epoch and index alone decide how.
    """

    def __init__(self, items: list[Item], size: int, seed: int | None = None) -> None:
        self.items, self.size, self.seed = items, size, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        source, label = self.items[key[1]]
        photograph = isinstance(source, Path)
        image = (Image.open(source) if photograph else source).convert("RGB")
        width, height = image.size
        chance = random.Random(f"{self.seed} {key}")
        if self.seed is None:  # the middle
            w = h = min(width, height) * (0.875 if photograph else 1)
            x, y = (width - w) / 2, (height - h) / 2
        else:
            area = width * height * chance.uniform(0.25 if photograph else 0.7, 1)
            ratio = math.exp(chance.uniform(-0.3, 0.3))
            w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
            x, y = chance.uniform(0, width - w), chance.uniform(0, height - h)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
        if self.seed is not None and photograph and chance.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3), label


def load(dataset: Images, order: list[int], epoch: int, args: argparse.Namespace, begin: int, end: int) -> DataLoader:
    """This process's batches begin to end of the epoch; nothing is loaded of those before."""
    own = args.batch_size // WORLD
    batches = [[(epoch, i) for i in order[at : at + own]] for at in range(begin * own, min(end * own, len(order)), own)]
    # A loader draws a number: from a generator of its own, lest it be dropout's.
    generator, pin = torch.Generator().manual_seed(0), args.device.type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, pin_memory=pin, generator=generator)


def to_device(batch: Batch, args: argparse.Namespace) -> Batch:
    """Bytes [N, H, W, 3] as the network's input [N, 3, H, W], whose memory stays channels-last if that is wanted."""
    images, labels = (t.to(args.device, non_blocking=True) for t in batch)
    mean, deviation = (torch.tensor(numbers, device=args.device) for numbers in (MEAN, DEVIATION))
    images = (images / 255 - mean) / deviation
    images = images.permute(0, 3, 1, 2)
    return images if args.channels_last else images.contiguous(), labels


@dataclass
class Run:
    """What a checkpoint holds."""

    options: dict  # those that change the numbers: a run that goes on must have the same
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    epoch: int = 0
    step: int = 0  # of the epoch
    loss_sum: float | Tensor = 0.0  # of the epoch's steps, in this process
    history: list[dict] = field(default_factory=list)


def build_model(args: argparse.Namespace, classes: int, display: Display) -> nn.Module:
    library, _, name = args.model.rpartition(":")
    if not library and name in models.NETWORKS:
        return getattr(models, name)(classes, fused=args.fuse)
    if library not in ("torchvision", "timm"):
        fail(f"--model: expected {', '.join(models.NETWORKS)}, torchvision:NAME or timm:NAME, got {args.model!r}")
    try:
        if library == "timm":
            import timm

            model = timm.create_model(name, num_classes=classes)
        else:
            import torchvision

            model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    except (ImportError, ValueError, RuntimeError) as error:
        fail(f"--model {args.model}: {error}")
    if args.fuse:
        display.say(str(mbn_kernels.fuse(model)))
    return model


def synchronised(model: nn.Module, args: argparse.Namespace) -> list[nn.Module]:
    """Whose batch norms span all processes: on the CPU only fused blocks', as stock SyncBatchNorm refuses there."""
    if args.device.type != "cpu":
        return [model]
    blocks = [m for m in model.modules() if hasattr(m, "why_not_fused") and m.why_not_fused() is None]
    return blocks or fail("--sync-bn: on the CPU only fused blocks can, and this model has none")


def start(args: argparse.Namespace, options: dict, display: Display) -> Run:
    torch.manual_seed(args.seed)
    model = build_model(args, len(options["classes"]), display)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = args.bn_momentum
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(args.device, memory_format=layout)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
    if args.compile:
        model.compile()
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "float16")
    return Run(options, model, optimizer, scaler, ema)


def learning_rate(args: argparse.Namespace, at: int, steps: int) -> float:
    """Of step `at` of a run with `steps` steps an epoch. It depends on nothing else: a checkpoint need not hold it."""
    warm_up = min(1.0, (at + 1) / max(1.0, args.warm_up_epochs * steps))
    return args.lr * warm_up * (1 + math.cos(math.pi * at / (args.epochs * steps))) / 2


def train_step(run: Run, net: nn.Module, batch: Batch, args: argparse.Namespace, lr: float) -> Tensor:
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(args.device.type, PRECISIONS[args.amp], enabled=args.amp != "off"):
        loss = F.cross_entropy(net(batch[0]), batch[1], label_smoothing=args.label_smoothing)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema:
        run.ema.update_parameters(run.model)
    return loss.detach().double()


def summed(numbers: Tensor) -> list[float]:
    """Over all processes."""
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


@torch.no_grad()
def validate(model: nn.Module, dataset: Images, args: argparse.Namespace) -> dict[str, float]:
    """Means over all images, each counted once, however they are shared out."""
    if WORLD > 1:  # a plain batch norm's statistics are those of the first process, as DDP has it in training
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=args.device)
    own = list(range(RANK, len(dataset), WORLD))
    for batch in load(dataset, own, 0, args, 0, args.limit_steps or len(own)):
        images, labels = to_device(batch, args)
        with torch.autocast(args.device.type, PRECISIONS[args.amp], enabled=args.amp != "off"):
            logits = model(images)
        sums[0] += F.cross_entropy(logits.float(), labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
        sums[2] += len(labels)
    loss, right, count = summed(sums)
    return {"loss": loss / count, "accuracy": right / count}


PARTS = ("model", "optimizer", "scaler", "ema")


def save_checkpoint(run: Run, path: Path) -> None:
    """For all processes to call, as each has random states of its own; the first one writes the whole file or none."""
    own = {"torch": torch.get_rng_state(), "python": random.getstate(), "loss_sum": float(run.loss_sum)}
    own["cuda"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    every = [own] * WORLD
    if WORLD > 1:
        dist.all_gather_object(every, own)
    if RANK != 0:
        return
    state = {name: getattr(run, name) for name in ("options", "epoch", "step", "history")} | {"processes": every}
    state |= {name: getattr(run, name).state_dict() for name in PARTS if getattr(run, name)}
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_checkpoint(path: Path, options: dict) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_with = state["options"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        fail(f"--resume: {path} is not a checkpoint of this script ({type(error).__name__})")
    for name, value in options.items():
        if made_with.get(name) != value:
            fail(f"--resume: {path} is of a run with {name} {made_with.get(name)}, this one has {name} {value}")
    return state


def restore(run: Run, state: dict) -> None:
    for name in PARTS:
        if name in state:
            getattr(run, name).load_state_dict(state[name])
    run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
    own = state["processes"][RANK]
    run.loss_sum = own["loss_sum"]
    torch.set_rng_state(own["torch"])
    random.setstate(own["python"])
    if own["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(own["cuda"])


class Display:
    """The first process's progress bar, log and table of epochs."""

    def __init__(self, args: argparse.Namespace, total: int) -> None:
        self.console, self.log_path = Console(quiet=RANK != 0), args.json_log if RANK == 0 else None
        text = "loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s  accuracy {task.fields[accuracy]:.1%}"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(text))
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        self.bar = self.progress.add_task("", total=total, loss=math.nan, rate=0, accuracy=0)
        if self.log_path and not args.resume:
            self.log_path.unlink(missing_ok=True)

    def say(self, text: object) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, **fields) -> None:
        self.progress.update(self.bar, **fields)

    def log(self, kind: str, **entry) -> None:
        if self.log_path:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"kind": kind, **entry}) + "\n")

    def table(self, title: str, history: list[dict]) -> None:
        found = Table(title=title)
        for heading in ("epoch", "training loss", "validation loss", "accuracy", "images/s"):
            found.add_column(heading, justify="right")
        for e in history:
            row = f"{e['epoch']}", f"{e['train_loss']:.4f}", f"{e['loss']:.4f}", f"{e['accuracy']:.2%}"
            found.add_row(*row, f"{e['images_per_s']:.0f}")
        self.console.print(found)


def train_epoch(run: Run, net: nn.Module, data: Data, args: argparse.Namespace, steps: int, display: Display) -> bool:
    """From run.step on; whether the loss is still a number."""
    net.train()
    training = Images(data.training, args.size, args.seed)
    sampler = DistributedSampler(training, WORLD, RANK, shuffle=True, seed=args.seed, drop_last=True)
    sampler.set_epoch(run.epoch)
    begin, first, rate = time.perf_counter(), run.step, 0.0
    display.show(description=f"epoch {run.epoch + 1} of {args.epochs}")
    for batch in load(training, list(sampler), run.epoch, args, run.step, steps):
        lr = learning_rate(args, run.epoch * steps + run.step, steps)
        loss = train_step(run, net, to_device(batch, args), args, lr)
        run.loss_sum += loss
        run.step += 1
        display.show(advance=1)
        if run.step % args.log_every == 0 or run.step == steps:
            [mean] = summed(loss[None] / WORLD)
            rate = (run.step - first) * args.batch_size / (time.perf_counter() - begin)
            display.show(loss=mean, rate=rate)
            display.log("step", epoch=run.epoch + 1, step=run.step, loss=mean, lr=lr, images_per_s=rate)
            if not math.isfinite(mean):
                display.say(f"FAILED: the loss of epoch {run.epoch + 1}, step {run.step} is {mean}")
                return False
        if args.checkpoint_every and run.step % args.checkpoint_every == 0:
            save_checkpoint(run, args.checkpoint)
    loss_sum = torch.tensor([float(run.loss_sum)], dtype=torch.float64, device=args.device)
    [train_loss] = summed(loss_sum / (WORLD * steps))
    found = validate(run.ema or run.model, Images(data.validation, args.size), args)
    run.history.append({"epoch": run.epoch + 1, "train_loss": train_loss, **found, "images_per_s": rate})
    display.show(accuracy=found["accuracy"])
    display.log("epoch", **run.history[-1])
    run.epoch, run.step, run.loss_sum = run.epoch + 1, 0, 0.0
    if args.checkpoint:
        save_checkpoint(run, args.checkpoint)
    return True


def train(args: argparse.Namespace) -> int:
    data = read_digits() if args.data == "digits" else read_folder(Path(args.data))
    steps = len(data.training) // WORLD // (args.batch_size // WORLD)
    if not steps:
        fail(f"--batch-size: expected at most {len(data.training)}, the images of training, got {args.batch_size}")
    steps = min(steps, args.limit_steps or steps)
    options = {k: v for k, v in vars(args).items() if k not in FREE}
    options |= {"data": data.name, "processes": WORLD, "classes": data.classes}
    state = read_checkpoint(args.checkpoint, options) if args.resume and args.checkpoint.exists() else None

    display = Display(args, args.epochs * steps)
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(args.device)
    run = start(args, options, display)
    blocks, convert = synchronised(run.model, args) if args.sync_bn else [], nn.SyncBatchNorm.convert_sync_batchnorm
    if args.sync_bn and args.model.startswith("timm:"):  # whose batch norms may hold an activation
        from timm.layers import convert_sync_batchnorm as convert
    net = run.model
    if WORLD > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        net = DistributedDataParallel(net, device_ids=[args.device] if on_gpu else None)
    for block in blocks:  # now, as DDP takes no SyncBatchNorm on the CPU
        if not any(isinstance(m, nn.SyncBatchNorm) for m in block.modules()):  # else it was in the block before
            convert(block)
    torch.manual_seed(args.seed + RANK)
    random.seed(args.seed + RANK)
    if state:
        restore(run, state)
        display.say(f"going on from {args.checkpoint}: epoch {run.epoch + 1}, step {run.step + 1}")
    display.log("start", epoch=run.epoch + 1, step=run.step, options=options)
    display.show(completed=run.epoch * steps + run.step)
    with display.progress:
        while run.epoch < args.epochs:
            if not train_epoch(run, net, data, args, steps, display):
                return 1
    display.table(f"{args.model}, {'fused' if args.fuse else 'stock'}, {args.size}x{args.size}", run.history)
    if args.checkpoint:
        display.say(f"the weights are in {args.checkpoint}")
    return 0


def main(argv: list[str] | None = None) -> int:
    status = train(parse(argv))
    if dist.is_initialized():
        gc.collect()  # a DDP module that is left over can wait for ever for a group that is gone
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
