"""The CUDA backend: depthwise convolutions and whole blocks in CUDA C++; the rest of the table is Triton's."""

from __future__ import annotations

from torch import Tensor

from ...chain import Chain, Stage, Value
from ..triton import tuning
from ..triton.config import Config
from ..triton.kernels import TritonKernels, gated
from . import blocks, depthwise, planner
from .planner import Way


class CudaKernels(TritonKernels):
    """:class:`mbn_kernels.chain.Kernels` on NVIDIA GPUs."""

    convolve_depthwise = staticmethod(depthwise.depthwise_forward)
    differentiate_depthwise = staticmethod(depthwise.depthwise_backward)

    def evaluate_chain(self, x: Tensor, chain: Chain, params: list[dict], residual: Tensor | None) -> Tensor:
        if not blocks.fits(x, params):
            return super().evaluate_chain(x, chain, params, residual)
        outer = tuple(p["weight"].shape[0] for p in params)
        hidden = tuple(p["w1"].shape[0] if stage.gate else 0 for stage, p in zip(chain.stages, params, strict=True))
        key = (
            "cuda_chain",
            *x.shape,
            *outer,
            *hidden,
            x.dtype,
            residual is not None,
            *(_shape(s) for s in chain.stages),
        )

        def tiles() -> list[Config]:
            sizes = planner.sizes_of(x.shape, chain.stages, outer, hidden, x.dtype.itemsize)
            return [way.config() for way in planner.ways(chain.stages, sizes, residual is not None, x.device)]

        def run(way: Way) -> Tensor:
            return self._evaluate(x, chain.stages, params, residual, way)

        return tuning.best(key, tiles, x.device, Way.of, run)

    def _evaluate(
        self, x: Tensor, stages: tuple[Stage, ...], params: list[dict], residual: Tensor | None, way: Way
    ) -> Tensor:
        u, i, end = Value(x), 0, len(stages)
        while i < end:
            count = way.count if way.count and i == way.first else 1
            i, last = i + count, i + count - 1
            stage, p = stages[last], params[last]
            adds = residual if i == end and not stage.gate else None
            if count > 1:
                y, parts = blocks.inverted_residual(u.y, stages[i - count : i], params[i - count : i], way, adds)
            else:
                y, parts = self.evaluate_stage(u, stage, p, adds)
            if stage.gate and way.gate_height and i < end:
                adds, tile = residual if i + 1 == end else None, (way.gate_height, way.gate_width)
                u = Value(blocks.gated_project(y, parts, stage, p, stages[i], params[i], tile, adds))
                i += 1
            else:
                u = gated(y, stage, p, parts)
        return u.y if u.gate is None else self.materialize(u, residual)


def _shape(stage: Stage) -> tuple:
    """What of a stage decides how fast it is."""
    return stage.conv, stage.kernel, stage.stride, stage.padding, stage.dilation, stage.gate is not None
