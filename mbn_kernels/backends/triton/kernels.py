"""The Triton backend: :class:`mbn_kernels.chain.Kernels` on any GPU that Triton has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...chain import Chain, Stage, Value, stage_parameters
from ..reference import ReferenceKernels
from . import convolutions, elementwise, gates, norm
from .convolutions import RAW, epilogue, precision

#: Larger windows do not fit in registers; PyTorch's own convolution takes them, between the same fused stages.
LARGEST_WINDOW = 7
_reference = ReferenceKernels()


def _fits(stage: Stage) -> bool:
    if stage.conv != "depthwise":
        return True
    return max(stage.kernel) <= LARGEST_WINDOW and max(stage.kernel[0], stage.stride[0]) * stage.stride[1] <= 32


@lru_cache(maxsize=4096)
def _evaluates(chain: Chain) -> bool:
    """Whether every stage is a convolution normalised by running statistics, in a window that the kernels take."""
    convolves = ("pointwise", "depthwise")
    return all(stage.conv in convolves and stage.norm == "running" and _fits(stage) for stage in chain.stages)


class TritonKernels:
    """:class:`mbn_kernels.chain.Kernels` in Triton. Statistics are :class:`norm.Statistics`, sums are those of
    :func:`elementwise.empty_sums`.
    """

    evaluate_checks = False
    convolve_depthwise = staticmethod(convolutions.depthwise_forward)
    differentiate_depthwise = staticmethod(convolutions.depthwise_backward)
    statistics = staticmethod(elementwise.statistics)
    pool = staticmethod(elementwise.pool)
    materialize = staticmethod(elementwise.materialize)
    materialize_gradient = staticmethod(elementwise.materialize_gradient)
    reduce_gradient = staticmethod(elementwise.reduce_gradient)
    batch_norm = staticmethod(norm.batch_norm)
    running_norm = staticmethod(norm.running_norm)
    norm_backward = staticmethod(norm.norm_backward)

    def prepared(self, *args: object) -> None:
        return None

    def evaluates(self, chain: Chain, residual: bool) -> bool:
        return _evaluates(chain)

    def evaluate(
        self, x: Tensor, chains: tuple[Chain, ...], flat: Sequence[Tensor], residuals: tuple[bool, ...]
    ) -> Tensor:
        x, flat = x.contiguous(memory_format=torch.channels_last), [p.contiguous() for p in flat]
        params = iter(stage_parameters([stage for chain in chains for stage in chain.stages], flat))
        for chain, residual in zip(chains, residuals, strict=True):
            x = self.evaluate_chain(x, chain, [next(params) for _ in chain.stages], x if residual else None)
        return x

    def evaluate_chain(self, x: Tensor, chain: Chain, params: list[dict], residual: Tensor | None) -> Tensor:
        """Nothing is deferred but a gate: each convolution stores what its stage is, the last one plus the residual."""
        u = Value(x)
        for i, (stage, p) in enumerate(zip(chain.stages, params, strict=True)):
            adds = i == len(chain.stages) - 1 and not stage.gate
            y, parts = self.evaluate_stage(u, stage, p, residual if adds else None)
            u = gated(y, stage, p, parts)
        return u.y if u.gate is None else self.materialize(u, residual)

    def evaluate_stage(self, u: Value, stage: Stage, p: dict, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(a stage's output but for its gate, where it has one the parts of its mean over each image)."""
        after = epilogue(stage, p, residual)
        if stage.conv == "pointwise":
            y, _ = convolutions.pointwise_forward(u, p["weight"], False, after, precision(u.y.dtype))
            return y, elementwise.pool(Value(y))[:, None] if stage.gate else None
        y, _, parts = self.convolve_depthwise(u, p["weight"], stage, False, after, stage.gate is not None)
        return y, parts

    def pointwise_forward(self, u: Value, weight: Tensor, statistics: bool):
        return convolutions.pointwise_forward(u, weight, statistics, RAW, precision(weight.dtype))

    def depthwise_forward(self, u: Value, weight: Tensor, stage: Stage, statistics: bool):
        if _fits(stage):
            return self.convolve_depthwise(u, weight, stage, statistics, RAW, False)[:2]
        y, found = _reference.depthwise_forward(u, weight, stage, statistics)
        return y, norm.one_part(y, *found) if statistics else None

    def pointwise_backward(self, g, weight, u, norm, residual, want_du, want_sums, want_dweight):
        wants = (want_du, want_sums, want_dweight)
        return convolutions.pointwise_backward(g, weight, u, norm, residual, *wants, precision(weight.dtype))

    def depthwise_backward(self, g, weight, stage, u, norm, residual, want_du, want_sums, want_dweight):
        if _fits(stage):
            wants = (want_du, want_sums, want_dweight)
            return self.differentiate_depthwise(g, weight, stage, u, norm, residual, *wants)
        wants = (want_du, False, want_dweight)
        du, _, dweight = _reference.depthwise_backward(g, weight, stage, u, norm, residual, *wants)
        return du, elementwise.reduce_gradient(du, u, norm) if want_sums else None, dweight

    def gate_forward(self, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]) -> Tensor:
        return gates.forward(pooled, p, acts)

    def gate_backward(self, sums: Tensor, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]):
        return gates.backward(sums[:, :, 0].sum(1), pooled, p, acts)


def gated(y: Tensor, stage: Stage, p: dict[str, Tensor], parts: Tensor | None) -> Value:
    """A stage's output, with the gate that its mean over each image makes."""
    if not stage.gate:
        return Value(y)
    return Value(y, gate=gates.forward(elementwise.mean_of_parts(parts), p, stage.gate))
