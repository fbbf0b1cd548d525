"""benchmarks.accuracy: what is trained and measured, that a planted fault shows up, and what the tables say."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="matplotlib belongs to the demo extra: pip install -e '.[demo]'")
pytest.importorskip("rich", reason="rich belongs to the demo extra: pip install -e '.[demo]'")
pytest.importorskip("sklearn", reason="scikit-learn belongs to the demo extra: pip install -e '.[demo]'")
from benchmarks import accuracy, gradient_errors
from benchmarks.gradient_errors import CHANNELS_LAST, FUSED, NCHW
from examples import demo
from mbn_kernels.backends.cpu import CpuKernels

TINY = Namespace(epochs=4, size=8, batch=24, gradient_batch=4, resolution=32, draws=2)


def model() -> nn.Module:
    return gradient_errors.models.mobilenet_v3_small(10)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 24 an epoch, and 20 to test."""
    read = demo.digits

    def few(*arguments: object) -> list[tuple[Tensor, Tensor]]:
        counts = 48, 20
        return [(x[:n], y[:n]) for (x, y), n in zip(read(*arguments), counts, strict=True)]

    monkeypatch.setattr(demo, "digits", few)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_errors, "MODEL", "mobilenet_v3_small")


# Trainings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ("float32", "autocast", pytest.param("bfloat16", marks=pytest.mark.slow)))
def test_stock_and_fused_train_alike(few_digits: None, precision: str) -> None:
    row = accuracy.train(precision, 1, TINY)
    assert (row["precision"], row["seed"], row["images"]) == (precision, 1, 20)
    assert {name: len(found) for name, found in row["accuracy"].items()} == {"stock": 4, "fused": 4}
    stock, fused = row["loss"]["stock"], row["loss"]["fused"]
    assert stock != fused and fused == pytest.approx(stock, rel=1e-3 if precision == "float32" else 5e-2)


def test_a_fault_in_training_shows_up(few_digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    build = demo.mobilenet_v3_small

    def uphill(*arguments: object, fused: bool, **options: object) -> nn.Module:
        model = build(*arguments, fused=fused, **options)
        for p in model.parameters() if fused else ():
            p.register_hook(torch.neg)
        return model

    monkeypatch.setattr(demo, "mobilenet_v3_small", uphill)
    loss = accuracy.train("float32", 1, TINY)["loss"]
    assert loss["fused"] > 1.05 * loss["stock"]


def trained(precision: str, stock: list[float], fused: list[float]) -> list[dict]:
    pairs = zip(stock, fused, strict=True)
    return [{"precision": precision, "accuracy": {"stock": [0.1, s], "fused": [0.2, f]}} for s, f in pairs]


def test_training_table() -> None:
    rows = trained("float32", [0.96, 0.98], [0.97, 0.98]) + trained("autocast", [0.9, 0.91], [0.95, 0.97])
    rows += trained("bfloat16", [0.9, 0.9], [0.8, 0.9])
    assert accuracy.training_table({"rows": rows}).splitlines()[2:] == [
        "| float32 | 97.00 ± 1.41 | 97.50 ± 0.71 | 0.50 ± 0.71 | 0.71 |",
        "| bfloat16 by autocast | 90.50 ± 0.71 | 96.00 ± 1.41 | 5.50 ± 0.71 | **7.78** |",
        "| bfloat16 parameters | 90.00 ± 0.00 | 85.00 ± 7.07 | -5.00 ± 7.07 | **∞** |",
    ]


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", gradient_errors.DTYPES)
def test_a_row_of_errors(small: None, dtype: str) -> None:
    row = gradient_errors.measure(dtype, 0, TINY)
    count = len(row["parameters"])
    assert count == len(list(model().parameters()))
    for numbers in (row["exact"], *row["errors"].values()):
        assert all(len(numbers[kind]) == count and min(numbers[kind]) >= 0 for kind in ("l2", "max"))
    assert list(row["errors"]) == [NCHW, CHANNELS_LAST, FUSED]
    eps = torch.finfo(gradient_errors.DTYPES[dtype]).eps
    for name in row["errors"]:
        assert eps / 16 < gradient_errors.as_one(row, row["errors"][name]["l2"]) < 2e4 * eps


def test_the_oracle_is_exact_where_float64_is_not() -> None:
    """Stock's hard-sigmoid rounds its slope to float32."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for stock, exact in gradient_errors.EXACT.items():
        slopes = []
        for layer in (stock(), exact()):
            leaf = x.clone().requires_grad_()
            torch.testing.assert_close(layer(leaf), stock()(x), rtol=0, atol=1e-15)
            slopes.append(torch.autograd.grad(layer(leaf).sum(), leaf)[0])
        away = ((x.abs() - 3).abs() > 1e-9).double()
        torch.testing.assert_close(slopes[1] * away, slopes[0] * away, rtol=1e-7, atol=1e-7)
    sigmoid = gradient_errors.ExactHardsigmoid()
    leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(sigmoid(leaf), leaf)[0].item() == 1 / 6


def test_a_fault_in_one_gradient_shows_up(small: None, needs_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backward: Callable = CpuKernels.depthwise_backward

    def wrong(self: CpuKernels, *arguments: object) -> tuple:
        du, sums, dweight = backward(self, *arguments)
        return du, sums, dweight * 1.01

    def listed() -> set[str]:
        result = {"rows": [gradient_errors.measure("float32", 0, TINY)]}
        lines = gradient_errors.above_table(result).splitlines()[2:]
        found = {cells[1].split(", ")[-1].strip(): float(cells[3]) for cells in (line.split("|") for line in lines)}
        return {name for name, ratio in found.items() if ratio > 10}

    assert not listed()
    monkeypatch.setattr(CpuKernels, "depthwise_backward", wrong)
    depthwise = {name for name, p in model().named_parameters() if p.ndim == 4 and p.shape[1:2] == (1,)}
    assert listed() == depthwise and len(depthwise) == 11


def measured(*errors: tuple[float, ...], exact: tuple[float, ...] = (3.0, 4.0, 1e-20)) -> dict:
    """A row of three parameters from the errors of stock's two layouts and ours."""
    found = {
        name: {"l2": list(e), "max": list(e)} for name, e in zip((NCHW, CHANNELS_LAST, FUSED), errors, strict=True)
    }
    names = ["a", "b", "zero"]
    return {"dtype": "float32", "parameters": names, "exact": {"l2": list(exact), "max": list(exact)}, "errors": found}


def test_tables_of_gradients() -> None:
    first = measured((0.3, 0.4, 0.0), (0.6, 0.8, 0.0), (0.6, 0.4, 1e-9))
    second = measured((0.3, 0.4, 1e-9), (0.3, 0.8, 0.0), (0.3, 0.2, 0.0))
    result = {"rows": [first, second]}
    assert gradient_errors.zeros(result["rows"]) == {"zero"}
    assert gradient_errors.ratios(result["rows"], FUSED, NCHW) == {"a": [2, 1], "b": [1, 0.5], "zero": [math.inf, 0]}
    fused, channels_last, layouts = gradient_errors.table(result).splitlines()[2:]
    assert (
        fused == "| float32: fused over eager-nchw | 1.1e-01 | 1.0e-01 | 1.08 (0.72 to 1.44) | 2, 0, inf | 2, 0, inf |"
    )
    assert channels_last.endswith("| 1.1e-01 | 1.9e-01 | 0.57 (0.42 to 0.72) | 1, 0, inf | 1, 0, inf |")
    assert layouts.endswith("over eager-nchw | 1.9e-01 | 1.0e-01 | 1.85 (1.71 to 2.00) | 2, 1, 2.00 | 2, 1, 2.00 |")
    assert gradient_errors.above_table(result).splitlines()[2:] == [
        "| float32, zero | 0 but for rounding | inf | 0.00 | 1 of 2 |",
        "| float32, a | not 0 | 1.50 | 1.00 | 1 of 2 |",
    ]
    right = {"rows": [measured(*[(1.0, 1.0, 1.0)] * 3)]}
    assert gradient_errors.above_table(right).splitlines()[2:] == ["| – | – | – | – | – |"]


# The command ----------------------------------------------------------------------------------------------------------


def test_command(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small_steps = ["--draws", "2", "--gradient-batch", "2", "--resolution", "32"]
    accuracy.main(["--part", "gradients", *small_steps, "--output", str(tmp_path)])
    said = capsys.readouterr()
    lines = (tmp_path / "gradients.json").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('    {"model"') for line in lines) == 4  # a row a line
    result = json.loads("\n".join(lines))
    assert [(row["dtype"], row["seed"]) for row in result["rows"]] == [
        ("float32", 0),
        ("float32", 1),
        ("bfloat16", 0),
        ("bfloat16", 1),
    ]
    assert "gradients in bfloat16, draw 1: done" in said.err and gradient_errors.table(result) in said.out
    accuracy.main(["--part", "gradients", "--table", str(tmp_path)])
    assert gradient_errors.table(result) in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ("--seeds 1", "--draws 1", "--epochs 0"))
def test_refused(wrong: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse(wrong.split())
    assert "at least 2" in capsys.readouterr().err
