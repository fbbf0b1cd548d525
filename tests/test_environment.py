"""docs/environment.md names every environment variable that a source reads, and none that no source reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mbn_kernels.__main__ import VARIABLES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "environment.md"
FOLDERS = ("mbn_kernels", "csrc", "tests", "examples", "benchmarks")
#: It shows every variable that it is told to, whatever it is for.
SHOWS_ANY = Path("mbn_kernels/__main__.py")


class Read(NamedTuple):
    """A variable that a source reads; the name is None where it is made at run time."""

    name: str | None
    default: str = ""


def reads_of_python(text: str) -> Iterator[Read]:
    """``os.environ[name]``, its methods that read, ``name in os.environ`` and ``os.getenv``, with a name that is a
    string or a constant of the file.
    """
    tree = ast.parse(text)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def value_of(node: ast.expr) -> str | None:
        found = constants.get(node.id) if isinstance(node, ast.Name) else getattr(node, "value", None)
        return found if isinstance(found, str) else None

    def is_environ(node: ast.AST) -> bool:
        return "environ" in (getattr(node, "attr", None), getattr(node, "id", None))

    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
            yield Read(value_of(node.slice))
        elif isinstance(node, ast.Compare) and is_environ(node.comparators[0]):
            yield Read(value_of(node.left))
        elif isinstance(node, ast.Call) and node.args:
            called, owner = (
                getattr(node.func, "attr", getattr(node.func, "id", None)),
                getattr(node.func, "value", None),
            )
            if called == "getenv" or (called in ("get", "setdefault", "pop") and is_environ(owner)):
                default = value_of(node.args[1]) if len(node.args) > 1 else None
                yield Read(value_of(node.args[0]), (called != "setdefault" and default) or "")


def reads_of_cpp(text: str) -> Iterator[Read]:
    for call in re.finditer(r"\bgetenv\(\s*(?:\"(\w+)\")?", text):
        yield Read(call[1])


def reads_of_shell(text: str) -> Iterator[Read]:
    """A Makefile's own (``NAME ?= default``), and the shell's with a default, which a Makefile writes with two $."""
    for variable in re.finditer(r"^(\w+) \?=[ \t]*(.*)$", text, re.MULTILINE):
        yield Read(variable[1], variable[2])
    for variable in re.finditer(r"\$\{(\w+):?-([^}]*)\}", text):
        yield Read(variable[1], variable[2])


READERS = {".py": reads_of_python, "": reads_of_shell} | dict.fromkeys((".cpp", ".h", ".cu", ".cuh"), reads_of_cpp)


def sources() -> list[Path]:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in READERS]
    files = [file for file in files if file.suffix and file.is_file()]
    return [*files, *ROOT.glob("*.py"), ROOT / "Makefile", ROOT / ".ci" / "run"]


@pytest.fixture(scope="module")
def read() -> dict[str, list[tuple[Path, str]]]:
    """By name: where it is read, and with which default."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for file in sources():
        where = file.relative_to(ROOT)
        for each in READERS[file.suffix](file.read_text()):
            if where != SHOWS_ANY or each.name is not None:
                assert each.name is not None, f"{where}: expected a variable whose name can be read off, got another"
                found.setdefault(each.name, []).append((where, each.default))
    return found


def rows_of(page: str) -> list[tuple[str, str, list[str]]]:
    """(section, name, the other cells) of each row of a table."""
    rows = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for name, rest in re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE):
            rows.append((section.splitlines()[0], name, [cell.strip() for cell in rest.split(" | ")]))
    return rows


def differences(read: dict[str, list[tuple[Path, str]]], page: str) -> list[str]:
    """What a page says otherwise than the sources do."""
    rows = rows_of(page)
    own = [(name, cells) for section, name, cells in rows if section != "Read by others"]
    others = [name for section, name, _ in rows if section == "Read by others"]
    names = [name for _, name, _ in rows]
    found = [f"{name}: twice on the page" for name in sorted({name for name in names if names.count(name) > 1})]
    for name in sorted(read.keys() - {name for name, _ in own}):
        found.append(f"{name}: read in {', '.join(sorted({str(where) for where, _ in read[name]}))}, not on the page")
    found += [f"{name}: on the page, read nowhere" for name, _ in own if name not in read]
    for name, (_, default, *_) in own:
        for where, stated in read.get(name, ()):
            if stated and f"`{stated}`" not in default:
                found.append(f"{name}: {stated} in {where}, {default} on the page")
    shown = set(VARIABLES) - read.keys()
    found += [f"{name}: the doctor shows it, not on the page" for name in sorted(shown - set(others))]
    found += [
        f"{name}: on the page as read by others, the doctor does not show it" for name in others if name not in shown
    ]
    return found


def test_the_page_says_what_the_sources_read(read: dict) -> None:
    assert not differences(read, PAGE.read_text()), "\n".join(differences(read, PAGE.read_text()))


def test_reads_are_found(read: dict) -> None:
    """Of each kind of source, and of each way to read."""
    places = {"csrc/cpu/dispatch.cpp", "mbn_kernels/__main__.py", "tests/run_sanitized.py"}
    assert {str(where) for where, _ in read["MBN_CPU_ISA"]} == places
    assert (Path("setup.py"), "c++") in read["CXX"] and (Path("Makefile"), "python3") in read["PYTHON"]
    assert (Path("Makefile"), "1") in read["OMP_NUM_THREADS"] and (Path(".ci/run"), "2") in read["MAX_JOBS"]
    assert Path("tests/cuda_host_build.py") in dict(read["MBN_SANITIZE_CUDA_HOST"])  # by a constant
    assert Path("benchmarks/gpu.py") in dict(read["TRITON_CACHE_DIR"])  # by setdefault


def test_ways_to_read() -> None:
    text = """
import os
from os import environ, getenv
A = "A_NAME"
os.environ["WRITTEN"] = "x"
del os.environ["DELETED"]
x = os.environ[A], os.environ["B"], os.environ.get("C", "c"), os.getenv("D"), getenv("E", "e"), environ["F"]
y = "G" in os.environ, os.environ.setdefault("H", "h"), os.environ.pop("I", None), {**os.environ, "NEW": "n"}
z = os.environ[made()], {}.get("ANOTHER"), os.path.get("NO")
"""
    named = {"A_NAME": "", "B": "", "C": "c", "D": "", "E": "e", "F": "", "G": "", "H": "", "I": ""}
    found = list(reads_of_python(text))
    assert {each.name: each.default for each in found if each.name} == named
    assert [each for each in found if each.name is None] == [Read(None)]
    assert list(reads_of_cpp('std::getenv("A"); getenv( "B"), getenv(name)')) == [Read("A"), Read("B"), Read(None)]
    found = list(reads_of_shell("A ?= a b\nB ?=\nC = c\nx: ; D=$${D:-1} $(E) ${F}"))
    assert found == [Read("A", "a b"), Read("B", ""), Read("D", "1")]


A_PAGE = """
## Run

| name | values | default | what it does |
|---|---|---|---|
| `A` | a number | `1` | something |
| `B` | | | something |

## Read by others

| name | what it does |
|---|---|
| `C` | something |
"""


@pytest.mark.parametrize(
    ("text", "instead", "sentences"),
    [
        ("", "", []),
        ("| `A` | a number | `1` | something |\n", "", ["A: read in a.py, not on the page"]),
        ("`1`", "`2`", ["A: 1 in a.py, `2` on the page"]),
        ("| `B`", "| `D` | | | |\n| `B`", ["D: on the page, read nowhere"]),
        ("| `B`", "| `B` | | | |\n| `B`", ["B: twice on the page"]),
        ("| `C` | something |\n", "", ["C: the doctor shows it, not on the page"]),
        ("| `C`", "| `E` | |\n| `C`", ["E: on the page as read by others, the doctor does not show it"]),
    ],
    ids=["the same", "not on the page", "another default", "stale", "twice", "not shown", "not by the doctor"],
)
def test_what_differs_is_found(text: str, instead: str, sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.VARIABLES", ("A", "C"))
    read = {"A": [(Path("a.py"), "1")], "B": [(Path("b.py"), "")]}
    assert differences(read, A_PAGE.replace(text, instead, 1)) == sentences
