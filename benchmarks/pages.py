"""Writes the tables of measured times into README.md and docs/speed.md, from the results that are kept.

python -m benchmarks.pages
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from . import cpu_calls, cpu_scaling, cpu_training
from .cpu_runs import table

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-epyc-zen4"
#: Of each file of RESULTS, what writes its table.
TABLES: dict[str, Callable[[dict], str]] = {
    "evaluation-float32": table,
    "evaluation-bfloat16": table,
    "scaling": cpu_scaling.table,
    "training": cpu_training.tables,
    "calls": cpu_calls.table,
}
#: A place for a table in a page, and what stands there.
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def made_of(name: str) -> str:
    """A result's table, below what it was measured on."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    system = ", ".join(f"{what} {value}" for what, value in result["system"].items() if what != "device")
    return f"{TABLES[name](result)}\n\nMeasured with {system}.\n"


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{made_of(found[2])}{found[3]}", text)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
