"""`pytest --benchmark`, tried on a small copy of the repository's layout and, collecting only, on the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parent.parent


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A run under pytest-xdist must not make the inner one think that it is a worker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The repository's pytest settings over one test and one benchmark."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    tests = {
        "tests/test_plain.py": "import pytest\ndef test_plain(): pass\n@pytest.mark.slow\ndef test_slow(): pass\n",
        "benchmarks/__init__.py": "",
        "benchmarks/test_timed.py": (
            "def test_timed(benchmark): benchmark.pedantic(int, rounds=2)\n"
            "def test_other(benchmark): benchmark.pedantic(int, rounds=2)\n"
            "def test_without_the_fixture(): assert False\n"
        ),
    }
    for name, text in tests.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_without_the_option_only_tests_run(project):
    result = run_pytest(project)
    assert result.returncode == 0, result.stdout
    assert "1 passed, 1 skipped" in result.stdout
    assert "slow: run with --runslow" in result.stdout
    assert "1 passed, 1 skipped" in run_pytest(project, ".").stdout
    assert "2 passed" in run_pytest(project, "--runslow").stdout


def test_exactly_as_typed(project):
    result = run_pytest(project, "--benchmark")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_timed" in result.stdout
    assert "test_plain" not in result.stdout
    assert "2 passed, 1 skipped" in result.stdout  # benchmark-only mode skips what times nothing


def test_composes_with_other_options(project):
    result = run_pytest(project, "--benchmark", "-k", "other", "--benchmark-json=out.json", "--benchmark-autosave")
    assert result.returncode == 0, result.stdout + result.stderr
    names = [row["name"] for row in json.loads((project / "out.json").read_text())["benchmarks"]]
    assert names == ["test_other"]

    result = run_pytest(project, "--benchmark-full", "-k", "other", "--benchmark-compare")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Comparing against benchmarks from" in result.stdout + result.stderr


def test_a_path_given_with_it_wins(project):
    result = run_pytest(project, "--benchmark", "benchmarks/test_timed.py::test_other")
    assert "1 passed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-p", "no:benchmark"), "ERROR: --benchmark needs pytest-benchmark: run `pip install -e '.[benchmark]'`."),
        (("-n", "2"), "ERROR: --benchmark times one thing at a time: leave out -n."),
    ],
)
def test_one_sentence_when_it_cannot_run(project, arguments, sentence):
    if "-n" in arguments:
        pytest.importorskip("xdist")
    result = run_pytest(project, "--benchmark", *arguments)
    assert result.returncode != 0
    assert (result.stdout + result.stderr).strip() == sentence


def test_the_quick_subset_covers_every_network_direction_and_implementation():
    result = run_pytest(ROOT, "--benchmark", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    blocks = [line for line in result.stdout.splitlines() if "test_block[" in line]
    for network in ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"):
        for direction in ("evaluation", "training"):
            for implementation in ("eager-nchw", "eager-channels-last", "compile", "fused"):
                ending = f"-{direction}-{implementation}]"
                assert [line for line in blocks if f"[{network}-" in line and line.endswith(ending)], ending
    assert "test_network[" in result.stdout
