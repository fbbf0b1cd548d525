"""Files as `pytest --benchmark --benchmark-json` writes them, made up for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

CPU = {
    "mbn_kernels": "0.1.0", "torch": "2.13.0", "python": "3.11", "device": "cpu", "cpu": "A CPU", "threads": 2,
    "load_average": 0.3, "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "copy_bandwidth": 20e9, "peak_flops": 200e9,
}  # fmt: skip
GPU = {**CPU, "device": "cuda", "gpu": "A GPU", "triton": "3.6.0", "cuda": "12.8", "driver": "570"}
WIDE, NARROW = "8x16x16-k3-e8-o16-s1-relu", "4x8x8-k3-e4-o8-s1-relu"


def benchmark(kind: str, direction: str, implementation: str, milliseconds: float, **more: object) -> dict:
    """One entry of a file: 20 MB and 80 Mflop, of V2 if not told otherwise."""
    info: dict[str, object] = {"kind": kind, "network": "mobilenet_v2", "times": 1, "direction": direction}
    info |= {"implementation": implementation, "batch": 4, "dtype": "float32", "minimum_bytes": 20_000_000}
    info |= {"flops": 80_000_000, "error": 1e-7, "tolerance": 1e-5, **CPU, **more}
    took = milliseconds / 1e3
    info |= {"gb_per_s": info["minimum_bytes"] / took / 1e9, "gflop_per_s": info["flops"] / took / 1e9}
    info |= {"copy_share": info["minimum_bytes"] / took / 20e9, "peak_share": info["flops"] / took / 200e9}
    return {"group": "g", "name": "n", "fullname": "n", "stats": {"median": took}, "extra_info": info}


def group(kind: str, direction: str, milliseconds: dict[str, float], **more: object) -> list[dict]:
    return [benchmark(kind, direction, name, took, **more) for name, took in milliseconds.items()]


def blocks() -> list[dict]:
    """Ratios of 2 and 0.5 in evaluation, of 4 in the forward; nothing else of the backward is stock."""
    found = group("block", "evaluation", {"eager-nchw": 8, "compile": 4, "fused-reference": 5, "fused-cpu": 2},
                  layer=WIDE, times=3, launches=9)  # fmt: skip
    found += group("block", "evaluation", {"eager-channels-last": 2, "fused-cpu": 4}, layer=NARROW)
    size = {"eager-channels-last": 8 << 20, "fused-cpu": 2 << 20}
    for name, took in {"eager-channels-last": 8, "fused-cpu": 2}.items():
        launches = {"eager-channels-last": 12, "fused-cpu": 5}[name]
        found.append(benchmark("block", "forward", name, took, layer=WIDE, saved_bytes=size[name], launches=launches))
    return [*found, benchmark("block", "backward", "fused-cpu", 3, layer=WIDE, launches=7)]


def stages(*directions: str) -> list[dict]:
    """At 4 flop/byte, and ours at 40 GFLOP/s; the pointwise one at 40 flop/byte."""
    found = []
    for direction in directions:
        times = {"eager-channels-last": 8, "compile": 4, "fused-cpu": 2}
        found += group("stage", direction, times, layer="depthwise 8x16x16-k3-s1-relu")
        found += group("stage", direction, times, layer="pointwise 8x16x16-o16-relu", minimum_bytes=2_000_000)
        found += group("stage", direction, times, layer="gate 8x16x16-hardsigmoid", flops=20)
    return found


def networks(**more: object) -> list[dict]:
    """A training step keeps ten times its milliseconds in MiB."""
    found = []
    for network in ("mobilenet_v3_small", "mobilenet_v1"):
        found += group("network", "evaluation", {"eager-nchw": 6, "fused-cpu": 3}, network=network, **more)
        for name, took in {"eager-nchw": 60, "fused-cpu": 30}.items():
            size = {"saved_bytes": 10 * took << 20}
            found.append(benchmark("network", "training", name, took, network=network, **size, **more))
    return found


def file(path: Path, benchmarks: list[dict]) -> Path:
    path.write_text(json.dumps({"machine_info": {}, "commit_info": {}, "benchmarks": benchmarks}))
    return path
