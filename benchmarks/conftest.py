"""The fixture that times a call, and the table of ratios at the end of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from .implementations import Implementation, default_device
from .timing import seconds, system_info

MEDIANS = pytest.StashKey[dict[str, dict[str, float]]]()
SECONDS_PER_CASE = 0.4
PAUSE = 0.1  # lets the threads of the previous case stop spinning


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()


@pytest.fixture
def timed(benchmark, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """timed(group, implementation, call, **info): warm up, time, and keep the median for the table."""

    def run(group: str, implementation: Implementation, call: Callable[[], object], **info: object) -> None:
        benchmark.group = group
        benchmark.extra_info.update(system_info(device), implementation=implementation.name, **info)
        for _ in range(2):
            call()  # compiles, packs weights, warms caches
        rounds = min(200, max(5, round(SECONDS_PER_CASE / seconds(call))))
        time.sleep(PAUSE)
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is not None:  # None with --benchmark-disable
            results = request.config.stash.setdefault(MEDIANS, {})
            results.setdefault(group, {})[implementation.name] = benchmark.stats.stats.median

    return run


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = []
    for group, by_name in config.stash.get(MEDIANS, {}).items():
        stock = {name: median for name, median in by_name.items() if name != "fused"}
        if stock and "fused" in by_name:
            best = min(stock, key=stock.__getitem__)
            rows.append((group, best, stock[best], by_name["fused"]))
    if not rows:
        return
    width = max(len(group) for group, *_ in rows)
    terminalreporter.section("fused against the fastest stock implementation (medians, ms)")
    terminalreporter.line(f"{'case':<{width}}  {'stock':>8}  {'fused':>8}  {'ratio':>6}  fastest stock")
    for group, best, stock_time, fused_time in rows:
        ratio = stock_time / fused_time
        terminalreporter.line(
            f"{group:<{width}}  {stock_time * 1e3:8.3f}  {fused_time * 1e3:8.3f}  {ratio:5.2f}x  {best}"
            + ("  <- slower" if ratio < 1 else "")
        )
    mean = math.exp(sum(math.log(stock / fused) for _, _, stock, fused in rows) / len(rows))
    terminalreporter.line(f"{'geometric mean of ' + str(len(rows)):<{width}}  {'':>8}  {'':>8}  {mean:5.2f}x")
