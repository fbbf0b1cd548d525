"""docs/compatibility.md says what docs/compatibility.json holds, and what the matrix makes of what it finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compatibility_matrix as matrix
import pytest

ROW = {"python": "3.10.1", "torch": "2.11.0", "triton": None, "self_test": {"cpu": "ok"}, "failed_tests": []}
ROW |= {"import_seconds": {"torch": 1.5, "mbn_kernels": 0.25}, "passed": 1234, "skipped": 2}
ROW |= {"bare_self_test": {"cpu": "ok"}, "seconds": 9}
RESULT = {"command": "python tests/…", "date": "2026-01-02", "library_commit": "abc", "wheel": "w.whl"}
RESULT |= {"wheel_bytes": 1000, "tests": ["test_fuse.py"]}


def test_the_page_says_what_was_found() -> None:
    result = json.loads(matrix.RESULT.read_text(encoding="utf-8"))
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.filled(text, result) == text
    assert result["rows"] and all(f"| {row['python']} | {row['torch']} |" in text for row in result["rows"])
    assert set(result["tests"]) == set(matrix.TESTS)


def test_a_table() -> None:
    rows = [ROW | {"torch": "2.15.0"}, ROW | {"python": "3.9.1", "failed": "pip: no such version"}, ROW]
    page = matrix.filled("A\n<!-- compatibility -->\nold\n<!-- end -->\nB\n", RESULT | {"rows": rows})
    lines = page.splitlines()
    assert lines[0] == "A" and lines[-2:] == ["<!-- end -->", "B"] and "old" not in page
    assert lines[4:7] == [
        "| 3.9.1 | 2.11.0 | failed: pip: no such version |  |  |  |  |",
        "| 3.10.1 | 2.11.0 | none | 1,234, 2, 0 | cpu ok | cpu ok | 1.50, 0.25 |",
        "| 3.10.1 | 2.15.0 | none | 1,234, 2, 0 | cpu ok | cpu ok | 1.50, 0.25 |",
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"failed_tests": ["test_a"]},
        {"passed": 0},
        {"self_test": {"reference": "ok", "cpu": "off"}},
        {"bare_self_test": {"reference": "ok"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_does_not_work(other: dict) -> None:
    assert matrix.works(ROW) and not matrix.works(ROW | other)
    assert not matrix.works({"python": "3.10", "torch": "2.11.0", "failed": "pip: no such version"})


REPORT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>
<testcase name="c"><failure/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>"""


def test_tests_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: object, folder: Path, **environment: str) -> None:
        assert not (folder / "mbn_kernels").exists() and (folder / "tests" / "test_fuse.py").exists()
        (tmp_path / "report.xml").write_text(REPORT)
        raise matrix.Failed("pytest")

    monkeypatch.setattr(matrix, "run", run)
    assert matrix.tests(Path("python"), tmp_path) == {"passed": 1, "skipped": 1, "failed_tests": ["c", "d"]}


def test_a_command_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert matrix.run(sys.executable, "-c", "import os; print(os.environ.get('PYTHONSAFEPATH'))") == "None\n"
    with pytest.raises(matrix.Failed, match=r"^python\S* -c .*: ValueError: b$"):
        matrix.run(sys.executable, "-c", "raise ValueError('b')")
    with pytest.raises(matrix.Failed, match=r"^missing-python: No such file"):
        matrix.run("missing-python")


@pytest.mark.parametrize("arguments", (["python3.10"], ["=2.11.0"], [], ["--page", "python3.10=2.11.0"]))
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        matrix.parse(arguments)
    assert "expected" in capsys.readouterr().err
