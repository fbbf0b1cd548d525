"""Schemas of the kernel operators ``torch.ops.mbn.*`` that compiled backends implement.

Python defines, C++ only implements: ``csrc/cpu`` and ``csrc/cuda`` register their kernels against these schemas. Every
operator writes into tensors that its caller allocated, so a fake kernel has nothing to do.

Activations ``[N, C, H, W]`` are dense channels-last in the storage dtype; per-channel vectors ``[C]``, gates ``[N,
C]`` and sums are in the accumulation dtype (float64 for float64, else float32). A *value* is ``act(scale*y + shift) *
gate``; a *gradient* is ``a*((dv*gate + q) * act'(scale*y + shift)) + b*y + c``. See :mod:`mbn_kernels.chain` for what
they mean.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from .errors import fail

_VALUE = "Tensor u_y, Tensor? u_scale, Tensor? u_shift, Tensor? u_gate, int u_act"
_GRADIENT = (
    "Tensor g_dv, Tensor? g_y, Tensor? g_scale, Tensor? g_shift, Tensor? g_gate, int g_act, "
    "Tensor? g_q, Tensor? g_a, Tensor? g_b, Tensor? g_c"
)
_WINDOW = "int[2] stride, int[4] padding, int[2] dilation"
_STATISTICS = "Tensor(b!)? mean, Tensor(c!)? var"
_BACKWARD = (
    "Tensor weight, Tensor? residual, Tensor? mean, Tensor? rstd, Tensor(a!)? du, Tensor(b!)? sums, Tensor(c!)? dweight"
)

_SQUARE = "int stride, int[2] corner"  # of a window as wide as it is high; corner: the padding's top and left
_NORM = "Tensor? mean, Tensor? var, Tensor? bn_weight, Tensor? bn_bias, float eps"

#: name -> arguments; every operator returns nothing.
KERNEL_SCHEMAS = {
    "pointwise_forward": f"{_VALUE}, Tensor weight, Tensor(a!) y, {_STATISTICS}",
    "pointwise_backward": f"{_GRADIENT}, {_VALUE}, {_BACKWARD}",
    "depthwise_forward": f"{_VALUE}, Tensor weight, {_WINDOW}, Tensor(a!) y, {_STATISTICS}",
    "depthwise_backward": f"{_GRADIENT}, {_VALUE}, {_WINDOW}, {_BACKWARD}",
    "norm_forward": "Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor(a!) norm",
    "norm_backward": "Tensor sums, Tensor? gate, Tensor? q, Tensor norm, int count, Tensor(a!) dweight, "
    "Tensor(b!) dbias, Tensor(c!)? b, Tensor(d!)? c",
    # stages, blocks: integers in a tensor, as a long list of them takes longer to hand over than a small block to run
    "evaluate": "Tensor x, Tensor[] params, Tensor stages, Tensor eps, Tensor blocks, int version, "
    "Tensor(a!) packed, Tensor(b!) out",
    # the same of what evaluate_hold keeps
    "evaluate_held": "Tensor x, int held, int version, Tensor(a!) out",
    "pool": f"{_VALUE}, Tensor(a!) pooled",
    "materialize": f"{_VALUE}, Tensor? residual, Tensor(a!) out",
    "materialize_gradient": f"{_GRADIENT}, Tensor? residual, Tensor(a!) out",
    "statistics": "Tensor y, Tensor(a!) mean, Tensor(b!) var",
    "reduce_gradient": f"Tensor dv, {_VALUE}, Tensor? mean, Tensor? rstd, Tensor(a!) sums",
}

#: Those of the CUDA library, likewise; their statistics and sums are in parts, which Triton's kernels add up.
CUDA_SCHEMAS = {
    "cuda_depthwise_forward": f"{_VALUE}, Tensor weight, {_SQUARE}, Tensor(b!)? counts, Tensor(c!)? moments, "
    f"{_NORM}, int act, Tensor? residual, Tensor(d!)? pooled, int[6] share, Tensor(a!) y",
    "cuda_depthwise_backward": f"{_GRADIENT}, {_VALUE}, {_SQUARE}, int[6] share, {_BACKWARD}",
    "cuda_inverted_residual": f"Tensor x, Tensor[] params, int[] stages, float[] eps, {_SQUARE}, Tensor? residual, "
    "int[2] tile, Tensor(a!)? pooled, Tensor(b!) out",
    "cuda_gated_project": "Tensor x, Tensor pooled, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int act, int gate_act, "
    "Tensor[] params, int[3] stage, float eps, Tensor? residual, int[2] tile, Tensor(a!) out",
}

library = torch.library.Library("mbn", "DEF")
# PyTorch would take the operators away at the process's end, before exit handlers and threads that still run models.
for _reference in weakref.getweakrefs(library):
    if isinstance(_reference.__callback__, weakref.finalize):
        _reference.__callback__.atexit = False


def _fake(name: str) -> Callable[..., None]:
    """Does nothing, for tensors without memory; where others are among them it would leave those unwritten."""

    def run(*arguments: object) -> None:
        flat = [t for each in arguments for t in (each if isinstance(each, (list, tuple)) else (each,))]
        found = {t.device for t in flat if isinstance(t, torch.Tensor)}
        if len(found) > 1:
            fail(name, "device", "all tensors on one device", " and ".join(sorted(map(str, found))), RuntimeError)

    return run


for _name, _arguments in {**KERNEL_SCHEMAS, **CUDA_SCHEMAS}.items():
    library.define(f"{_name}({_arguments}) -> ()")
    torch.library.register_fake(f"mbn::{_name}", _fake(_name), lib=library)
# running, batch: mean and variance in turn; counts: of batches, each grows by 1
library.define("update_running(Tensor(a!)[] running, Tensor[] batch, float[] momenta, Tensor(b!)[] counts) -> ()")
library.define("evaluate_size(Tensor[] params, Tensor stages) -> int")
# numbers: eps; where there are no params widths, and what is packed is all that is looked at
library.define("evaluate_hold(Tensor[] params, Tensor stages, Tensor numbers, Tensor blocks, Tensor packed) -> int")
library.define("evaluate_release(int held) -> ()")
library.define("cpu_instruction_set() -> str")
library.define("cpu_peak(float seconds) -> float")
library.define("cuda_missing() -> str")
library.define(
    "cuda_depthwise_shared(int itemsize, int kernel, int stride, int vectors, int groups, bool backward) -> int"
)
library.define("cuda_inverted_residual_shared(int[3] channels, int kernel, int stride, int[2] tile, int hidden) -> int")
library.define("cpu_buffer(int n, int c, int h, int w, ScalarType dtype) -> Tensor")
library.define("cpu_empty_cache() -> ()")
library.define("cpu_cached_bytes() -> int")
