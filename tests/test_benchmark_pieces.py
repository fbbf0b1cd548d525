"""What `pytest --benchmark` is made of: the calls that are timed, the check before it, what is recorded, the table."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pytest_benchmark")
from benchmarks import conftest, gpu_timing, implementations, timing
from benchmarks.correct import FACTOR, KINKS, ROUNDINGS, Oracle, Verdict, oracle
from benchmarks.implementations import STOCK, Implementation, Pass, Prepared, contestants, prepare
from mbn_kernels import available_backends
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import BlockShape

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NCHW, EAGER, COMPILE = STOCK
OURS = Implementation("fused-cpu", torch.channels_last, fused=True, backend="cpu")
BLOCK = BlockShape(8, 5, 24, 8, True, "hs", 1, 8, 8, "inverted_residual")
SIZE = (2, 8, 8, 8)
DIRECTIONS = ("evaluation", "forward", "backward", "dx", "dw", "training")


def of_block(direction: str, dtype: torch.dtype = torch.float32) -> Pass:
    return Pass(direction, lambda fused: build_block(BLOCK, fused=fused), SIZE, CPU, dtype)


class Scale(nn.Module):
    """What it is given, times its one number; keeps what it was given, and itself in ``made``."""

    made: list[Scale]

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(()))
        self.seen: list[Tensor] = []
        Scale.made.append(self)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x * self.factor


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Scale]:
    """The modules that were built; torch.compile leaves them as they are."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    Scale.made = []
    return Scale.made


def of_scale(direction: str, dtype: torch.dtype = torch.float32) -> Pass:
    return Pass(direction, lambda fused: Scale(), SIZE, CPU, dtype)


# prepare --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS[:-1])
def test_all_get_the_same_numbers(direction: str, made: list[Scale]) -> None:
    results = [prepare(i, of_scale(direction)).results() for i in (*STOCK, OURS)]
    first = made[0]
    assert len(made) == 4 and first.seen
    for module, found in zip(made, results, strict=True):
        assert torch.equal(module.factor, first.factor) and torch.equal(module.seen[0], first.seen[0])
        assert module.training == (direction != "evaluation")
        assert [t.shape for t in found] == [t.shape for t in results[0]]
        # A gradient shows what it began with: the same for all, in either layout.
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-5)
    layouts = [m.seen[0].is_contiguous(memory_format=torch.channels_last) for m in made]
    assert layouts == [False, True, True, True]


@pytest.mark.parametrize("direction", ("backward", "dx", "dw"))
def test_only_the_gradients_that_are_asked_for(direction: str) -> None:
    built: list[nn.Module] = []

    def build(fused: bool) -> nn.Module:
        built.append(build_block(BLOCK, fused=fused))
        return built[-1]

    prepared = prepare(EAGER, of_block(direction)._replace(build=build))
    parameters = list(built[0].parameters())
    assert {p.requires_grad for p in parameters} == {direction != "dx"}
    expected = {"backward": [SIZE], "dx": [SIZE], "dw": []}[direction]
    expected = expected + [tuple(p.shape) for p in parameters if direction != "dx"]
    arguments = prepared.given()
    for found in (prepared.call(*arguments), prepared.results()):
        assert [tuple(g.shape) for g in found] == expected
    assert prepared.forward is None  # of a backward nothing is kept


def test_directions_share_their_gradients() -> None:
    """dx is the backward's first, dw its others."""
    backward, dx, dw = (prepare(EAGER, of_block(direction)).results() for direction in ("backward", "dx", "dw"))
    assert all(map(torch.equal, backward, [*dx, *dw]))


def test_dtypes(made: list[Scale]) -> None:
    """Evaluation is in the dtype, training in float32 under autocast to it; exact is float64 of the same numbers."""
    for direction in DIRECTIONS[:-1]:
        prepare(EAGER, of_scale(direction, torch.bfloat16)).results()
        prepare(EAGER, of_scale(direction, torch.bfloat16), exact=True).results()
        rounded, exact = made[-2:]
        evaluates = direction == "evaluation"
        assert rounded.factor.dtype == (torch.bfloat16 if evaluates else torch.float32)
        assert rounded.seen[0].dtype == torch.bfloat16
        assert exact.factor.dtype == exact.seen[0].dtype == torch.float64
        assert torch.equal(exact.factor, rounded.factor.double()) and torch.equal(
            exact.seen[0], rounded.seen[0].double()
        )


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)
        )


def test_a_training_step_changes_the_parameters_and_its_results_do_not() -> None:
    built: list[nn.Module] = []

    def build(fused: bool) -> nn.Module:
        built.append(Classifier())
        return built[-1]

    prepared = prepare(EAGER, Pass("training", build, (2, 3, 8, 8), CPU))
    before = [p.detach().clone() for p in built[0].parameters()]
    (first,), (again,) = prepared.results(), prepared.results()
    assert torch.equal(first, again) and first.shape == (sum(p.numel() for p in before),)
    assert all(map(torch.equal, built[0].parameters(), before))
    prepared.call(*prepared.given())
    assert not any(map(torch.equal, built[0].parameters(), before))
    # A step of SGD: against the gradient, by the learning rate.
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, built[0].parameters(), strict=True)])
    torch.testing.assert_close(moved, 1e-3 * first, rtol=1e-3, atol=1e-7)


def test_compile_gets_whole_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: given.append(options) or module)
    for direction in DIRECTIONS[:-1]:
        prepare(COMPILE, of_block(direction))
    frozen, plain = {"fullgraph": True, "options": {"freezing": True}}, {"fullgraph": True, "options": None}
    assert given == [frozen, plain, plain, plain, plain]


def test_contestants(monkeypatch: pytest.MonkeyPatch) -> None:
    states = dict.fromkeys(("reference", "cpu", "triton", "cuda"), "available")
    monkeypatch.setattr(implementations, "available_backends", lambda: states)

    def names(device: torch.device, full: bool) -> list[str]:
        found = contestants(device, full)
        assert found[:3] == STOCK and not any(i.fused for i in STOCK)
        assert all(i.fused and i.name == f"fused-{i.backend}" for i in found[3:])
        return [i.backend for i in found[3:]]

    assert [i.name for i in STOCK] == ["eager-nchw", "eager-channels-last", "compile"]
    assert [i.name for i in STOCK if i.compiled] == ["compile"]
    assert names(CPU, False) == ["cpu"] and names(CPU, True) == ["reference", "cpu"]
    assert names(GPU, False) == ["triton", "cuda"] and names(GPU, True) == ["reference", "triton", "cuda"]
    states["cuda"] = "it is not built"
    assert names(GPU, False) == ["triton"]


# The check ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_oracle_is_float64_on_the_rounded_numbers(dtype: torch.dtype, made: list[Scale]) -> None:
    found = oracle(of_scale("evaluation", dtype))
    x = made[-1].seen[0]
    assert x.dtype == dtype
    assert found.exact[0].dtype == torch.float64
    assert torch.equal(found.exact[0], x.double() * made[-1].factor.double())
    eager = x * made[-1].factor
    error = (eager.double() - found.exact[0]).norm() / found.exact[0].norm()
    assert found.allowed == pytest.approx([FACTOR * error.item() + ROUNDINGS * torch.finfo(dtype).eps]) and error > 0


@pytest.mark.parametrize("direction", DIRECTIONS[:-1])
def test_what_is_allowed(direction: str) -> None:
    given = of_block(direction)
    found = oracle(given)
    gradients = direction in ("backward", "dx", "dw")
    least = ROUNDINGS * torch.finfo(torch.float32).eps + KINKS * gradients
    verdict = found.judge(prepare(EAGER, given))
    assert verdict.holds and verdict.tolerance in found.allowed
    assert verdict.tolerance == pytest.approx(FACTOR * verdict.error + least)


def judged(*found: float, exact: tuple[float, ...], errors: tuple[float, ...], least: float = 0.0) -> Verdict:
    tensors = [torch.tensor([x]) for x in found]
    exacts = [torch.tensor([x], dtype=torch.float64) for x in exact]
    tolerances = [FACTOR * error + least for error in errors]
    return Oracle(exacts, tolerances).judge(Prepared(lambda: None, lambda: tensors))


def test_the_verdict_is_that_of_the_worst_result() -> None:
    """By how much of what is allowed it takes."""
    exact, errors = (1.0, 100.0, 1.0), (0.1, 0.01, 0.001)
    assert judged(1.3, 100, 1, exact=exact, errors=errors) == pytest.approx((0.3, 0.4))
    found = judged(1.3, 105, 1, exact=exact, errors=errors)
    assert found == pytest.approx((0.05, 0.04)) and not found.holds
    assert judged(1.3, 105, 1, exact=exact, errors=errors, least=0.02).holds
    assert not judged(1, 100, 1.005, exact=exact, errors=errors).holds
    assert judged(0.0, exact=(0.0,), errors=(0.0,), least=1e-6).holds
    assert not judged(1e-9, exact=(0.0,), errors=(0.0,), least=1e-6).holds


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("place", (0, 1))
def test_nan_and_inf_never_hold(bad: float, place: int) -> None:
    found, errors = [1.0, 1.0], [0.1, 0.1]
    found[place] = bad
    assert not judged(*found, exact=(1, 1), errors=(0.1, 0.1)).holds
    if math.isnan(bad):  # nor where eager PyTorch, or the oracle itself, has one
        errors[place] = bad
        assert not judged(1, 1, exact=(1, 1), errors=tuple(errors)).holds
        assert not judged(*found, exact=tuple(found), errors=tuple(errors)).holds


def test_the_reference_passes_and_a_wrong_weight_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Implementation("fused-reference", torch.channels_last, fused=True, backend="reference")
    for direction in ("evaluation", "forward", "dx", "dw"):
        given = of_block(direction)
        assert oracle(given).judge(prepare(ours, given)).holds

        def build(fused: bool) -> nn.Module:
            module = build_block(BLOCK, fused=fused)
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] += 0.1
            return module

        assert not oracle(given).judge(prepare(ours, given._replace(build=build))).holds


# Times, and what is recorded ------------------------------------------------------------------------------------------


class Benchmark:
    """pytest-benchmark's fixture, whose median is 0.25."""

    def __init__(self, enabled: bool = True) -> None:
        self.calls = 0
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.25)) if enabled else None

    def pedantic(self, call: Callable, setup: Callable, rounds: int, warmup_rounds: int) -> None:
        arguments, named = setup()
        call(*arguments, **named)
        self.calls += 1
        assert 5 <= rounds <= 200 and warmup_rounds == 1


def test_on_a_gpu_the_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    waited: list[torch.device] = []

    def median_seconds(call: Callable, milliseconds: float, *, given: Callable, ahead: bool) -> float:
        asked.append((call, given, ahead))
        return 0.001

    monkeypatch.setattr(conftest, "median_seconds", median_seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    prepared = Prepared(lambda x: x + 1, list, lambda: (1,))
    pass_ = of_scale("backward")
    assert conftest.measured(Benchmark(), prepared, pass_, ahead=True) == 0.25
    assert not asked and not waited
    for ahead in (True, False):
        assert conftest.measured(Benchmark(), prepared, pass_._replace(device=GPU), ahead=ahead) == 0.001
        assert asked[-1] == (prepared.call, prepared.given, ahead)
    assert set(waited) == {GPU}
    disabled = Benchmark(enabled=False)
    assert conftest.measured(disabled, prepared, pass_._replace(device=GPU), ahead=True) is None and disabled.calls == 1


def test_what_is_recorded_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(timing, "driver", lambda: "570.1")
    monkeypatch.setattr(gpu_timing, "l2_bytes", lambda device: 50)
    plain, found = timing.system_info(CPU), timing.system_info(GPU)
    assert found.keys() - plain.keys() == {"gpu", "driver", "cuda", "triton"}
    assert [found[name] for name in ("gpu", "driver", "cuda", "triton")] == [
        "A GPU",
        "570.1",
        "12.8",
        triton.__version__,
    ]
    more = gpu_timing.gpu_system_info(GPU)
    assert more.keys() - found.keys() == {"cuda_backend", "tuned", "l2_bytes"}
    assert (more["cuda_backend"], more["l2_bytes"]) == (available_backends()["cuda"], 50)


def test_the_driver_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(timing, "output_of", lambda *command: asked.append(command) or "570.1")
    timing.driver.cache_clear()
    try:
        assert timing.driver() == timing.driver() == "570.1"
    finally:
        timing.driver.cache_clear()
    assert [command[0] for command in asked] == ["nvidia-smi"]


def test_single_times_are_kept_only_where_they_are_asked_for_and_the_host_is_nobodys_business() -> None:
    for wanted in (False, True):
        stats = {"median": 1.0, "data": [1.0, 1.0]}
        found = {"machine_info": {"node": "host", "machine": "x86_64"}, "benchmarks": [{"stats": stats}]}
        config = SimpleNamespace(option=SimpleNamespace(benchmark_save_data=wanted))
        conftest.pytest_benchmark_update_json(config, [], found)
        assert found["benchmarks"][0]["stats"].keys() == {"median"} | ({"data"} if wanted else set())
        assert found["machine_info"] == {"machine": "x86_64"}


# The table ------------------------------------------------------------------------------------------------------------


class Reporter(list):
    """What a terminal was told."""

    def section(self, title: str) -> None:
        self.append(title)

    line = list.append


def summary(medians: dict[str, dict[str, float]], kept: object = None) -> list[str]:
    stash = pytest.Stash()
    stash[conftest.MEDIANS] = medians
    found = Reporter()
    conftest.pytest_terminal_summary(found, SimpleNamespace(stash=stash, option=SimpleNamespace(benchmark_json=kept)))
    return found


def test_the_table() -> None:
    """Ours is the last backend; stock the fastest that is there."""
    medians = {
        "twice": {
            "eager-nchw": 4e-3,
            "compile": 2e-3,
            "fused-reference": 9e-3,
            "fused-triton": 5e-3,
            "fused-cuda": 1e-3,
        },
        "half": {"eager-nchw": 2e-3, "fused-cpu": 4e-3},
        "stock alone": {"eager-nchw": 2e-3},
        "ours alone": {"fused-cpu": 2e-3},
    }
    _, _, twice, half, mean, where = summary(medians)
    assert twice.split() == ["twice", "2.000", "1.000", "2.00x", "compile"]
    assert half.split() == ["half", "2.000", "4.000", "0.50x", "eager-nchw", "<-", "slower"]
    assert mean.split() == ["geometric", "mean", "of", "2", "1.00x"]
    assert where.startswith("The results are above; --benchmark-json=FILE keeps them; ")


def test_where_the_results_are() -> None:
    alone = {"stock alone": {"eager-nchw": 2e-3}}
    opened = namedtuple("File", "name")("folder/found.json")  # as pytest-benchmark 4 has it
    for kept in (Path("folder/found.json"), opened):
        assert summary(alone, kept) == [
            "The results are in folder/found.json; `python -m benchmarks.report --read FILE` draws them."
        ]
    assert summary({}) == []
