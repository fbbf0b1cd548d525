"""What can be wrong with a page that people read: its links, its commands, the variables that it names. No command is
run: its arguments are given to its program's parser.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import shlex
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path

import pytest
import scripts
from _pytest.mark.expression import Expression
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent


# Markdown -------------------------------------------------------------------------------------------------------------

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n+)+")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def prose(text: str) -> str:
    """Without blocks of code."""
    return INDENTED.sub("", FENCED.sub("", text))


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#{1,6} (.+)$", FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return anchors


def link_faults(text: str, page: Path) -> Iterator[str]:
    """``text`` is what ``page`` holds."""
    for target in re.findall(r"\]\(([^)\s]+)\)", INLINE.sub("", prose(text))):
        if re.match(r"[a-z]+:", target):
            continue  # another site's
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if name and not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in slugs(text if file == page else file.read_text(encoding="utf-8")):
            yield f"{target}: no such heading"


# Commands -------------------------------------------------------------------------------------------------------------

ASSIGNMENT = re.compile(r"(\w+)=(\S*)")
PLACEHOLDER = re.compile(r"<\w+>|(^|[:/=])[A-Z]{2,}$")
FOLDERS = ("benchmarks/", "docs/", "examples/", "tests/")
READS = ("--table", "--read")


def commands(text: str) -> Iterator[list[str]]:
    """Of blocks that hold a command, every line, and of inline code what begins with one; the words of each."""
    blocks = [block for language, block in FENCED.findall(text) if language in ("", "sh", "bash")]
    for block in blocks + INDENTED.findall(FENCED.sub("", text)):
        variables: dict[str, str] = {}
        lines = [words_of(line) for line in block.replace("\\\n", " ").splitlines()]
        for words in filter(None, lines) if any(map(is_command, lines)) else ():
            assigned = words[: len(words) - len(without_assignments(words))]
            variables |= dict(ASSIGNMENT.fullmatch(word).groups() for word in assigned)
            yield [re.sub(r"\$(\w+)", lambda name, known=variables: known.get(name[1], name[0]), w) for w in words]
    yield from (words for code in INLINE.findall(prose(text)) if is_command(words := words_of(code)) and words[1:])


def words_of(line: str) -> list[str]:
    """None of what a shell could not split, as a formula with an odd quote."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def without_assignments(words: list[str]) -> list[str]:
    first = next((i for i, word in enumerate(words) if not ASSIGNMENT.fullmatch(word)), len(words))
    return words[first:]


def is_command(words: list[str]) -> bool:
    rest = without_assignments(words)
    return bool(rest) and rest[0] in PROGRAMS


class Commands:
    """Finds what is wrong with a page's commands. A file may be read that a command before it has written."""

    def __init__(self, config: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.monkeypatch, self.seen = config, monkeypatch, set()

    def faults(self, text: str) -> Iterator[str]:
        for words in commands(text):
            command = without_assignments(words)
            yield from (f"{shlex.join(words)}: {fault}" for fault in (self.faults_of(command) if command else ()))
            self.seen |= {word.rpartition("=")[2] for word in words}

    def faults_of(self, words: list[str]) -> Iterator[str]:
        program, *arguments = [word for word in words if word != "…"]
        if program in PROGRAMS:
            yield from self.file_faults(arguments)
            yield from PROGRAMS[program](self, arguments)
        else:
            yield f"{program} is no program that these pages use"

    def file_faults(self, arguments: list[str]) -> Iterator[str]:
        reading = False
        for word in arguments:
            reading = word in READS or (reading and not word.startswith("-"))
            path = word.rpartition("=")[2]
            if PLACEHOLDER.search(path) or word in READS:
                continue
            if path.startswith(FOLDERS) and not list(ROOT.glob(path.partition("::")[0])):
                yield f"{path}: no such file"
            elif reading and path not in self.seen and not (ROOT / path).exists():
                yield f"{path}: nothing has written this file"

    def python(self, arguments: list[str]) -> Iterator[str]:
        if arguments[:1] != ["-m"]:
            yield from self.script(arguments)
            return
        _, name, *given = arguments
        if name in PROGRAMS:
            yield from PROGRAMS[name](self, given)
        elif name.partition(".")[0] not in ("benchmarks", "mbn_kernels") or importlib.util.find_spec(name) is None:
            yield f"{name}: no such module"
        else:
            spec = importlib.util.find_spec(name)
            module = importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
            yield from self.refused(module, given)

    def script(self, arguments: list[str], processes: str = "1") -> Iterator[str]:
        if PLACEHOLDER.search(arguments[0]):
            return
        script = ROOT / arguments[0]
        if not script.is_file():
            yield f"{arguments[0]}: no such file"
            return
        self.monkeypatch.setenv("WORLD_SIZE", processes)
        self.monkeypatch.setitem(sys.modules, script.stem, None)  # other tests may have it loaded
        yield from self.refused(scripts.load(script), arguments[1:])

    def refused(self, module: object, arguments: list[str]) -> Iterator[str]:
        """Gives the arguments to the module's ``parse``, or to its ``main`` as far as the end of its parser's work."""
        parse = getattr(module, "parse", None)
        if parse is None and not hasattr(module, "argparse"):
            if arguments:
                yield f"{module.__name__} takes no arguments"
            return
        said = io.StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(said), self.monkeypatch.context() as patch:
                if parse is None:
                    patch.setattr(ArgumentParser, "parse_args", accepting(ArgumentParser.parse_args))
                (parse or module.main)(arguments)
        except Accepted:
            return
        except SystemExit as end:
            if end.code:
                yield said.getvalue().strip().splitlines()[-1] if said.getvalue().strip() else str(end.code)
            return
        if parse is None:
            yield f"{module.__name__}.main parses no arguments"

    def torchrun(self, arguments: list[str]) -> Iterator[str]:
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                options = get_args_parser().parse_args(arguments)
        except SystemExit:
            yield said.getvalue().strip().splitlines()[-1]
            return
        yield from self.script([options.training_script, *options.training_script_args], options.nproc_per_node)

    def pytest(self, arguments: list[str]) -> Iterator[str]:
        # Opened as it is parsed, in a folder that is there.
        given = [re.sub(r"(?<=--benchmark-json=).*/", "", word) for word in arguments]
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                options, unknown = self.config._parser.parse_known_and_unknown_args(given)
        except (pytest.UsageError, SystemExit) as problem:
            yield str(problem) or said.getvalue().strip()
            return
        yield from (f"pytest has no option {option}" for option in unknown)
        for path in options.file_or_dir:
            file, *names = path.split("::")
            found = list(ROOT.glob(file))
            if not found:
                yield f"{file}: no such file"
            yield from (f"{path}: no such test" for n in names if not any(n in f.read_text() for f in found))
        markers = {re.split(r"\W", line)[0] for line in self.config.getini("markers")}
        for option, expression, known in (("-m", options.markexpr, markers), ("-k", options.keyword, sources())):
            try:
                names = names_in(expression)
            except Exception as problem:  # what it is called depends on pytest's version
                yield f"{option}: {problem}"
                continue
            yield from (f"{option}: nothing is called {name}" for name in names if name not in known)

    def make(self, arguments: list[str]) -> Iterator[str]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        yield from (f"no such target: {a}" for a in arguments if not ASSIGNMENT.fullmatch(a) and a not in targets)

    def pip(self, arguments: list[str]) -> Iterator[str]:
        project = (ROOT / "pyproject.toml").read_text()
        extras = [e for word in arguments if (found := re.fullmatch(r"\.\[(.+)\]", word)) for e in found[1].split(",")]
        yield from (f"no such extra: {e}" for e in extras if not re.search(rf"^{e} = \[", project, re.MULTILINE))

    def profiler(self, arguments: list[str]) -> Iterator[str]:
        """What it runs; ``nsys stats`` runs nothing."""
        if "python" in arguments:
            yield from self.faults_of(arguments[arguments.index("python") :])
        elif "-m" in arguments:
            yield "runs no python"


PROGRAMS: dict[str, Callable[[Commands, list[str]], Iterator[str]]] = {
    "python": Commands.python,
    "pytest": Commands.pytest,
    "make": Commands.make,
    "pip": Commands.pip,
    "torchrun": Commands.torchrun,
    **dict.fromkeys(("nsys", "ncu", "compute-sanitizer"), Commands.profiler),
}


class Accepted(Exception):
    """A parser took the arguments."""


def accepting(parse_args: Callable) -> Callable:
    def wrapper(*arguments, **more) -> None:
        parse_args(*arguments, **more)
        raise Accepted

    return wrapper


def names_in(expression: str) -> list[str]:
    Expression.compile(expression)
    return [name for name in re.findall(r"[^\s()]+", expression) if name not in ("and", "or", "not")]


@lru_cache
def sources() -> str:
    """Where the names of tests, cases and layers are."""
    files = [file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).glob("*.py"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.name != "test_pages.py")


def undocumented(text: str, documentation: str) -> set[str]:
    """Environment variables of the project that the documentation does not name."""
    variables = re.compile(r"\bMBN_[A-Z_]*[A-Z]\b")
    return set(variables.findall(text)) - set(variables.findall(documentation))
