"""Fused operators as functions. Shapes are PyTorch's: activations ``[N, C, H, W]`` of any strides; outputs are
channels-last.

All are differentiable once in every tensor argument that stock PyTorch differentiates, work under
``torch.compile(fullgraph=True)`` and autocast, and accumulate in float32 (float64 for float64). Errors: ``TypeError``
and ``ValueError`` of one sentence, ``op: argument: expected …, got …``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import backends, checks, ops
from .chain import Link, chain_spec, parse, stage_spec
from .errors import fail
from .running import Running, update_running

Pair = int | tuple[int, int]


def run_chain(
    x: Tensor,
    spec: str,
    params: Sequence[Tensor],
    running: Sequence[Running] = (),
    residual: bool = False,
) -> Tensor:
    """Runs a chain of stages; adds ``x`` to its output if ``residual``.

    Args:
        x: ``[N, C, H, W]``.
        spec: from :func:`mbn_kernels.chain.chain_spec`.
        params: the stages' parameters, flat, in the order of :attr:`mbn_kernels.chain.Stage.parameter_names`.
        running: for each stage that uses batch statistics, the running ones to update in place.

    A stage with a process group takes its statistics from the batches of all its processes: each has to make the same
    call, and to go backward through it, with a batch of any size, also none.

    >>> spec = chain_spec("example", [stage_spec("pointwise", act="relu")])
    >>> run_chain(torch.randn(2, 8, 4, 4), spec, [torch.randn(16, 8, 1, 1)]).shape
    torch.Size([2, 16, 4, 4])
    """
    if not torch.compiler.is_compiling():
        checks.check_call("run_chain", x, params, running, residual)
    grad = torch.is_grad_enabled()
    save = grad and (x.requires_grad or any(p.requires_grad for p in params))
    backend, direct = backends.choose(x.device, x.dtype), runs_directly(x)

    def update(statistics: list[Tensor]) -> None:
        if running:
            if grad and not torch.compiler.is_compiling():
                checks.check_no_gradient(parse(spec).name, running)
            update_running(running, statistics, x.numel(), _shared(spec))

    if direct and save:
        return ops.ChainFunction.apply(spec, residual, backend, update, x, *params)
    if direct and not running and evaluates(spec, residual, backend):
        return ops.evaluate_chains(x, (parse(spec),), [params], (residual,), backend)
    out, statistics, _ = _dispatched(x, list(params), spec, residual, save, backend)
    update(statistics)
    return out


def _dispatched(x: Tensor, params: list[Tensor], *given) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if torch.compiler.is_compiling():
        return ops.CHAIN(x, params, *given)
    try:
        return ops.CHAIN(x, params, *given)
    except (RuntimeError, AssertionError):  # what the dispatcher and modes refuse in words of their own
        checks.check_dispatched(parse(given[0]), x, params)
        raise


def run_linked(x: Tensor, chains: Sequence[tuple[str, Sequence[Tensor], Sequence[Running]]], backend: str) -> Tensor:
    """Chains one behind the other where gradients are wanted, (spec, parameters, running statistics) of each. Of what
    one hands to the next only the raw output is stored: the next normalises and activates it as it loads. No chain has
    a residual or shares statistics, and all but the last end in a norm without a gate. For the backend "cpu", of eager
    calls that nothing watches (:func:`runs_directly`).

    >>> spec = chain_spec("example", [stage_spec("pointwise", norm="batch", act="relu")])
    >>> x, chains = torch.randn(2, 8, 4, 4), [(spec, [torch.randn(8, 8, 1, 1)], [Running()]) for _ in range(2)]
    >>> torch.allclose(run_linked(x, chains, "cpu"), run_chain(run_chain(x, *chains[0]), *chains[1]), atol=1e-4)
    True
    """
    checks.check_links(x, chains)
    rows, act, grad = None, "identity", torch.is_grad_enabled()
    for i, (spec, params, running) in enumerate(chains):
        link, values = Link(act, i + 1 < len(chains)), x.numel()

        def update(statistics: list[Tensor], spec=spec, running=running, values: int = values) -> None:
            if running:
                if grad:
                    checks.check_no_gradient(parse(spec).name, running)
                update_running(running, statistics, values)

        found = ops.LinkFunction.apply(spec, link, backend, update, x, rows, *params)
        x, rows = found if link.open else (found, None)
        act = parse(spec).stages[-1].act
    return x


@backends.constant_when_compiled
@lru_cache(maxsize=4096)
def _shared(spec: str) -> tuple[bool, ...]:
    """Of each stage with batch statistics, whether they are those of a process group."""
    return tuple(stage.group is not None for stage in parse(spec).stages if stage.norm == "batch")


def evaluates(spec: str, residual: bool, backend: str) -> bool:
    """Whether the backend has one call for the whole chain where nothing is saved for backward.

    >>> running, batch = (chain_spec("example", [stage_spec("pointwise", norm=norm)]) for norm in ("running", "batch"))
    >>> evaluates(running, False, "cpu"), evaluates(batch, False, "cpu")
    (True, False)
    """
    checks.check_bool("evaluates", "residual", residual)
    return backends.get(backend).kernels.evaluates(parse(spec), residual)


def runs_directly(x: Tensor) -> bool:
    """Whether nothing watches the operator ``mbn::chain``, so that it may be passed by: no graph is traced, and no
    autocast, torch.func transform, dispatch mode or tensor subclass is at work.

    >>> runs_directly(torch.randn(1, 8, 4, 4))
    True
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     runs_directly(torch.randn(1, 8, 4, 4))
    False
    """
    if not isinstance(x, Tensor):
        return False
    device = "cpu" if x.is_cpu else x.device.type  # to ask a device for its type takes longer than all the rest
    return not (ops.is_watched(x) or (device in ops.AUTOCAST_DEVICES and torch.is_autocast_enabled(device)))


def _conv_bn_act(
    op: str,
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    window: dict,
    conv: str,
    act: str,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    for name, t in (("x", x), ("weight", weight)):
        checks.check_tensor(op, name, t)
        checks.check_dense(op, name, t)
    norm = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    for name, t in norm.items():
        checks.check_tensor(op, name, t, optional=True)
    checks.check_act(op, "act", act)
    checks.check_bool(op, "training", training)
    momentum, eps = checks.number(op, "momentum", momentum), checks.number(op, "eps", eps, least=0)
    for a, b in (("bn_weight", "bn_bias"), ("running_mean", "running_var")):
        if (norm[a] is None) != (norm[b] is None):
            fail(op, b if norm[b] is None else a, f"a tensor, as {a if norm[b] is None else b} is one", "None")
    if not training and running_mean is None:
        fail(op, "running_mean", "a tensor when training is False", "None")
    spec = stage_spec(
        conv,
        **window,
        norm="batch" if training else "running",
        affine=bn_weight is not None,
        eps=eps,
        act=act,
    )
    params = [weight, *(t for t in (bn_weight, bn_bias) if t is not None)]
    if not training:
        params += [running_mean, running_var]
    running = [Running(running_mean, running_var, momentum)] if training else []
    if training and running_mean is not None:
        checks.check_input(op, x)
        channels = weight.shape[0] if weight.dim() else 0
        for name in ("running_mean", "running_var"):
            checks.check_beside(op, name, norm[name], x)
            if weight.dim() == 4 and tuple(norm[name].shape) != (channels,):
                fail(op, name, f"shape ({channels},)", tuple(norm[name].shape))
        if runs_directly(x):
            given = {"x": x, "weight": weight, "bn_weight": bn_weight, "bn_bias": bn_bias}
            for name in ("running_mean", "running_var"):
                checks.check_memory(op, name, norm[name])
            checks.check_apart(op, {"running_mean": running_mean, "running_var": running_var}, given)
    if not training and not torch.compiler.is_compiling():
        # The operator checks, too, but a kernel for whole chains in evaluation would take a weight of another rank.
        checks.check_chain(op, x, parse(chain_spec(op, [spec])).stages, params, residual is x)
    # The chain's own residual is its input; another tensor is added to what it returns.
    out = run_chain(x, chain_spec(op, [spec]), params, running, residual is x)
    return out if residual is None or residual is x else out + residual


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: Pair = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: Pair = 1,
    act: str = "hardswish",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``act(batch_norm(conv2d(x, weight, groups=C)))`` in one pass over ``x`` and one over the convolution's output.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, 1, kh, kw]``, kernel sizes odd, dtype of ``x``.
        bn_weight, bn_bias: ``[C]``, or both None.
        running_mean, running_var: ``[C]``; updated in place when ``training``, exactly as ``F.batch_norm`` does;
            both may be None then.
        padding: one int, (height, width), or (top, bottom, left, right).
        act: a name in :data:`mbn_kernels.activations.ACTIVATIONS`.
        training: normalise by the batch's statistics, else by the running ones.

    >>> x, weight, mean, var = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.zeros(8), torch.ones(8)
    >>> y = functional.depthwise_conv_bn_act(x, weight, None, None, mean, var, stride=2, padding=1, act="relu")
    >>> stock = torch.conv2d(x, weight, stride=2, padding=1, groups=8)
    >>> torch.allclose(y, torch.nn.functional.batch_norm(stock, mean, var).relu(), atol=1e-4)
    True
    """
    op = "depthwise_conv_bn_act"
    checks.check_tensor(op, "weight", weight)
    checks.check_dense(op, "weight", weight)
    kernel = tuple(weight.shape[2:]) if weight.dim() == 4 else (1, 1)
    if any(k % 2 == 0 for k in kernel):
        fail(op, "weight", "an odd kernel size", f"{kernel[0]}x{kernel[1]}")
    stride = checks.integers(op, "stride", stride, (2,), 1)
    dilation = checks.integers(op, "dilation", dilation, (2,), 1)
    pads = checks.integers(op, "padding", padding, (2, 4), 0)
    pads = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
    window = {"kernel": kernel, "stride": stride, "padding": pads, "dilation": dilation}
    norm = (bn_weight, bn_bias, running_mean, running_var)
    return _conv_bn_act(op, x, weight, *norm, window, "depthwise", act, training, momentum, eps, None)


def pointwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    act: str = "hardswish",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(batch_norm(conv2d(x, weight))) + residual`` for a 1x1 convolution.

    Args:
        x: ``[N, C_in, H, W]``.
        weight: ``[C_out, C_in, 1, 1]``, dtype of ``x``.
        residual: ``[N, C_out, H, W]`` added to the result, or None. Passing ``x`` itself fuses the addition.

    The other arguments are those of :func:`depthwise_conv_bn_act`.

    >>> x, weight, mean, var = torch.randn(2, 8, 4, 4), torch.randn(8, 8, 1, 1), torch.zeros(8), torch.ones(8)
    >>> y = functional.pointwise_conv_bn_act(x, weight, None, None, mean, var, training=True, residual=x)
    >>> y.shape
    torch.Size([2, 8, 4, 4])
    >>> bool((var == 1).any())  # the running statistics are no longer what they were
    False
    """
    op = "pointwise_conv_bn_act"
    checks.check_tensor(op, "residual", residual, optional=True)
    if residual is not None:
        checks.check_addend(op, "residual", residual)
        if not torch.compiler.is_compiling():
            checks.check_memory(op, "residual", residual)
    if residual is not None and residual is not x:
        checks.check_tensor(op, "x", x)
        checks.check_tensor(op, "weight", weight)
        if x.dim() == 4 and weight.dim() == 4:
            shape = (x.shape[0], weight.shape[0], *x.shape[2:])
            if tuple(residual.shape) != shape or residual.device != x.device:
                fail(op, "residual", f"shape {shape} on {x.device}", f"{tuple(residual.shape)} on {residual.device}")
    norm = (bn_weight, bn_bias, running_mean, running_var)
    return _conv_bn_act(op, x, weight, *norm, {}, "pointwise", act, training, momentum, eps, residual)


def squeeze_excite(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, act: str = "relu", gate: str = "hardsigmoid"
) -> Tensor:
    """``x * gate(act(mean_hw(x) w1^T + b1) w2^T + b2)``: squeeze-excite gating (Hu et al., arXiv 1709.01507).

    Args:
        x: ``[N, C, H, W]``; not modified.
        w1, b1: ``[S, C]`` or ``[S, C, 1, 1]``, and ``[S]``.
        w2, b2: ``[C, S]`` or ``[C, S, 1, 1]``, and ``[C]``.
        act, gate: names in :data:`mbn_kernels.activations.ACTIVATIONS`.

    >>> x, (w1, b1, w2, b2) = torch.randn(2, 8, 4, 4), map(torch.zeros, ((2, 8), (2,), (8, 2), (8,)))
    >>> torch.allclose(functional.squeeze_excite(x, w1, b1, w2, b2), 0.5 * x)  # hard-sigmoid of 0 is 0.5
    True
    """
    op = "squeeze_excite"
    for name, t in (("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        checks.check_tensor(op, name, t)
    checks.check_act(op, "act", act)
    checks.check_act(op, "gate", gate)
    return run_chain(x, chain_spec(op, [stage_spec("none", gate=(act, gate))]), [w1, b1, w2, b2])
