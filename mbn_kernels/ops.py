"""The differentiable operators ``torch.ops.mbn.chain`` and ``chain_backward``: one call runs a whole chain of stages.

A chain is text (:func:`mbn_kernels.chain.chain_spec`) and a flat list of parameters. Both operators are opaque to
``torch.compile``, have exact fake kernels, an autocast rule (activations and convolution weights, never batch norm or
gate parameters) and a flop formula. Arguments are checked here, once, for eager and compiled callers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import backends, chain, ranges
from .checks import check_chain, check_fixed, check_kinds, check_memories, check_memory
from .errors import fail, short
from .schemas import library

library.define(
    "chain(Tensor x, Tensor[] params, str spec, bool residual, bool save, str backend) -> (Tensor, Tensor[], Tensor[])"
)
library.define(
    "chain_backward(Tensor dout, Tensor x, Tensor[] params, Tensor[] saved, str spec, bool residual, bool[] needs, "
    "str backend) -> Tensor[]"
)
AUTOCAST_DEVICES = ("cpu", "cuda")
# Overloads, not packets: finding the overload again costs microseconds a call.
CHAIN, _CHAIN_BACKWARD = torch.ops.mbn.chain.default, torch.ops.mbn.chain_backward.default


def is_watched(t: Tensor) -> bool:
    """Whether a graph is traced, or a torch.func transform, dispatch mode or tensor subclass wants to see each operator
    on ``t``.
    """
    return (
        type(t) not in (Tensor, Parameter)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _chain(
    x: Tensor,
    params: Sequence[Tensor],
    spec: str,
    residual: bool,
    save: bool,
    backend: str,
    rows: Tensor | None = None,
    link: chain.Link = chain.NO_LINK,
):
    parsed, chosen = chain.parse(spec), backends.get(backend)
    if not save and chosen.kernels.evaluates(parsed, residual):
        return evaluate_chains(x, (parsed,), [params], (residual,), backend), [], []
    _check(parsed, chosen, backend, x, params, residual)
    if parsed.only_evaluates:
        expected = "stages that can be differentiated, or one that the backend evaluates"
        fail(parsed.name, "spec", expected, short(spec), NotImplementedError)
    if backend == "reference":  # PyTorch reads memory that was freed, and ends the process
        check_memories(parsed, params)
    params = [p.contiguous() for p in params]
    try:
        return chain.forward(chosen.kernels, chain.channels_last(x), parsed, params, residual, save, rows, link)
    except RuntimeError:
        check_memories(parsed, params)
        raise


def evaluate_chains(
    x: Tensor,
    chains: tuple[chain.Chain, ...],
    params: Sequence[Sequence[Tensor]],
    residuals: tuple[bool, ...],
    backend: str,
) -> Tensor:
    """Chains that the backend evaluates, one behind the other, in one call outside of autograd."""
    chosen = backends.get(backend)
    flat = [p for own in params for p in own]

    def check() -> None:
        given = x
        for parsed, own, residual in zip(chains, params, residuals, strict=True):
            shape = _check(parsed, chosen, backend, given, own, residual)
            check_memories(parsed, own)
            given = x.new_empty(1).expand(shape)  # only its shape is looked at

    if not chosen.kernels.evaluate_checks:
        check()
    try:
        with ranges.whole(ranges.operator_of(chains)):
            return chosen.kernels.evaluate(x, chains, flat, residuals)
    except Exception:
        # A kernel that checks everything itself says less; only where it refuses is it worth finding the best words.
        check()
        raise


def _check(
    parsed: chain.Chain, chosen: backends.Backend, backend: str, x: Tensor, params, residual: bool
) -> tuple[int, ...]:
    shape = check_chain(parsed.name, x, parsed.stages, params, residual)
    check_memory(parsed.name, "x", x)
    unsupported = chosen.supports(x.device, x.dtype)
    if unsupported:
        raise TypeError(f"{parsed.name}: x: backend {backend!r} expected {unsupported}")
    return shape


def _chain_fake(x: Tensor, params: Sequence[Tensor], spec: str, residual: bool, save: bool, backend: str):
    parsed = chain.parse(spec)
    stages = parsed.stages
    check_chain(parsed.name, x, stages, params, residual)
    dtype, shape, statistics, saved = chain.accumulate_dtype(x.dtype), tuple(x.shape), [], []
    for stage, p in zip(stages, chain.stage_parameters(stages, params), strict=True):
        shape = stage.output_shape(shape, p["weight"].shape if "weight" in p else None)
        if stage.norm == "batch":
            statistics += [x.new_empty(shape[1], dtype=dtype) for _ in range(2)]
        if stage.conv != "none":
            saved.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
        if stage.norm != "none":
            saved.append(x.new_empty((4, shape[1]), dtype=dtype))
        if stage.group is not None:
            saved.append(x.new_empty(1, dtype=dtype))
        if stage.gate:
            saved += [x.new_empty(shape[:2], dtype=dtype) for _ in range(2)]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, statistics, saved if save else []


def _checked_chain_backward(dout, x, params, saved, spec, residual, needs, backend) -> list[Tensor]:
    """For callers of the operator: autograd hands over what :func:`_chain` has made."""
    parsed = chain.parse(spec)
    shape = _check(parsed, backends.get(backend), backend, x, params, residual)
    if len(needs) != 1 + len(params):
        fail(parsed.name, "needs", f"{1 + len(params)} flags", len(needs))
    if dout.shape != shape or dout.dtype != x.dtype or dout.device != x.device:
        expected = f"{x.dtype}, {shape} on {x.device}"
        fail(parsed.name, "dout", expected, f"{dout.dtype}, {tuple(dout.shape)} on {dout.device}")
    metas = [p.to("meta") for p in params]
    made = _chain_fake(x.to("meta"), metas, spec, residual, True, backend)[2]
    expected = [(tuple(t.shape), t.dtype) for t in made]
    given = [(tuple(t.shape), t.dtype) for t in saved]
    if expected != given:
        fail(parsed.name, "saved", short(expected), short(given))
    return _chain_backward(dout, x, params, saved, spec, residual, needs, backend)


def _chain_backward(*given) -> list[Tensor]:
    """The gradients that are wanted, of the schema's arguments."""
    return [g for g in _chain_gradients(*given)[0] if g is not None]


def _chain_gradients(
    dout: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    spec: str,
    residual: bool,
    needs: Sequence[bool],
    backend: str,
    *link,
) -> tuple[list[Tensor | None], Tensor | None]:
    """As :func:`mbn_kernels.chain.backward`, whose last arguments are ``link``."""
    parsed, params = chain.parse(spec), [p.contiguous() for p in params]
    # Hooks on saved tensors, as torch.autograd.graph.save_on_cpu, may give them back in another layout.
    saved = [chain.channels_last(t) if t.dim() == 4 else t.contiguous() for t in saved]
    dout, x, kernels = chain.channels_last(dout), chain.channels_last(x), backends.get(backend).kernels
    return chain.backward(kernels, dout, x, parsed, params, saved, residual, needs, *link)


def _chain_backward_fake(dout, x, params, saved, spec, residual, needs, backend):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grads = [dx, *(p.new_empty_strided(p.shape, p.contiguous().stride()) for p in params)]
    return [g for g, need in zip(grads, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, params, ctx.spec, ctx.residual, save, ctx.backend = inputs
    _, statistics, saved = output
    if not save:
        raise RuntimeError("mbn::chain: save: expected True where a gradient is required, got False")
    check_fixed(chain.parse(ctx.spec), params)
    # Statistics and saved tensors are results for the caller and for backward, not functions to differentiate; without
    # this, autograd would also make a zero gradient as large as each of them.
    ctx.mark_non_differentiable(*statistics, *saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *params, *saved)
    ctx.count = len(params)


def _gradients(ctx, dout: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    x, *rest = ctx.saved_tensors
    params, saved = rest[: ctx.count], rest[ctx.count :]
    # The operator is there for graphs, modes and the second differentiation; past the dispatcher it is faster.
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    run = _CHAIN_BACKWARD if watched else _chain_backward
    found = iter(run(dout, x, params, saved, ctx.spec, ctx.residual, needs, ctx.backend))
    return [next(found) if need else None for need in needs]


def _differentiate(ctx, dout: Tensor | None, _statistics, _saved):
    if dout is None:
        return None, [None] * ctx.count, None, None, None, None
    dx, *grads = _gradients(ctx, dout, [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]])
    return dx, grads, None, None, None, None


class ChainFunction(torch.autograd.Function):
    """The operator with the autograd that :func:`torch.library.register_autograd` gives it, at a tenth of the cost, for
    eager calls that nothing watches (:func:`mbn_kernels.functional.runs_directly`). ``apply(spec, residual, backend,
    update, x, *params)`` returns the output. ``update`` is called with the batch statistics before anything is saved:
    torch.utils.checkpoint ends a second forward at the last tensor saved, and stock has updated its statistics by then.
    """

    @staticmethod
    def forward(ctx, spec: str, residual: bool, backend: str, update: Callable, x: Tensor, *params: Tensor) -> Tensor:
        check_fixed(chain.parse(spec), params)
        out, statistics, saved = _chain(x, params, spec, residual, True, backend)
        update(statistics)
        ctx.spec, ctx.residual, ctx.backend, ctx.count = spec, residual, backend, len(params)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *params, *saved)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor | None):
        if dout is None:
            return (None,) * (5 + ctx.count)
        return None, None, None, None, *_gradients(ctx, dout, ctx.needs_input_grad[4:])


class LinkFunction(torch.autograd.Function):
    """:class:`ChainFunction` for chains that leave their last value to the next (:class:`mbn_kernels.chain.Link`).
    ``apply(spec, link, backend, update, x, rows, *params)`` returns the output, and of an open chain its rows. From
    chain to chain goes back the gradient of the value in the place of the raw output's, and its sums in that of the
    rows' gradient.
    """

    @staticmethod
    def forward(ctx, spec: str, link: chain.Link, backend: str, update: Callable, x: Tensor, rows, *params: Tensor):
        check_fixed(chain.parse(spec), params)
        out, statistics, saved = _chain(x, params, spec, False, True, backend, rows, link)
        update(statistics)
        ctx.spec, ctx.link, ctx.backend, ctx.count = spec, link, backend, len(params)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rows, *params, *saved)
        return (out, saved[-1]) if link.open else out

    @staticmethod
    def backward(ctx, dout: Tensor | None, sums: Tensor | None = None):
        if dout is None:
            return (None,) * (6 + ctx.count)
        x, rows, *rest = ctx.saved_tensors
        params, saved = rest[: ctx.count], rest[ctx.count :]
        needs = [ctx.needs_input_grad[4], *ctx.needs_input_grad[6:]]
        with torch.no_grad():
            given = (rows, ctx.link, None if sums is None else sums[:2])
            (dx, *grads), left = _chain_gradients(dout, x, params, saved, ctx.spec, False, needs, ctx.backend, *given)
            left = None if left is None else torch.nn.functional.pad(left, (0, 0, 0, 2))  # in the shape of the rows
        found = (dx, left, *grads)
        if torch.is_grad_enabled():
            wanted = [g for g in found if g is not None]
            once = iter(_Once.apply(len(wanted), *wanted, dout, x, *params))
            found = tuple(None if g is None else next(once) for g in found)
        return None, None, None, None, *found


class _Once(torch.autograd.Function):
    """The first tensors, whose gradient none can have."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        _twice(ctx, *grads)


def _twice(ctx, *grads):
    raise NotImplementedError(
        "mbn_kernels: double backward: expected one differentiation, got a second; it is not supported"
    )


def _autocast(device_type: str):
    key = getattr(torch._C.DispatchKey, "Autocast" + device_type.upper())

    def run(x: Tensor, params: Sequence[Tensor], spec: str, residual: bool, save: bool, backend: str):
        dtype = torch.get_autocast_dtype(device_type)
        stages, given = chain.parse(spec).stages, x
        check_kinds(chain.parse(spec), x, params)  # before a cast makes a floating-point tensor of x
        names = [name for stage in stages for name in stage.parameter_names]
        # As stock's autocast: convolutions run in its dtype, float64 stays, and so does what no convolution takes in.
        if x.dtype != torch.float64 and stages[0].conv != "none":
            x = x.to(dtype)
            params = [p.to(dtype) if name == "weight" else p for p, name in zip(params, names, strict=True)]
        wider = residual and x.dtype != given.dtype  # a residual is added as it was given, not as it was cast
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            out, statistics, saved = CHAIN(x, params, spec, residual and not wider, save, backend)
        return (out + given if wider else out), statistics, saved

    return run


library.impl("chain", _chain, "CompositeExplicitAutograd")
library.impl("chain_backward", _checked_chain_backward, "CompositeExplicitAutograd")
torch.library.register_fake("mbn::chain", _chain_fake, lib=library)
torch.library.register_fake("mbn::chain_backward", _chain_backward_fake, lib=library)
torch.library.register_autograd("mbn::chain", _differentiate, setup_context=_setup_context, lib=library)
torch.library.register_autograd("mbn::chain_backward", _twice, lib=library)
for _type in AUTOCAST_DEVICES:
    library.impl("chain", _autocast(_type), "Autocast" + _type.upper())


def _flops(x_shape: Sequence[int], param_shapes: Sequence[Sequence[int]], spec: str) -> list[tuple[int, int]]:
    """(convolution, gate) multiply-add flops of each stage, by the convention of torch.utils.flop_counter: two per
    multiply-add.
    """
    stages, shape, counts = chain.parse(spec).stages, tuple(x_shape), []
    for stage, p in zip(stages, chain.stage_parameters(stages, param_shapes), strict=True):
        shape = stage.output_shape(shape, p.get("weight"))
        n, c, h, w = shape
        per_output = 0 if stage.conv == "none" else p["weight"][1] * stage.kernel[0] * stage.kernel[1]
        counts.append((2 * n * c * h * w * per_output, 4 * n * c * p["w1"][0] if stage.gate else 0))
    return counts


@register_flop_formula(torch.ops.mbn.chain)
def _chain_flops(x_shape, param_shapes, spec, residual, save, backend, *args, out_shape=None, **kwargs) -> int:
    return sum(conv + gate for conv, gate in _flops(x_shape, param_shapes, spec))


@register_flop_formula(torch.ops.mbn.chain_backward)
def _chain_backward_flops(dout_shape, x_shape, param_shapes, saved, spec, residual, needs, *args, **kwargs) -> int:
    """Each convolution's input gradient and weight gradient cost what its forward does, where they are asked for."""
    stages, counts = chain.parse(spec).stages, _flops(x_shape, param_shapes, spec)
    wanted, total, upstream = chain.stage_parameters(stages, needs[1:]), 0, needs[0]
    for (conv, gate), w in zip(counts, wanted, strict=True):
        total += conv * (upstream + w.get("weight", False)) + 2 * gate
        upstream = upstream or any(w.values())
    return total
