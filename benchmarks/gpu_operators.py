"""Single stages of a network against the speed of a copy: a convolution with batch norm and an activation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mbn_kernels import backends, chain

from .gpu_contestants import Timed, default_of, measure_passes, ours
from .gpu_timing import Setting, l2_bytes
from .implementations import Call
from .stages import StageShape, deferred_bytes, stage_shapes

#: Of the copy's bandwidth, by kind of convolution, for each pass over a stage.
TARGETS = {
    "depthwise": {"evaluation": 0.90, "forward": 0.85, "backward": 0.75},
    "pointwise": {"evaluation": 0.85, "forward": 0.75, "backward": 0.65},
}


def measured_stages(network: str, setting: Setting) -> list[StageShape]:
    """Those whose input and output are beyond twice the second-level cache: the others do not wait for memory alone."""
    least = 2 * l2_bytes(setting.device)
    return [s for s in stage_shapes(network) if sum(s.bytes(setting.batch, setting.dtype)) > least]


def channels_last(setting: Setting, *shape: int) -> Tensor:
    x = torch.randn(shape, dtype=setting.dtype, device=setting.device)
    return x.contiguous(memory_format=torch.channels_last)


def stage_evaluation(shape: StageShape, x: Tensor) -> Call:
    """The module's forward in evaluation without gradients."""
    module = shape.module().to(x.device, x.dtype).eval()

    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def stage_training(shape: StageShape, x: Tensor, kernels: chain.Kernels) -> tuple[Call, Call]:
    """(forward, backward) as the engine runs them within a block, where the normalised output is left to the next
    stage: the convolution with its statistics and batch norm's numbers; the gradients of input and parameters.
    """
    module = shape.module().to(x.device).train()
    parsed, params = chain.parse(module.call().spec), module.call().params
    (stage,) = parsed.stages
    weight, gamma, beta = params[0].detach().to(x.dtype), params[1].detach(), params[2].detach()
    flat = [weight, gamma, beta]
    out, _, saved = chain.forward(kernels, x, parsed, flat, False, True)
    dout, count = torch.randn_like(out), out.numel() // out.shape[1]

    def forward() -> None:
        if shape.conv == "depthwise":
            _, statistics = kernels.depthwise_forward(chain.Value(x), weight, stage, True)
        else:
            _, statistics = kernels.pointwise_forward(chain.Value(x), weight, True)
        kernels.batch_norm(statistics, count, gamma, beta, stage.eps)

    def backward() -> None:
        chain.backward(kernels, dout, x, parsed, flat, saved, False, [True] * 4)

    return forward, backward


def measure_stage(shape: StageShape, setting: Setting) -> Iterator[dict]:
    """One row a pass, with the time of each backend that has kernels of its own for the stage."""
    rows = {
        name: {
            **{"kind": "operator", "operator": str(shape), "pass": name, "batch": setting.batch},
            **{"minimum_bytes": moved, "seconds": {}, "share": {}, "failed": {}},
            "target": TARGETS[shape.conv][name],
        }
        for name, moved in deferred_bytes(shape, setting.batch, setting.dtype).items()
    }
    for contestant in ours():
        if shape.conv == "depthwise" or contestant.name == "triton":  # the pointwise kernels are Triton's
            kernels = backends.get(contestant.backend).kernels
            measure_passes(rows, contestant, partial(stage_calls, shape, kernels, setting), setting)
    for row in rows.values():
        best = default_of(row["share"])
        yield {**row, "met": best is not None and row["share"][best] >= row["target"]}


def stage_calls(shape: StageShape, kernels: chain.Kernels, setting: Setting) -> Iterator[Timed]:
    """The passes over a stage."""
    x = channels_last(setting, setting.batch, shape.inner, shape.height, shape.width)
    yield "evaluation", stage_evaluation(shape, x), None
    for name, call in zip(("forward", "backward"), stage_training(shape, x, kernels), strict=True):
        yield name, call, None
