"""The CPU backend: the kernels of ``csrc/cpu``, for float32, float64 and bfloat16 storage with float32 accumulation."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import ranges, schemas  # noqa: F401  (the library implements these schemas)
from ..activations import ACTIVATIONS
from ..chain import Chain, Gradient, Norm, Stage, Value, accumulate_dtype, channels_last
from ..checks import check_chain, check_memory
from .reference import empty_channels_last, unbiased

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Activations of at least so many bytes are taken from memory that the library keeps; smaller ones are malloc's.
LEAST_BUFFER = 1 << 20


class _Operators:
    """``torch.ops.mbn.<name>``, each found once: choosing the overload anew costs as much as a small kernel."""

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.mbn, name).default
        setattr(self, name, operator)
        return operator


_ops = _Operators()


def load() -> str | None:
    """Loads the compiled library; returns why it cannot be used, or None."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built: run `pip install -e .` in the source tree (it needs a C++ compiler)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        cause = error.__cause__ or error  # torch's own message leaves the reason out
        return f"{LIBRARY.name} does not load: {cause}; build it again with `pip install -e .`"
    return None


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """The instruction set in use: "avx512_bf16", "avx512", "avx2" or "baseline" (``MBN_CPU_ISA`` forces one)."""
    return _ops.cpu_instruction_set()


def empty_cache() -> None:
    """See :func:`mbn_kernels.empty_cache`."""
    _packed_chains.clear()
    Prepared.generation += 1
    _ops.cpu_empty_cache()


def updates_running(running: Sequence[Tensor], batch: Sequence[Tensor], counts: Sequence[Tensor]) -> bool:
    """Whether :func:`update_running` takes tensors that nothing watches."""
    dtype = running[0].dtype if running else torch.float32
    return dtype in (torch.float32, torch.float64) and not (
        False in [t.is_cpu and t.dtype is dtype and t.is_contiguous() for t in (*running, *batch)]
        or False in [t.is_cpu and t.dtype is torch.int64 for t in counts]
    )


def update_running(
    running: Sequence[Tensor], batch: Sequence[Tensor], momenta: Sequence[float], counts: Sequence[Tensor]
) -> None:
    """Means and variances take the batch's in, and counts grow by 1: all of it, or nothing where it is interrupted."""
    increment_version([*running, *counts])  # beforehand: an interrupt in between then costs no more than a packing
    _ops.update_running(running, batch, momenta, counts)


def buffer(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised channels-last activation in memory that earlier ones have left (csrc/cpu/buffers.cpp)."""
    return _ops.cpu_buffer(n, c, h, w, like.dtype)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    n, c, h, w = shape
    if n * c * h * w * like.itemsize < LEAST_BUFFER:
        return empty_channels_last(like, (n, c, h, w))
    return buffer(like, n, c, h, w)


def _value(u: Value) -> tuple:
    return u.y, u.scale, u.shift, u.gate, ACTIVATIONS[u.act].code


def _gradient(g: Gradient) -> tuple:
    return g.dv, *_value(g.of), g.q, g.a, g.b, g.c


@lru_cache(maxsize=4096)
def _evaluates(chain: Chain, residual: bool) -> bool:
    """Whether the chain is [pointwise], depthwise (+ squeeze-excite), [pointwise] or one of them, or an end of a
    network alone, none of it normalised by its batch, and a residual goes around a pointwise stage.
    """
    stages, kinds = chain.stages, [stage.conv for stage in chain.stages]
    shapes = (["pointwise", "depthwise", "pointwise"], ["depthwise", "pointwise"], ["depthwise"], ["pointwise"])
    gates = [i for i, stage in enumerate(stages) if stage.gate]
    fixed = all(stage.norm in ("running", "bias") or stage.conv == "pool" for stage in stages)
    fits = kinds in (*shapes, ["dense"], ["pool"]) and gates in ([], [len(stages) - 2]) and fixed
    return fits and (not residual or kinds[-1] == "pointwise")


class _Evaluation(NamedTuple):
    """How csrc/cpu/evaluate.cpp is called for chains."""

    stages: Tensor  # int64, as the struct StageCode there reads them
    eps: Tensor  # float64
    blocks: Tensor  # int64, as BlockCode
    weights: list[tuple[Stage, int | None]]  # each stage, and where its weight is in the flat list of parameters

    def output_shape(self, shape: Sequence[int], flat: Sequence[Tensor]) -> Sequence[int]:
        for stage, weight in self.weights:
            shape = stage.output_shape(shape, None if weight is None else flat[weight].shape)
        return shape

    def widths(self, flat: Sequence[Tensor]) -> Tensor:
        """As csrc/cpu/evaluate_params.h's Widths: (out, in, squeeze) of each stage."""
        found = []
        for stage, weight in self.weights:
            out, inner = (0, 0) if weight is None else flat[weight].shape[:2]
            names = stage.parameter_names
            squeeze = flat[weight + names.index("w1")].shape[0] if stage.gate else 0
            found += [out, out if stage.conv == "depthwise" else inner, squeeze]
        return torch.tensor(found, dtype=torch.int64, device="cpu")


@lru_cache(maxsize=4096)
def _evaluation(chains: tuple[Chain, ...], residuals: tuple[bool, ...]) -> _Evaluation:
    codes, weights, count = [], [], 0
    stages = [stage for chain in chains for stage in chain.stages]
    for stage in stages:
        acts = (ACTIVATIONS[stage.gate[0]].code, ACTIVATIONS[stage.gate[1]].code) if stage.gate else (-1, -1)
        conv = ("none", "pointwise", "depthwise", "dense", "pool").index(stage.conv)
        window = (*stage.kernel, *stage.stride, *stage.padding, *stage.dilation)
        codes += [conv, *window, int(stage.norm == "running"), int(stage.affine), ACTIVATIONS[stage.act].code, *acts]
        weights.append((stage, count if stage.conv != "pool" else None))
        count += len(stage.parameter_names)
    blocks = [n for chain, r in zip(chains, residuals, strict=True) for n in (len(chain.stages), int(r))]
    integers = {"dtype": torch.int64, "device": "cpu"}
    eps = torch.tensor([stage.eps for stage in stages], dtype=torch.float64, device="cpu")
    return _Evaluation(torch.tensor(codes, **integers), eps, torch.tensor(blocks, **integers), weights)


class _Packed(NamedTuple):
    """Chains' parameters as ``evaluate`` reads them, kept for as long as the first weight lives."""

    weight: weakref.ref[Tensor]
    params: list[int]  # all of them, by id: another thread may use what is packed of these, and of no others
    shapes: list[torch.Size]
    numbers: Tensor


_packed_chains: dict[tuple[int, tuple[Chain, ...], torch.dtype], _Packed] = {}


def _packed(
    x: Tensor, chains: tuple[Chain, ...], flat: Sequence[Tensor], params: Sequence[Tensor], stages: Tensor
) -> Tensor:
    """The packed parameters: ``evaluate`` packs them anew where their version, a place in memory or what it samples of
    the contents is no longer what it was.
    """
    key, ids, shapes = (id(flat[0]), chains, x.dtype), [id(p) for p in flat], [p.shape for p in flat]
    found = _packed_chains.get(key)
    if found is None or found.weight() is not flat[0] or found.params != ids or found.shapes != shapes:
        # In memory that is looked up by large pages: a network's weights are read once per image.
        numbers = _ops.cpu_buffer(1, _ops.evaluate_size(params, stages) // 4, 1, 1, torch.float32).flatten()
        numbers[:16] = 0  # made of no parameters yet
        found = _Packed(weakref.ref(flat[0], lambda _: _packed_chains.pop(key, None)), ids, shapes, numbers)
        _packed_chains[key] = found
    return found.numbers


def takes(p: Tensor) -> bool:
    """Whether ``evaluate`` reads a parameter as it lies in memory."""
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


_version_of = attrgetter("_version")


def _version(flat: Sequence[Tensor]) -> int:
    """Grows with every change that PyTorch knows of. Inference tensors count none: -1, as if always changed."""
    try:
        return sum(map(_version_of, flat))
    except RuntimeError:
        return -1


class Prepared:
    """One evaluation, as often as it is called: for callers who know that neither the chains nor the tensors are others
    than they were. What became of the tensors is checked in C++, with a RuntimeError where it does not fit any more.
    """

    generation = 0  # of those that empty_cache has not made forget

    def __init__(self, x: Tensor, chains: tuple[Chain, ...], flat: list[Tensor], residuals: tuple[bool, ...]) -> None:
        self._made_in, self._operator = Prepared.generation, ranges.operator_of(chains)
        self._evaluation, self._flat, self._dtype = _evaluation(chains, residuals), flat, x.dtype
        self._packed = _packed(x, chains, flat, flat, self._evaluation.stages)
        self._dense = chains[0].stages[0].conv == "dense"
        self._shapes: dict[torch.Size, Sequence[int]] = {}
        self._hold(flat, self._evaluation.eps)

    def _hold(self, params: list[Tensor], numbers: Tensor) -> None:
        e = self._evaluation
        self._held = _ops.evaluate_hold(params, e.stages, numbers, e.blocks, self._packed)
        weakref.finalize(self, _ops.evaluate_release, self._held).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype or not x.is_cpu:
            raise RuntimeError(f"evaluate: x: expected {self._dtype} on the CPU, got {x.dtype} on {x.device}")
        shape = self._shapes.get(x.shape)
        if shape is None:
            if len(self._shapes) > 64:
                self._shapes.clear()
            shape = self._shapes[x.shape] = self._evaluation.output_shape(x.shape, self._flat)
        if not self._dense:
            x = channels_last(x)
        out = _empty(x, shape)
        if ranges.on:
            with ranges.whole(self._operator):
                self._run(x, out)
        else:
            self._run(x, out)
        return out

    def _run(self, x: Tensor, out: Tensor) -> None:
        if self._made_in != Prepared.generation:
            raise RuntimeError("evaluate: params: expected those it was prepared for, got others")
        _ops.evaluate_held(x, self._held, _version(self._flat), out)

    def freeze(self, x: Tensor) -> Frozen:
        """The same with the parameters' numbers of now, for inputs like x."""
        self(x)  # packs them
        packed = _ops.cpu_buffer(1, self._packed.numel(), 1, 1, torch.float32).flatten().copy_(self._packed)
        return Frozen(self, packed)


class Frozen(Prepared):
    """An evaluation whose parameters are numbers: nothing of them is looked at any more."""

    def __init__(self, of: Prepared, packed: Tensor) -> None:
        self._evaluation, self._operator, self._dtype, self._dense = of._evaluation, of._operator, of._dtype, of._dense
        self._shapes = {}
        self._packed, self._instruction_set = packed, instruction_set()  # which the numbers are packed for
        self._flat = [torch.empty(p.shape, device="meta") for p in of._flat]
        self._hold([], self._evaluation.widths(self._flat))

    def explain(self, op: str, x: Tensor) -> None:
        """ValueError where x is not what the chains take in."""
        given = torch.empty(x.shape, device="meta")
        check_chain(op, given, [stage for stage, _ in self._evaluation.weights], self._flat, False)
        check_memory(op, "x", x)

    def __reduce__(self) -> tuple:
        return _thawed, ({name: value for name, value in self.__dict__.items() if name != "_held"},)

    def _run(self, x: Tensor, out: Tensor) -> None:
        if self._instruction_set != instruction_set():
            raise RuntimeError(f"evaluate: packed: expected for {instruction_set()}, got for {self._instruction_set}")
        _ops.evaluate_held(x, self._held, 0, out)


def _thawed(state: dict) -> Frozen:
    """For pickle and copy."""
    frozen = Frozen.__new__(Frozen)
    frozen.__dict__.update(state)
    frozen._hold([], frozen._evaluation.widths(frozen._flat))
    return frozen


def _vectors(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=accumulate_dtype(like.dtype))


class CpuKernels:
    """:class:`mbn_kernels.chain.Kernels` on ``torch.ops.mbn.*``: allocates the outputs, the operators fill them."""

    evaluate_checks = True

    @staticmethod
    def prepared(
        x: Tensor, chains: tuple[Chain, ...], flat: list[Tensor], residuals: tuple[bool, ...]
    ) -> Prepared | None:
        return Prepared(x, chains, flat, residuals) if all(map(takes, flat)) else None

    def pointwise_forward(self, u: Value, weight: Tensor, statistics: bool):
        n, _, h, w = u.y.shape
        y, found = self._forward_outputs(u.y, (n, weight.shape[0], h, w), statistics)
        _ops.pointwise_forward(*_value(u), weight, y, *found)
        return y, found

    def depthwise_forward(self, u: Value, weight: Tensor, stage: Stage, statistics: bool):
        y, found = self._forward_outputs(u.y, stage.output_shape(u.y.shape, weight.shape), statistics)
        _ops.depthwise_forward(*_value(u), weight, stage.stride, stage.padding, stage.dilation, y, *found)
        return y, found

    @staticmethod
    def _forward_outputs(like: Tensor, shape: tuple[int, ...], statistics: bool):
        y = _empty(like, shape)
        if not statistics:
            return y, (None, None)
        return y, (_vectors(like, shape[1]), _vectors(like, shape[1]))

    def statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        found = _vectors(y, y.shape[1]), _vectors(y, y.shape[1])
        _ops.statistics(y, *found)
        return found

    def evaluates(self, chain: Chain, residual: bool) -> bool:
        return _evaluates(chain, residual)

    def evaluate(
        self, x: Tensor, chains: tuple[Chain, ...], flat: Sequence[Tensor], residuals: tuple[bool, ...]
    ) -> Tensor:
        if False in [p.is_cpu for p in (x, *flat)]:
            # Of a meta tensor the dispatcher would make a call that does nothing.
            raise RuntimeError("evaluate: expected tensors on the CPU, got some on another device")
        call = _evaluation(chains, residuals)
        if chains[0].stages[0].conv != "dense":
            x = channels_last(x)
        out = _empty(x, call.output_shape(x.shape, flat))
        params = [p if takes(p) else p.contiguous() for p in flat]
        packed = _packed(x, chains, flat, params, call.stages)
        _ops.evaluate(x, params, call.stages, call.eps, call.blocks, _version(flat), packed, out)
        return out

    def pool(self, u: Value) -> Tensor:
        pooled = _vectors(u.y, *u.y.shape[:2])
        _ops.pool(*_value(u), pooled)
        return pooled

    # The gate's two layers are pointwise convolutions of a 1x1 map with a bias in the place of the norm, so the same
    # kernels run them, with the same bits for any number of threads, which a library's product does not promise.

    def gate_forward(self, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]) -> Tensor:
        return self.materialize(self._gate_layers(pooled, p, acts)[2], None).flatten(1)

    def gate_backward(self, sums: Tensor, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]):
        squeezed, hidden, logits, w1, w2 = self._gate_layers(pooled, p, acts)  # small: recomputed, not saved
        dgate = sums[0][:, :, None, None]
        db2 = self.reduce_gradient(dgate, logits, None)[0]
        wants = (True, True, True)
        dhidden, sums, dw2 = self.pointwise_backward(Gradient(dgate, logits), w2, hidden, None, None, *wants)
        wants = (True, False, True)
        dpooled, _, dw1 = self.pointwise_backward(Gradient(dhidden, hidden), w1, squeezed, None, None, *wants)
        return dpooled.flatten(1), {"w1": dw1, "b1": sums[0].clone(), "w2": dw2, "b2": db2.clone()}

    def _gate_layers(self, pooled: Tensor, p: dict[str, Tensor], acts: tuple[str, str]):
        w1, w2 = (p[name].to(pooled.dtype).flatten(1)[:, :, None, None].contiguous() for name in ("w1", "w2"))
        b1, b2 = (p[name].to(pooled.dtype).contiguous() for name in ("b1", "b2"))
        squeezed = Value(pooled[:, :, None, None])
        hidden = Value(self.pointwise_forward(squeezed, w1, False)[0], torch.ones_like(b1), b1, acts[0])
        logits = Value(self.pointwise_forward(hidden, w2, False)[0], torch.ones_like(b2), b2, acts[1])
        return squeezed, hidden, logits, w1, w2

    def batch_norm(self, statistics, count: int, weight: Tensor | None, bias: Tensor | None, eps: float):
        mean, var = statistics
        return self.running_norm(mean, var, weight, bias, eps), mean, unbiased(var, count)

    def running_norm(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        norm = _vectors(mean, 4, mean.shape[0])
        _ops.norm_forward(mean, var, weight, bias, eps, norm)
        return norm

    def norm_backward(self, sums: Tensor, gate: Tensor | None, q: Tensor | None, norm: Tensor, count: int | None):
        channels = norm.shape[1]
        dweight, dbias = _vectors(norm, channels), _vectors(norm, channels)
        b, c = (None, None) if count is None else _vectors(norm, 2, channels).unbind(0)
        _ops.norm_backward(sums, gate, q, norm, count or 0, dweight, dbias, b, c)
        return dweight, dbias, b, c

    def materialize(self, u: Value, residual: Tensor | None) -> Tensor:
        out = _empty(u.y, u.y.shape)
        _ops.materialize(*_value(u), residual, out)
        return out

    def materialize_gradient(self, g: Gradient, residual: Tensor | None) -> Tensor:
        out = _empty(g.dv, g.dv.shape)
        _ops.materialize_gradient(*_gradient(g), residual, out)
        return out

    def reduce_gradient(self, dv: Tensor, u: Value, norm: Norm | None) -> Tensor:
        sums = self._sums(u)
        _ops.reduce_gradient(dv, *_value(u), norm and norm.mean, norm and norm.rstd, sums)
        return sums

    @staticmethod
    def _sums(u: Value) -> Tensor:
        n, c = u.y.shape[:2]
        return _vectors(u.y, 2, c) if u.gate is None else _vectors(u.y, 5, n, c)

    def pointwise_backward(self, g, weight, u, norm, residual, want_du, want_sums, want_dweight):
        out = self._backward_outputs(u, weight, want_du, want_sums, want_dweight)
        _ops.pointwise_backward(
            *_gradient(g), *_value(u), weight, residual, norm and norm.mean, norm and norm.rstd, *out
        )
        return out

    def depthwise_backward(self, g, weight, stage, u, norm, residual, want_du, want_sums, want_dweight):
        out = self._backward_outputs(u, weight, want_du, want_sums, want_dweight)
        window = (stage.stride, stage.padding, stage.dilation)
        _ops.depthwise_backward(
            *_gradient(g), *_value(u), *window, weight, residual, norm and norm.mean, norm and norm.rstd, *out
        )
        return out

    def _backward_outputs(self, u: Value, weight: Tensor, want_du: bool, want_sums: bool, want_dweight: bool):
        du = _empty(u.y, u.y.shape) if want_du else None
        return du, self._sums(u) if want_sums else None, _vectors(weight, *weight.shape) if want_dweight else None
