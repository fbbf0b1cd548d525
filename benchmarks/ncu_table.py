"""What Nsight Compute measured of each range: its summary by NVTX range, as a table.

python -m benchmarks.ncu_table FILE

FILE holds what this prints, with a GPU (add --clock-control none where the clocks may not be fixed):

MBN_PROFILE=1 ncu --profile-from-start off --nvtx --nvtx-include "regex:mbn::.*/" \
    --metrics gpu__time_duration.sum,dram__bytes.sum --print-summary per-nvtx \
    python -m benchmarks.profile_block --model mobilenet_v3_large --block 13 --iterations 1
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from .cpu_runs import markdown

#: Metrics, and what their units are in seconds and bytes.
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
RANGE = re.compile(r"\s+<(mbn::.+)>")
KERNEL = re.compile(r"\s+(.+?) \([\d, ]+\)x\([\d, ]+\), Device \d+, CC [\d.]+, Invocations (\d+)")
METRIC = re.compile(rf"\s+({re.escape(TIME)}|{re.escape(BYTES)})\s+(\w+)\s+\S+\s+\S+\s+(\S+)")


class Kernel(NamedTuple):
    """Of one kernel in one range, all its launches together."""

    range: str
    name: str
    launches: int
    seconds: float
    bytes: float  # of main memory, read and written


def kernels(text: str) -> list[Kernel]:
    """The summary's kernels, in its order. Raises ValueError where there are none, or a metric is missing."""
    found: list[Kernel] = []
    where, metrics = "", {}
    for line in text.splitlines():
        if match := RANGE.fullmatch(line):
            where = match[1]
        elif match := KERNEL.fullmatch(line):
            found.append(Kernel(where, short(match[1]), int(match[2]), float("nan"), float("nan")))
            metrics = {TIME: "seconds", BYTES: "bytes"}
        elif found and (match := METRIC.fullmatch(line)):
            total = float(match[3].replace(",", "")) * UNITS[match[2]] * found[-1].launches
            found[-1] = found[-1]._replace(**{metrics.pop(match[1]): total})
    if not found or any(k.seconds != k.seconds or k.bytes != k.bytes for k in found):
        raise ValueError(f"expected ncu's --print-summary per-nvtx with {TIME} and {BYTES}")
    return found


def short(name: str) -> str:
    """A kernel's name without its arguments, template arguments of PyTorch and NVIDIA left out."""
    name = name.removeprefix("void ").split("(")[0]
    return name if name.startswith("mbn::") else name.split("<")[0]


def table(text: str) -> str:
    """One row a kernel, the ranges as they follow each other in a step, and all of a range together."""
    rows = []
    by_range: dict[str, list[Kernel]] = {}
    for kernel in kernels(text):
        by_range.setdefault(kernel.range, []).append(kernel)
    for name in sorted(by_range, key=place):
        own = sorted(by_range[name], key=lambda kernel: -kernel.seconds)
        rows.append([f"**{name}**", *cells(own, bold=True)])
        rows += [[f"`{kernel.name}`", *cells([kernel])] for kernel in own]
    return markdown(["range, kernel", "launches", "µs", "MB of main memory", "GB/s"], rows)


def place(name: str) -> tuple:
    """Forward from the first stage to the output, backward from there."""
    _, stage, direction = name.rsplit("/", 2)
    number = float("inf") if stage == "output" else int(stage.split(".")[0])
    return (0, number) if direction == "forward" else (1, -number)


def cells(kernels: list[Kernel], bold: bool = False) -> list[str]:
    seconds, moved = sum(k.seconds for k in kernels), sum(k.bytes for k in kernels)
    found = [f"{sum(k.launches for k in kernels)}", f"{seconds * 1e6:.1f}", f"{moved / 1e6:.1f}"]
    return [f"**{cell}**" if bold else cell for cell in (*found, f"{moved / seconds / 1e9:.0f}")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ncu_table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(table(options.file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        parser.exit(2, f"{options.file}: {problem}\n")


if __name__ == "__main__":
    main()
