"""pytest options of this repository: --benchmark, --benchmark-full, --runslow, and the markers cuda and slow."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mbn_kernels")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run benchmarks/ instead of tests/: a quick subset of the shapes, under 3 minutes",
    )
    group.addoption(
        "--benchmark-full",
        action="store_true",
        help="as --benchmark, with every layer shape, and torch.compile of every network: an hour",
    )
    group.addoption("--runslow", action="store_true", help="run the tests marked slow too")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "slow: runs only with --runslow")
    if config.option.benchmark_full:
        config.option.benchmark = True
    if not config.option.benchmark:
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: run `pip install -e '.[benchmark]'`.")
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--benchmark times one thing at a time: leave out -n.")
    # Tests without the benchmark fixture are left out, unless the user only wants to see that benchmarks run.
    config.option.benchmark_only = not config.option.benchmark_disable
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(BENCHMARKS)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.runslow:
        skip_slow = pytest.mark.skip(reason="slow: run with --runslow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip_slow)

    on_cuda = [item for item in items if item.get_closest_marker("cuda")]
    if on_cuda:
        import torch  # here, so that pytest --help and runs without such tests do not wait for it

        if not torch.cuda.is_available():
            for item in on_cuda:
                item.add_marker(pytest.mark.skip(reason="cuda: torch.cuda.is_available() is false"))
