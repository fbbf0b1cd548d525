"""python -m benchmarks.gpu without a GPU: whose results are wrong has no time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import test_gpu_benchmark
import torch
from test_gpu_benchmark import (
    BACKEND,
    CPU,
    OURS,
    SHAPES,
    STAGES,
    gpu_text,
    options,
    take_part,
    ways_by,
)
from torch import Tensor

from benchmarks import correct, gpu, gpu_blocks, gpu_checks, gpu_contestants, gpu_networks, gpu_operators, gpu_tables
from benchmarks.gpu_checks import Exact
from benchmarks.gpu_contestants import EAGER, EXACT, NCHW, Contestant
from mbn_kernels import backends
from mbn_kernels.backends.reference import ReferenceKernels
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import NETWORKS

made_up = test_gpu_benchmark.made_up  # the fixture


class WrongForward(ReferenceKernels):
    """Products are off by a tenth of another image's: batch norm would take a factor back."""

    def pointwise_forward(self, u, weight, statistics):
        y, _ = super().pointwise_forward(u, weight, False)
        y = y + 0.1 * y.roll(1, 0)
        return y, self.statistics(y) if statistics else None


class WrongBackward(ReferenceKernels):
    """Only the gradients of the products' weights are off, by a tenth."""

    def pointwise_backward(self, *args):
        du, sums, dweight = super().pointwise_backward(*args)
        return du, sums, dweight if dweight is None else 1.1 * dweight


class Breaks(ReferenceKernels):
    def pointwise_forward(self, *args):
        raise torch.OutOfMemoryError("out of memory\nand more")


@pytest.fixture
def with_kernels(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type], None]]:
    """Has "triton" run kernels like these; "cuda" is right."""

    def choose(kernels: type[ReferenceKernels]) -> None:
        supports = backends._reference_supports
        monkeypatch.setitem(backends._LOADERS, "wrong", lambda: backends.Backend(kernels(), None, supports))
        monkeypatch.setitem(backends._SUPPORTS, "wrong", supports)
        backends._backend.cache_clear()
        take_part(monkeypatch, {"triton": "wrong", "cuda": BACKEND})

    yield choose
    monkeypatch.undo()
    backends._backend.cache_clear()


#: What of each kind of row the products play a part in: forward, and only backward.
PRODUCTS = {
    "operators": ({"evaluation", "forward", "backward"}, {"backward"}),
    "layers": ({"evaluation", "forward", "backward"}, {"backward"}),
    "networks": (
        {"training step", "training step as a CUDA graph", "CUDA graph", "evaluation"},
        {"training step", "training step as a CUDA graph"},
    ),
}


def rows_of(kind: str) -> list[dict]:
    """Those where "triton" computes products. A network is of maps and a batch that gradients can be told by."""
    found = gpu.rows(options("--only", kind, model="mobilenet_v3_small", batch=4, side=64), 3e12)
    return [row for row in found if not row.get("operator", "").startswith("depthwise")]


@pytest.mark.parametrize("kernels", (WrongForward, WrongBackward))
@pytest.mark.parametrize("kind", PRODUCTS)
def test_who_is_wrong_has_no_time(with_kernels: Callable, kind: str, kernels: type) -> None:
    with_kernels(kernels)
    wrong, found = PRODUCTS[kind][kernels is WrongBackward], rows_of(kind)
    seen = set()
    for row in found:
        direction = row.get("pass") or row["direction"]
        seen.add(direction)
        if direction not in wrong:
            assert not row["failed"] and "triton" in row["seconds"], row
            continue
        assert row["failed"].keys() == {"triton"} and "triton" not in row["seconds"], row
        sentence = row["failed"]["triton"].split(" ")
        error, tolerance = float(sentence[3].rstrip(",")), float(sentence[4])
        assert row["failed"]["triton"] == f"is off by {error:.1e}, {tolerance:.1e} are allowed"
        assert row["errors"]["triton"] == pytest.approx(error, rel=0.05) and error > tolerance
        assert "share" not in row or "triton" not in row["share"]
        if kind != "operators":
            assert {"eager", "cuda"} <= row["seconds"].keys() and row["errors"]["eager"] < tolerance
        assert "triton failed: is off by" in gpu_tables.line(row)
    assert seen == PRODUCTS[kind][0]
    assert "failed" in gpu_text(found)


def test_a_wrong_way_has_no_time(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first shape's ways the second is off by a fifth; another breaks; the rest is measured."""
    calls = []

    def evaluate(right: Tensor, way, before: int) -> Tensor:
        calls.append(way)
        if calls.index(way) != len(calls) - 1 or len(set(calls)) > 3:
            return right
        if len(set(calls)) == 3:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return right * (1.2 if len(set(calls)) == 2 else 1)

    rows = [row for rows in ways_by(monkeypatch, evaluate) for row in rows]
    assert [row["seconds"] for row in rows] == [1e-3, None, None] + [1e-3] * (len(rows) - 3)
    assert rows[1]["errors"]["cuda"] == pytest.approx(0.2, abs=0.01)
    assert rows[1]["failed"].startswith("is off by 2.0e-01, ") and rows[1]["failed"].endswith(" are allowed")
    assert rows[2]["failed"] == "OutOfMemoryError: out of memory" and not rows[2]["errors"]
    assert not any(row["failed"] for row in rows[3:])


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_check_that_breaks(with_kernels: Callable, kind: str) -> None:
    with_kernels(Breaks)
    for row in rows_of(kind):
        assert row["failed"] == {"triton": "OutOfMemoryError: out of memory"} and "triton" not in row["errors"]
        assert kind == "operators" or row["seconds"].keys() >= {"eager", "cuda"}


def test_what_is_wrong_before_something_breaks(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass has its own reason."""

    def calls(contestant: Contestant, *args: object) -> Iterator[gpu_contestants.Timed]:
        for name, call, given in block_calls(contestant, *args):
            if contestant.name == "triton" and name == "forward":
                raise RuntimeError("launch of [1] blocks")
            wrong = contestant.name == "triton" and name == "evaluation"
            yield name, (lambda call=call: 1.1 * call()) if wrong else call, given

    block_calls = gpu_blocks.block_calls
    monkeypatch.setattr(gpu_blocks, "block_calls", calls)
    rows = {row["pass"]: row for row in gpu_blocks.measure_block("mobilenet_v2", SHAPES["v2"], 1, CPU, False)}
    assert rows["evaluation"]["failed"]["triton"].startswith("is off by 1.0e-01, ")
    for name in ("forward", "backward"):
        assert rows[name]["failed"] == {"triton": "RuntimeError: launch of [1] blocks"}
    assert all(row["seconds"].keys() == {"eager", "cuda"} for row in rows.values())


@pytest.mark.parametrize("kind", PRODUCTS)
def test_nothing_to_compare_with(made_up: list[str], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Nobody is right where float64 does not fit."""
    build = gpu_contestants.build

    def too_large(contestant: Contestant, *args: object) -> torch.nn.Module:
        if contestant.exact:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return build(contestant, *args)

    for module in (gpu_blocks, gpu_networks, gpu_operators):
        monkeypatch.setattr(module, "build", too_large)
    found = list(gpu.rows(options("--only", kind, "--quick"), 3e12))
    for row in found:
        assert not row["seconds"] and not row["errors"] and {"triton", "cuda"} <= row["failed"].keys()
        reason = "RuntimeError: nothing to compare with: OutOfMemoryError: out of memory"
        assert set(row["failed"].values()) == {reason}
    assert "failed" in gpu_text(found)


def test_what_is_allowed() -> None:
    """Four times eager's error and eight roundings; no more where eager overflows."""
    eps = torch.finfo(torch.bfloat16).eps
    found = correct.allowed([0.01, math.inf, math.nan], torch.bfloat16)
    assert found == pytest.approx([0.04 + 8 * eps, 8 * eps, 8 * eps])
    assert correct.allowed([0.01], torch.float32, kinks=True) == pytest.approx([0.041], rel=1e-4)
    step = gpu_networks.network_cases(256)[0]
    assert step.limits(torch.bfloat16, [1e-4, 0.1, 0.2]) == pytest.approx([0.02, 0.4 + 8 * eps, 0.801 + 8 * eps])
    assert step.limits(torch.bfloat16, [0.01, 0.1, 0.2])[0] == pytest.approx(0.04)
    assert step.limits(torch.bfloat16, [math.inf, 0.1, 0.2])[0] == 0.02


def test_each_result_is_held_to_its_own() -> None:
    """A small gradient is not lost beside a large one, and NaN is never right."""
    exact = Exact([torch.full((4,), 100.0).double(), torch.ones(2).double()], [0.1, 0.1])
    errors: dict[str, float] = {}
    assert exact.sentence([torch.full((4,), 101.0), torch.ones(2)], "right", errors) is None
    wrong = exact.sentence([torch.full((4,), 100.0), torch.tensor([0.0, 1.0])], "wrong", errors)
    assert wrong == "is off by 7.1e-01, 1.0e-01 are allowed"
    lost = exact.sentence([torch.full((4,), 100.0), torch.tensor([math.nan, 1.0])], "lost", errors)
    assert lost == "is off by nan, 1.0e-01 are allowed"
    assert errors == pytest.approx({"right": 0.01, "wrong": 0.5**0.5})  # JSON has no NaN


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_the_oracle_is_float64(dtype: torch.dtype) -> None:
    """All of it, from the numbers as the others round them, without autocast and CUDA graphs."""
    setting, small = CPU._replace(dtype=dtype), options()
    small.dtype = dtype
    calls = {
        "block": partial(gpu_blocks.block_calls, shape=SHAPES["v3"], setting=setting),
        "stage": partial(gpu_operators.stage_calls, shape=STAGES[1], setting=setting),
    }
    found = {name: list(gpu_checks.exact_passes(PASSES, made, setting).values()) for name, made in calls.items()}
    for case in gpu_networks.network_cases(2):
        results = case.prepare(EXACT, "mobilenet_v3_small", 2, small).results()
        found[f"{case.direction} {case.batch}"] = [Exact(results, [])]
    for name, passes in found.items():
        assert {t.dtype for each in passes for t in each.results} == {torch.float64}, name
    x, exact = (gpu_contestants.drawn(c, (2, 3, 4, 4), dtype, CPU.device) for c in (EAGER, EXACT))
    assert x.dtype == dtype and exact.dtype == torch.float64 and torch.equal(x.double(), exact)
    rounded, weights = (
        gpu_contestants.build(c, partial(build_block, SHAPES["v3"]), CPU.device, dtype).state_dict()
        for c in (EAGER, EXACT)
    )
    for name, t in rounded.items():
        assert not t.is_floating_point() or (t.dtype == dtype and torch.equal(t.double(), weights[name])), name


PASSES = ("evaluation", "forward", "backward")


@pytest.mark.parametrize("network", NETWORKS)
def test_all_have_the_same_network_and_images(network: str) -> None:
    """Without dropout, whatever was drawn before."""

    def given(contestant: Contestant) -> tuple[dict, Tensor]:
        torch.rand(1)
        net = gpu_networks.network_of(contestant, network, small, torch.float32)
        assert not any(module.p for module in net.modules() if isinstance(module, torch.nn.Dropout))
        return net.state_dict(), gpu_networks.images(contestant, 2, small, torch.float32)

    small = options()
    weights, images = given(EAGER)
    for contestant in (OURS, NCHW, EXACT):
        others, same = given(contestant)
        assert weights.keys() == others.keys() and torch.equal(images, same.float())
        assert all(torch.equal(t.double(), others[name].double()) for name, t in weights.items())


def test_a_step_that_was_captured_is_a_first_one(made_up: list[str]) -> None:
    """Its network is set back to what it was before the calls that a graph takes."""
    first, later = (
        gpu_networks.network_training(EAGER, "mobilenet_v3_small", 2, options(), graph).results()
        for graph in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
