"""Installs one wheel of this package into a new environment for each Python and PyTorch, and tries it there: the doctor
with its self-test, tests, the time of an import, and the doctor again without anything that can be missed. Writes
docs/compatibility.json, after each environment, and from it the table of docs/compatibility.md. An environment with a
CUDA build of PyTorch takes 5 GB, and is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "docs" / "compatibility.json", ROOT / "docs" / "compatibility.md"
PLACE = re.compile(r"(<!-- compatibility -->\n).*?(<!-- end -->)", re.DOTALL)
#: What is run with the installed wheel: each function, fuse(), and what the library asks of PyTorch.
TESTS = ["test_functional.py", "test_fuse.py"]
TESTS += [f"test_build.py::test_{name}" for name in ("one_library_for_every_python", "needs_only_the_stable_abi")]
#: Seconds of PyTorch's import and of what this package's takes on top, of a process of its own.
IMPORT = """
import time
before = time.perf_counter()
import torch
between = time.perf_counter()
import mbn_kernels
print(between - before, time.perf_counter() - between)
"""
HEADS = (
    "Python", "PyTorch", "Triton", "tests passed, skipped, failed", "self-test", "with nothing else",
    "seconds to import PyTorch, this package",
)  # fmt: skip


class Failed(Exception):
    """A command ended with an error: which, and the last line that it said."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", type=_pair, metavar="PYTHON=VERSION", help="as python3.10=2.11.0")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel; without it one is built from here")
    parser.add_argument("--page", action="store_true", help="only write the page again, from the JSON")
    options = parser.parse_args(arguments)
    if options.page == bool(options.pairs):
        parser.error("expected pairs of a Python and a PyTorch, or --page")
    return options


def _pair(text: str) -> tuple[str, str]:
    """The interpreter's command and PyTorch's version."""
    command, _, version = text.partition("=")
    if not command or not version:
        raise argparse.ArgumentTypeError(f"expected PYTHON=VERSION, got {text!r}")
    return command, version


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where anything failed anywhere."""
    options = parse(arguments)
    result = json.loads(RESULT.read_text(encoding="utf-8")) if options.page else None
    with TemporaryDirectory(prefix="mbn-compatibility-") as name:
        if result is None:
            folder = Path(name)
            wheel = options.wheel.resolve() if options.wheel else built(folder)
            given = sys.argv[1:] if arguments is None else arguments
            result = head(wheel, shlex.join(["python", "tests/compatibility_matrix.py", *given])) | {"rows": []}
            for row in rows(options, wheel, folder):
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    return int(not all(map(works, result["rows"])))


def built(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


def head(wheel: Path, command: str) -> dict:
    """What is the same everywhere."""
    library = ("--", "csrc", "setup.py")
    commit = run("git", "log", "-1", "--format=%H", *library).strip()
    changed = run("git", "status", "--porcelain", *library)
    return {
        "command": command,
        "date": date.today().isoformat(),
        "library_commit": commit + ("-dirty" if changed else ""),
        "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size,
        "tests": TESTS,
    }


# One environment ------------------------------------------------------------------------------------------------------


def rows(options: argparse.Namespace, wheel: Path, folder: Path) -> Iterator[dict]:
    environment = folder / "environment"
    for python, torch in options.pairs:
        shared = folder / f"torch-{torch}"
        shared.mkdir(exist_ok=True)
        try:
            yield tried(python, torch, wheel, environment, shared)
        except Failed as error:
            yield {"python": python, "torch": torch, "failed": str(error)}
        shutil.rmtree(environment, ignore_errors=True)


def tried(command: str, torch: str, wheel: Path, environment: Path, shared: Path) -> dict:
    """A row. ``shared`` keeps NVIDIA's libraries for the next Python with this PyTorch, as they are the same."""
    began = time.monotonic()
    run(command, "-m", "venv", environment)
    python = environment / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for entry in shared.iterdir():
        (packages / entry.name).symlink_to(entry)
    install = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    run(*install, f"torch=={torch}", wheel, "pytest", "hypothesis")
    for entry in [entry for entry in packages.glob("nvidia*") if not entry.is_symlink()]:
        entry.rename(shared / entry.name)
        entry.symlink_to(shared / entry.name)

    facts = doctor(python, environment)
    row = {"python": facts["versions"]["python"], "torch": facts["versions"]["torch"]}
    row |= {"triton": facts["versions"]["triton"], "self_test": facts["self_test"]}
    row["import_seconds"] = import_seconds(python, environment)
    row |= tests(python, environment)
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "triton")
    # No Triton, no compiler, no folder that can be written to.
    bare = {"PATH": "", "HOME": os.devnull, "MBN_CACHE_DIR": f"{os.devnull}/cache"}
    facts = doctor(python, environment, **bare)
    assert facts["versions"]["triton"] is None and not any(facts["compilers"].values())
    assert not facts["cache"]["writable"], facts["cache"]
    return row | {"bare_self_test": facts["self_test"], "seconds": round(time.monotonic() - began)}


def doctor(python: Path, folder: Path, **environment: str) -> dict:
    return json.loads(run(python, "-m", "mbn_kernels", "--json", folder=folder, **environment))


def import_seconds(python: Path, folder: Path) -> dict[str, float]:
    """Medians of three processes, after the doctor's, which has read the files."""
    runs = [list(map(float, run(python, "-c", IMPORT, folder=folder).split())) for _ in range(3)]
    medians = [round(statistics.median(each), 2) for each in zip(*runs, strict=True)]
    return {"torch": medians[0], "mbn_kernels": medians[1]}


def tests(python: Path, environment: Path) -> dict[str, object]:
    """How many passed and were skipped, and which failed, in a folder without the package: the wheel's is tested."""
    checkout, report = environment / "checkout", environment / "report.xml"
    shutil.copytree(ROOT / "tests", checkout / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    chosen = [f"tests/{name}" for name in TESTS]
    command = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen)
    try:
        run(*command, folder=checkout, OMP_NUM_THREADS="1")
    except Failed:
        if not report.exists():
            raise
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case.get("name") for case in cases for kind in ("failure", "error") if case.find(kind) is not None]
    return {"passed": len(cases) - len(skipped) - len(failed), "skipped": len(skipped), "failed_tests": failed}


def run(*command: object, folder: Path = ROOT, **environment: str) -> str:
    """What a command prints; it sees no package but its environment's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MBN_", "PYTHON"))} | environment
    words = list(map(str, command))
    try:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise Failed(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise Failed(f"{Path(words[0]).name} {shlex.join(words[1:4])}: {said}")
    return done.stdout


# The page -------------------------------------------------------------------------------------------------------------


def works(row: dict) -> bool:
    """Whether nothing failed, and the CPU kernels are among what was tried."""
    if "failed" in row or row["failed_tests"] or not row["passed"]:
        return False
    tried = (row["self_test"], row["bare_self_test"])
    return all("cpu" in found and set(found.values()) == {"ok"} for found in tried)


def filled(text: str, result: dict) -> str:
    """The page with the table of a result in its place."""
    return PLACE.sub(lambda place: place[1] + table(result) + place[2], text)


def table(result: dict) -> str:
    rows = map(_cells, sorted(result["rows"], key=_order))
    lines = [" | ".join(cells) for cells in (HEADS, ["---"] * len(HEADS), *rows)]
    return (
        "".join(f"| {line} |\n" for line in lines)
        + f"\n`{result['wheel']}`, {result['wheel_bytes']:,} bytes, its library of commit {result['library_commit']}, "
        + f"on {result['date']}, by\n\n    {result['command']}\n"
    )


def _order(row: dict) -> list[list[int]]:
    """By PyTorch, then by Python."""
    return [[int(n) for n in re.findall(r"\d+", row[name])[:3]] for name in ("torch", "python")]


def _cells(row: dict) -> list[str]:
    first = [row["python"], row["torch"]]
    if "failed" in row:
        return [*first, f"failed: {row['failed']}", *[""] * (len(HEADS) - 3)]
    seconds = row["import_seconds"]
    counts = ", ".join(f"{n:,}" for n in (row["passed"], row["skipped"], len(row["failed_tests"])))
    times = f"{seconds['torch']:.2f}, {seconds['mbn_kernels']:.2f}"
    return [*first, row["triton"] or "none", counts, _told(row["self_test"]), _told(row["bare_self_test"]), times]


def _told(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {said}" for name, said in found.items())


if __name__ == "__main__":
    sys.exit(main())
