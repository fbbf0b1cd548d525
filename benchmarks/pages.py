"""Writes the tables of measured times into README.md and docs/benchmarks.md, from the results that are kept.

python -m benchmarks.pages
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import cpu_calls, cpu_scaling, cpu_training
from .cpu_runs import DASH, markdown, table
from .implementations import TITLES

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
RESULTS = ROOT / "benchmarks" / "results"
#: What a reader of a table need not know of a system; the files tell it.
UNTOLD = ("device", "load_average", "threads", "cuda_backend", "l2_bytes")
#: A place for a table in a page, and what stands there.
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Source(NamedTuple):
    """What a place's table is made of, and what makes it of the results in these files of RESULTS."""

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


# Pages ----------------------------------------------------------------------------------------------------------------

CPU = "cpu-epyc-zen4"
H100 = tuple(f"h100-80gb/{model}" for model in TITLES)
TABLES: dict[str, Source] = {
    "evaluation-float32": Source((f"{CPU}/evaluation-float32",), table),
    "evaluation-bfloat16": Source((f"{CPU}/evaluation-bfloat16",), table),
    "scaling": Source((f"{CPU}/scaling",), cpu_scaling.table),
    "training": Source((f"{CPU}/training",), table),
    "training-memory": Source((f"{CPU}/training",), cpu_training.memory_table),
    "calls": Source((f"{CPU}/calls",), cpu_calls.table),
    "h100-summary": Source(H100, gpu_summary),
    "h100": Source(H100, gpu_networks),
}


def made_of(name: str) -> str:
    """A place's table, above what it was measured on."""
    source = TABLES[name]
    results = [json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8")) for file in source.files]
    return f"{source.make(*results)}\n\n{systems(results)}\n"


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


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
