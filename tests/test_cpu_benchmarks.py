"""The CPU benchmarks: what takes part, is checked and is counted, tables, charts; other engines are not needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed")
from benchmarks import (
    cpu_calls,
    cpu_charts,
    cpu_contestants,
    cpu_peers,
    cpu_processes,
    cpu_runs,
    cpu_scaling,
    cpu_training,
)
from benchmarks.cpu_contestants import Case, Contestant, Network

SMALL = Case("mobilenet_v3_small", 2, 1, resolution=32, width=0.35)
LARGE = SMALL._replace(model="mobilenet_v3_large")
ONCE = {"rounds": 1, "burst": 1, "pause": 0}
SYSTEM = {"mbn_kernels": "0.1.0", "torch": "2.13.0", "python": "3.11", "device": "cpu", "cpu": "A CPU", "cores": 2}


def row(seconds: dict[str, float], **more: object) -> dict:
    case = Case("mobilenet_v1", 1, 1)._asdict()
    return {**case, "seconds": seconds, "errors": dict.fromkeys(seconds, 1e-6), "failed": {}, **more}


def only(messages) -> dict:
    """The one row among them."""
    (found,) = [value for kind, value in messages if kind == "row"]
    return found


# What takes part ------------------------------------------------------------------------------------------------------


def test_one_line_for_who_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    absent = Contestant(cpu_contestants.eager, ("no_such_package", "torch", "nor_this"))
    picky = Contestant(cpu_contestants.eager, dtypes=("float32",))
    monkeypatch.setattr(
        cpu_contestants, "CONTESTANTS", {"absent": absent, "picky": picky, **cpu_contestants.CONTESTANTS}
    )
    out = cpu_contestants.left_out(["absent", "picky", "eager-channels-last"], ["float32", "bfloat16"])
    assert out == {
        "absent": "left out, no_such_package and nor_this not installed: pip install -e '.[cpu-peers]'",
        "picky, bfloat16": "left out, it has no bfloat16 kernels for CPUs",
    }
    assert cpu_contestants.takes_part(["absent", "picky"], "float32", out) == ["picky", "fused", "frozen"]
    assert cpu_contestants.takes_part(["absent", "picky"], "bfloat16", out) == ["fused", "frozen"]
    assert "torch" in cpu_contestants.versions(["absent"]) and "nor_this" not in cpu_contestants.versions(["absent"])
    cpu_runs.announce({"system": SYSTEM, "left_out": out})
    assert capsys.readouterr().out.splitlines()[1:] == [f"{name}: {why}" for name, why in out.items()]


def test_every_package_is_in_the_extra() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    (extra,) = [line for line in text.splitlines() if line.startswith("cpu-peers =")]
    assert all(f'"{package}' in extra for c in cpu_contestants.CONTESTANTS.values() for package in c.needs)


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", cpu_peers.models.NETWORKS)
def test_logits_depend_on_the_image(model: str, tmp_path: Path) -> None:
    """Else a wrong contestant could pass; and they are of no size that only float64 tells apart."""
    network = Network(Case(model, 2, 1, resolution=64), tmp_path)
    with torch.no_grad():
        logits = network.expected
    most = logits.abs().max()
    assert (logits[0] - logits[1]).abs().max() > 0.1 * most and 1e-2 < most < 1e3


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_who_is_wrong_has_no_time(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(network: Network) -> cpu_contestants.Call:
        call = cpu_contestants.eager(network)
        return lambda: call().flip(0)

    def broken(network: Network) -> cpu_contestants.Call:
        raise RuntimeError("no such operator\nand more")

    added = {"swapped": Contestant(swapped), "broken": Contestant(broken)}
    monkeypatch.setattr(cpu_contestants, "CONTESTANTS", {**cpu_contestants.CONTESTANTS, **added})
    names = ["swapped", "broken", "eager-channels-last", "fused"]
    given = {"case": LARGE._replace(dtype=dtype), "names": names, "timing": ONCE, "folder": str(tmp_path)}
    found = only(cpu_contestants.measure(given))
    assert list(found["seconds"]) == list(found["errors"]) == ["eager-channels-last", "fused"]
    assert max(found["errors"].values()) < cpu_contestants.TOLERANCE[dtype]
    assert found["failed"].keys() == {"swapped", "broken"}
    assert found["failed"]["swapped"].startswith("its logits are off by ")
    assert found["failed"]["broken"] == "RuntimeError: no such operator"


def test_errors() -> None:
    expected = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    assert cpu_contestants.relative_error(torch.tensor([[2.0, -4.0]]), expected) == 0.25
    assert cpu_contestants.relative_error([[float("nan"), -4.0]], expected) == float("inf")
    assert cpu_contestants.relative_error(torch.tensor([1.0, -4.0]), expected) == float("inf")


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, charts = tmp_path / "new" / "result.json", [tmp_path / "chart.svg"]
    small = "--model", "mobilenet_v3_small", "--batch", "1", "--resolution", "32", "--threads", "1"
    once = "--rounds", "1", "--burst", "1", "--pause", "0"
    with_eager = "--against", "eager-channels-last"
    pytest.importorskip("matplotlib")
    cpu_peers.main([*small, *once, *with_eager, "--json", str(file), "--chart", *map(str, charts)])
    result = json.loads(file.read_text())
    (found,) = result["rows"]
    assert found["seconds"].keys() == found["errors"].keys() == {"eager-channels-last", "fused", "frozen"}
    assert {name: found[name] for name in Case._fields} == Case("mobilenet_v3_small", 1, 1, resolution=32)._asdict()
    assert all(t > 0 for t in found["seconds"].values()) and not found["failed"]
    assert cpu_runs.table(result) in capsys.readouterr().out and charts[0].stat().st_size


def test_rows_that_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    for seconds, batches, keep in ((1.0, (1, 2, 4), True), (2.0, (2, 8), True), (3.0, (8,), False)):

        def answers(measurement: str, arguments: dict, seconds: float = seconds, **more: object):
            yield "row", {**row({"fused": seconds}), **arguments["case"]._asdict()}

        monkeypatch.setattr(cpu_runs, "answers", answers)
        requests = [(SMALL._replace(batch=batch), {}) for batch in batches]
        assert cpu_runs.run({"rows": []}, "", requests, file, keep)
        found = {each["batch"]: each["seconds"]["fused"] for each in json.loads(file.read_text())["rows"]}
        assert found == {1.0: {1: 1, 2: 1, 4: 1}, 2.0: {1: 1, 2: 2, 4: 1, 8: 2}, 3.0: {8: 3}}[seconds]


def test_a_process_that_dies_costs_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(measurement: str, arguments: dict, *, threads: int):
        if arguments["case"].batch == 1:
            raise cpu_processes.Died("the process ended with exit code -11")
        yield "row", row({"fused": 1e-3}, batch=arguments["case"].batch)

    monkeypatch.setattr(cpu_runs, "answers", answers)
    file, result = tmp_path / "result.json", {"rows": []}
    assert not cpu_runs.run(result, "", [(SMALL._replace(batch=batch), {}) for batch in (1, 2)], file)
    assert [each["batch"] for each in json.loads(file.read_text())["rows"]] == [2]
    assert cpu_runs.run(result, "", [(SMALL, {})], None)
    monkeypatch.undo()
    with pytest.raises(cpu_processes.Died, match=r"exit code 1: .*no_such_module"):
        list(cpu_processes.answers("no_such_module:f", {}, threads=1))


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of who has the right gradients, and the memory of a step."""
    monkeypatch.setattr(cpu_training, "answers", lambda _, given, **more: cpu_training.peak(given))
    names = [name for name in cpu_training.BY_NAME if name != "compile"]
    counts = Path("/proc/self/clear_refs").exists()  # Linux
    found = only(cpu_training.measure({"case": SMALL, "names": names, "timing": ONCE, "memory": counts}))
    assert list(found["seconds"]) == list(found["errors"]) == names and not found["failed"]
    assert list(found["peak_bytes"]) == names * counts and all(size >= 0 for size in found["peak_bytes"].values())


def test_who_has_wrong_gradients_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu_training.step_of

    def step_of(name: str, case: Case):
        model, call = real(name, case)
        for parameter in model.parameters() if name == "fused" else ():
            parameter.register_hook(lambda g: 2 * g)
        return model, call

    monkeypatch.setattr(cpu_training, "step_of", step_of)
    given = {"case": SMALL, "names": ["eager-nchw", "fused"], "timing": ONCE, "memory": False}
    found = only(cpu_training.measure(given))
    assert list(found["seconds"]) == ["eager-nchw"] and "gradients are off by" in found["failed"]["fused"]


def test_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call costs; an output that is not stock's ends it."""
    path = tmp_path / "calls.json"
    cpu_calls.main(["--rounds", "1", "--burst", "2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["way"], len(row["seconds"])) for row in rows] == [("evaluation", 4)] * 2 + [("training", 2)] * 2
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    lines = cpu_calls.table({"rows": rows}).splitlines()
    assert len(lines) == 6 and lines[0].startswith("| µs a call | stock modules | fused |")
    assert lines[-1].startswith("| inverted residual with squeeze-excite, training |") and lines[-1].endswith(
        "| – | – |"
    )
    assert capsys.readouterr().out.splitlines()[-6:] == lines
    monkeypatch.setattr(cpu_calls, "freeze", lambda module, x: lambda x: module(x) + 1)
    with pytest.raises(AssertionError, match="inverted residual, frozen: "):
        cpu_calls.main(["--rounds", "1", "--burst", "1"])


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"batch": 1, "resolution": 224, "width": 1.0}
    sweeps = {"batch": [1, 2], "resolution": [96, 224], "width": [1.0]}
    assert cpu_scaling.points(at, sweeps) == [at, {**at, "batch": 2}, {**at, "resolution": 96}]
    assert cpu_scaling.multiply_adds(Case("mobilenet_v3_large", 64, 1)) == pytest.approx(216.6e6, rel=1e-3)
    monkeypatch.setattr(cpu_scaling, "peak_gflops", lambda: 50.0)
    given = {"case": SMALL, "names": ["fused"], "timing": ONCE, "folder": str(tmp_path)}
    found = only(cpu_scaling.measure(given))
    assert found["peak_gflops"] == 50 and found["multiply_adds"] == cpu_scaling.multiply_adds(SMALL)


# Tables and charts ----------------------------------------------------------------------------------------------------

ROWS = [
    row({"eager-channels-last": 8e-3, "openvino": 4e-3, "fused": 3.2e-3}),
    row({"eager-channels-last": 8e-3, "fused": 16e-3}, failed={"openvino": "why"}, batch=16, threads=2),
    row({"eager-channels-last": 8e-3}, failed={"fused": "why"}, dtype="bfloat16", resolution=96, width=0.5),
]


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"system": SYSTEM, "left_out": {}, "rows": ROWS}))
    cpu_peers.main(["--table", str(file)])
    assert capsys.readouterr().out.splitlines() == [
        "| ms a call | eager-channels-last | openvino | fused | fused against the best of the others |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| V1, batch 1, 1 thread | 8.00 | 4.00 | 3.20 | 1.25× |",
        "| V1, batch 16, 2 threads | 8.00 | – | 16.00 | 0.50× |",
        "| V1, batch 1, 1 thread, bfloat16, 96×96, width 0.5 | 8.00 | – | – | – |",
    ]


def test_tables_of_training_and_scaling() -> None:
    mib = 1 << 20
    rows = [{**ROWS[0], "peak_bytes": {"eager-channels-last": 200 * mib, "fused": 90 * mib}}]
    assert cpu_training.tables({"rows": rows}).splitlines()[-1] == "| V1, batch 1, 1 thread | 200 | 90 | 0.45 |"
    lines = cpu_scaling.table({"rows": scaled(100.0)}).splitlines()
    assert lines[2] == "| V1, batch 1, 1 thread | 2.00, 50% | 1.00, 100% | 2.00× |"
    assert lines[-1] == "Peak, 2 threads: 200 GFLOP/s"
    assert cpu_scaling.table({"rows": scaled(None)}).splitlines()[-1] == "Peak, 2 threads: not known"


def scaled(peak: float | None) -> list[dict]:
    """Ours at the peak, the other at half of it."""
    return [
        row({"onnxruntime": 2e-3 * batch / threads, "fused": 1e-3 * batch / threads}, batch=batch, threads=threads,
            multiply_adds=50e6, peak_gflops=peak and peak * threads)
        for batch in (1, 2) for threads in (1, 2)
    ]  # fmt: skip


def test_a_chart_that_cannot_be_drawn_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cpu_peers.main(["--chart", "chart.jpg"])
    assert "expected a name that ends in .png or .svg, got chart.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ("png", "svg"))
def test_charts(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    at = {"batch": 1, "resolution": 224, "width": 1.0}
    path = tmp_path / f"chart.{suffix}"
    cpu_charts.bars({"system": SYSTEM, "rows": ROWS}, path)
    bars = path.read_bytes()
    for peak in (100.0, None):
        cpu_charts.curves({"system": SYSTEM, "rows": scaled(peak), "at": at}, path)
    curves = path.read_bytes()
    if suffix == "png":
        assert bars.startswith(b"\x89PNG") and curves.startswith(b"\x89PNG")
        return
    for text in ("A CPU, 2 cores; mbn_kernels", "higher is faster", "fused", "batch 16, 2 threads, float32", "V1"):
        assert text.encode() in bars, text
    for text in ("A CPU, 2 cores", "time of an image (ms)", "images a call", "fused, 2 threads"):
        assert text.encode() in curves, text
    cpu_charts.curves({"system": SYSTEM, "rows": scaled(None), "at": at}, path)
    assert path.read_bytes() == curves


def test_speeds_and_parts_of_the_peak() -> None:
    assert cpu_charts.speeds(ROWS[0]) == {"eager-channels-last": 0.5, "openvino": 1.0, "fused": 1.25}
    rows = [{**r, "peak_gflops": peak} for r, peak in zip(scaled(1.0), (90.0, None, 100.0, None), strict=True)]
    peaks = cpu_runs.peaks(rows)
    assert peaks == {1: 100.0, 2: None}
    assert (
        cpu_runs.share(rows[0], "fused", peaks) == pytest.approx(1) and cpu_runs.share(rows[1], "fused", peaks) is None
    )
