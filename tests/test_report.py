"""`python -m benchmarks.report`: what it reads, its tables' numbers, and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_files import GPU, NARROW, WIDE, benchmark, blocks, file, group, networks, stages

pytest.importorskip("rich", reason="rich is not installed")
from benchmarks import report, report_charts, report_data, report_tables


@pytest.fixture
def read(tmp_path: Path):
    """read(benchmarks): the result of a file of them."""
    return lambda benchmarks: report_data.read([file(tmp_path / "read.json", benchmarks)])


def cells(table: str, *names: str) -> list[str]:
    """Those of the one row that has the names."""
    (row,) = [line for line in table.splitlines() if all(name in line for name in names)]
    return [cell.strip() for cell in row.strip("|").split("|")]


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, default",
    [
        (("compile", "fused-cpu", "fused-reference"), "fused-cpu"),
        (("fused-reference", "eager-nchw"), "fused-reference"),
        (("fused-cuda", "fused-triton"), "fused-cuda"),
        (("fused-triton", "fused-reference"), "fused-triton"),
        (("eager-nchw",), None),
    ],
)
def test_default_backend(names, default):
    assert report_data.default_of(names) == default


def test_order(read):
    """As tables have it, whatever the order of the file: V1 first, stock first, the default last."""
    result = read([*networks(), *blocks()][::-1])
    assert [g.kind for g in result.groups] == ["block"] * 4 + ["network"] * 4
    assert [g.name for g in result.of("network", "training")] == ["V1", "V3-Small"]
    assert [g.direction for g in result.of("block")] == ["evaluation", "evaluation", "forward", "backward"]
    wide = next(g for g in result.groups if g.layer == WIDE)
    assert list(wide.entries) == ["eager-nchw", "compile", "fused-reference", "fused-cpu"]


def test_a_time_that_is_recorded_counts(read):
    """A GPU's own, not what pytest-benchmark took with the wait for it."""
    times = {"eager-nchw": 8, "fused-cuda": 8}
    (found,) = read(group("block", "forward", times, layer=WIDE)).groups
    assert found.ratio == 1
    found = [benchmark("block", "forward", name, took, layer=WIDE) for name, took in times.items()]
    found[1]["extra_info"]["seconds"] = 2e-3
    assert read(found).groups[0].ratio == 4


def test_files_of_one_machine_are_merged(tmp_path):
    again = group("block", "evaluation", {"fused-cpu": 1}, layer=WIDE, torch="2.14.0")
    first, second = file(tmp_path / "a.json", blocks()), file(tmp_path / "b.json", [*again, *networks()])
    result = report_data.read([first, second])
    assert result.groups[0].entries["fused-cpu"]["seconds"] == 1e-3 and result.groups[0].ratio == 4
    assert len(result.of("block")) == len(result.of("network")) == 4
    assert cells(report_tables.header(result), "versions")[1].startswith("mbn_kernels 0.1.0, torch 2.13.0 and 2.14.0")


@pytest.mark.parametrize("name, value", [("cpu", "Another"), ("gpu", "A GPU"), ("threads", 1), ("device", "cuda")])
def test_files_of_two_machines_are_refused(name, value, tmp_path, capsys):
    other = file(tmp_path / "b.json", networks(**{name: value}))
    sentence = f"{other}: expected one machine in a report, but {name} is {value} there and "
    assert refused([file(tmp_path / "a.json", blocks()), other], tmp_path, capsys).startswith(sentence)


def refused(paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> str:
    """The one line, with exit status 2 and no report."""
    with pytest.raises(SystemExit) as end:
        report.main(["--read", *map(str, paths), "--output", str(tmp_path / "out")])
    assert end.value.code == 2 and not (tmp_path / "out" / "report.md").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


BAD = [
    (b"{", "expected JSON, got something else"),
    (b"\xff", "expected JSON, got something else"),
    (b"[]", "expected what `pytest --benchmark --benchmark-json` writes, got other JSON"),
    (b'{"rows": []}', "expected what `pytest --benchmark --benchmark-json` writes, got other JSON"),
    (b'{"benchmarks": []}', "no benchmark was measured"),
    (b'{"benchmarks": [1]}', "benchmark 0: expected extra_info and a median, got other JSON"),
    (b'{"benchmarks": [{"stats": {"median": 1}}]}', "benchmark 0: expected extra_info and a median, got other JSON"),
    (
        b'{"benchmarks": [{"stats": {"median": 1}, "extra_info": {}}]}',
        "benchmark 0: kind: expected one of block, stage, network, got None",
    ),
]


@pytest.mark.parametrize("content, sentence", BAD)
def test_other_files_are_refused(content, sentence, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refused([path], tmp_path, capsys) == f"{path}: {sentence}"


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("direction", "dx", "expected one of evaluation, forward, backward, got 'dx'"),
        ("layer", None, "expected text, got None"),
        ("batch", "4", "expected a number, got '4'"),
        ("launches", 1.5, "expected a number, got 1.5"),
        ("copy_bandwidth", float("nan"), "expected a number, got nan"),
        ("torch", [], "expected text, got []"),
        ("seconds", 0, "expected a positive number, got 0"),
    ],
)
def test_entries_that_do_not_fit_are_refused(name, value, sentence, tmp_path, capsys):
    path = file(tmp_path / "a.json", [*blocks(), benchmark("block", "forward", "compile", 1, layer=NARROW)])
    found = json.loads(path.read_text())
    found["benchmarks"][-1]["extra_info"][name] = value
    number = len(found["benchmarks"]) - 1
    path.write_text(json.dumps(found))
    assert refused([path], tmp_path, capsys) == f"{path}: benchmark {number}: {name}: {sentence}"


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    path = tmp_path / "none.json"
    assert refused([path], tmp_path, capsys) == f"{path}: No such file or directory"


# Tables ---------------------------------------------------------------------------------------------------------------


def test_header(read):
    lines = report_tables.header(read(networks(**GPU))).splitlines()[2:]
    assert lines == [
        "| GPU | A GPU |",
        "| CPU | A CPU |",
        "| threads of the CPU | 2 |",
        "| versions | mbn_kernels 0.1.0, torch 2.13.0, python 3.11, triton 3.6.0, cuda 12.8, driver 570 |",
        "| commit | 0123456789ab-dirty |",
        "| load average meanwhile | 0.3 to 0.3 |",
        "| copy bandwidth, measured | 20.0 GB/s |",
        "| arithmetic peak, measured | 200.0 GFLOP/s |",
    ]


def test_times(read):
    table = report_tables.times(read(blocks()).of("block"))
    assert cells(table, "ms a call") == [
        "ms a call", "direction", "eager-nchw", "eager-channels-last", "compile", "fused-reference", "fused-cpu",
        "fastest stock", "fused-cpu against it", "GB/s", "of a copy's", "GFLOP/s", "of the peak",
    ]  # fmt: skip
    assert cells(table, WIDE, "evaluation") == [
        f"V2 {WIDE}, 3×", "evaluation, batch 4, float32", "8.000", "–", "4.000", "5.000", "2.000",
        "compile", "2.00×", "10.0", "50%", "40.0", "20%",
    ]  # fmt: skip
    assert cells(table, NARROW)[7:10] == ["eager-channels-last", "0.50× <- slower", "5.0"]
    assert cells(table, "backward")[2:9] == ["–", "–", "–", "–", "3.000", "–", "–"]


def test_another_backend_than_the_default_is_named(read):
    found = group("block", "forward", {"eager-nchw": 4, "fused-triton": 2, "fused-cuda": 1}, layer=WIDE)
    result = read(found + group("block", "forward", {"eager-nchw": 4, "fused-triton": 2}, layer=NARROW))
    table = report_tables.times(result.of("block"))
    assert cells(table, WIDE)[6] == "4.00×" and cells(table, NARROW)[6] == "2.00× (fused-triton)"
    assert report_tables.absent(result) == [f"- fused-cuda, blocks, forward: V2 {NARROW}"]


def test_geometric_means(read):
    table = report_tables.means(read([*blocks(), *networks()]))
    assert cells(table, "blocks, evaluation") == ["blocks, evaluation", "2", "1.00×", "1"]
    assert cells(table, "blocks, forward") == ["blocks, forward", "1", "4.00×", "0"]
    assert cells(table, "networks, training") == ["networks, training", "2", "2.00×", "0"]
    assert "backward" not in table
    slower = group("block", "forward", {"compile": 1, "fused-cpu": 4}, layer=WIDE)
    slower += group("block", "forward", {"compile": 1, "fused-cpu": 1}, layer=NARROW)
    assert cells(report_tables.means(read(slower)), "forward")[1:] == ["2", "0.50× <- slower", "1"]


def test_memory(read):
    larger = benchmark("block", "forward", "eager-nchw", 9, layer=WIDE, saved_bytes=9 << 20)
    table = report_tables.memory(read([*blocks(), larger, *networks(peak_bytes=4 << 20)]))
    kept = "batch 4, float32, kept for the backward"
    assert cells(table, WIDE) == [f"V2 {WIDE}", f"forward, {kept}", "8.0", "eager-channels-last", "2.0", "0.25"]
    assert cells(table, "V1", "kept")[1:] == [f"training, {kept}", "600.0", "eager-nchw", "300.0", "0.50"]
    assert cells(table, "V1", "training", "peak")[2:] == ["4.0", "eager-nchw", "4.0", "1.00"]
    more = [
        benchmark("block", "forward", n, 1, layer=WIDE, saved_bytes=s) for n, s in (("compile", 2), ("fused-cpu", 3))
    ]
    assert cells(report_tables.memory(read(more)), WIDE)[-1] == "1.50 <- more"


def test_launches(read):
    table = report_tables.launches(read(blocks()))
    names = ["eager-nchw", "eager-channels-last", "compile", "fused-reference", "fused-cpu"]
    assert cells(table, "direction")[2:] == names
    assert cells(table, WIDE, "evaluation")[2:] == ["9", "–", "9", "9", "9"]
    assert cells(table, WIDE, "forward")[2:] == ["–", "12", "–", "–", "5"]
    assert NARROW not in table


def test_what_is_absent(read):
    found = group("stage", "dx", {"eager-nchw": 1, "fused-cpu": 1}, layer="gate a")
    found += group("stage", "dx", {"fused-cpu": 1}, layer="gate b") + group(
        "stage", "dw", {"fused-cpu": 1}, layer="gate a"
    )
    assert report_tables.absent(read(found)) == ["- eager-nchw, stages, dx: V2 gate b", "- eager-nchw, stages, dw: any"]
    assert "## Without an entry" in report_tables.tables(read(found))
    complete = read(found[:2])
    assert not report_tables.absent(complete) and "## Without an entry" not in report_tables.tables(complete)


def test_what_a_report_says_first(read):
    text = report_tables.tables(read(blocks()))
    assert "Ours is fused-cpu;" in text and "slower than the fastest stock implementation in 1 of 3 groups" in text
    assert "failed" not in text and "the GPU's own" not in text
    failed = report_tables.tables(read(networks(**GPU)), failed=True)
    assert "**Some benchmark of this run failed" in failed and "the GPU's own" in failed
    assert "No block's launches were counted." in failed and "## Blocks" not in failed


# The command ----------------------------------------------------------------------------------------------------------


ALL = [*blocks(), *stages("forward", "dx"), *networks()]
FILES = {f"{picture.name}{suffix}" for picture in report_charts.PICTURES for suffix in (".svg", ".png")} | {"report.md"}


def test_the_same_bytes_for_the_same_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, folders = file(tmp_path / "a.json", ALL), [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        report.main(["--read", str(path), "--output", str(folder)])
    one, two = ({each.name: each.read_bytes() for each in folder.iterdir()} for folder in folders)
    assert one.keys() == FILES and one == two
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line == f"{folders[1] / 'report.md'}: the report; its pictures are in the same folder"
    for picture in report_charts.PICTURES:
        assert one[f"{picture.name}.png"].startswith(b"\x89PNG")
        for text in ("A CPU, 2 threads; mbn_kernels", "torch", "commit", "0123456789ab-dirty"):
            assert text in one[f"{picture.name}.svg"].decode(), text
        assert f"]({picture.name}.svg)" in one["report.md"].decode() and picture.reading in one["report.md"].decode()


def test_pictures_are_black_and_white(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    report.main(["--read", str(file(tmp_path / "a.json", ALL)), "--output", str(tmp_path)])
    for picture in report_charts.PICTURES:
        pixels = imread(tmp_path / f"{picture.name}.png")[..., :3]
        assert (pixels == pixels[..., :1]).all() and pixels.min() < 0.2 < 0.9 < pixels.max()


def test_a_picture_without_data_is_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    for found in (ALL, networks()):
        report.main(["--read", str(file(tmp_path / "a.json", found)), "--output", str(tmp_path / "out")])
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"report.md", "networks.svg", "networks.png"}
    text = (tmp_path / "out" / "report.md").read_text()
    for picture in report_charts.PICTURES:
        left_out = f"### {picture.title}\n\nLeft out: the measurements lack {picture.needs}."
        assert (left_out in text) == (picture.name != "networks")


def fake(found: list[dict] | None, status: int, calls: list):
    """In the place of run_pytest: writes these benchmarks, or nothing."""

    def run_pytest(arguments: list[str]) -> int:
        calls.append(arguments)
        (path,) = [a.removeprefix("--benchmark-json=") for a in arguments if a.startswith("--benchmark-json=")]
        assert not Path(path).exists() and Path(path).is_absolute()
        Path(path).touch()
        if found is not None:
            file(Path(path), found)
        return status

    return run_pytest


def test_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    calls: list[list[str]] = []
    monkeypatch.setattr(report, "run_pytest", fake(ALL, 0, calls))
    report.main(["--output", str(tmp_path / "new" / "out")])
    report.main(["--output", str(tmp_path / "new" / "out"), "--full", "-k", "v3 and not stage"])
    json_option = f"--benchmark-json={tmp_path / 'new' / 'out' / 'benchmark.json'}"
    assert calls == [
        ["--benchmark", json_option],
        ["--benchmark", json_option, "--benchmark-full", "-k", "v3 and not stage"],
    ]
    assert {each.name for each in (tmp_path / "new" / "out").iterdir()} == FILES | {"benchmark.json"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("report.md: the report; its pictures and benchmark.json are in the same folder")


def test_a_run_in_which_one_fails(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    found = [b for b in ALL if (b["extra_info"]["kind"], b["stats"]["median"]) != ("network", 3e-3)]
    monkeypatch.setattr(report, "run_pytest", fake(found, 1, []))
    with pytest.raises(SystemExit) as end:
        report.main(["--output", str(tmp_path)])
    sentence = "pytest ended with exit status 1: what failed is named above and has no time in the report.\n"
    assert end.value.code == 1 and capsys.readouterr().err == sentence
    text = (tmp_path / "report.md").read_text()
    assert "**Some benchmark of this run failed" in text and "- fused-cpu, networks, evaluation: any" in text


def test_a_run_that_measures_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.md").write_text("of an earlier run")
    (tmp_path / "benchmark.json").write_text("{}")
    monkeypatch.setattr(report, "run_pytest", fake(None, 5, []))
    with pytest.raises(SystemExit) as end:
        report.main(["--output", str(tmp_path)])
    assert end.value.code == 5 and capsys.readouterr().err == "pytest ended with exit status 5 and measured nothing.\n"
    assert not (tmp_path / "report.md").exists()


def test_how_pytest_is_run(monkeypatch):
    seen = {}

    def run(command: list[str], **more: object):
        seen.update(more, command=command)
        return type("Completed", (), {"returncode": 3})

    monkeypatch.setattr(report.subprocess, "run", run)
    assert report.run_pytest(["--benchmark"]) == 3
    assert seen == {"command": [report.sys.executable, "-m", "pytest", "--benchmark"], "cwd": report.ROOT}
    assert (report.ROOT / "pyproject.toml").exists()


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Said before anything is measured."""
    real = report.importlib.util.find_spec
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    calls: list[list[str]] = []
    monkeypatch.setattr(report, "run_pytest", fake(ALL, 0, calls))
    with pytest.raises(SystemExit) as end:
        report.main(["--output", str(tmp_path)])
    sentence = "matplotlib not installed: pip install -e '.[benchmark]'\n"
    assert end.value.code == 2 and capsys.readouterr().err == sentence and not calls


def test_options_that_do_not_go_together(tmp_path, capsys):
    for measures_nothing in (["--read", str(tmp_path / "a.json")], ["--pages"]):
        for more in (["--full"], ["-k", "v3"]):
            with pytest.raises(SystemExit) as end:
                report.main([*measures_nothing, *more])
            assert end.value.code == 2
            sentence = "error: --read and --pages measure nothing: leave out --full and -k\n"
            assert capsys.readouterr().err.endswith(sentence)


def test_an_output_that_is_no_folder(tmp_path, capsys):
    path = file(tmp_path / "a.json", blocks())
    with pytest.raises(SystemExit) as end:
        report.main(["--read", str(path), "--output", str(path)])
    assert end.value.code == 2 and capsys.readouterr().err == f"{path}: File exists\n"


def test_git_ignores_where_results_go():
    ignored = (report.ROOT / ".gitignore").read_text().splitlines()
    assert f"/{report.FOLDER.relative_to(report.ROOT)}/" in ignored
    assert re.fullmatch(r"benchmarks/results/\w+", str(report.FOLDER.relative_to(report.ROOT)))
