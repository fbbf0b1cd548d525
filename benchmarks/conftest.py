"""The fixture that checks and times a call, and the table of ratios at the end of a run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from mbn_kernels import use_backend

from .ceilings import ceilings
from .correct import Oracle, oracle
from .counts import launches, peak_bytes, saved_bytes
from .gpu_timing import median_seconds
from .implementations import Implementation, Pass, Prepared, contestants, default_device, prepare
from .report_data import default_of, geometric_mean, is_stock
from .timing import seconds, system_info

MEDIANS = pytest.StashKey[dict[str, dict[str, float]]]()
ORACLE = pytest.StashKey[tuple[str, Oracle]]()
SECONDS_PER_CASE = 0.3
#: Of a GPU's time alone, measured behind the others.
GPU_MILLISECONDS = 50
PAUSE = 0.1  # lets the threads of the previous case stop spinning


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def across(metafunc: pytest.Metafunc, directions: tuple[str, ...], compiles: bool = True) -> None:
    """Every direction and implementation; the last varies fastest: those of a group run next to each other."""
    found = contestants(default_device(), metafunc.config.option.benchmark_full)
    found = [implementation for implementation in found if compiles or not implementation.compiled]
    metafunc.parametrize("direction", directions)
    metafunc.parametrize("implementation", found, ids=lambda implementation: implementation.name)


@pytest.fixture
def timed(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """timed(group, implementation, given, **info): check against float64, count, time; keep the time for the table."""
    stash = request.config.stash

    def run(group: str, implementation: Implementation, given: Pass, **info: object) -> None:
        if stash.get(ORACLE, ("", None))[0] != group:
            stash[ORACLE] = (group, oracle(given))
        benchmark.group = group
        info |= {"direction": given.direction, "implementation": implementation.name, **system_info(given.device)}
        info |= {"dtype": str(given.dtype).removeprefix("torch.")}
        with use_backend(implementation.backend):
            prepared = prepare(implementation, given)
            verdict = stash[ORACLE][1].judge(prepared)
            if not verdict.holds:
                pytest.fail(
                    f"{group}: {implementation.name} is off by {verdict.error:.1e}, {verdict.tolerance:.1e} "
                    "are allowed: it has no time",
                    pytrace=False,
                )
            info |= {"error": verdict.error, "tolerance": verdict.tolerance, **counted(implementation, prepared, given)}
            took = measured(benchmark, prepared, given, ahead=info["kind"] != "network")
        if took is not None:  # None with --benchmark-disable
            benchmark.extra_info.update(info, seconds=took, **rates(info, given, took))
            stash.setdefault(MEDIANS, {}).setdefault(group, {})[implementation.name] = took

    yield run
    gc.collect()


def counted(implementation: Implementation, prepared: Prepared, given: Pass) -> dict[str, int]:
    """What is known."""
    on_gpu = given.device.type == "cuda"
    found = {"saved_bytes": saved_bytes(prepared)}
    if given.direction == "training":
        found["peak_bytes"] = peak_bytes(prepared.call, given.device)
    elif on_gpu or not implementation.compiled:  # on a CPU, operators made by torch.compile are not seen
        found["launches"] = launches(prepared, given.device)
    return {name: value for name, value in found.items() if value is not None}


def measured(benchmark, prepared: Prepared, given: Pass, ahead: bool) -> float | None:
    """Seconds of a call: on a CPU the median, on a GPU its own, without Python's (``ahead``) or with."""
    on_gpu = given.device.type == "cuda"

    def call(*arguments: object) -> None:
        prepared.call(*arguments)
        if on_gpu:
            torch.cuda.synchronize(given.device)

    for _ in range(2):
        call(*prepared.given())  # packs weights, warms caches
    rounds = min(200, max(5, round(SECONDS_PER_CASE / seconds(partial(call, *prepared.given())))))
    time.sleep(PAUSE)
    benchmark.pedantic(call, setup=lambda: (prepared.given(), {}), rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:
        return None
    if on_gpu:
        return median_seconds(prepared.call, GPU_MILLISECONDS, given=prepared.given, ahead=ahead)
    return benchmark.stats.stats.median


def rates(info: dict, given: Pass, took: float) -> dict[str, float]:
    """Of the least bytes and the operations, and what part of the machine's ceilings that is."""
    limits = ceilings(given.device, given.dtype)
    found = {
        "gb_per_s": info["minimum_bytes"] / took / 1e9,
        "gflop_per_s": info["flops"] / took / 1e9,
        "copy_bandwidth": limits.copy_bandwidth,
        "copy_share": info["minimum_bytes"] / took / limits.copy_bandwidth,
    }
    if limits.peak_flops:
        found |= {"peak_flops": limits.peak_flops, "peak_share": info["flops"] / took / limits.peak_flops}
    return found


@pytest.hookimpl(optionalhook=True)  # pytest-benchmark may be missing where only tests run
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Leaves out the single times, so that files are small enough to be kept (--benchmark-save-data asks for them), and
    the host's name, which is nobody's business.
    """
    output_json["machine_info"].pop("node", None)
    if not config.option.benchmark_save_data:
        for entry in output_json["benchmarks"]:
            entry["stats"].pop("data", None)


# The table ------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    medians = config.stash.get(MEDIANS, {})
    if not medians:
        return
    compare(terminalreporter, medians)
    kept = getattr(config.option, "benchmark_json", None)
    # pytest-benchmark 4 has an open file there, whose name is the path.
    where = f"in {kept if isinstance(kept, Path) else kept.name}" if kept else "above; --benchmark-json=FILE keeps them"
    terminalreporter.line(f"The results are {where}; `python -m benchmarks.report --read FILE` draws them.")


def compare(terminalreporter: pytest.TerminalReporter, medians: dict[str, dict[str, float]]) -> None:
    """The table; nothing where no group has both stock and ours."""
    rows = []
    for group, by_name in medians.items():
        stock = {name: took for name, took in by_name.items() if is_stock(name)}
        name = default_of(by_name)
        if stock and name:
            best = min(stock, key=stock.__getitem__)
            rows.append((group, best, stock[best], by_name[name]))
    if not rows:
        return
    width = max(len(group) for group, *_ in rows)
    terminalreporter.section("mbn_kernels against the fastest stock implementation (medians, ms)")
    terminalreporter.line(f"{'case':<{width}}  {'stock':>8}  {'fused':>8}  {'ratio':>6}  fastest stock")
    for group, best, stock_time, fused_time in rows:
        ratio = stock_time / fused_time
        terminalreporter.line(
            f"{group:<{width}}  {stock_time * 1e3:8.3f}  {fused_time * 1e3:8.3f}  {ratio:5.2f}x  {best}"
            + ("  <- slower" if ratio < 1 else "")
        )
    mean = geometric_mean([stock / fused for _, _, stock, fused in rows])
    terminalreporter.line(f"{'geometric mean of ' + str(len(rows)):<{width}}  {'':>8}  {'':>8}  {mean:5.2f}x")
