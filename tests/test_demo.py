"""examples/demo.py on a run of three steps: its table, its picture, its verdict."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import scripts
import torch

for _needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(_needed, reason=f"{_needed} belongs to the demo extra: pip install -e '.[demo]'")

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
TINY = ["--device", "cpu", "--epochs", "1", "--batch-size", "400", "--size", "32"]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return scripts.load(DEMO)


@pytest.fixture
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run_of(demo: ModuleType, name: str, losses: list[float], accuracy: float) -> object:
    return demo.Run(name, None, None, None, 1, losses, [0.1] * len(losses), accuracy)


def test_table_and_picture(demo, wide_terminal, tmp_path, capsys):
    picture = tmp_path / "demo.png"
    # Three steps teach nothing, so the verdict is a failure, and the only one is the accuracy.
    assert demo.main([*TINY, "--output", str(picture)]) == 1
    out = capsys.readouterr().out
    rows = {}
    for line in out.splitlines():
        if line.startswith("│"):
            label, *cells = (cell.strip() for cell in line.strip("│").split("│"))
            rows[label] = cells
    assert list(rows) == [
        "loss at step 1",
        "loss at step 3",
        "largest of steps 1 to 3",
        "test accuracy",
        "time per step, median",
        "saved for backward",
    ]
    first, last = (rows[f"loss at step {step}"] for step in (1, 3))
    assert float(first[0]) == pytest.approx(2.3, abs=0.1)
    assert float(last[1]) == pytest.approx(float(last[0]), rel=1e-3)
    assert float(rows["largest of steps 1 to 3"][2]) <= demo.MOST_DIFFERENCE
    assert all(cell.endswith("%") for cell in rows["test accuracy"][:2])
    assert [cell.split()[-1] for cell in rows["time per step, median"]] == ["ms", "ms", "fast"]
    stock, fused = (float(cell.split()[0]) for cell in rows["saved for backward"][:2])
    assert 0 < fused < 0.7 * stock

    sentences = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert len(sentences) == 2 and all("less than 97%" in line for line in sentences)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_verdict(demo):
    good = [2.3 - 0.01 * i for i in range(30)]
    runs = [run_of(demo, "stock", good, 0.98), run_of(demo, "fused", good, 0.97)]
    assert demo.failures(runs) == []
    runs[1].losses = [*good[:20], *[9.0] * 10]  # after the first 20 they may part
    assert demo.failures(runs) == []
    runs[1].losses = [*good[:19], good[19] * 1.002, *good[20:]]
    assert demo.failures(runs) == ["the losses at step 20 differ by 2.0e-03, more than 1e-03"]
    runs[1].losses = [float("nan")] * 30
    runs[1].accuracy = 0.965
    assert demo.failures(runs) == [
        "the fused network got 96.50% of the test images right, less than 97%",
        "the losses at step 1 differ by nan, more than 1e-03",
    ]


def test_batches(demo):
    """Both networks get the same batches, of real digits that are moved a little but stay what they were."""
    training, test = demo.digits(16, 0, "cpu")
    assert training[0].shape == (1347, 1, 16, 16) and test[0].shape == (450, 1, 16, 16)
    assert abs(training[0].mean().item()) < 1e-5 and training[0].std().item() == pytest.approx(1, abs=1e-5)
    batches, again = (demo.epoch_batches(training, 64, 5) for _ in range(2))
    assert len(batches) == 21 and all(len(labels) == 64 for _, labels in batches)
    for (images, labels), (same_images, same_labels) in zip(batches, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    order = torch.randperm(1347, generator=torch.Generator().manual_seed(5))[:64]
    assert torch.equal(batches[0][1], training[1][order])
    pairs = torch.stack([batches[0][0].flatten(), training[0][order].flatten()])
    assert 0.7 < pairs.corrcoef()[0, 1].item() < 1


def test_saved_bytes(demo):
    """Kept are the linear layer's input and the loss's log-softmax, labels and one number; parameters do not count."""
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10)), torch.zeros(8, 1, 4, 4)
    labels = torch.zeros(8, dtype=torch.int64)
    assert demo.measure_saved_bytes(model, (x, labels)) == x.nbytes + 8 * 10 * 4 + labels.nbytes + 4
    assert model[1].weight.grad is None


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--epochs", "0"], "expected --epochs of at least 1"),
        (["--size", "7"], "--size of at least 8"),
        pytest.param(
            ["--device", "cuda"],
            "torch.cuda.is_available() is false",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_options(demo, options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_batch_larger_than_the_data(demo, capsys, wide_terminal):
    assert demo.main(["--batch-size", "2000", "--device", "cpu", "--size", "8"]) == 2
    assert "--batch-size: expected at most 1347 images, got 2000" in capsys.readouterr().out
