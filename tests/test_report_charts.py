"""The pictures of `python -m benchmarks.report`: what the figures hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from report_files import NARROW, WIDE, blocks, file, group, networks, stages

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from benchmarks import report_charts, report_data


@pytest.fixture
def read(tmp_path: Path):
    """read(benchmarks): the result of a file of them."""
    return lambda benchmarks: report_data.read([file(tmp_path / "read.json", benchmarks)])


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def ticks(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_picture_of_speedups(read):
    found = [
        *blocks(),
        *group("block", "evaluation", {"compile": 3, "fused-cpu": 1}, layer="x", network="mobilenet_v1"),
    ]
    figure = report_charts.speedups(read(found))
    evaluation, forward = figure.axes
    assert titles(figure) == ["evaluation, batch 4, float32", "forward, batch 4, float32"]
    assert ticks(evaluation) == ["V1 x", f"V2 {WIDE}", f"V2 {NARROW}"]
    assert widths(evaluation) == pytest.approx([3, 2, 0.5]) and widths(forward) == pytest.approx([4])
    assert texts(evaluation) == ["3.00× compile", "2.00× compile", "0.50× eager-channels-last"]
    assert [bool(bar.get_hatch()) for bar in evaluation.patches] == [False, False, True]
    assert [list(line.get_xdata()) for line in evaluation.lines] == [[1, 1]]
    bottom, top = evaluation.get_ylim()
    assert bottom > top and evaluation.get_xlim() == forward.get_xlim()
    assert "speed of fused-cpu against the fastest stock implementation" in evaluation.get_xlabel()


def test_another_backend_than_the_default_is_named(read):
    found = group("block", "forward", {"eager-nchw": 4, "fused-triton": 2, "fused-cuda": 1}, layer=WIDE)
    found += group("block", "forward", {"eager-nchw": 4, "fused-triton": 2}, layer=NARROW)
    (axes,) = report_charts.speedups(read(found)).axes
    assert texts(axes) == ["4.00× eager-nchw", "2.00× (fused-triton) eager-nchw"]


def test_a_picture_grows_with_its_blocks(read):
    times = {"eager-channels-last": 2, "fused-cpu": 1}
    for draw in (report_charts.speedups, report_charts.launches):
        heights = []
        for count in (4, 45):
            found = [b for i in range(count) for b in group("block", "forward", times, layer=f"{i}", launches=3)]
            figure = draw(read(found))
            heights.append(figure.get_figheight())
            figure.draw_without_rendering()
            boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
            assert all(below.y1 <= above.y0 for above, below in pairwise(boxes))
        assert heights[1] > 3 * heights[0]


def test_picture_of_the_roofline(read):
    figure = report_charts.roofline(read(stages("forward", "dx", "dw")))
    assert titles(figure) == [f"{direction}, batch 4, float32" for direction in ("forward", "dx", "dw")]
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    (roof,) = [line for label, line in lines.items() if label.startswith("_")]
    assert roof.get_xydata().tolist()[1] == [10, 200]  # where 20 GB/s meet 200 GFLOP/s
    assert all(y == pytest.approx(min(20 * x, 200)) for x, y in roof.get_xydata())
    at = {label: line.get_xydata().tolist()[0] for label, line in lines.items() if not label.startswith("_")}
    assert {label: pytest.approx(point) for label, point in at.items()} == {
        "eager-channels-last, depthwise": [4, 10], "eager-channels-last, pointwise": [40, 10],
        "compile, depthwise": [4, 20], "compile, pointwise": [40, 20],
        "fused-cpu, depthwise": [4, 40], "fused-cpu, pointwise": [40, 40],
    }  # fmt: skip
    looks = {label: (lines[label].get_marker(), lines[label].get_fillstyle()) for label in at}
    assert len(set(looks.values())) == 6
    assert {fill for label, (_, fill) in looks.items() if label.endswith("depthwise")} == {"none"}
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "arithmetic intensity (flop/byte)"
    assert axes.get_ylabel() == "arithmetic speed (GFLOP/s)"
    assert texts(axes) == ["copy 20 GB/s", "peak 200 GFLOP/s"]
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert all(low < x < high and bottom < y < top for x, y in at.values()) and top > 200


def test_roofline_of_what_there_is(read):
    assert titles(report_charts.roofline(read(stages("evaluation")))) == ["evaluation, batch 4, float32"]
    bare = stages("evaluation")
    for each in bare:
        del each["extra_info"]["peak_flops"]
    assert report_charts.roofline(read(bare)) is None
    gates = [b for b in stages("evaluation") if b["extra_info"]["layer"].startswith("gate")]
    assert report_charts.roofline(read(gates)) is None


def test_picture_of_networks(read):
    figure = report_charts.networks(read(networks()))
    assert titles(figure) == ["evaluation\nbatch 4, float32"] + ["training\nbatch 4, float32"] * 2
    evaluation, training, memory = figure.axes
    assert ticks(evaluation) == ["V1, eager-nchw", "V1, fused-cpu", "V3-Small, eager-nchw", "V3-Small, fused-cpu"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["time of a call (ms)"] * 2 + ["kept for the backward (MiB)"]
    assert widths(evaluation) == pytest.approx([6, 3, 6, 3]) and texts(evaluation) == ["6", "3", "6", "3"]
    assert widths(training) == pytest.approx([60, 30, 60, 30])
    assert widths(memory) == pytest.approx([600, 300, 600, 300])
    peak = report_charts.networks(read(networks(peak_bytes=4 << 20))).axes[-1]
    assert peak.get_xlabel() == "memory at the peak of a step (MiB)" and widths(peak) == [4] * 4
    only = [b for b in networks() if b["extra_info"]["direction"] == "evaluation"]
    assert len(report_charts.networks(read(only)).axes) == 1


def test_picture_of_launches(read):
    figure = report_charts.launches(read(blocks()))
    assert titles(figure) == [f"{direction}, batch 4, float32" for direction in ("evaluation", "forward", "backward")]
    evaluation, forward, backward = figure.axes
    assert ticks(evaluation) == [f"V2 {WIDE}"]
    assert widths(evaluation) == [9, 9] and widths(forward) == [12, 5] and widths(backward) == [7]
    assert texts(forward) == ["12", "5"] and forward.get_xlabel() == "launches of one call"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["eager-channels-last", "compile", "fused-cpu"]


def test_numbers_on_bars():
    assert [report_charts.number(x) for x in (0.01234, 1.5, 999.4, 999.6, 12345.6)] == [
        "0.0123", "1.5", "999", "1000", "12346",
    ]  # fmt: skip
