"""What the CPU benchmarks share: options, measuring row by row, and tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cpu_contestants import FUSED, OURS, Case
from .cpu_processes import Died, answers
from .implementations import TITLES
from .timing import system_info

COLUMNS = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
DASH = "–"


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Those of the timing, and where results go."""
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contestant")
    parser.add_argument("--burst", type=int, help="calls a turn (default: as many as take a quarter of a second)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each turn, for threads that spin")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result here after every row")
    parser.add_argument("--keep", action="store_true", help="keep the rows of that file which are not measured now")
    parser.add_argument("--table", type=Path, metavar="PATH", help="measure nothing: print this JSON file's table")
    parser.add_argument(
        "--chart", type=picture, nargs="+", default=[], metavar="PATH", help="draw the result here, as .png or .svg"
    )


def picture(name: str) -> Path:
    """Where a chart goes; refused before anything is measured, if it cannot be drawn."""
    if Path(name).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .svg, got {name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is not installed: pip install -e '.[benchmark]'")
    return Path(name)


def timing(options: argparse.Namespace) -> dict:
    return {"rounds": options.rounds, "burst": options.burst, "pause": options.pause}


def new_result(out: dict[str, str], versions: dict[str, str]) -> dict:
    """A result without rows; each row tells its own threads and load."""
    system = system_info(torch.device("cpu"))
    system = {name: value for name, value in system.items() if name not in ("threads", "load_average")}
    return {"system": {**system, "cores": os.cpu_count(), **versions}, "left_out": out, "rows": []}


def title(row: dict) -> str:
    """What a row measured, in words."""
    words = [TITLES[row["model"]], f"batch {row['batch']}", f"{row['threads']} thread{'s' * (row['threads'] > 1)}"]
    words += [row["dtype"]] if row["dtype"] != "float32" else []
    words += [f"{row['resolution']}×{row['resolution']}"] if row["resolution"] != 224 else []
    return ", ".join([*words, f"width {row['width']:g}"] if row["width"] != 1 else words)


def line(row: dict) -> str:
    """A row as it is measured, in one line."""
    times = [f"{name} {t * 1e3:.2f} ms" for name, t in row["seconds"].items()]
    return f"{title(row)}: {', '.join(times)}"


def case_of(row: dict) -> Case:
    return Case(*(row[name] for name in Case._fields))


def run(
    result: dict, measurement: str, requests: list[tuple[Case, dict]], path: Path | None, keep: bool = False
) -> bool:
    """Measures each case in a process and adds its row, in the place of an earlier one of the file where that is kept;
    whether ours has a time in every row.
    """
    complete = True
    earlier = json.loads(path.read_text())["rows"] if keep and path and path.exists() else []
    rows = {case_of(row): row for row in earlier}
    result["rows"] = list(rows.values())
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress, TemporaryDirectory() as folder:
        task, say = progress.add_task("", total=len(requests)), progress.console.print
        for case, arguments in requests:
            what, found = title(case._asdict()), None
            given = {**arguments, "case": case, "folder": folder}
            try:
                for kind, value in answers(measurement, given, threads=case.threads):
                    if kind == "step":
                        progress.update(task, description=f"{what}: {value}")
                    else:
                        found = value
            except Died as problem:
                say(f"{what}: {problem}", markup=False, soft_wrap=True)
            if found:
                rows[case_of(found)] = found
                result["rows"] = list(rows.values())
                say(line(found), markup=False, soft_wrap=True)
                for name, why in found["failed"].items():
                    say(f"{what}: {name} FAILED: {why}", markup=False, soft_wrap=True)
            if path:
                path.write_text(json.dumps(result, indent=2) + "\n")
            complete = complete and found is not None and {FUSED, OURS} & found["seconds"].keys()
            progress.advance(task)
    return complete


def command(
    options: argparse.Namespace,
    measure: Callable[[], tuple[dict, bool]],
    table: Callable[[dict], str],
    chart: Callable[[dict, Path], None],
) -> None:
    """Measures, or reads the result of --table; prints its table and draws its charts."""
    result, complete = (json.loads(options.table.read_text()), True) if options.table else measure()
    if result["rows"]:
        print(table(result))
        for path in options.chart:
            chart(result, path)
    if not complete:
        raise SystemExit(f"{FUSED} has no time in some row: the lines above say why.")


def announce(result: dict) -> None:
    """The hardware and versions, and one line for each contestant that is left out."""
    print(", ".join(f"{name} {value}" for name, value in result["system"].items()))
    for name, why in result["left_out"].items():
        print(f"{name}: {why}", flush=True)


# Tables ---------------------------------------------------------------------------------------------------------------


def names_of(rows: list[dict]) -> list[str]:
    """Whose times the rows have, ours last."""
    found = dict.fromkeys(name for row in rows for name in (*row["seconds"], *row["failed"]))
    return [name for name in found if name not in (FUSED, OURS)] + [name for name in (FUSED, OURS) if name in found]


def ours_of(names: Iterable[str]) -> str:
    """Whom the others are compared with: training steps have no frozen weights."""
    return OURS if OURS in names else FUSED


def best_other(row: dict) -> float | None:
    """The least seconds of those that are not ours."""
    return min((t for name, t in row["seconds"].items() if name not in (FUSED, OURS)), default=None)


def ratio(row: dict) -> str:
    """How many times as fast as the best of the others ours is."""
    best = best_other(row)
    ours = ours_of(row["seconds"])
    return f"{best / row['seconds'][ours]:.2f}×" if best and ours in row["seconds"] else DASH


def milliseconds(row: dict, name: str) -> str:
    return f"{row['seconds'][name] * 1e3:.2f}" if name in row["seconds"] else DASH


def peaks(rows: list[dict]) -> dict[int, float | None]:
    """For each number of threads the highest peak that a row measured, in GFLOP/s; None where none did."""
    found: dict[int, float | None] = {}
    for row in rows:
        found[row["threads"]] = max(found.get(row["threads"]) or 0, row["peak_gflops"] or 0) or None
    return found


def share(row: dict, name: str, peaks: dict[int, float | None]) -> float | None:
    """The part of the peak that a contestant's multiply-adds reach."""
    peak = peaks[row["threads"]]
    return 2 * row["multiply_adds"] * row["batch"] / row["seconds"][name] / (peak * 1e9) if peak else None


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table(result: dict) -> str:
    """Milliseconds a call of every contestant, and ours against the best of the others."""
    names = names_of(result["rows"])
    heads = ["ms a call", *names, f"{ours_of(names)} against the best of the others"]
    rows = [[title(row), *(milliseconds(row, name) for name in names), ratio(row)] for row in result["rows"]]
    return markdown(heads, rows)
