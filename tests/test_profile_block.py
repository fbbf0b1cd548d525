"""python -m benchmarks.profile_block: the table, the trace, and on a GPU what a profiler waits for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

pytest.importorskip("rich", reason="rich is not installed")
from benchmarks import profile_block
from benchmarks.profile_block import ITERATION, WARM_UP, Row, main, rows_of
from mbn_kernels import ranges
from mbn_kernels.models.tables import BlockShape

OPERATOR = "mbn::FusedInvResBlock"
STAGES = ("0.pointwise", "1.depthwise", "2.pointwise", "output")
TRAINING = [f"{OPERATOR}/{stage}/forward" for stage in STAGES]
TRAINING += [f"{OPERATOR}/{stage}/backward" for stage in reversed(STAGES)]
SMALL = "--resolution", "32", "--batch", "2"


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setattr(profile_block, "default_device", lambda: torch.device("cpu"))


def rows_in(printed: str) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in printed.splitlines() if "│" in line]
    return {first: cells for first, *cells in lines}


def ranges_in(trace: Path) -> list[str]:
    """Names of a Chrome trace's ranges, as they began."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    assert all(e["dur"] >= 0 for e in events)
    return [e["name"] for e in sorted(events, key=lambda e: e["ts"]) if e["name"].startswith(OPERATOR + "/")]


# On a CPU -------------------------------------------------------------------------------------------------------------


def test_a_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "folder" / "trace.json"
    main([*SMALL, "--iterations", "2", "--trace", str(trace)])
    printed = capsys.readouterr().out
    first, second, *_, last = printed.splitlines()
    assert first.startswith("mobilenet_v3_large, block 13 (160x1x1-k5-e960-o160-s1-se-hs), training, batch 2, torch.fl")
    assert second == f"{WARM_UP} calls to warm up, then 2"
    assert last == f"The trace is in {trace}: open it in Perfetto or chrome://tracing."

    rows = rows_in(printed)
    assert list(rows) == [*TRAINING, "outside of them", "an iteration"]
    assert all(cells[0] == "1" for cells in rows.values())  # calls an iteration
    host = [float(cells[1]) for cells in rows.values()]
    assert all(h > 0 for h in host) and sum(host[:-1]) == pytest.approx(host[-1], abs=1)
    assert [cells[2] for cells in rows.values()][-1] == "100.0%"
    assert ranges_in(trace) == 2 * TRAINING
    assert not ranges.on


def test_an_evaluation_is_one_range(needs_cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    main([*SMALL, "--iterations", "3", "--direction", "evaluation", "--backend", "cpu", "--trace", str(trace)])
    assert list(rows_in(capsys.readouterr().out)) == [f"{OPERATOR}/whole/forward", "outside of them", "an iteration"]
    assert ranges_in(trace) == 3 * [f"{OPERATOR}/whole/forward"]


def test_the_trace_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU there is one without --trace, too, in the folder where it runs."""
    monkeypatch.chdir(tmp_path)
    main([*SMALL, "--iterations", "1", "--model", "mobilenet_v1", "--block", "0", "--dtype", "bfloat16"])
    assert "training, batch 2, torch.bfloat16, CPU, " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["profile-mobilenet_v1-0.json"]
    names = [
        e.get("name", "") for e in json.loads((tmp_path / "profile-mobilenet_v1-0.json").read_text())["traceEvents"]
    ]
    assert "mbn::FusedDepthwiseSeparable/0.depthwise/backward" in names


@pytest.mark.parametrize("wanted", (True, False))
def test_ranges_are_left_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Switched on for the loop alone, also where it fails."""
    monkeypatch.setattr(ranges, "on", wanted)
    seen: list[bool] = []

    def failing(call: Callable, options: object) -> None:
        seen.append(ranges.on)
        raise ZeroDivisionError

    monkeypatch.setattr(profile_block, "call_of", lambda shape, options: lambda: seen.append(ranges.on))
    monkeypatch.setattr(profile_block, "recorded", failing)
    with pytest.raises(ZeroDivisionError):
        main(["--trace", str(tmp_path / "trace.json")])
    assert seen == [wanted] * WARM_UP + [True] and ranges.on == wanted


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--block 15", "argument --block: expected 0 to 14 for mobilenet_v3_large, got 15"),
        ("--block -1", "argument --block: expected 0 to 14 for mobilenet_v3_large, got -1"),
        ("--model mobilenet_v1 --block 13", "argument --block: expected 0 to 12 for mobilenet_v1, got 13"),
        ("--iterations 0", "argument --iterations: expected a positive number, got 0"),
        ("--batch 0", "argument --batch: expected a positive number, got 0"),
        ("--resolution -1", "argument --resolution: expected a positive number, got -1"),
        ("--iterations some", "argument --iterations: invalid int value: 'some'"),
        ("--model mobilenet_v9", "argument --model: invalid choice: 'mobilenet_v9' (choose from "),
        ("--backend none", "argument --backend: invalid choice: 'none' (choose from "),
        ("--backend triton", "argument --backend: triton: there is no GPU"),
    ],
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    states = {"reference": "available", "triton": "there is no GPU"}
    monkeypatch.setattr(profile_block, "available_backends", lambda: states)
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    printed = capsys.readouterr()
    assert caught.value.code == 2 and not printed.out
    assert printed.err.splitlines()[-1].startswith(f"python -m benchmarks.profile_block: error: {sentence}")


# On a GPU -------------------------------------------------------------------------------------------------------------


def event(name: str, start: float, end: float, kind: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    took = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=kind, time_range=took)


def on_gpu(name: str, start: float, end: float) -> SimpleNamespace:
    return event(name, start, end, DeviceType.CUDA)


FORWARD, BACKWARD = TRAINING[1], TRAINING[6]
EVENTS = [
    *(event(ITERATION, begin, begin + 80) for begin in (0, 100)),
    *(event(BACKWARD, begin + 30, begin + 40) for begin in (0, 100)),  # listed before what began earlier
    *(event(FORWARD, begin + 10, begin + 25) for begin in (0, 100)),
    event("aten::add", 12, 14),
    event("mbn::cpu_buffer", 13, 14),  # an operator, no range
    # The GPU is behind the host; a range is from its first kernel's start to its last one's end.
    on_gpu(ITERATION, 20, 90),
    on_gpu(FORWARD, 20, 40),
    on_gpu("first", 20, 26),
    on_gpu("second", 34, 40),
    on_gpu("between", 40, 45),
    on_gpu(BACKWARD, 50, 60),
    on_gpu("third", 50, 60),
    on_gpu("last", 70, 90),
    on_gpu(FORWARD, 120, 124),
    on_gpu("first", 120, 124),
]


def test_kernels_belong_to_the_range_around_them() -> None:
    rows, whole = rows_of(EVENTS, 2)
    assert list(rows) == [FORWARD, BACKWARD]
    assert rows[FORWARD] == pytest.approx(Row(1, 15, (6 + 6 + 4) / 2))
    assert rows[BACKWARD] == pytest.approx(Row(1, 10, 10 / 2))
    assert whole == pytest.approx(Row(1, 80, (6 + 6 + 5 + 10 + 20 + 4) / 2))


def test_the_table_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    console = profile_block.Console(width=120)
    console.print(profile_block.table_of(*rows_of(EVENTS, 2), True))
    rows = rows_in(capsys.readouterr().out)
    assert rows[FORWARD] == ["1", "15.0", "18.8%", "8.0", "31.4%"]
    assert rows["outside of them"] == ["1", "55.0", "68.8%", "12.5", "49.0%"]  # what no range is around
    assert rows["an iteration"] == ["1", "80.0", "100.0%", "25.5", "100.0%"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that only notes what is asked of it, and a call that does."""
    found: list[str] = []
    monkeypatch.setattr(profile_block, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(profile_block, "call_of", lambda shape, options: lambda: found.append(f"call {ranges.on}"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: found.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: found.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: found.append("stop"))
    return found


def test_the_loop_lies_between_start_and_stop(
    told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--iterations", "2"])
    assert told == ["call False"] * WARM_UP + ["wait", "start"] + ["call True", "wait"] * 2 + ["stop"]
    assert not ranges.on and not list(tmp_path.iterdir())
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("training, batch 256, torch.bfloat16, A GPU")
    assert last == "2 iterations ran between cudaProfilerStart and cudaProfilerStop."


def test_a_trace_on_a_gpu(told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records the GPU as well; nothing waits for the profiler's start."""
    asked: list[object] = []
    real, kinds = torch.profiler.profile, torch.profiler.ProfilerActivity

    def profile(activities: list, **options: object) -> torch.profiler.profile:
        asked.extend(activities)
        return real(activities=[kinds.CPU], **options)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    main(["--iterations", "2", "--trace", str(tmp_path / "trace.json")])
    assert asked == [kinds.CPU, kinds.CUDA]
    assert told == ["call False"] * WARM_UP + ["wait"] + ["call True", "wait"] * 2
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("direction", profile_block.DIRECTIONS)
def test_the_call(direction: str, dtype: torch.dtype) -> None:
    """A training step gives the gradients of the input and every parameter; an evaluation keeps nothing."""
    shape = BlockShape(8, 5, 24, 16, True, "hs", 2, 8, 8, "inverted_residual")
    options = SimpleNamespace(direction=direction, device=torch.device("cpu"), dtype=dtype, batch=2)
    found = profile_block.call_of(shape, options)()
    if direction == "evaluation":
        assert found.dtype == dtype and not found.requires_grad
        return
    module = profile_block.build_block(shape)
    assert [g.shape for g in found] == [(2, 8, 8, 8), *(p.shape for p in module.parameters())]
    assert found[0].dtype == dtype and all(g.dtype == torch.float32 for g in found[1:])
