"""Single stages of a network against the speed of a copy: a convolution with batch norm and an activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mbn_kernels import backends, chain

from .gpu_checks import measure_passes
from .gpu_contestants import Contestant, Timed, build, default_of, drawn, ours
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


def stage_evaluation(contestant: Contestant, shape: StageShape, x: Tensor, setting: Setting) -> Call:
    """The module's forward in evaluation without gradients."""
    module = build(contestant, shape.module, setting.device, setting.dtype).eval()

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call


def stage_training(contestant: Contestant, shape: StageShape, x: Tensor, setting: Setting) -> tuple[Call, Call]:
    """(forward, backward) as the engine runs them within a block, where the normalised output is left to the next
    stage: the convolution with its statistics and batch norm's numbers; the gradients of input and parameters. Who has
    no backend runs the reference's kernels, plain PyTorch.
    """
    kernels = backends.get(contestant.backend or "reference").kernels
    module = build(contestant, lambda fused: shape.module(), setting.device).train()
    parsed, params = chain.parse(module.call().spec), module.call().params
    (stage,) = parsed.stages
    weight, gamma, beta = params[0].detach().to(setting.dtype).to(x.dtype), params[1].detach(), params[2].detach()
    flat = [weight, gamma, beta]
    out, _, saved = chain.forward(kernels, x, parsed, flat, False, True)
    dout, count = drawn(contestant, out.shape, setting.dtype, setting.device, seed=2), out.numel() // out.shape[1]

    def forward() -> tuple[Tensor, Tensor]:
        if shape.conv == "depthwise":
            y, statistics = kernels.depthwise_forward(chain.Value(x), weight, stage, True)
        else:
            y, statistics = kernels.pointwise_forward(chain.Value(x), weight, True)
        return y, kernels.batch_norm(statistics, count, gamma, beta, stage.eps)[0]

    def backward() -> list[Tensor]:
        return chain.backward(kernels, dout, x, parsed, flat, saved, False, [True] * 4)[0]

    return forward, backward


def measure_stage(shape: StageShape, setting: Setting) -> Iterator[dict]:
    """One row a pass, with the time of each backend that has kernels of its own for the stage."""
    rows = {
        name: {
            **{"kind": "operator", "operator": str(shape), "pass": name, "batch": setting.batch},
            **{"minimum_bytes": moved, "seconds": {}, "share": {}, "failed": {}, "errors": {}},
            "target": TARGETS[shape.conv][name],
        }
        for name, moved in deferred_bytes(shape, setting.batch, setting.dtype).items()
    }
    # The pointwise kernels are Triton's.
    own = [contestant for contestant in ours() if shape.conv == "depthwise" or contestant.name == "triton"]
    measure_passes(rows, own, lambda contestant: stage_calls(contestant, shape, setting), setting)
    for row in rows.values():
        best = default_of(row["share"])
        yield {**row, "met": best is not None and row["share"][best] >= row["target"]}


def stage_calls(contestant: Contestant, shape: StageShape, setting: Setting) -> Iterator[Timed]:
    """The passes over a stage. They return the output; the raw one and batch norm's numbers; the gradients."""
    x = drawn(contestant, (setting.batch, shape.inner, shape.height, shape.width), setting.dtype, setting.device)
    yield "evaluation", stage_evaluation(contestant, shape, x, setting), None
    for name, call in zip(("forward", "backward"), stage_training(contestant, shape, x, setting), strict=True):
        yield name, call, None
