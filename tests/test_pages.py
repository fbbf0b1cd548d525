"""The pages that people read: links lead somewhere, commands are accepted, variables are documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from page_checks import ROOT, Commands, commands, link_faults, undocumented, without_assignments

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# The pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page_commands(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], list[str]]:
    """The faults of a page's commands; parsers that open a file do so in an empty folder."""
    for needed in ("pytest_benchmark", "xdist", "rich", "matplotlib", "PIL"):
        pytest.importorskip(needed, reason=f"{needed} belongs to the test extra: pip install -e '.[test]'")
    monkeypatch.chdir(tmp_path)
    return lambda text: list(Commands(pytestconfig, monkeypatch).faults(text))


@each_page
def test_links(page: Path) -> None:
    assert list(link_faults(page.read_text(encoding="utf-8"), page)) == []


@each_page
def test_commands(page: Path, page_commands: Callable[[str], list[str]]) -> None:
    assert page_commands(page.read_text(encoding="utf-8")) == []


@each_page
def test_variables(page: Path) -> None:
    documentation = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert undocumented(page.read_text(encoding="utf-8"), documentation) == set()


def test_the_readme_shows_how_to_do_everything() -> None:
    shown = [" ".join(without_assignments(words)) for words in commands(PAGES[0].read_text(encoding="utf-8"))]
    everything = """
        pip install -e .
        make test
        pytest -m cuda
        pytest --benchmark
        python -m benchmarks.report
        python -m benchmarks.profile_block
        nsys profile
        nsys stats
        ncu
        python examples/train.py
        torchrun
    """
    for beginning in map(str.strip, everything.strip().splitlines()):
        assert any(line.startswith(beginning) for line in shown), beginning


# What is wrong is found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](missing.md) [b](https://example.org/missing.md)", ["missing.md: no such file"]),
        ("![a](docs/missing.svg)", ["docs/missing.svg: no such file"]),
        ("[a](README.md#instal)", ["README.md#instal: no such heading"]),
        ("# A\n\n[a](#a) [b](#b) `[c](#c)`\n\n    [d](#d)\n", ["#b: no such heading"]),
        ("## Of `f(x)`: a, b-c\n\n## Of\n\n## Of\n\n[a](#of-fx-a-b-c) [b](#of-1) [c](README.md)", []),
    ],
)
def test_links_that_lead_nowhere(text: str, found: list[str]) -> None:
    assert list(link_faults(text, ROOT / "made-up.md")) == found


BAD = {
    "python -m benchmarks.missing": "benchmarks.missing: no such module",
    "python -m benchmarks.cpu_peers --missing": "unrecognized arguments: --missing",
    "python -m benchmarks.cpu_peers --table benchmarks/results/missing.json": "missing.json: no such file",
    "python -m benchmarks.cpu_peers --table missing.json": "nothing has written this file",
    "python -m benchmarks.gpu --json new.json\npython -m benchmarks.gpu --table $model.json": "nothing has written",
    "python -m benchmarks.profile_block --block 99": "argument --block: expected",
    "python -m benchmarks.report --missing": "unrecognized arguments: --missing",
    "python -m benchmarks.pages README.md": "takes no arguments",
    "python -m mbn_kernels --missing": "unrecognized arguments: --missing",
    "python examples/missing.py": "examples/missing.py: no such file",
    "python missing.py": "missing.py: no such file",
    "python examples/train.py --missing": "unrecognized arguments: --missing",
    "torchrun --missing examples/train.py": "unrecognized arguments: --missing",
    "torchrun --nproc-per-node 8 examples/train.py --batch-size 12": "expected a multiple of 8",
    "pytest --missing": "pytest has no option --missing",
    "pytest --benchmark-compare-fail=median": "benchmark-compare-fail",
    "pytest tests/missing.py": "tests/missing.py: no such file",
    "pytest tests/test_demo.py::test_missing": "no such test",
    "pytest -m missing": "-m: nothing is called missing",
    "pytest -k 'demo and mis_sing'": "-k: nothing is called mis_sing",
    "pytest -k 'demo and'": "-k: ",
    "make missing": "no such target: missing",
    "pip install -e '.[missing]'": "no such extra: missing",
    "A=1 nsys profile --output=x python -m benchmarks.missing": "benchmarks.missing: no such module",
    "ncu pyton -m benchmarks.gpu": "runs no python",
    "compute-sanitizer python -m pytest -m missing": "-m: nothing is called missing",
    "make test\nmak test": "mak is no program",
}


@pytest.mark.parametrize("lines", BAD)
def test_commands_that_would_not_run(lines: str, page_commands: Callable[[str], list[str]]) -> None:
    block = "".join(f"    {line}\n" for line in lines.splitlines())
    for text in (f"Text:\n\n{block}", f"```\n{lines}\n```\n"):
        faults = page_commands(text)
        assert faults and all(BAD[lines] in fault for fault in faults)


def test_commands_that_would_run(page_commands: Callable[[str], list[str]]) -> None:
    assert page_commands("Not `make`, but `make missing` fails.") == ["make missing: no such target: missing"]
    good = """
        model=mobilenet_v2   # and so on
        python -m benchmarks.gpu --model $model --json $model.json
        python -m benchmarks.gpu --table mobilenet_v2.json
        python -m benchmarks.report --read FILES --output FOLDER
        python -m benchmarks.profile_block …
        pytest --benchmark --benchmark-json=benchmarks/results/<gpu>.json -k "v3_large and backward"
        torchrun --nproc-per-node 2 FILE
        make test \\
            TEST_ARGS=-x
    """
    assert page_commands("```sh" + good.replace("\n        ", "\n") + "\n```\n") == []
    assert page_commands("A formula:\n\n    dy = a*dv*act'(n) + make\n") == []


def test_variables_that_nothing_documents() -> None:
    assert undocumented("`MBN_A=1`, MBN_A_B, `MBN_`", "MBN_A is documented") == {"MBN_A_B"}
