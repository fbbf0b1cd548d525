"""python -m benchmarks.gpu without a GPU: what it runs, on the CPU; what it counts; its tables."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import stock
import torch
from test_blocks import REAL
from torch import Tensor

pytest.importorskip("rich", reason="rich is not installed")
from benchmarks import gpu, gpu_blocks, gpu_checks, gpu_contestants, gpu_networks, gpu_operators, gpu_tables, gpu_timing
from benchmarks.gpu_contestants import EAGER, Contestant
from benchmarks.gpu_timing import Setting
from benchmarks.layers import label, minimum_bytes, minimum_evaluation_bytes
from benchmarks.stages import StageShape, deferred_bytes
from mbn_kernels import available_backends, backends, chain, use_backend
from mbn_kernels.backends.reference import ReferenceKernels
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import NETWORKS, BlockShape, layer_shapes

CPU = Setting(torch.device("cpu"), torch.bfloat16, 2, 3e12, 50)
SHAPES = {
    "v1": BlockShape(8, 3, 8, 16, False, "relu", 2, 8, 8, "separable"),
    "v2": BlockShape(8, 3, 24, 8, False, "relu6", 1, 8, 8, "inverted_residual"),
    "v3": BlockShape(8, 5, 24, 16, True, "hs", 1, 8, 8, "inverted_residual"),
}
STAGES = (
    StageShape("depthwise", 8, 8, 3, 2, 9, 9, "hardswish"),
    StageShape("pointwise", 8, 16, 1, 1, 9, 9, "identity"),
)
BACKEND = "cpu" if available_backends()["cpu"] == "available" else "reference"
OURS = Contestant(BACKEND, backend=BACKEND)


# What runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_calls_of_a_block(shape: BlockShape, dtype: torch.dtype) -> None:
    """Stock and ours do the same in each pass, from the same numbers."""

    def results(contestant: Contestant) -> dict[str, tuple[Tensor, ...]]:
        found = {}
        with use_backend(contestant.backend):
            for name, call, given in gpu_blocks.block_calls(contestant, shape, CPU._replace(dtype=dtype)):
                out = call(*(given() if given else ()))
                found[name] = out if isinstance(out, tuple) else (out,)
        return found

    expected, got = results(EAGER), results(OURS)
    assert list(expected) == list(got) == ["evaluation", "forward", "backward"]
    for name, plain in expected.items():
        assert [(t.dtype, t.shape, t.requires_grad) for t in got[name]] == [
            (t.dtype, t.shape, t.requires_grad) for t in plain
        ]
        assert plain[0].dtype == dtype and plain[0].requires_grad == (name == "forward")
        if dtype == torch.float32:
            stock.assert_same(got[name], plain, 1e-4)


@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_calls_of_a_stage(shape: StageShape) -> None:
    """The plain twin with the reference's kernels and ours do the same, from the same numbers."""
    setting = CPU._replace(dtype=torch.float32)

    def results(contestant: Contestant) -> dict[str, list[Tensor]]:
        with use_backend(contestant.backend):
            calls = gpu_operators.stage_calls(contestant, shape, setting)
            return {name: gpu_checks.results_of(call) for name, call, _ in calls}

    expected, got = results(EAGER), results(OURS)
    assert list(got) == ["evaluation", "forward", "backward"]
    assert got.keys() == gpu_operators.TARGETS[shape.conv].keys()
    assert {name: len(found) for name, found in got.items()} == {"evaluation": 1, "forward": 2, "backward": 4}
    for name, plain in expected.items():
        stock.assert_same(got[name], plain, 1e-4)


def take_part(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]) -> None:
    """Ours, by name: the backend that each really runs."""
    found = [Contestant(name, backend=backend) for name, backend in chosen.items()]
    for module in (gpu_contestants, gpu_operators):
        monkeypatch.setattr(module, "ours", lambda: found)


def captured(call: Callable) -> Callable:
    """No CUDA graph, but the calls that come before one is recorded."""
    gpu_networks.warm_up(call)
    return call


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No GPU is asked for anything: two backends, of which the second takes half as long; who was measured."""
    measured: list[str] = []

    def seconds(call: Callable, *args: object, given: Callable | None = None, ahead: bool = True) -> float:
        call(*(given() if given else ()))
        return {"triton": 2e-3, "cuda": 1e-3}.get(measured[-1], 1.5e-3)

    turn = gpu_contestants.turn

    def watched(contestant: Contestant) -> object:
        measured.append(contestant.name)
        return turn(contestant)

    for module in (gpu_checks, gpu_blocks, gpu_networks):
        monkeypatch.setattr(module, "median_seconds", seconds)
        monkeypatch.setattr(module, "turn", watched)
    take_part(monkeypatch, dict.fromkeys(gpu_contestants.BACKENDS, BACKEND))
    monkeypatch.setattr(gpu_operators, "l2_bytes", lambda device: 0)
    monkeypatch.setattr(gpu_networks, "captured", captured)
    monkeypatch.setattr(gpu, "blocks", lambda network, quick: dict.fromkeys(SHAPES.values(), 1))
    monkeypatch.setattr(gpu, "measured_stages", lambda network, setting: STAGES)
    return measured


def options(*arguments: str, model: str = "mobilenet_v3_large", batch: int = 2, side: int = 32) -> argparse.Namespace:
    small = "--batch", str(batch), "--resolution", str(side), "--dtype", "float32"
    found = gpu.parse(["--model", model, "--no-compile", *small, *arguments])
    found.device = torch.device("cpu")
    return found


def test_every_row(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(gpu.rows(options("--quick"), 3e12))
    kinds = [row["kind"] for row in found]
    assert [kinds.count(kind) for kind in ("operator", "block", "network")] == [3, 9, 4]
    more = list(gpu.rows(options("--only", "operators", "networks"), 3e12))
    assert len(more) == 6 + 6  # also pointwise stages, which are Triton's alone, and small evaluations without a graph
    assert [list(row["seconds"]) for row in more[:6]] == [["triton", "cuda"]] * 3 + [["triton"]] * 3
    assert [row["met"] for row in more[:6]] == [False] * 6
    assert not any(row["failed"] for row in found), [row["failed"] for row in found]
    for row in found:
        assert {"triton", "cuda"} <= row["seconds"].keys() == row["errors"].keys()
        assert 0 < max(row["errors"].values()) < 1e-4, "of float32 against float64"
    assert all(row["slower_than"] == [] for row in found if row["kind"] == "block")
    text = gpu_text(json.loads(json.dumps(found)))
    assert "V3-Large, forward" in text and "CUDA graph" in text


def test_what_fails_leaves_the_rest(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(contestant: Contestant, *args: object):
        if contestant.name == "cuda":
            raise RuntimeError("launch of [1] blocks\nand more")
        return block_calls(contestant, *args)

    block_calls = gpu_blocks.block_calls
    monkeypatch.setattr(gpu_blocks, "block_calls", refuses)
    found = list(gpu.rows(options("--only", "layers"), 3e12))
    assert len(found) == 9
    for row in found:
        assert row["failed"] == {"cuda": "RuntimeError: launch of [1] blocks"}
        assert row["seconds"].keys() == {"eager", "triton"} and row["slower_than"] == ["eager"]
    assert "launch of [1] blocks" in gpu_tables.line(found[0])
    assert "failed" in gpu_text(found)


def ways_by(monkeypatch: pytest.MonkeyPatch, evaluate: Callable) -> list[list[dict]]:
    """The rows of each shape's ways. The kernels are not here: ``evaluate`` is given the reference's result, the way,
    and how many have run before it.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    from mbn_kernels.backends.cuda import kernels, planner

    reference, ran = ReferenceKernels(), []

    def _evaluate(self, x: Tensor, stages: tuple, params: list[dict], residual: Tensor | None, way) -> Tensor:
        flat = [p for own in params for p in own.values()]
        ran.append(way)
        right = chain.forward(reference, x, chain.Chain("", stages), flat, residual is not None, False)[0]
        return evaluate(right, way, len(ran) - 1)

    monkeypatch.setattr(planner, "_shared", lambda *args: 0)
    monkeypatch.setattr(kernels.CudaKernels, "_evaluate", _evaluate)
    monkeypatch.setitem(
        backends._LOADERS, "cuda", lambda: backends.Backend(kernels.CudaKernels(), None, lambda *a: None)
    )
    backends._backend.cache_clear()
    try:
        return [list(gpu_blocks.measure_ways("mobilenet_v3_large", shape, CPU)) for shape in SHAPES.values()]
    finally:
        monkeypatch.undo()
        backends._backend.cache_clear()


def test_ways(made_up: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's ways with its estimates."""
    ran = []

    def evaluate(right: Tensor, way, before: int) -> Tensor:
        ran.append(way)
        return right

    found = ways_by(monkeypatch, evaluate)
    from mbn_kernels.backends.cuda import planner

    for rows, shape in zip(found, SHAPES.values(), strict=True):
        assert [row["first_choice"] for row in rows] == [True] + [False] * (len(rows) - 1)
        assert [row["estimate"] for row in rows] == sorted(row["estimate"] for row in rows)
        assert all(row["seconds"] == 1e-3 and not row["failed"] for row in rows)
        assert all(0 < row["errors"]["cuda"] < 1e-2 for row in rows)
        assert {row["block"] for row in rows} == {label(shape)}
        assert sum((row["count"], row["gate_height"]) == (0, 0) for row in rows) == 1
    every = [row for rows in found for row in rows]
    measured = ran[::2]  # each is checked, then timed
    assert measured == ran[1::2] and len(measured) > 9
    assert [planner.Way(*(row[name] for name in planner.Way._fields)) for row in every] == measured


def test_names_of_ways() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from mbn_kernels.backends.cuda.planner import Way

    def described(shape: str, *way: int) -> str:
        return gpu_blocks.describe(Way(*way), chain.parse(build_block(SHAPES[shape]).call().spec).stages)

    assert described("v2") == "pointwise, depthwise, pointwise"
    assert described("v2", 0, 3, 8, 4) == "pointwise+depthwise+pointwise 8x4"
    assert described("v2", 1, 2, 8, 4) == "pointwise, depthwise+pointwise 8x4"
    assert described("v3") == "pointwise, depthwise, gate, pointwise"
    assert described("v3", 0, 2, 8, 4, 7, 2) == "pointwise+depthwise 8x4, gate+pointwise 7x2"


# What is timed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", (True, False), ids=("ahead", "not ahead"))
def test_median_of_calls(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """Between the two events is the call alone; before it the cache is emptied and the GPU is kept waiting."""
    done: list[str] = []
    durations = iter([1.0, *(float(n) for n in (3, 1, 2, 7, 4, 6, 5))])  # ms: an estimate, and what counts

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return next(durations)

    class Memory:
        def zero_(self) -> None:
            done.append("emptied")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("asleep"))
    monkeypatch.setattr(gpu_timing, "_other_memory", lambda device: Memory())

    def given() -> tuple[str, int]:
        done.append("given")
        return "called", 1

    def call(name: str, one: int) -> None:
        done.append(name)

    assert gpu_timing.median_seconds(call, 2.0, given=given, ahead=ahead) == 4e-3
    once = ["given", "emptied", "event", "called", "event"]
    late = [*once[:2], "asleep", *once[2:]] if ahead else once
    assert done == [*once, "waited"] * 3 + late * 7 + ["waited"]


# What is counted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS[1:])  # V1 has no residual, which is not told from the shape there
def test_least_bytes(network: str) -> None:
    """Those of docs/design.md, which test_triton_compiled.py holds the launches to."""
    least_bytes = pytest.importorskip("test_triton_compiled").least_bytes
    for shape in layer_shapes(network):
        found = minimum_bytes(shape, 3, 2)
        assert found["forward"] + found["backward"] == 3 * least_bytes(shape)
        assert found["evaluation"] == minimum_evaluation_bytes(shape, 3, 2)
        assert minimum_bytes(shape, 3, 4) == {name: 2 * n for name, n in found.items()}


def test_bytes_of_a_stage_are_those_of_a_block() -> None:
    """A block's forward is its stages' and the last one's materialisation: batch norm, activation, residual."""
    shape = SHAPES["v2"]
    out = 2 * shape.out_channels * shape.height * shape.width
    stages = [
        StageShape("pointwise", 8, 24, 1, 1, 8, 8, "relu6"),
        StageShape("depthwise", 24, 24, 3, 1, 8, 8, "relu6"),
        StageShape("pointwise", 24, 8, 1, 1, 8, 8, "identity"),
    ]
    forward = sum(deferred_bytes(s, 1, torch.bfloat16)["forward"] for s in stages)
    assert minimum_bytes(shape, 1, 2)["forward"] == forward + 3 * out


def test_blocks_of_a_network() -> None:
    for network in NETWORKS:
        every, few = (gpu_blocks.blocks(network, quick) for quick in (False, True))
        assert sum(every.values()) == len(layer_shapes(network)) and set(every) <= set(REAL)
        assert len(few) == 3 and few.items() <= every.items()


def test_who_is_slower() -> None:
    seconds = {"eager": 1.0, "compile": 1.3, "triton": 1.19, "cuda": 1.2}
    assert gpu_blocks.slower_than(seconds) == ["eager"]  # within CHANCE of triton
    assert gpu_blocks.slower_than({**seconds, "cuda": 1.25}) == ["eager", "triton"]
    assert gpu_blocks.slower_than({"eager": 1.0, "triton": 1.1}) == ["eager"]
    assert gpu_blocks.slower_than({"eager": 1.0}) == []


def test_targets_of_networks() -> None:
    cases = {(case.direction, case.batch): case for case in gpu_networks.network_cases(256)}
    assert {key: case.targets for key, case in cases.items() if case.essential} == {
        ("training step", 256): {"eager": 2.0, "compile": 1.7},
        ("training step as a CUDA graph", 256): {},
        ("evaluation", 256): {"max-autotune": 1.6},
        ("CUDA graph", 1): {"reduce-overhead": 1.3},
    }
    for case in cases.values():
        assert case.targets.keys() <= {contestant.name for contestant in case.stock}
    targets = {"eager": 2.0, "compile": 1.7}
    seconds = {"eager": 4.0, "compile": 3.4, "triton": 1.0, "cuda": 2.0}
    assert gpu_networks.compare(seconds, targets) == {
        "ratios": {"eager": 2, "compile": 1.7, "triton": 0.5},
        "met": True,
    }
    assert gpu_networks.compare({**seconds, "compile": 3.3}, targets)["met"] is False
    assert gpu_networks.compare({"eager": 4.0, "cuda": 2.0}, targets)["met"] is None
    assert gpu_networks.compare({"eager": 4.0}, targets) == {"ratios": {}, "met": None}


def test_chosen_parts() -> None:
    for arguments, parts in (
        ((), {"operators", "layers", "ways", "networks"}),
        (("--only", "blocks"), {"operators", "layers", "ways"}),
        (("--only", "ways", "networks"), {"ways", "networks"}),
    ):
        chosen = gpu.parse(list(arguments))
        assert {part for part in gpu.PARTS if part != "blocks" and gpu.wants(chosen, part)} == parts


# The tables -----------------------------------------------------------------------------------------------------------

#: As older files are, without "errors".
RESULT = {
    "system": {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "cuda_backend": "available [made up]"},
    "copy_bandwidth": 3000.0,
    "rows": [
        {"kind": "operator", "operator": "depthwise 64x112x112-k3-s2-hardswish", "pass": "backward", "batch": 256,
         "minimum_bytes": 300_000_000, "seconds": {"triton": 200e-6, "cuda": 125e-6}, "failed": {},
         "share": {"triton": 0.5, "cuda": 0.8}, "target": 0.75, "met": True},
        *({"kind": "block", "model": "mobilenet_v3_large", "block": f"block-{i}", "times": i, "pass": "backward",
           "batch": 256, "minimum_bytes": 60_000_000, "failed": {} if i == 1 else {"compile": "why"},
           "seconds": {"eager": 90e-6, **({"compile": 45e-6} if i == 1 else {}), "triton": 50e-6, "cuda": i * 40e-6},
           "share": {"cuda": 0.5 / i}, "slower_than": [] if i == 1 else ["triton"]} for i in (1, 2)),
        *({"kind": "way", "model": "mobilenet_v3_large", "block": "block-1", "batch": 1, "way": way, "failed": None,
           "estimate": estimate, "seconds": seconds, "first_choice": way == "all"}
          for way, estimate, seconds in (("all", 5e-6, 12e-6), ("alone", 6e-6, 8e-6), ("broken", 7e-6, None))),
        {"kind": "network", "model": "mobilenet_v3_large", "direction": "CUDA graph", "batch": 1, "failed": {},
         "seconds": {"eager": 6e-4, "reduce-overhead": 3e-4, "triton": 2.5e-4, "cuda": 2e-4}, "met": True,
         "ratios": {"eager": 3.0, "reduce-overhead": 1.5, "triton": 1.25}, "targets": {"reduce-overhead": 1.3}},
    ],
}  # fmt: skip


def gpu_text(rows: list[dict]) -> str:
    """What a console shows of these rows."""
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for table in gpu_tables.tables({"rows": rows, "copy_bandwidth": 3000.0}):
        console.print(table)
    return console.export_text()


def cells(text: str, *start: str) -> list[str]:
    """The one line of a table that begins with these cells."""
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("│")] for line in text.splitlines() if "│" in line]
    (found,) = [line for line in lines if line[: len(start)] == list(start)]
    return found


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(RESULT))
    gpu.main(["--table", str(file)])
    text = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3" in text and "available [made up]" in text and "a copy: 3000 GB/s" in text
    operator = cells(text, "depthwise 64x112x112-k3-s2-hardswish", "backward")
    assert operator[2:] == ["300", "200.0  1500  50%", "125.0  2400  80%", "75%", "yes"]
    first = cells(text, "block-1", "1")
    assert first[2:] == ["60", "90.0   667  22%", "45.0  1333  44%", "50.0  1200  40%", "40.0  1500  50%", ""]
    second = cells(text, "block-2", "2")
    assert second[2:] == ["60", "90.0   667  22%", "failed", "50.0  1200  40%", "80.0   750  25%", "triton"]
    total = cells(text, "these blocks of a network", "3")
    assert total[2:] == ["180", "270.0   667  22%", "-", "150.0  1200  40%", "200.0   900  30%", ""]
    assert cells(text, "block-1", "all")[2:] == ["5.0", "12.0", "2.40", "first choice, 1.50x the fastest"]
    assert cells(text, "block-1", "alone")[2:] == ["6.0", "8.0", "1.33", "fastest"]
    assert cells(text, "block-1", "broken")[2:] == ["7.0", "failed", "-", ""]
    network = cells(text, "V3-Large", "CUDA graph")
    assert network[2:7] == ["1", "0.600", "0.300", "0.250", "0.200"]
    assert network[7:] == ["eager 3.00x, reduce-overhead 1.50x (1.3x), triton 1.25x", "yes"]


def test_a_line_for_each_row() -> None:
    lines = [gpu_tables.line(row) for row in RESULT["rows"]]
    assert lines[0].endswith("triton 200.000 us, cuda 125.000 us (80% of a copy)")
    assert lines[2].endswith("cuda 80.000 us, compile failed: why (25% of a copy)")
    assert lines[3] == "block-1, batch 1, all: 12.0 us, expected 5.0 us"
    assert lines[6].startswith("V3-Large, CUDA graph, batch 1: eager 0.600 ms, ")


def test_a_sentence_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu.main([])
