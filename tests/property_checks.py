"""How a random call of property_cases.py is held to the oracle; see tests/test_properties.py."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from oracle import (
    Case,
    StageCase,
    Tensors,
    avoid_kinks,
    fused_chain,
    fused_functional,
    hold,
    magnitude,
    make_tensors,
    stock_chain,
)
from property_cases import SPECIAL, Call, Domain, calls, lay
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import FusedInvResBlock, FusedSequential, FusedSqueezeExcite, chain, functional
from mbn_kernels.modules.units import ACTS as ACT_MODULES

#: Fixed cases are held to twice stock's error, drawn 8 times. Of tens of thousands of random ones, with maps of a few
#: values and sums that cancel, some are luckier in stock than that allows for; what is wrong is wrong by far more.
DRAWS, FACTOR = 64, 16
#: Where that is not enough, as of maps that are constant and then normalised, the same call decides that has float64's
#: digits to spare: to about half a millionth of what is largest.
DECIDED, DECIDING = "decided in float64", 1 << 20
ROUND = settings(
    max_examples=10,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# A call, run --------------------------------------------------------------------------------------------------------


def stock(call: Call, t: Tensors) -> Tensor:
    h = t.x
    for case, params in call.split(t):
        h = stock_chain(case, Tensors(h, params), call.training, call.momentum, conv2d=trusted_conv2d)
    return h


def trusted_conv2d(x: Tensor, weight: Tensor, *window: object) -> Tensor:
    """F.conv2d where oneDNN, which it calls, is right: not of all channels-last maps in a dense convolution (see
    mbn_kernels/dense.py), nor in bfloat16 with a dilation. So these are NCHW, and float32's of bfloat16, rounded once.
    """
    given, pointwise, groups = x.dtype, weight.shape[2:] == (1, 1), window[4] if window else 1
    if given == torch.bfloat16 or (groups == 1 and not pointwise):
        wide = torch.float32 if given == torch.bfloat16 else given
        x, weight = (v.to(wide).clone(memory_format=torch.contiguous_format) for v in (x, weight))
    return F.conv2d(x, weight, *window).to(given)


def fused(call: Call, t: Tensors) -> Tensor:
    if call.way == "sequential":
        modules = [_module(case, params, call.momentum) for case, params in call.split(t)]
        net = FusedSequential(*modules).train(call.training)
        out = net(t.x)
        assert torch.is_grad_enabled() or torch.equal(out, net(t.x))  # the second of its calls goes another way
        return out
    if call.way == "linked" and mbn_kernels.backends.choose(t.x.device, t.x.dtype) == "cpu":
        return functional.run_linked(t.x, [_linked(call, *part) for part in call.split(t)], "cpu")
    h, f = t.x, fused_functional if call.way == "function" else fused_chain
    for case, params in call.split(t):
        h = f(case, Tensors(h, params), call.training, call.momentum)
    return h


def _linked(call: Call, case: Case, params: list[dict[str, Tensor]]) -> tuple:
    flat = [v for p in params for name, v in p.items() if not (call.training and name.startswith("running"))]
    norms = [p for p in params if call.training and "running_mean" in p]
    running = [functional.Running(p["running_mean"], p["running_var"], call.momentum) for p in norms]
    return chain.chain_spec("linked", [s.spec(call.training) for s in case.stages]), flat, running


def _act(name: str) -> nn.Module:
    return next(kind for kind, act in ACT_MODULES.items() if act == name and kind is not type(None))()


def _module(case: Case, params: list[dict[str, Tensor]], momentum: float) -> nn.Module:
    """A stem, a squeeze-excite, or a block of these stages, that holds these very tensors."""
    layers: list[nn.Module] = []
    for stage, p in zip(case.stages, params, strict=True):
        if stage.conv != "none":
            layers.append(_conv_bn_act(stage, p, momentum))
        if stage.gate:
            layers.append(_excitation(stage, p))
    if len(layers) == 1 and case.stages[0].conv in ("none", "dense"):
        return layers[0]
    block = FusedInvResBlock(2, 3, 4, 3, False, "relu", 1)
    block.layers, block.skip_connect = nn.Sequential(*layers), case.residual
    assert block.why_not_fused() is None
    return block


def _conv_bn_act(stage: StageCase, p: dict[str, Tensor], momentum: float) -> nn.Sequential:
    out, inner = p["weight"].shape[:2]
    groups = out if stage.conv == "depthwise" else 1
    pads = stage.padding[0], stage.padding[2]
    options = {"stride": stage.stride, "padding": pads, "dilation": stage.dilation, "groups": groups, "bias": False}
    conv = nn.Conv2d(inner * groups, out, stage.kernel, **options)
    bn = nn.BatchNorm2d(out, eps=stage.eps, momentum=momentum, affine=stage.affine)
    conv.weight, bn.running_mean, bn.running_var = p["weight"], p["running_mean"], p["running_var"]
    if stage.affine:
        bn.weight, bn.bias = p["bn_weight"], p["bn_bias"]
    return nn.Sequential(conv, bn, _act(stage.act))


def _excitation(stage: StageCase, p: dict[str, Tensor]) -> FusedSqueezeExcite:
    squeeze, channels = p["w1"].shape
    module = FusedSqueezeExcite(channels, squeeze_channels=squeeze)
    first, _, second, _ = module.excitation
    first.weight, first.bias, second.weight, second.bias = p["w1"], p["b1"], p["w2"], p["b2"]
    module.excitation[1], module.excitation[3] = map(_act, stage.gate)
    return module


# Checking a call ------------------------------------------------------------------------------------------------------


def tensors_of(call: Call) -> Tensors:
    """In float64, representable in the call's dtype; what is expanded has the same values."""
    whole = Case("call", call.parts[0].shape, tuple(stage for case in call.parts for stage in case.stages))
    t = call.laid(make_tensors(whole, call.dtype, call.seed))
    t.x = lay(SPECIAL[call.special](t.x), call.layout("x")).to(call.dtype).double()
    return t.map(Tensor.contiguous)


def prepare(call: Call) -> Tensors:
    """As oracle.prepare; raises what stock raises where it refuses the call."""
    t = tensors_of(call)
    h = t.x
    for case, params in call.split(t):
        avoid_kinks(case, Tensors(h, params), call.training, call.dtype)
        h = stock_chain(case, Tensors(h, [{k: v.clone() for k, v in p.items()} for p in params]), call.training)
    dout = torch.randn(h.shape, generator=torch.Generator().manual_seed(call.seed + 1), dtype=torch.float64)
    t.dout = lay(dout, call.layout("dout")).to(call.dtype).double().contiguous()
    return t


def with_leaves(call: Call, t: Tensors) -> Tensors:
    """The same memory, as what a caller hands over: leaves of a graph where their gradients are wanted."""
    wanted = call.wants(t)
    leaf = nn.Parameter if call.way == "sequential" else Tensor.requires_grad_

    def stage(i: int, p: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {k: v.detach() for k, v in p.items()}
        return {k: v if k.startswith("running") else leaf(v, f"{i}.{k}" in wanted) for k, v in tensors.items()}

    return Tensors(t.x.detach().requires_grad_("x" in wanted), [stage(*each) for each in enumerate(t.stages)], t.dout)


def run(f: Callable[[Call, Tensors], Tensor], call: Call, t: Tensors) -> dict[str, Tensor]:
    """Output, wanted gradients and running statistics by name. What is not wanted has no gradient."""
    wanted, t = call.wants(t), with_leaves(call, t)
    t.stages = [{k: v.clone() if f is stock and "running" in k else v for k, v in p.items()} for p in t.stages]
    with torch.set_grad_enabled(call.mode != "evaluation"):
        out = f(call, t)
    assert out.requires_grad == bool(wanted), f"the output requires a gradient: {out.requires_grad}"
    if wanted:
        out.backward(t.dout)
    found = {"out": out.detach()}
    for name, v in t.leaves().items():
        assert (v.grad is not None) == (name in wanted), f"there is a gradient of {name}: {v.grad is not None}"
        if v.grad is not None:
            found[f"grad {name}"] = v.grad
    for i, p in enumerate(t.stages):
        found |= {f"{i}.{name}": v for name, v in p.items() if name.startswith("running")}
    return found


def named(t: Tensors) -> dict[str, Tensor]:
    found = {f"{i}.{k}": v for i, p in enumerate(t.stages) for k, v in p.items()}
    return found | {"x": t.x} | ({} if t.dout is None else {"dout": t.dout})


def check_unchanged(t: Tensors, given: Tensors, but: Callable[[str], bool]) -> None:
    before = named(given)
    changed = [name for name, v in named(t).items() if not but(name) and not torch.equal(v, before[name])]
    assert not changed, f"changed: {', '.join(changed)}"


REFUSALS = "more than 1 value per channel|Kernel size can't be greater than actual input size"


def check(call: Call, backends: Sequence[str], counts: Counter | None = None) -> None:
    """Holds each backend to the tolerance; where stock refuses the call, to a refusal that changes nothing."""
    try:
        t = prepare(call)
    except (ValueError, RuntimeError) as error:
        if not re.search(REFUSALS, str(error)):
            raise
        t = None
    else:
        try:
            check_results(call, t.map(lambda v: v.to(call.dtype)), backends)
        except AssertionError as error:
            beyond = re.match(r"beyond the tolerance(?!.* NaN of )", str(error), re.DOTALL)
            if not beyond:
                raise
            # A value beside a kink that no bias moved it from, or a gradient that stock's rounding makes exactly 0.
            wide = replace(call, dtype=torch.float64)
            check_results(wide, prepare(wide), backends, DECIDING)
            if counts is not None:
                counts[call.dtype, DECIDED] += 1
    for name in backends:
        if t is None:
            with mbn_kernels.use_backend(name):
                check_refusal(call)
        if counts is not None:
            counts[name, "refused" if t is None else call.mode] += 1


def check_results(call: Call, t: Tensors, backends: Sequence[str], factor: float = FACTOR) -> None:
    got = {}
    for name in backends:
        laid = call.laid(t)
        with mbn_kernels.use_backend(name):
            got |= {f"{name}: {k}": v for k, v in run(fused, call, laid).items()}
        check_unchanged(laid, t, lambda k: call.training and "running" in k)

    def for_each(results: dict) -> dict:
        return {f"{name}: {k}": v for name in backends for k, v in results.items()}

    hold(
        got,
        lambda given: for_each(run(stock, call, given)),
        t,
        call.dtype,
        sizes=lambda: for_each(sizes_of_terms(call, t)),
        draws=DRAWS,
        factor=factor,
    )


def check_refusal(call: Call) -> None:
    """A ValueError of one sentence. Of two chains the first may have run, as in stock's nn.Sequential."""
    t = tensors_of(call).map(lambda v: v.to(call.dtype))
    laid = call.laid(t)
    leaves, h, ran = with_leaves(call, laid), t.x, 0
    with contextlib.suppress(ValueError, RuntimeError):
        for case, params in call.split(t.map(Tensor.clone)):
            h = stock_chain(case, Tensors(h, params), call.training)
            ran += len(case.stages)
    with torch.set_grad_enabled(call.mode != "evaluation"), pytest.raises((ValueError, RuntimeError)) as error:
        fused(call, leaves)
    said = str(error.value)
    as_stock = call.way == "sequential" and call.parts[0].stages[0].conv == "dense" and re.search(REFUSALS, said)
    assert as_stock or (error.type is ValueError and re.fullmatch(r"\w+: x: expected .+, got .+", said)), said
    check_unchanged(laid, t, lambda k: "running" in k and int(k.split(".")[0]) < ran)


def sizes_of_terms(call: Call, t: Tensors) -> dict[str, float]:
    """As the oracle's sizes_before_batch_norm, with the batch's own statistics in the place of the running ones.

    What batch norm subtracts and what cancels in a sum is rounded, too, as what is accumulated: so also the size of
    outputs and gradients without a mean to subtract, and of gradients from an output's gradient of one sign.
    """
    t, frozen = t.map(lambda v: v.double().clone()), replace(call, mode="frozen" if call.training else call.mode)
    if call.training:
        stock(replace(call, momentum=1.0), t)
    sizes = {name: magnitude(g) for name, g in run(stock, frozen, t).items() if call.training and "grad" in name}
    finer = torch.finfo(chain.accumulate_dtype(call.dtype)).eps / torch.finfo(call.dtype).eps
    accumulated = [run(stock, frozen, Tensors(t.x, t.stages, t.dout.abs()))]
    for p in t.stages:
        if "running_mean" in p:
            p["running_mean"].zero_()
    accumulated.append(run(stock, frozen, t))
    for name, v in (each for results in accumulated for each in results.items()):
        terms = magnitude(t.dout) if "grad" in name else 0  # what a gradient that cancels to 0 is made of
        sizes[name] = max(sizes.get(name, 0), finer * magnitude(v), finer * terms)
    return sizes


def check_many(start: int, count: int, backends: Sequence[str], domain: Domain, counts: Counter) -> None:
    """Checks that many different calls, the same ones for the same ``start``."""
    done: set[Call] = set()

    def one(call: Call) -> None:
        if call not in done and len(done) < count:
            check(call, backends, counts)
            done.add(call)

    with pytest.MonkeyPatch.context() as patch:
        # Of releases that know it: numbers found in whichever modules are loaded, which no other run would draw.
        patch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *args, **kwargs: None, raising=False)
        # After ten examples hypothesis mostly varies former ones: each ten begin anew.
        for number in itertools.count(start):
            seed(number)(ROUND(given(calls(domain))(one)))()
            if len(done) == count:
                return
