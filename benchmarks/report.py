"""Measures on the device that is there, and writes a report: tables and pictures.

python -m benchmarks.report
python -m benchmarks.report --read A.json B.json --output FOLDER
python -m benchmarks.report --pages

With --pages it writes the tables and pictures of README.md and docs/ anew, from the results that are kept
(benchmarks/pages.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from .report_data import Result, Unusable, read

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "local"
NEEDS = ("matplotlib", "rich")


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="measure every layer shape, as pytest --benchmark-full")
    parser.add_argument("-k", metavar="EXPR", help="measure only what matches, as pytest -k")
    parser.add_argument(
        "--read",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: report what these files of pytest --benchmark-json hold, all of one machine",
    )
    parser.add_argument(
        "--pages",
        action="store_true",
        help="measure nothing: write the tables and pictures of README.md and docs/ anew",
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default: %(default)s")
    return parser


def run_pytest(arguments: list[str]) -> int:
    """pytest's exit status; it runs in the repository and prints as it goes."""
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


def measure(path: Path, *, full: bool, expression: str | None) -> int:
    """pytest's exit status; an earlier run's file and report are removed, so that none is taken for this one's."""
    for earlier in (path, path.with_name("report.md")):
        earlier.unlink(missing_ok=True)
    arguments = ["--benchmark-full"] if full else []
    arguments += ["-k", expression] if expression is not None else []
    return run_pytest(["--benchmark", f"--benchmark-json={path.resolve()}", *arguments])


def write(result: Result, folder: Path, failed: bool = False) -> None:
    """report.md, and of each picture an SVG and a PNG: the same bytes for the same result.

    A picture that the result has no data for is removed. ``failed``: some benchmark did, which the report says.
    """
    from . import report_charts, report_tables  # here, as these need what main looks for
    from .cpu_charts import save

    lines = [report_tables.tables(result, failed), "## Pictures"]
    for picture in report_charts.PICTURES:
        figure = picture.draw(result)
        files = [folder / f"{picture.name}{suffix}" for suffix in (".svg", ".png")]
        for file in files:
            if figure is None:
                file.unlink(missing_ok=True)
            else:
                save(figure, {"system": report_tables.system(result)}, file, result.entries)
        lines.append(f"### {picture.title}")
        if figure is None:
            lines.append(f"Left out: the measurements lack {picture.needs}.")
        else:
            lines += [f"{picture.reading} ([PNG]({picture.name}.png))", f"![{picture.title}]({picture.name}.svg)"]
    (folder / "report.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = parser_of()
    options = parser.parse_args(argv)
    if (options.read or options.pages) and (options.full or options.k is not None):
        parser.error("--read and --pages measure nothing: leave out --full and -k")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(2, f"{' and '.join(missing)} not installed: pip install -e '.[benchmark]'\n")
    if options.pages:
        from . import pages  # here, as it needs what was looked for

        return print(*map(str, pages.write()), sep="\n")
    folder, status = options.output, 0
    measured = folder / "benchmark.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not options.read:
            status = measure(measured, full=options.full, expression=options.k)
            if not measured.exists() or not measured.stat().st_size:
                parser.exit(status or 1, f"pytest ended with exit status {status} and measured nothing.\n")
        write(read(options.read or [measured]), folder, failed=status != 0)
    except Unusable as problem:
        parser.exit(2, f"{problem}\n")
    except OSError as problem:
        parser.exit(2, f"{problem.filename}: {problem.strerror}\n")
    beside = "its pictures" if options.read else "its pictures and benchmark.json"
    print(f"{folder / 'report.md'}: the report; {beside} are in the same folder")
    if status:
        why = "what failed is named above and has no time in the report"
        parser.exit(status, f"pytest ended with exit status {status}: {why}.\n")


if __name__ == "__main__":
    main()
