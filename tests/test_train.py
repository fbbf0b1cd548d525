"""examples/train.py: what it learns, that a killed run ends as if it had not been, folders, options, two processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import peers
import pytest
import scripts
import torch
from torch import nn

for _needed in ("rich", "sklearn", "PIL"):
    pytest.importorskip(_needed, reason=f"{_needed} belongs to the demo extra: pip install -e '.[demo]'")

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
# Three steps an epoch on 32x32 digits.
TINY = ["--device", "cpu", "--size", "32", "--epochs", "2", "--limit-steps", "3", "--batch-size", "32"]
TINY += ["--log-every", "1", "--workers", "0"]
PATIENCE = 90  # seconds until a process has ended


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return scripts.load(TRAIN)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def entries(log: Path, kind: str) -> list[dict]:
    """The log's whole lines of one kind; the last line of a process that was killed may be half a line."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


# Processes ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(processes: int, *options: object):
    """The script in so many processes, all of which are gone afterwards, whatever happens."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [sys.executable, *launcher, TRAIN, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        kill(process.pid)
        process.communicate()


def kill(root: int) -> None:
    """SIGKILL to a process and all below it: torchrun gives each of its children a process group of its own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    doomed = [root]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run(train: ModuleType, processes: int, *options: object) -> tuple[int, str]:
    """One process is this one, on one thread as those that it starts."""
    if processes == 1:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            return train.main([*map(str, options)]), out.getvalue()
    with started(processes, *options) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, out


def run_until(step: int, log: Path, processes: int, *options: object) -> None:
    """Starts the script and kills it once its log shows that step."""
    with started(processes, *options) as process:
        deadline = time.monotonic() + PATIENCE
        while len(entries(log, "step")) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the step does not come"
            time.sleep(0.005)


# Learning -------------------------------------------------------------------------------------------------------------


def test_learns_digits_fused_as_stock(train, tmp_path, capsys):
    torch.set_num_threads(1)
    losses = {}
    options = [*TINY, "--epochs", "2", "--limit-steps", "10", "--warm-up-epochs", "0.5", "--lr", "0.05"]
    for fuse in ("--fuse", "--no-fuse"):
        log = tmp_path / f"{fuse}.jsonl"
        assert train.main([*options, fuse, "--json-log", str(log)]) == 0
        steps, epochs = entries(log, "step"), entries(log, "epoch")
        assert [(e["epoch"], e["step"]) for e in steps] == [(e, s) for e in (1, 2) for s in range(1, 11)]
        assert set(steps[0]) == {"kind", "epoch", "step", "loss", "lr", "images_per_s"}
        assert set(epochs[0]) == {"kind", "epoch", "train_loss", "loss", "accuracy", "images_per_s"}
        out = capsys.readouterr().out
        for entry in epochs:
            mean = sum(e["loss"] for e in steps if e["epoch"] == entry["epoch"]) / 10
            assert entry["train_loss"] == pytest.approx(mean, rel=1e-6)
            assert f"{entry['accuracy']:.2%}" in out and f"{entry['loss']:.4f}" in out
        losses[fuse] = [e["loss"] for e in steps]
    fused, stock = losses.values()
    assert fused[0] == pytest.approx(2.303, abs=0.05) and sum(fused[-3:]) / 3 < fused[0] - 0.1
    assert fused[:5] == pytest.approx(stock[:5], rel=1e-3) and fused != stock


def test_learning_rate(train):
    args = train.parse(["--epochs", "10", "--warm-up-epochs", "2", "--lr", "0.5", "--device", "cpu"])
    rates = [train.learning_rate(args, at, 5) for at in range(50)]
    assert rates[0] == 0.05 and max(rates) == rates[9] > 0.49 * 0.9 and rates[-1] < 0.001
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[:10] == sorted(rates[:10])
    args.warm_up_epochs = 0
    assert train.learning_rate(args, 0, 5) == 0.5


def test_augmentation_depends_on_seed_epoch_and_index_alone(train):
    items = train.read_digits().training[:3]
    images = train.Images(items, 16, seed=1)
    first = images[4, 2][0]
    images[5, 0]
    assert torch.equal(train.Images(items, 16, seed=1)[4, 2][0], first)
    for other in (images[5, 2][0], train.Images(items, 16, seed=2)[4, 2][0], train.Images(items, 16)[4, 2][0]):
        assert not torch.equal(other, first)
    assert torch.equal(train.Images(items, 16)[0, 2][0], train.Images(items, 16)[9, 2][0])


def test_a_loss_that_is_no_number_fails(train, capsys):
    assert train.main([*TINY, "--lr", "1e30", "--warm-up-epochs", "0", "--limit-steps", "10"]) == 1
    assert "FAILED: the loss of epoch 1, step" in capsys.readouterr().out


# Killed and resumed ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes to kill in /proc")
@pytest.mark.parametrize("processes, more", [(1, []), (2, ["--sync-bn", "--amp", "bfloat16", "--batch-size", 72])])
def test_killed_and_resumed_ends_with_the_same_bits(train, processes, more, tmp_path):
    """With two processes under all else at once; their 5 batches of 72 are all 359 images of validation."""
    whole, killed, log = tmp_path / "whole.pt", tmp_path / "killed.pt", tmp_path / "log.jsonl"
    options = [*TINY, "--limit-steps", 5, "--checkpoint-every", 2, "--ema", 0.5, *more]
    status, out = run(train, processes, *options, "--checkpoint", whole)
    assert status == 0, out
    assert out.count("training loss") == 1, "expected one process to speak"
    options += ["--checkpoint", killed, "--json-log", log]
    for _ in range(3):  # where this process has to wait for a core, the other may have come to the epoch's end
        run_until(8, log, processes, *options)  # step 3 of the second epoch
        half = torch.load(killed, weights_only=True)
        if half["epoch"] == 1 and half["step"] in (2, 4):
            break
        killed.unlink(), log.unlink()
    else:
        pytest.fail("no checkpoint is from within the second epoch")
    status, out = run(train, processes, *options, "--resume")
    assert status == 0 and f"epoch 2, step {half['step'] + 1}" in out, out

    # Of the steps that ran twice, both times gave the same loss.
    steps = {}
    for entry in entries(log, "step"):
        steps.setdefault((entry["epoch"], entry["step"]), set()).add(entry["loss"])
    assert len(steps) == 10 and all(len(losses) == 1 and 2 < min(losses) < 3 for losses in steps.values())
    expected, found = (torch.load(path, weights_only=True) for path in (whole, killed))
    assert len(found["processes"]) == processes and found["ema"]["n_averaged"] == 10
    for part in ("model", "ema"):
        assert expected[part].keys() == found[part].keys()
        assert all(torch.equal(t, found[part][name]) for name, t in expected[part].items())
    moved = [name for name, t in expected["model"].items() if not torch.equal(t, half["model"][name])]
    assert len(moved) > 100  # the steps after the checkpoint matter
    for a, b in zip(expected["history"], found["history"], strict=True):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}
        right = a["accuracy"] * (359 if processes == 2 else 160)
        assert right == pytest.approx(round(right), abs=1e-6), "expected each image to count once"


def test_the_random_state_is_part_of_a_checkpoint(train, tmp_path):
    """Dropout is where it shows: another random state after resuming would give other weights."""
    torch.set_num_threads(1)
    options = [*TINY, "--model", "mobilenet_v2", "--checkpoint-every", "2"]
    path = tmp_path / "run.pt"
    assert train.main([*options, "--checkpoint", str(path), "--epochs", "1"]) == 0
    state = torch.load(path, weights_only=True)
    assert len(state["processes"]) == 1
    assert torch.equal(state["processes"][0]["torch"], torch.get_rng_state())
    assert not torch.equal(state["processes"][0]["torch"], torch.Generator().manual_seed(0).get_state())


# Folders and mistakes -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Reddish and bluish noise of several sizes and formats."""
    from PIL import Image

    for name, colour in (("blue", (20, 40, 220)), ("red", (220, 40, 20))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            suffix, mode = (("png", "RGB"), ("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"))[i % 4]
            noise = Image.effect_noise((30 + 3 * i, 50 - i), 100).convert("RGB")
            picture = Image.blend(noise, Image.new("RGB", noise.size, colour), 0.5).convert(mode)
            picture.save(tmp_path / "images" / name / f"{i}.{suffix}")
        (tmp_path / "images" / name / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_trains_on_a_folder(train, folder, tmp_path, capsys):
    data = train.read_folder(folder)
    assert data.classes == ["blue", "red"] and (len(data.training), len(data.validation)) == (32, 8)
    assert {label for _, label in data.validation} == {0, 1}
    assert not {path for path, _ in data.training} & {path for path, _ in data.validation}
    for seed in (None, 1):  # as validated and as augmented: red is more than blue where the label says so
        images = train.Images(data.validation, 24, seed)
        for index in range(len(images)):
            pixels, label = images[3, index]
            assert pixels.shape == (24, 24, 3) and pixels.dtype == torch.uint8
            red, _, blue = pixels.float().mean((0, 1))
            assert label == (red > blue)
    log = tmp_path / "log.jsonl"
    options = [*TINY, "--data", str(folder), "--batch-size", "8", "--limit-steps", "4", "--workers", "1"]
    options += ["--model", "mobilenet_v1", "--epochs", "5", "--lr", "0.01", "--json-log", str(log)]
    assert train.main(options) == 0
    first, *_, last = (e["train_loss"] for e in entries(log, "epoch"))
    assert first == pytest.approx(0.7, abs=0.1) and last < 0.75 * first
    assert f"{last:.4f}" in capsys.readouterr().out


def test_train_and_val_folders(train, folder):
    for name in ("train", "val"):
        (folder / name).mkdir()
    for name in ("blue", "red"):
        (folder / name).rename(folder / "train" / name)
        (folder / "val" / name).mkdir()
    (folder / "train" / "red" / "0.png").rename(folder / "val" / "red" / "0.png")
    data = train.read_folder(folder)
    assert (len(data.training), data.validation) == (39, [(folder / "val" / "red" / "0.png", 1)])
    (folder / "val" / "red").rename(folder / "val" / "green")
    with pytest.raises(SystemExit, match="class 'green' has images of validation, but none of training"):
        train.read_folder(folder)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--data", "/nowhere"], "--data: expected digits or a folder, got '/nowhere'"),
        (["--data", "EMPTY"], "no image of training in"),
        (["--model", "lenet"], "--model: expected mobilenet_v1, mobilenet_v2, .* or timm:NAME, got 'lenet'"),
        (["--model", "keras:lenet"], "--model: expected .* got 'keras:lenet'"),
        (["--epochs", "0"], "--epochs: expected a number from 1 to below inf, got 0"),
        (["--momentum", "1"], "--momentum: expected a number from 0 to below 1, got 1.0"),
        (["--batch-size", "1"], "--batch-size: expected a multiple of 1, 2 or more, got 1"),
        (["--batch-size", "2000"], "--batch-size: expected at most 1438, the images of training, got 2000"),
        (["--amp", "float16"], "--amp float16: expected a GPU"),
        (["--resume"], "--checkpoint: expected a path"),
        (["--sync-bn", "--no-fuse"], "--sync-bn: on the CPU only fused blocks can"),
    ],
)
def test_bad_options(train, options, sentence, tmp_path):
    options = [str(tmp_path) if option == "EMPTY" else option for option in options]
    with pytest.raises(SystemExit, match=f"^train: .*{sentence}"):
        train.main([*TINY, *options])


def test_a_checkpoint_of_another_run_is_refused(train, tmp_path, folder, monkeypatch):
    path = tmp_path / "run.pt"
    options = [*TINY, "--epochs", "1", "--limit-steps", "1", "--checkpoint", str(path)]
    assert train.main(options) == 0
    with pytest.raises(SystemExit, match="exists: add --resume"):
        train.main(options)
    assert train.main([*options, "--resume", "--workers", "1"]) == 0  # it is complete, and workers change nothing
    before = path.read_bytes()
    for other, sentence in (
        (["--model", "mobilenet_v2"], "is of a run with model mobilenet_v3_small, this one has model mobilenet_v2"),
        (["--seed", "7"], "with seed 0, this one has seed 7"),
        (["--data", str(folder), "--batch-size", "8"], "with data digits, this one has data 32 [+] 8 images"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            train.main([*options, "--resume", *other])
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(SystemExit, match="with processes 1, this one has processes 2"):
        train.main([*options, "--resume"])
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(SystemExit, match=r"run.pt is not a checkpoint of this script"):
        train.main([*options, "--resume"])


# Other people's models, other options ---------------------------------------------------------------------------------


def skip_without(model: str) -> None:
    peers.import_torchvision()  # skips without; timm imports it, too
    pytest.importorskip(model.partition(":")[0])


@pytest.mark.parametrize("model", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_models_of_libraries(train, model, tmp_path, capsys):
    skip_without(model)
    losses = {}
    for fuse in ("--fuse", "--no-fuse"):
        log = tmp_path / f"{fuse}.jsonl"
        assert train.main([*TINY, "--epochs", "1", "--ema", "0.5", "--model", model, fuse, "--json-log", str(log)]) == 0
        assert ("modules fused" in capsys.readouterr().out) == (fuse == "--fuse")
        losses[fuse] = [e["loss"] for e in entries(log, "step")]
    assert losses["--fuse"] == pytest.approx(losses["--no-fuse"], rel=1e-3)
    with pytest.raises(SystemExit, match=r"^train: --model .*:lenet: Unknown model"):
        train.main([*TINY, "--model", f"{model.partition(':')[0]}:lenet"])


def test_sync_bn_on_the_cpu_leaves_the_stem_alone(train, monkeypatch):
    found = []
    monkeypatch.setattr(train, "train_epoch", lambda run, *_: found.append(run.model))
    assert train.main([*TINY, "--sync-bn"]) == 1
    norms = {name: m for name, m in found[0].named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert [name for name, m in norms.items() if not isinstance(m, nn.SyncBatchNorm)] == ["conv1.1"]
    assert len(norms) == 34
    blocks = [m for m in found[0].modules() if hasattr(m, "why_not_fused")]
    assert len(blocks) > 10 and all(m.why_not_fused() is None for m in blocks)
