"""The oracle: stock PyTorch in float64 on the same rounded inputs, and the tolerance, stated here once.

TOLERANCE. With errors as maxima over a tensor, against the float64 oracle on the inputs as rounded to the dtype:

    error(fused) <= 2 * error(stock PyTorch at that dtype) + eps(dtype) * scale

for outputs, all gradients and running statistics. ``scale`` is the oracle's largest magnitude; for a mean it is that of
the numbers averaged, since their rounding is what a mean inherits, and for a variance at least
eps * (4 * mean)^2, as its mean is rounded. float64 has no wider oracle: there the bound is 1e-12 * scale.

Both terms are estimates that a small tensor can make by luck: the maximum of four rounding errors may be nearly 0, and
a sum that happens to cancel has no scale. So before a breach counts, stock's error is taken anew on up to DRAWS copies
of the inputs in either memory format, each rounded once more at random, and scale becomes the largest of: the oracle's
magnitude, what that rounding alone changed in the oracle over eps, and a gradient's size before batch norm cancels it.
The fused error is never drawn again. :func:`hold` can be given more draws, and another factor than 2.

A derivative that jumps turns a rounding error into an error of its own size, in stock as here. So inputs keep away from
kinks where they can: :func:`avoid_kinks` shifts each bias to the widest gap between the values that it adds to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mbn_kernels import chain, functional
from mbn_kernels.activations import ACTIVATIONS

ACTS = tuple(ACTIVATIONS)
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "hardsigmoid": (-3.0, 3.0)}
DRAWS = 8


# Even in float64 stock rounds 1/6 to float32: in hard-sigmoid's gradient, and on a GPU in hard-swish.
def exact_hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6 if x.dtype == torch.float64 else F.hardsigmoid(x)


def exact_hardswish(x: Tensor) -> Tensor:
    return x * exact_hardsigmoid(x) if x.dtype == torch.float64 else F.hardswish(x)


STOCK_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": exact_hardswish,
    "silu": F.silu,
    "hardsigmoid": exact_hardsigmoid,
    "sigmoid": torch.sigmoid,
}


# Chains ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StageCase:
    """One stage of a case: the fields of :func:`mbn_kernels.chain.stage_spec`, and a pointwise or dense stage's output
    width.
    """

    conv: str
    out: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    act: str = "identity"
    norm: bool = True
    affine: bool = True
    gate: tuple[str, str] | None = None
    eps: float = 1e-5

    def spec(self, training: bool) -> str:
        window = {"kernel": self.kernel, "stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        norm = {"norm": "batch" if training else "running", "affine": self.affine, "eps": self.eps} if self.norm else {}
        return chain.stage_spec(self.conv, **window, **norm, act=self.act, gate=self.gate)


def pw(out: int, act: str = "identity", **fields) -> StageCase:
    return StageCase("pointwise", out, act=act, **fields)


def dw(k: int | tuple[int, int], act: str = "identity", *, stride=1, padding=None, dilation=1, **fields) -> StageCase:
    kernel = (k, k) if isinstance(k, int) else k
    stride = (stride, stride) if isinstance(stride, int) else stride
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    if padding is None:
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True) for _ in range(2))
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    return StageCase("depthwise", 0, kernel, stride, padding, dilation, act, **fields)


def dense(out: int, k: int | tuple[int, int], act: str = "identity", **fields) -> StageCase:
    return replace(dw(k, act, **fields), conv="dense", out=out)


def se(act: str = "relu", gate: str = "hardsigmoid") -> StageCase:
    return StageCase("none", norm=False, gate=(act, gate))


@dataclass(frozen=True)
class Case:  # a chain on an input
    name: str
    shape: tuple[int, int, int, int]
    stages: tuple[StageCase, ...]
    residual: bool = False

    def __str__(self) -> str:
        return self.name


def in_each_mode(cases: Sequence[Case]) -> list[tuple[Case, bool]]:
    """(case, training); a case without batch norm has one mode."""
    return [(c, training) for c in cases for training in (True, False) if not training or any(s.norm for s in c.stages)]


def mode_id(value: object) -> str:
    return str(value) if isinstance(value, Case) else ("evaluation", "training")[value]


@dataclass
class Tensors:  # of a case
    x: Tensor
    stages: list[dict[str, Tensor]]  # parameters by name
    dout: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Tensors:
        stages = [{name: f(t) for name, t in p.items()} for p in self.stages]
        return Tensors(f(self.x), stages, None if self.dout is None else f(self.dout))

    def leaves(self) -> dict[str, Tensor]:
        """What to differentiate, by name: all but the running statistics."""
        found = {"x": self.x}
        for i, p in enumerate(self.stages):
            found |= {f"{i}.{name}": t for name, t in p.items() if not name.startswith("running")}
        return found


def make_tensors(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Random tensors of unit scale, given as float64 but representable in ``dtype``; without dout."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def sign_and_size(n: int) -> Tensor:  # some batch norms have a negative weight
        return (0.5 + torch.rand(n, generator=g, dtype=torch.float64)) * randn(n).sign()

    channels, stages = case.shape[1], []
    for stage in case.stages:
        p = {}
        if stage.conv == "pointwise":
            p["weight"] = randn(stage.out, channels, 1, 1) / max(channels, 1) ** 0.5
            channels = stage.out
        elif stage.conv == "dense":
            taps = channels * stage.kernel[0] * stage.kernel[1]
            p["weight"] = randn(stage.out, channels, *stage.kernel) / max(taps, 1) ** 0.5
            channels = stage.out
        elif stage.conv == "depthwise":
            p["weight"] = randn(channels, 1, *stage.kernel) / (stage.kernel[0] * stage.kernel[1]) ** 0.5
        if stage.norm and stage.affine:
            p |= {"bn_weight": sign_and_size(channels), "bn_bias": 0.3 * randn(channels)}
        if stage.norm:
            p |= {"running_mean": 0.3 * randn(channels), "running_var": 0.5 + randn(channels).abs()}
        if stage.gate:
            squeeze = max(channels // 4, 2)
            p |= {"w1": randn(squeeze, channels) / channels**0.5, "b1": randn(squeeze)}
            p |= {"w2": randn(channels, squeeze) / squeeze**0.5, "b2": randn(channels)}
        stages.append(p)
    return Tensors(0.3 + randn(*case.shape), stages).map(lambda t: t.to(dtype).to(torch.float64))


def gap_shift(n: Tensor, kinks: Sequence[float], width: float = 0.5) -> Tensor:
    """For each column of n [values, channels], the shift within ``width`` that leaves most room around every kink."""
    if not n.numel():
        return n.new_zeros(n.shape[1:])
    ends = [n.new_full((1, n.shape[1]), e) for e in (-width, width)]
    ordered = torch.cat([n - k for k in kinks] + ends).clamp(-width, width).sort(0).values
    room, index = ordered.diff(dim=0).max(0)
    return -(ordered.gather(0, index[None])[0] + room / 2)


def avoid_kinks(case: Case, tensors: Tensors, training: bool, dtype: torch.dtype) -> None:
    """Shifts biases so that no value lies on or next to a kink of its activation."""

    def shift(i: int, bias: str, act: str, n: Tensor) -> Tensor:
        p = tensors.stages[i]
        if act not in KINKS or bias not in p:
            return n
        columns = n.transpose(0, 1).flatten(1).T
        moved = (p[bias] + gap_shift(columns, KINKS[act])).to(dtype).to(torch.float64)
        by, p[bias] = moved - p[bias], moved
        return n + (by[:, None, None] if n.dim() == 4 else by)

    stock_chain(case, tensors.map(torch.Tensor.clone), training, shift=shift)


def _as_it_is(i: int, bias: str, act: str, n: Tensor) -> Tensor:
    return n


def stock_chain(
    case: Case,
    t: Tensors,
    training: bool,
    momentum: float = 0.1,
    shift: Callable = _as_it_is,
    conv2d: Callable = F.conv2d,
) -> Tensor:
    """The chain as stock PyTorch's own operators; updates the running statistics in training."""
    h = t.x
    for i, (stage, p) in enumerate(zip(case.stages, t.stages, strict=True)):
        if stage.conv == "pointwise":
            h = conv2d(h, p["weight"])
        elif stage.conv in ("depthwise", "dense"):
            top, bottom, left, right = stage.padding
            pads = (top, left) if (top, left) == (bottom, right) else 0  # else padded beforehand
            h = h if pads else F.pad(h, (left, right, top, bottom))
            groups = h.shape[1] if stage.conv == "depthwise" else 1
            h = conv2d(h, p["weight"], None, stage.stride, pads, stage.dilation, groups)
        if stage.norm:
            running = p["running_mean"], p["running_var"]
            h = F.batch_norm(h, *running, p.get("bn_weight"), p.get("bn_bias"), training, momentum, stage.eps)
            h = shift(i, "bn_bias", stage.act, h)
        h = STOCK_ACTS[stage.act](h)
        if stage.gate:
            pooled = h.mean((2, 3))
            hidden = shift(i, "b1", stage.gate[0], F.linear(pooled, p["w1"].flatten(1), p["b1"]))
            logits = F.linear(STOCK_ACTS[stage.gate[0]](hidden), p["w2"].flatten(1), p["b2"])
            logits = shift(i, "b2", stage.gate[1], logits)
            h = h * STOCK_ACTS[stage.gate[1]](logits)[:, :, None, None]
    return t.x + h if case.residual else h


def fused_chain(case: Case, t: Tensors, training: bool, momentum: float = 0.1) -> Tensor:
    """The same chain as one ``torch.ops.mbn.chain``."""
    specs, params, running = [], [], []
    for stage, p in zip(case.stages, t.stages, strict=True):
        specs.append(stage.spec(training))
        params += [v for name, v in p.items() if not (training and name.startswith("running"))]
        if training and stage.norm:
            running.append(functional.Running(p["running_mean"], p["running_var"], momentum))
    return functional.run_chain(t.x, chain.chain_spec(case.name, specs), params, running, case.residual)


def fused_functional(case: Case, t: Tensors, training: bool, momentum: float = 0.1) -> Tensor:
    """A case of one stage through the public function of its name."""
    (stage,), (p,) = case.stages, t.stages
    if stage.conv == "none":
        return functional.squeeze_excite(t.x, p["w1"], p["b1"], p["w2"], p["b2"], act=stage.gate[0], gate=stage.gate[1])
    norm = [p.get(name) for name in ("bn_weight", "bn_bias", "running_mean", "running_var")]
    options = {"act": stage.act, "training": training, "momentum": momentum, "eps": stage.eps}
    if stage.conv == "pointwise":
        residual = t.x if case.residual else None
        return functional.pointwise_conv_bn_act(t.x, p["weight"], *norm, residual=residual, **options)
    window = {"stride": stage.stride, "padding": stage.padding, "dilation": stage.dilation}
    return functional.depthwise_conv_bn_act(t.x, p["weight"], *norm, **window, **options)


def run(f: Callable[[Case, Tensors, bool], Tensor], case: Case, t: Tensors, training: bool) -> dict[str, Tensor]:
    """Output, gradients and running statistics by name; ``t`` is left as it was."""
    t = t.map(torch.Tensor.detach)
    t.stages = [{k: v.clone() if k.startswith("running") else v for k, v in p.items()} for p in t.stages]
    leaves = {name: v.requires_grad_() for name, v in t.leaves().items()}
    out = f(case, t, training)
    grads = torch.autograd.grad(out, list(leaves.values()), t.dout)
    found = {"out": out.detach()} | {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}
    if not training:  # without gradients another path may run
        with torch.no_grad():
            found["out without gradients"] = f(case, t, training)
    for i, p in enumerate(t.stages):
        found |= {f"{i}.{name}": v for name, v in p.items() if name.startswith("running")}
    return found


def prepare(case: Case, dtype: torch.dtype, training: bool, seed: int = 0) -> Tensors:
    """A case's tensors in float64, representable in dtype, away from kinks, with a gradient of the output."""
    t = make_tensors(case, dtype, seed)
    avoid_kinks(case, t, training, dtype)
    shape = stock_chain(case, t.map(torch.Tensor.clone), training).shape
    g = torch.Generator().manual_seed(seed + 1)
    t.dout = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(torch.float64)
    return t


# Comparison -----------------------------------------------------------------------------------------------------------


class Expected:
    """The oracle's results, and by name how far from them a result may be."""

    def __init__(
        self,
        dtype: torch.dtype,
        oracle: dict[str, Tensor],
        stock: dict[str, Tensor],
        not_finite: bool = False,
        factor: float = 2,
    ) -> None:
        self.dtype, self.oracle, self.stock, self.not_finite, self.factor = dtype, oracle, stock, not_finite, factor
        self.own = {name: max_error(stock[name], t) for name, t in oracle.items()}
        self.slack = {name: self.eps * self._scale(name) for name in oracle}

    @property
    def eps(self) -> float:
        return 1e-12 if self.dtype == torch.float64 else torch.finfo(self.dtype).eps

    def _scale(self, name: str) -> float:
        scale = magnitude(self.oracle[name])
        if name.endswith("running_mean"):
            return max(scale, magnitude(self.oracle[name[:-4] + "var"]) ** 0.5)
        if name.endswith("running_var"):
            return max(scale, self.eps * (4 * magnitude(self.oracle[name[:-3] + "mean"])) ** 2)
        return scale

    def draw(self, oracle: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
        """Takes in the results on inputs rounded anew."""
        for name in self.oracle:
            self.own[name] = max(self.own[name], max_error(stock[name], oracle[name]))
            change = max_error(oracle[name], self.oracle[name]) / torch.finfo(self.dtype).eps
            self.slack[name] = max(self.slack[name], self.eps * change)

    def widen(self, sizes: dict[str, float]) -> None:
        for name, size in sizes.items():
            self.slack[name] = max(self.slack[name], self.eps * size)

    def breaches(self, got: dict[str, Tensor]) -> list[str]:
        """Every breach, so that one failure shows all of them.

        Of a derivative at NaN stock makes 0 or 1 as its loops happen to be vectorised, and it hides NaN behind a
        derivative of 0. So where inputs are ``not_finite``, gradients need only be NaN wherever stock's are. Of running
        statistics infinity may be NaN.
        """
        assert got.keys() == self.oracle.keys()
        found = []
        for name, t in got.items():
            stock, error = self.stock[name], max_error(t, self.oracle[name])
            bound = self.factor * (self.own[name] + self.slack[name] / 2)
            if (t.shape, t.dtype) != (stock.shape, stock.dtype):
                found.append(f"{name}: {t.dtype} {tuple(t.shape)}, stock's {stock.dtype} {tuple(stock.shape)}")
            elif self.not_finite and name.startswith("grad"):
                if (stock.isnan() & ~t.isnan()).any():
                    found.append(f"{name}: finite where stock is NaN")
            elif self.not_finite and "running" in name:
                if not torch.equal(t.isfinite(), stock.isfinite()):
                    found.append(f"{name}: {int(t.isfinite().sum())} finite, stock {int(stock.isfinite().sum())}")
            elif not torch.equal(t.isnan(), stock.isnan()):
                found.append(f"{name}: {int(t.isnan().sum())} NaN of {t.numel()}, stock {int(stock.isnan().sum())}")
            elif not error <= bound:
                terms = f"{self.factor} * stock's {self.own[name]:.3g} + {self.factor / 2 * self.slack[name]:.3g}"
                found.append(f"{name}: error {error:.3g} above {terms}")
        return found


def magnitude(t: Tensor) -> float:
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def max_error(t: Tensor, oracle: Tensor) -> float:
    """The largest difference; numbers that are infinite or NaN must be the same in both, else it is infinite."""
    t, oracle = t.detach().double(), oracle.detach().double()
    same = (t == oracle) | (t.isnan() & oracle.isnan())
    return torch.where(same, 0.0, (t - oracle).abs().nan_to_num(float("inf"))).max().item() if t.numel() else 0.0


def compare_case(
    f: Callable,
    case: Case,
    dtype: torch.dtype,
    training: bool,
    seed: int = 0,
    change: Callable | None = None,
    not_finite: bool = False,
) -> None:
    """Runs ``f`` (:func:`fused_chain` or :func:`fused_functional`) on a case and holds it to the tolerance.

    ``change`` gives the tensors other strides or values; stock gets the same. ``not_finite``: see :meth:`breaches`.
    """
    change = change or (lambda t: t)
    typed = change(prepare(case, dtype, training, seed).map(lambda v: v.to(dtype)))
    got = run(f, case, typed, training)
    sizes = functools.partial(sizes_before_batch_norm, case, typed) if training else dict
    hold(got, lambda t: run(stock_chain, case, t, training), typed, dtype, change, not_finite, sizes)


def sizes_before_batch_norm(case: Case, t: Tensors) -> dict[str, float]:
    """The size of each gradient before batch norm takes its part away, which is its size in evaluation.

    A weight that only scales what is normalised has no gradient in training but the rounding errors of its terms.
    """
    found = run(stock_chain, case, t.map(torch.Tensor.double), False)
    return {name: magnitude(g) for name, g in found.items() if name.startswith("grad")}


def hold(
    got: dict[str, Tensor],
    stock: Callable[[Tensors], dict],
    t: Tensors,
    dtype: torch.dtype,
    change: Callable = lambda t: t,
    not_finite: bool = False,
    sizes: Callable[[], dict[str, float]] = dict,
    draws: int = DRAWS,
    factor: float = 2,
) -> None:
    """Holds fused results to the tolerance; ``stock`` computes the same results from tensors of any dtype."""
    expected = Expected(dtype, stock(t.map(torch.Tensor.double)), stock(t), not_finite, factor)
    g = torch.Generator().manual_seed(0)

    def again(v: Tensor) -> Tensor:
        noise = torch.rand(v.shape, generator=g, dtype=torch.float64) - 0.5
        return (v.double() * (1 + torch.finfo(dtype).eps * noise.to(v.device))).to(dtype)

    for draw in range(draws):
        if not expected.breaches(got):
            break
        if draw == 0:
            expected.widen(sizes())
        drawn = change(t.map(again))
        if draw % 2:
            drawn.x = drawn.x.contiguous(memory_format=torch.channels_last)
        expected.draw(stock(drawn.map(torch.Tensor.double)), stock(drawn))
    assert not expected.breaches(got), "\n".join(["beyond the tolerance:", *expected.breaches(got)])
