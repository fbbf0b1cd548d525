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
        key = ("cuda_chain", *x.shape, *outer, x.dtype, residual is not None, *(_shape(s) for s in chain.stages))

        def tiles() -> list[Config]:
            sizes = planner.sizes_of(x.shape, chain.stages, outer, x.dtype.itemsize)
            return [way.config() for way in planner.ways(chain.stages, sizes, residual is not None, x.device)]

        def run(way: Way) -> Tensor:
            if not way.count:
                return super(CudaKernels, self).evaluate_chain(x, chain, params, residual)
            return self._evaluate_fused(x, chain.stages, params, residual, way)

        return tuning.best(key, tiles, x.device, Way.of, run)

    def _evaluate_fused(
        self, x: Tensor, stages: tuple[Stage, ...], params: list[dict], residual: Tensor | None, way: Way
    ) -> Tensor:
        first, last = way.first, way.first + way.count
        u = self.evaluate_stages(Value(x), stages[:first], params[:first], None)
        adds = residual if last == len(stages) and not stages[-1].gate else None
        y, pooled = blocks.inverted_residual(u.y, stages[first:last], params[first:last], way, adds)
        u = gated(y, stages[last - 1], params[last - 1], pooled)
        u = self.evaluate_stages(u, stages[last:], params[last:], residual)
        return u.y if u.gate is None else self.materialize(u, residual)


def _shape(stage: Stage) -> tuple:
    """What of a stage decides how fast it is."""
    return stage.conv, stage.kernel, stage.stride, stage.padding, stage.dilation, stage.gate is not None
