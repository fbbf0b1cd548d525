"""`pytest --benchmark`, tried on a small copy of the repository's layout and on the real one: collecting only, and
with tiny shapes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.implementations import contestants, default_device
from mbn_kernels import available_backends

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parent.parent
SETTINGS = ("conftest.py", "pyproject.toml")


def run_pytest(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # A run under pytest-xdist must not make the inner one think that it is a worker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | variables
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The repository's pytest settings over one test and one benchmark."""
    for name in SETTINGS:
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


def test_a_slower_run_fails(project):
    """--benchmark-compare-fail, against the run that was kept."""
    (project / "benchmarks" / "test_timed.py").write_text(
        "import os, time\n"
        "def test_nap(benchmark): benchmark.pedantic(time.sleep, (float(os.environ['NAP']),), rounds=3)\n"
    )
    assert run_pytest(project, "--benchmark", "--benchmark-autosave", NAP="0.04").returncode == 0

    against = "--benchmark-compare", "--benchmark-compare-fail=median:10%"
    for nap, slower in (("0.08", True), ("0.005", False)):
        result = run_pytest(project, "--benchmark", *against, NAP=nap)
        printed = result.stdout + result.stderr
        assert "Comparing against benchmarks from" in printed
        assert (result.returncode != 0) == ("Performance has regressed" in printed) == slower, printed


def test_histograms(project):
    pytest.importorskip("pygal", reason="pygal is missing: pip install -e '.[test]'")
    result = run_pytest(project, "--benchmark", "--benchmark-histogram=charts/times")
    assert result.returncode == 0, result.stdout + result.stderr
    (drawn,) = (project / "charts").iterdir()
    assert drawn.suffix == ".svg" and "<svg" in drawn.read_text() and "test_other" in drawn.read_text()


# The real benchmarks --------------------------------------------------------------------------------------------------

CONTESTANTS = [implementation.name for implementation in contestants(default_device(), full=False)]


def collected(*arguments: str) -> list[str]:
    """Names of what would run, without their file."""
    result = run_pytest(ROOT, "--benchmark", "--collect-only", "-q", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line.split("::")[1] for line in result.stdout.splitlines() if "::" in line]


def test_the_quick_subset_covers_every_network_direction_and_implementation():
    names = collected()
    for network in ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"):
        for direction in ("evaluation", "forward", "backward"):
            for implementation in CONTESTANTS:
                ending = f"-{direction}-{implementation}]"
                assert [name for name in names if name.startswith(f"test_block[{network}-") and name.endswith(ending)]
    assert {name.partition("[")[0] for name in names} == {"test_block", "test_stage", "test_network"}


def test_a_network_and_a_direction_are_chosen_by_name():
    names = collected("-k", "v3_large and backward")
    assert names and all(re.fullmatch(r"test_block\[mobilenet_v3_large-.*-backward-[a-z-]+\]", n) for n in names)
    assert len(names) == len(CONTESTANTS)


# A run with tiny shapes -----------------------------------------------------------------------------------------------

#: Of a pass and an implementation: what its results are multiplied by, and the gradients that come through it.
WRONG = {
    ("evaluation", "fused-cpu"): (1.01, 1.0),
    ("forward", "eager-nchw"): (math.nan, 1.0),
    ("backward", "fused-cpu"): (1.0, 1.01),
    ("dw", "eager-nchw"): (1.0, 1.01),
    ("training", "fused-cpu"): (1.0, math.nan),
}
PLUGIN = """
import gc
import sys
from functools import partial

import torch

from benchmarks import ceilings, implementations, layers
from benchmarks.stages import StageShape

nan = float("nan")
WRONG = {wrong}
layers.layer_shapes = partial(layers.layer_shapes, resolution=32, width_mult=0.25)
layers.NETWORKS = ("mobilenet_v3_large",)
layers.QUICK_NETWORKS = ("mobilenet_v3_small",)
layers.QUICK_STAGES = (
    StageShape("depthwise", 24, 24, 5, 1, 8, 8, "hardswish"),
    StageShape("gate", 24, 24, 1, 1, 8, 8, "hardsigmoid"),
)
layers.BATCH["cpu"]["training"] = 2
ceilings.COPIED, ceilings.PEAK = 1 << 24, 0.02
prepare = implementations.prepare


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value, slope):
        ctx.slope = slope
        return x * value

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None, None


class Wrong(torch.nn.Module):
    def __init__(self, module, factors):
        super().__init__()
        self.module, self.factors = module, factors

    def forward(self, x):
        return Times.apply(self.module(x), *self.factors)


def prepare_wrong(implementation, given, *, exact=False):
    factors = WRONG.get((given.direction, implementation.name))
    if factors:
        given = given._replace(build=lambda fused, build=given.build: Wrong(build(fused), factors))
    return prepare(implementation, given, exact=exact)


implementations.prepare = prepare_wrong


def pytest_collection_modifyitems():
    gc.freeze()  # what is there now is not looked through after each case
    sys.modules["benchmarks.conftest"].SECONDS_PER_CASE = 0.02
    sys.modules["benchmarks.conftest"].PAUSE = 0
"""


class Run(NamedTuple):
    """A run's exit status, what it printed, what it wrote, and where."""

    status: int
    printed: str
    found: dict
    path: Path

    @property
    def entries(self) -> list[dict]:
        return [benchmark["extra_info"] for benchmark in self.found["benchmarks"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if available_backends()["cpu"] != "available":
        pytest.skip(available_backends()["cpu"])
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny_shapes.py").write_text(PLUGIN.replace("{wrong}", repr(WRONG)))
    # No GPU, so that there is what WRONG names; one thread, as threads that wait for each other hold others up.
    variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    path = folder / "results" / "found.json"
    path.parent.mkdir()
    chosen = "not compile and not (test_network and evaluation)"
    result = run_pytest(ROOT, "-p", "tiny_shapes", "--benchmark", f"--benchmark-json={path}", "-k", chosen, **variables)
    assert path.exists(), result.stdout + result.stderr
    return Run(result.returncode, result.stdout, json.loads(path.read_text()), path)


def test_what_is_wrong_has_no_time(tiny):
    """Neither a wrong output, nor a wrong gradient alone, nor NaN: one sentence says so, and the others have theirs."""
    assert tiny.status == 1
    _, _, failures = tiny.printed.partition("= FAILURES =")
    sentences = [line for line in failures.splitlines() if "are allowed" in line and not line.startswith("FAILED")]
    heads = re.findall(r"^_+ (test_\S+) _+$", failures, re.MULTILINE)
    # One block, two stages, one network: evaluation and forward are wrong of three, dw of two.
    assert len(sentences) == len(heads) == 2 * 3 + 1 + 2 + 1
    for head, sentence in zip(heads, sentences, strict=True):
        direction, implementation = re.search(r"-(\w+)-((?:eager|fused)-[\w-]+)\]$", head).groups()
        assert (direction, implementation) in WRONG
        off = "nan" if math.nan in WRONG[direction, implementation] else r"(9\.9|1\.0)e-0[23]"
        pattern = rf"\S+ \S.* {direction}: {implementation} is off by {off}, \d\.\de-0\d are allowed: it has no time"
        assert re.fullmatch(pattern, sentence), sentence

    timed: dict[tuple[str, str], set[str]] = {}
    for benchmark in tiny.found["benchmarks"]:
        entry = benchmark["extra_info"]
        timed.setdefault((benchmark["group"], entry["direction"]), set()).add(entry["implementation"])
    assert len(timed) == 3 + 2 * 4 + 1
    for (group, direction), names in timed.items():
        right = {name for name in ("eager-nchw", "eager-channels-last", "fused-cpu") if (direction, name) not in WRONG}
        assert names == right, group


TEXTS = ("network", "direction", "implementation", "dtype", "mbn_kernels", "torch", "python", "device", "cpu", "commit")
COUNTS = ("times", "batch", "minimum_bytes", "flops", "threads")
NUMBERS = ("gb_per_s", "gflop_per_s", "copy_bandwidth", "copy_share", "error", "tolerance", "load_average", "seconds")
DIRECTIONS = {"block": "evaluation forward backward", "stage": "evaluation forward dx dw", "network": "training"}


def test_every_entry_has_what_readers_expect(tiny):
    for benchmark in tiny.found["benchmarks"]:
        entry, kind = benchmark["extra_info"], benchmark["extra_info"]["kind"]
        assert entry["direction"] in DIRECTIONS[kind].split()
        expected = dict.fromkeys(("kind", *TEXTS), str) | dict.fromkeys(COUNTS, int) | dict.fromkeys(NUMBERS, float)
        if kind == "network":
            assert entry["network"] == "mobilenet_v3_small"
        else:
            assert entry["network"] == "mobilenet_v3_large"
            expected |= {"layer": str, "launches": int}
        if entry["direction"] in ("forward", "training"):
            expected |= {"saved_bytes": int}
        if "peak_flops" in entry:  # a CPU library of another compiler has none
            expected |= {"peak_flops": float, "peak_share": float}
        assert {name: type(value) for name, value in entry.items()} == expected
        assert all(entry[name] > 0 for name in (*COUNTS, "gb_per_s", "gflop_per_s", "copy_share", "seconds"))
        assert 0 <= entry["error"] <= entry["tolerance"] < 0.1
        assert entry["batch"] == (1 if entry["direction"] == "evaluation" else 2)
        assert benchmark["group"].startswith(entry["network"])
        assert benchmark["name"].endswith(f"-{entry['direction']}-{entry['implementation']}]")
        assert "data" not in benchmark["stats"] and benchmark["stats"]["rounds"] >= 5
        assert entry["seconds"] == benchmark["stats"]["median"]
    assert {e["times"] for e in tiny.entries if e["kind"] == "block"} == {2}  # V3-Large has its fifth block twice
    assert tiny.path.stat().st_size < 4000 * len(tiny.entries)


def test_rates_are_of_the_recorded_numbers(tiny):
    assert len({e["copy_bandwidth"] for e in tiny.entries}) == 1 == len({e.get("peak_flops") for e in tiny.entries})
    for e in tiny.entries:
        bandwidth, rate = e["minimum_bytes"] / e["seconds"], e["flops"] / e["seconds"]
        assert (e["gb_per_s"], e["gflop_per_s"]) == pytest.approx((bandwidth / 1e9, rate / 1e9))
        assert e["copy_share"] == pytest.approx(bandwidth / e["copy_bandwidth"])
        if "peak_flops" in e:
            assert e["peak_share"] == pytest.approx(rate / e["peak_flops"])


def test_the_commit_is_that_of_the_checkout(tiny):
    recorded = {e["commit"] for e in tiny.entries}
    if (ROOT / ".git").exists():
        info = tiny.found["commit_info"]
        assert recorded == {info["id"] + "-dirty" * info["dirty"]} and len(info["id"]) == 40
    else:
        assert recorded == {"unknown"}


def test_the_last_lines_are_ratios_and_where_the_results_are(tiny):
    _, _, end = tiny.printed.partition("mbn_kernels against the fastest stock implementation")
    lines = end.partition("short test summary")[0].splitlines()[1:-1]
    # A group without ours, as it was wrong, has no ratio: the block's forward and the stages' are left.
    rows, mean, where = lines[1:-2], lines[-2], lines[-1]
    assert len(rows) == 1 + 2 * 2 + 2 and re.match(rf"geometric mean of {len(rows)} ", mean), lines
    assert all(re.search(r"\d+\.\d{3} +\d+\.\d{3} +\d+\.\d\dx  eager-", row) for row in rows)
    assert where == f"The results are in {tiny.path}; `python -m benchmarks.report --read FILE` draws them."
