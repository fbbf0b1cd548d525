"""The tables and pictures of README.md and docs/, written from the results that are kept; `python -m benchmarks.report
--pages` does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import (
    accuracy,
    cpu_calls,
    cpu_charts,
    cpu_scaling,
    cpu_training,
    gradient_errors,
    ncu_table,
    report,
    report_data,
    report_tables,
)
from .cpu_runs import DASH, markdown, table
from .implementations import TITLES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "benchmarks.md", DOCS / "numerics.md")
RESULTS = ROOT / "benchmarks" / "results"
#: What a reader of a table need not know of a system; the files tell it.
UNTOLD = ("device", "load_average", "threads", "cuda_backend", "l2_bytes")
#: A place for a table in a page, and what stands there.
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Source(NamedTuple):
    """What a place's table is made of, and what makes it of the results in these files."""

    files: tuple[str, ...]
    make: Callable[..., str]


# On a GPU -------------------------------------------------------------------------------------------------------------

#: Names of benchmarks.gpu's directions that say less without its help text.
DIRECTIONS = {"CUDA graph": "evaluation as a CUDA graph"}
GPU_COLUMNS = {"eager-nchw": "eager, NCHW", "eager": "eager, channels-last", "triton": "`triton`", "cuda": "`cuda`"}
AGAINST = "`cuda` against eager, channels-last"


def gpu_networks(*results: dict) -> str:
    """Milliseconds of each contestant, a file for each network, and how many times as fast the default backend is."""
    heads = ["ms a call", *GPU_COLUMNS.values(), AGAINST]
    return markdown(heads, [gpu_row(row) for result in results for row in result["rows"]])


def gpu_row(row: dict) -> list[str]:
    seconds = row["seconds"]
    cells = [milliseconds(seconds[name]) if name in seconds else DASH for name in GPU_COLUMNS]
    return [f"{TITLES[row['model']]}, {gpu_case(row)}", *cells, ratio(seconds)]


def gpu_summary(*results: dict) -> str:
    """The default backend alone, a column for each network: milliseconds, and how many times as fast it is."""
    rows = {(gpu_case(row), row["model"]): row["seconds"] for result in results for row in result["rows"]}
    networks = list(dict.fromkeys(model for _, model in rows))
    heads = [f"ms by `cuda`, {AGAINST.removeprefix('`cuda` ')}", *(TITLES[model] for model in networks)]

    def cell(case: str, model: str) -> str:
        seconds = rows.get((case, model), {})
        return f"{milliseconds(seconds['cuda'])}, {ratio(seconds)}" if "cuda" in seconds else DASH

    cases = dict.fromkeys(case for case, _ in rows)
    return markdown(heads, [[case, *(cell(case, model) for model in networks)] for case in cases])


def gpu_case(row: dict) -> str:
    return f"{DIRECTIONS.get(row['direction'], row['direction'])}, batch {row['batch']}"


def milliseconds(seconds: float) -> str:
    """Three digits or so: a GPU's times spread over three orders of magnitude."""
    return f"{1e3 * seconds:.{1 if seconds >= 1e-2 else 2}f}"


def ratio(seconds: dict[str, float]) -> str:
    """In bold where stock is faster."""
    if not {"eager", "cuda"} <= seconds.keys():
        return DASH
    found = seconds["eager"] / seconds["cuda"]
    return f"{found:.2f}×" if found >= 1 else f"**{found:.2f}×**"


# Layers ---------------------------------------------------------------------------------------------------------------


def layers(*paths: Path) -> str:
    """Of a report of blocks and stages what a page shows: the means, and the times of the blocks."""
    result = report_data.read(list(paths))
    return "\n\n".join([report_tables.header(result), report_tables.means(result), times(result)])


def times(result: report_data.Result) -> str:
    """Milliseconds of each block, and how many times as fast ours is as the fastest of stock."""
    names = report_data.implementations(result.of("block"))
    rows = [
        [
            f"{group.name}, {group.measured}",
            *(f"{group.entries[n]['seconds'] * 1e3:.3f}" if n in group.entries else DASH for n in names),
            report_tables.against(group, report_data.default_of(names)),
        ]
        for group in result.of("block")
    ]
    return markdown(["ms a call", *names, "ours against the fastest of stock"], rows)


# Pages ----------------------------------------------------------------------------------------------------------------

CPU = "cpu-epyc-zen4"
GPU = "h100-80gb"
H100 = tuple(f"{GPU}/{model}.json" for model in TITLES)
TABLES: dict[str, Source] = {
    "evaluation-float32": Source((f"{CPU}/evaluation-float32.json",), table),
    "evaluation-bfloat16": Source((f"{CPU}/evaluation-bfloat16.json",), table),
    "scaling": Source((f"{CPU}/scaling.json",), cpu_scaling.table),
    "training": Source((f"{CPU}/training.json",), table),
    "training-memory": Source((f"{CPU}/training.json",), cpu_training.memory_table),
    "calls": Source((f"{CPU}/calls.json",), cpu_calls.table),
    "training-accuracy": Source((f"{CPU}/accuracy.json",), accuracy.training_table),
    "gradients": Source((f"{CPU}/gradients.json",), gradient_errors.table),
    "gradients-above": Source((f"{CPU}/gradients.json",), gradient_errors.above_table),
    "h100-summary": Source(H100, gpu_summary),
    "h100": Source(H100, gpu_networks),
}
#: Reports of layers, whole in a folder of docs, in parts in a page: their files.
LAYERS: dict[str, tuple[str, ...]] = {
    f"layers-{CPU}": (f"{CPU}/layers.json", f"{CPU}/layers-blocks.json", f"{CPU}/layers-stages.json"),
    f"layers-{GPU}": (f"{GPU}/layers.json", f"{GPU}/layers-more.json"),
}
#: Summaries of Nsight Compute.
PROFILES = {"ncu": f"{GPU}/ncu-mobilenet_v3_large-13.txt"}
#: Charts of docs: the file that each is drawn of, and what draws it.
CHARTS: dict[str, tuple[str, Callable[[dict, Path], None]]] = {
    "evaluation-float32": (f"{CPU}/evaluation-float32.json", cpu_charts.bars),
    "evaluation-bfloat16": (f"{CPU}/evaluation-bfloat16.json", cpu_charts.bars),
    "training": (f"{CPU}/training.json", cpu_charts.bars),
    "scaling": (f"{CPU}/scaling.json", cpu_charts.curves),
}


def made_of(name: str) -> str:
    """What stands in a place: a table, and what it was measured on."""
    if name in LAYERS:
        return layers(*(RESULTS / file for file in LAYERS[name])) + "\n"
    if name in PROFILES:
        return ncu_table.table((RESULTS / PROFILES[name]).read_text(encoding="utf-8")) + "\n"
    source = TABLES[name]
    results = [kept(file) for file in source.files]
    return f"{source.make(*results)}\n\n{systems(results)}\n"


def kept(file: str) -> dict:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def systems(results: list[dict]) -> str:
    """What the results were measured on; where they differ, which network on what."""
    told = {TITLES.get(r["rows"][0].get("model")): r["system"] for r in results}
    texts = []
    for name in next(iter(told.values())):
        by_value: dict[object, list[str]] = {}
        for title, system in told.items():
            by_value.setdefault(system.get(name), []).append(title)
        if name not in UNTOLD:
            alike = len(by_value) == 1
            texts += [f"{name} {value}" + ("" if alike else f" ({', '.join(by)})") for value, by in by_value.items()]
    return f"Measured with {', '.join(texts)}."


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{made_of(found[2])}{found[3]}", text)


def write() -> list[Path]:
    """Writes everything; returns what was written."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    drawn = [DOCS / f"{name}.svg" for name in CHARTS]
    for (file, draw), path in zip(CHARTS.values(), drawn, strict=True):
        draw(kept(file), path)
    for name, files in LAYERS.items():
        (DOCS / name).mkdir(exist_ok=True)
        report.write(report_data.read([RESULTS / file for file in files]), DOCS / name)
    return [*PAGES, *drawn, *(DOCS / name / "report.md" for name in LAYERS)]
