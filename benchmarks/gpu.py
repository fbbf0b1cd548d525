"""On a GPU: single stages against the speed of a copy, and whole networks against stock PyTorch.

python -m benchmarks.gpu --json result.json

Every time is the median of triton.testing.do_bench, which empties the second-level cache before each call. With
MBN_TRITON_TUNE=1 each kernel's tile size is measured first (mbn_kernels/backends/triton/tuning.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbn_kernels import FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct, available_backends, backends, chain, models
from mbn_kernels.models.tables import layer_shapes

from .implementations import IMPLEMENTATIONS, Call, Implementation
from .networks import TITLES
from .timing import system_info

DTYPE = torch.bfloat16
LARGE = "mobilenet_v3_large"
#: Of the copy's bandwidth, for each pass over a stage.
STAGE_TARGETS = {"evaluation": 0.85, "training forward": 0.75, "backward": 0.65}
#: On V3-Large, how many times as fast a training step is as the best of the others, and evaluation as torch.compile.
NETWORK_TARGETS = {"training step": 1.7, "evaluation": 1.4}


def median_seconds(call: Call, milliseconds: int = 200) -> float:
    """The median time of a call on the GPU, in seconds, from about so many milliseconds of calls."""
    from triton.testing import do_bench

    for _ in range(2):
        call()  # compiles and tunes
    return do_bench(call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median") / 1e3


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of torch's copy_ between tensors of eight times the second-level cache."""
    source = torch.zeros(8 * l2_bytes(device), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source))


# Stages ---------------------------------------------------------------------------------------------------------------


class StageShape(NamedTuple):
    """A convolution with batch norm and an activation, on an input of ``height`` x ``width``."""

    conv: str
    inner: int
    outer: int
    k: int
    s: int
    height: int
    width: int
    act: str

    def __str__(self) -> str:
        window = f"-k{self.k}-s{self.s}" if self.conv == "depthwise" else f"-o{self.outer}"
        return f"{self.conv} {self.inner}x{self.height}x{self.width}{window}-{self.act}"

    def bytes(self, batch: int) -> tuple[int, int]:
        """(U, D): of the input, of the output."""
        pixels, after = self.height * self.width, -(-self.height // self.s) * -(-self.width // self.s)
        return batch * self.inner * pixels * DTYPE.itemsize, batch * self.outer * after * DTYPE.itemsize

    def module(self) -> nn.Module:
        if self.conv == "depthwise":
            return FusedDepthwiseConvBNAct(self.inner, self.k, stride=self.s, act=self.act)
        return FusedPointwiseConvBNAct(self.inner, self.outer, act=self.act)


def stage_shapes(network: str = LARGE) -> list[StageShape]:
    """The network's depthwise stages, all with hard-swish, then its pointwise ones: each once."""
    found: dict[str, list[StageShape]] = {"depthwise": [], "pointwise": []}
    for b in layer_shapes(network):
        after = -(-b.height // b.s), -(-b.width // b.s)
        expanded = b.exp_channels
        found["depthwise"].append(StageShape("depthwise", expanded, expanded, b.k, b.s, b.height, b.width, "hardswish"))
        if expanded != b.in_channels:
            expansion = StageShape("pointwise", b.in_channels, expanded, 1, 1, b.height, b.width, "hardswish")
            found["pointwise"].append(expansion)
        found["pointwise"].append(StageShape("pointwise", expanded, b.out_channels, 1, 1, *after, "identity"))
    return list(dict.fromkeys(found["depthwise"] + found["pointwise"]))


def channels_last(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=device).contiguous(memory_format=torch.channels_last)


def stage_evaluation(shape: StageShape, x: Tensor) -> Call:
    """The module's forward in evaluation without gradients."""
    module = shape.module().to(x.device, DTYPE).eval()

    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def stage_training(shape: StageShape, x: Tensor, kernels: chain.Kernels) -> tuple[Call, Call]:
    """(forward, backward) as the engine runs them within a block, where the normalised output is left to the next
    stage: the convolution with its statistics and batch norm's numbers; the gradients of input and parameters.
    """
    module = shape.module().to(x.device).train()
    stages, params = chain.parse(module.call().spec).stages, module.call().params
    (stage,) = stages
    weight, gamma, beta = params[0].detach().to(DTYPE), params[1].detach(), params[2].detach()
    flat = [weight, gamma, beta]
    out, _, saved = chain.forward(kernels, x, stages, flat, False, True)
    dout, count = torch.randn_like(out), out.numel() // out.shape[1]

    def forward() -> None:
        if shape.conv == "depthwise":
            _, statistics = kernels.depthwise_forward(chain.Value(x), weight, stage, True)
        else:
            _, statistics = kernels.pointwise_forward(chain.Value(x), weight, True)
        kernels.batch_norm(statistics, count, gamma, beta, stage.eps)

    def backward() -> None:
        chain.backward(kernels, dout, x, stages, flat, saved, False, [True] * 4)

    return forward, backward


def minimum_bytes(shape: StageShape, batch: int) -> dict[str, int]:
    """What each pass must move through memory (docs/design.md, "What it costs"): weights and halo are left out."""
    u, d = shape.bytes(batch)
    return {"evaluation": u + d, "training forward": u + d, "backward": 2 * u + 4 * d}


def measure_stage(shape: StageShape, batch: int, device: torch.device, copy: float) -> Iterator[dict]:
    """One row a pass; ``copy`` in bytes a second, ``share`` the part of it that the least bytes reach."""
    x = channels_last(device, batch, shape.inner, shape.height, shape.width)
    forward, backward = stage_training(shape, x, backends.get("triton").kernels)
    calls = {"evaluation": stage_evaluation(shape, x), "training forward": forward, "backward": backward}
    for name, moved in minimum_bytes(shape, batch).items():
        seconds = median_seconds(calls[name])
        row = {"kind": "stage", "stage": str(shape), "pass": name, "batch": batch, "minimum_bytes": moved}
        yield {**row, "seconds": seconds, "share": moved / seconds / copy, "target": STAGE_TARGETS[name]}


def measured_stages(batch: int, device: torch.device) -> list[StageShape]:
    """Those whose input and output are beyond twice the second-level cache: the others do not wait for memory alone."""
    return [s for s in stage_shapes() if sum(s.bytes(batch)) > 2 * l2_bytes(device)]


# Networks -------------------------------------------------------------------------------------------------------------


def build(implementation: Implementation, model: str, device: torch.device) -> nn.Module:
    if implementation.compiled:
        torch.compiler.reset()  # else the graphs of earlier cases count against the limit of recompilations
    torch.manual_seed(0)
    net = getattr(models, model)(fused=implementation.fused)
    return net.to(device, memory_format=implementation.memory_format)


def network_evaluation(implementation: Implementation, model: str, batch: int, device: torch.device, size: int) -> Call:
    """Of a network in bfloat16, without gradients; torch.compile may freeze the weights, as users would."""
    net = build(implementation, model, device).to(DTYPE).eval()
    x = torch.randn(batch, 3, size, size, dtype=DTYPE, device=device)
    x = x.contiguous(memory_format=implementation.memory_format)
    forward = torch.compile(net, fullgraph=True, options={"freezing": True}) if implementation.compiled else net

    def call() -> None:
        with torch.no_grad():
            forward(x)

    return call


def network_training(implementation: Implementation, model: str, batch: int, device: torch.device, size: int) -> Call:
    """A step of a network in float32 under autocast to bfloat16: forward, cross-entropy, backward, SGD."""
    net = build(implementation, model, device).train()
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=implementation.memory_format)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    forward = torch.compile(net, fullgraph=True) if implementation.compiled else net

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=DTYPE):
            loss = nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()

    return call


def compare(seconds: dict[str, float]) -> dict[str, float]:
    """How many times as fast as the best of the others, and as torch.compile, the fused network is."""
    ratios = {name: t / seconds["fused"] for name, t in seconds.items() if name != "fused"}
    found = {"against_best": min(ratios.values())}
    return found | ({"against_compile": ratios["compile"]} if "compile" in ratios else {})


def measure_network(
    model: str, direction: str, batch: int, prepare: Callable[..., Call], options: argparse.Namespace
) -> dict:
    seconds = {}
    for implementation in IMPLEMENTATIONS:
        if not (implementation.compiled and options.no_compile):
            call = prepare(implementation, model, batch, options.device, options.resolution)
            seconds[implementation.name] = median_seconds(call, 1000)
            del call
            torch.cuda.empty_cache()
    target = NETWORK_TARGETS[direction] if model == LARGE else None
    row = {"kind": "network", "model": model, "direction": direction, "batch": batch, "seconds": seconds}
    return {**row, **compare(seconds), "target": target}


def network_cases(batch: int) -> list[tuple[str, int, Callable[..., Call]]]:
    evaluations = [("evaluation", n, network_evaluation) for n in dict.fromkeys((1, 16, batch))]
    return [("training step", batch, network_training), *evaluations]


# The report -----------------------------------------------------------------------------------------------------------


def line(row: dict) -> str:
    """A row in one line: microseconds, GB/s and the share of a copy's speed, or milliseconds and ratios."""
    if row["kind"] == "stage":
        time, speed = row["seconds"] * 1e6, row["minimum_bytes"] / row["seconds"] / 1e9
        reached = f"{row['share']:4.0%} of a copy (target {row['target']:.0%})"
        return f"{row['stage']:<40} {row['pass']:<16} {time:9.1f} us {speed:7.0f} GB/s  {reached}"
    title = f"{TITLES[row['model']]}, {row['direction']}, batch {row['batch']}"
    times = "  ".join(f"{name} {t * 1e3:.3f}" for name, t in row["seconds"].items())
    ratios = f"{row['against_best']:.2f}x the best of the others"
    if "against_compile" in row:
        ratios += f", {row['against_compile']:.2f}x torch.compile"
    if row["target"]:
        than = "the best" if row["direction"] == "training step" else "torch.compile"
        ratios += f" (target {row['target']}x {than})"
    return f"{title:<34} ms: {times}  fused {ratios}"


def output_of(*command: str) -> str:
    """What a program prints, or "unknown" where it cannot run."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.splitlines()[0] if found else "unknown"


def gpu_system_info(device: torch.device) -> dict[str, str | float]:
    import triton

    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    folder = str(Path(__file__).parent)
    commit = output_of("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    found = {"driver": driver, "cuda": str(torch.version.cuda), "triton": triton.__version__, "commit": commit}
    return {
        **system_info(device),
        **found,
        "tuned": os.environ.get("MBN_TRITON_TUNE", "0"),
        "l2_bytes": l2_bytes(device),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("blocks", "networks"), help="single stages, or whole networks")
    parser.add_argument(
        "--batch", type=int, default=256, help="images of a stage, a training step, the last evaluation"
    )
    parser.add_argument("--model", nargs="+", default=list(models.NETWORKS), choices=models.NETWORKS)
    parser.add_argument("--resolution", type=int, default=224, help="of the networks' images")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result here, row by row")
    return parser.parse_args(arguments)


def rows(options: argparse.Namespace, copy: float) -> Iterator[dict]:
    """``copy``: bytes a second."""
    if options.only != "networks":
        for shape in measured_stages(options.batch, options.device):
            yield from measure_stage(shape, options.batch, options.device, copy)
    if options.only != "blocks":
        for model in options.model:
            for direction, batch, prepare in network_cases(options.batch):
                yield measure_network(model, direction, batch, prepare, options)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA GPU, and torch.cuda.is_available() is false here.")
    if available_backends()["triton"] != "available":
        raise SystemExit(f"benchmarks.gpu needs the Triton backend: {available_backends()['triton']}.")
    options.device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True  # stock at its best
    copy = copy_bandwidth(options.device)
    result = {"system": gpu_system_info(options.device), "copy_bandwidth": copy / 1e9, "rows": []}
    print(", ".join(f"{name} {value}" for name, value in result["system"].items()))
    print(f"a copy: {copy / 1e9:.0f} GB/s")
    for row in rows(options, copy):
        print(line(row), flush=True)
        result["rows"].append(row)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
