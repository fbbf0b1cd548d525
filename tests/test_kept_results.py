"""The pages' tables and pictures are those of the results that are kept; what Nsight Compute told is read rightly."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich", reason="rich is missing: pip install -e '.[test]'")
from benchmarks import ncu_table, pages, report_charts, report_data, report_tables
from benchmarks.cpu_charts import fingerprint

# Pages ----------------------------------------------------------------------------------------------------------------


def test_tables_say_what_the_results_say() -> None:
    texts = [page.read_text(encoding="utf-8") for page in pages.PAGES]
    assert [pages.filled(text) for text in texts] == texts
    places = [name for text in texts for _, name, _ in pages.PLACE.findall(text)]
    assert sorted(places) == sorted([*pages.TABLES, *pages.LAYERS, *pages.PROFILES])


@pytest.mark.parametrize("name", pages.CHARTS)
def test_charts_are_drawn_of_the_results(name: str) -> None:
    file, _ = pages.CHARTS[name]
    assert fingerprint(pages.kept(file)) in (pages.DOCS / f"{name}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pages.LAYERS)
def test_reports_are_those_of_the_results(name: str) -> None:
    """The text anew; of pictures what they were drawn of, as their bytes are those of one version of matplotlib."""
    result = report_data.read([pages.RESULTS / file for file in pages.LAYERS[name]])
    text = (pages.DOCS / name / "report.md").read_text(encoding="utf-8")
    assert text.startswith(report_tables.tables(result) + "\n\n## Pictures\n")
    for picture in report_charts.PICTURES:
        for file in (pages.DOCS / name / f"{picture.name}{suffix}" for suffix in (".svg", ".png")):
            assert file.name in text and fingerprint(result.entries).encode() in file.read_bytes()


def test_every_picture_has_a_source() -> None:
    drawn = {pages.DOCS / f"{name}.svg" for name in pages.CHARTS}
    drawn |= {pages.DOCS / name / f"{p.name}.svg" for name in pages.LAYERS for p in report_charts.PICTURES}
    assert set(pages.DOCS.rglob("*.svg")) - drawn == {pages.DOCS / "dataflow.svg"}  # made by hand


def test_what_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    page.write_text("A\n<!-- table: calls -->\nan old one\n<!-- end -->\nB\n", encoding="utf-8")
    monkeypatch.setattr(pages, "PAGES", (page,))
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(pages, "CHARTS", {"training": pages.CHARTS["training"]})
    monkeypatch.setattr(pages, "LAYERS", {})
    assert pages.write() == [page, tmp_path / "training.svg"]
    text, source = page.read_text(encoding="utf-8"), fingerprint(pages.kept(pages.CHARTS["training"][0]))
    assert text.startswith("A\n<!-- table: calls -->\n| µs a call |") and text.endswith("<!-- end -->\nB\n")
    assert "old" not in text and source in (tmp_path / "training.svg").read_text(encoding="utf-8")


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables_of_a_gpu() -> None:
    rows = [
        {"model": "mobilenet_v1", "direction": "training step", "batch": 8, "seconds": {"eager": 0.03, "cuda": 0.06}},
        {"model": "mobilenet_v1", "direction": "CUDA graph", "batch": 1, "seconds": {"eager": 0.004, "cuda": 0.002}},
        {"model": "mobilenet_v2", "direction": "CUDA graph", "batch": 1, "seconds": {"eager-nchw": 1, "eager": 0.5}},
    ]
    results = [
        {"system": {"gpu": "A GPU", "commit": "a", "load_average": 1}, "rows": rows[:2]},
        {"system": {"gpu": "A GPU", "commit": "b", "load_average": 2}, "rows": rows[2:]},
    ]
    assert pages.gpu_networks(*results).splitlines()[2:] == [
        "| V1, training step, batch 8 | – | 30.0 | – | 60.0 | **0.50×** |",
        "| V1, evaluation as a CUDA graph, batch 1 | – | 4.00 | – | 2.00 | 2.00× |",
        "| V2, evaluation as a CUDA graph, batch 1 | 1000.0 | 500.0 | – | – | – |",
    ]
    assert pages.gpu_summary(*results).splitlines() == [
        "| ms by `cuda`, against eager, channels-last | V1 | V2 |",
        "| --- | ---: | ---: |",
        "| training step, batch 8 | 60.0, **0.50×** | – |",
        "| evaluation as a CUDA graph, batch 1 | 2.00, 2.00× | – |",
    ]
    assert pages.systems(results) == "Measured with gpu A GPU, commit a (V1), commit b (V2)."


# Nsight Compute -------------------------------------------------------------------------------------------------------

HEAD = """== NVTX State ==
<default domain>
"""


def summary(kernel: str, times: int, moved: str, took: str) -> str:
    """As ncu prints it."""
    rule = "    ---------------------- ----------- ------- ------- -------\n"
    return (
        f"  {kernel} (60, 1, 1)x(128, 1, 1), Device 0, CC 9.0, Invocations {times}\n"
        f"    Section: Command line profiler metrics\n{rule}"
        f"    Metric Name            Metric Unit Minimum Maximum Average\n{rule}"
        f"    dram__bytes.sum              {moved}\n"
        f"    gpu__time_duration.sum          {took}\n{rule}\n"
    )


def test_a_summary_of_ranges() -> None:
    text = (
        HEAD
        + "  <mbn::Block/0.pointwise/backward>\n"
        + summary("_norm", 2, "Kbyte  1.00  3.00  2.00", "ns  900.0  1,100.0  1,000.0")
        + "  <mbn::Block/output/forward>\n"
        + summary("void at::kernel<4, at::F<float>>(int, T2)", 1, "Mbyte 8.00 8.00 8.00", "us 4.00 4.00 4.00")
        + "  <mbn::Block/1.depthwise/backward>\n"
        + summary("void mbn::depthwise<float, 5>(mbn::D)", 1, "byte 64 64 64", "ms 2.00 2.00 2.00")
        + "  <mbn::Block/0.pointwise/forward>\n"
        + summary("_a", 1, "Gbyte 1.00 1.00 1.00", "us 10.00 10.00 10.00")
        + summary("_b", 1, "Mbyte 2.00 2.00 2.00", "us 30.00 30.00 30.00")
    )
    found = ncu_table.kernels(text)
    assert found[0][:3] == ("mbn::Block/0.pointwise/backward", "_norm", 2)
    assert found[0][3:] == pytest.approx((2e-6, 4000))
    assert [k.name for k in found] == ["_norm", "at::kernel", "mbn::depthwise<float, 5>", "_a", "_b"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ncu_table.table(text).splitlines()[2:]]
    assert rows == [
        ["**mbn::Block/0.pointwise/forward**", "**2**", "**40.0**", "**1002.0**", "**25050**"],
        ["`_b`", "1", "30.0", "2.0", "67"],
        ["`_a`", "1", "10.0", "1000.0", "100000"],
        ["**mbn::Block/output/forward**", "**1**", "**4.0**", "**8.0**", "**2000**"],
        ["`at::kernel`", "1", "4.0", "8.0", "2000"],
        ["**mbn::Block/1.depthwise/backward**", "**1**", "**2000.0**", "**0.0**", "**0**"],
        ["`mbn::depthwise<float, 5>`", "1", "2000.0", "0.0", "0"],
        ["**mbn::Block/0.pointwise/backward**", "**2**", "**2.0**", "**0.0**", "**2**"],
        ["`_norm`", "2", "2.0", "0.0", "2"],
    ]


NO_TIME = HEAD + summary("k", 1, "byte 1 1 1", "us 1 1 1").replace("gpu__", "x__")


@pytest.mark.parametrize("text", ["", HEAD, NO_TIME], ids=["empty", "no kernel", "no time"])
def test_no_summary(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "ncu.txt"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        ncu_table.main([str(file)])
    assert end.value.code == 2
    expected = "expected ncu's --print-summary per-nvtx with gpu__time_duration.sum and dram__bytes.sum"
    assert capsys.readouterr().err == f"{file}: {expected}\n"
