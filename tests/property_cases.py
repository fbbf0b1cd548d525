"""Random calls for tests/test_properties.py: what a call is, and how hypothesis draws one.

A :class:`Call` is one or two chains, their tensors (a seed, special values, strides), a mode and what is
differentiated. :func:`calls` draws them, mostly small ones; property_checks.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from oracle import ACTS, KINKS, Case, StageCase, Tensors, dense, dw, pw, se
from torch import Tensor

from mbn_kernels import chain

MODES = ("training", "evaluation", "frozen")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAN = float("nan")


# Strides --------------------------------------------------------------------------------------------------------------


def _flat(v: Tensor, last: bool) -> Tensor:
    """The values one number into a buffer of NaN, of channels-last strides if ``last``: aligned to nothing."""
    buffer = v.new_full((v.numel() + 2,), NAN)[1:-1]
    if last and v.dim() == 4:
        n, c, h, w = v.shape
        return buffer.view(n, h, w, c).permute(0, 3, 1, 2).copy_(v)
    return buffer.view(v.shape).copy_(v)


def _rotated(v: Tensor) -> Tensor:
    dims = [*range(1, v.dim()), 0]
    return v.permute(dims).contiguous().permute([v.dim() - 1, *range(v.dim() - 1)])


def _sliced(v: Tensor) -> Tensor:
    place = v.new_full([n + 2 for n in v.shape], NAN)
    for d, n in enumerate(v.shape):
        place = place.narrow(d, 1, n)
    return place.copy_(v)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-last": lambda v: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v.contiguous(),
    "offset": lambda v: _flat(v, False),
    "channels-last, offset": lambda v: _flat(v, True),
    "spread": lambda v: v.new_full((*v.shape[:-1], 2 * v.shape[-1]), NAN)[..., ::2].copy_(v),
    "sliced": _sliced,
    "transposed": lambda v: v.mT.contiguous().mT if v.dim() > 1 else v.contiguous(),
    "rotated": _rotated,
    "reversed": lambda v: v.permute(*reversed(range(v.dim()))).contiguous().permute(*reversed(range(v.dim()))),
}
#: Of dimensions with stride 0, whose values are therefore the same.
EXPANDED = {"expanded 0": (0,), "expanded 1": (1,), "expanded map": (2, 3), "expanded": (0, 1, 2, 3)}


def lay(v: Tensor, layout: str) -> Tensor:
    """A fresh tensor of these values, or of the first along expanded dimensions, in that layout."""
    if layout in LAYOUTS:
        return LAYOUTS[layout](v.clone())
    first = v
    for d in EXPANDED[layout]:
        first = first.narrow(d, 0, min(1, v.shape[d])) if d < v.dim() else first
    return first.clone().expand(v.shape)


# Special values -------------------------------------------------------------------------------------------------------


def _constant_channel(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0.7
    return x


SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "constant channel": _constant_channel,
    "large mean": lambda x: x + 100,
    "small": lambda x: 1e-4 * x,
    "large": lambda x: 1e4 * x,
    "zeros": torch.zeros_like,
}


# Calls ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """``parts`` run one behind the other. ``way``: "chain" (``run_chain``), "function" (the public one of its name),
    "linked" (``run_linked``), "sequential" (modules in a ``FusedSequential``).
    """

    parts: tuple[Case, ...]
    mode: str = "training"
    dtype: torch.dtype = torch.float32
    way: str = "chain"
    wanted: int = -1  # one bit for each tensor that can have a gradient
    layouts: tuple[str, ...] = ("contiguous",)  # of x, of the output's gradient, then of the parameters in turn
    special: str = "none"
    momentum: float = 0.1
    seed: int = 0

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def split(self, t: Tensors) -> Iterator[tuple[Case, list[dict[str, Tensor]]]]:
        stages = iter(t.stages)
        for case in self.parts:
            yield case, [next(stages) for _ in case.stages]

    def layout(self, name: str) -> str:
        """Of a tensor by its name in ``Tensors.leaves``, "dout", or that of a running statistic."""
        stem = self.way == "sequential" and self.parts[0].stages[0].conv == "dense"
        if stem and (name == "x" or name.startswith("0.")):
            # It may run as stock, where oneDNN is wrong of some channels-last maps, and batch norm of strided vectors.
            return "contiguous"
        if name in ("x", "dout"):
            return self.layouts[("x", "dout").index(name) % len(self.layouts)]
        of_parameters = self.layouts[2:] or self.layouts
        layout = of_parameters[sum(map(ord, name)) % len(of_parameters)]
        # Biases keep values away from kinks, each channel's in its own way; what is updated needs memory of its own.
        single = name.endswith(("bias", "b1", "b2")) or (self.training and "running" in name)
        return "spread" if single and layout in EXPANDED else layout

    def laid(self, t: Tensors) -> Tensors:
        stages = [{k: lay(v, self.layout(f"{i}.{k}")) for k, v in p.items()} for i, p in enumerate(t.stages)]
        return Tensors(lay(t.x, self.layout("x")), stages, None if t.dout is None else lay(t.dout, self.layout("dout")))

    def wants(self, t: Tensors) -> list[str]:
        names = [] if self.mode == "evaluation" else list(t.leaves())
        return [name for i, name in enumerate(names) if self.wanted >> i & 1]


# Drawing calls --------------------------------------------------------------------------------------------------------


def size(usual: int, most: int, least: int = 1) -> st.SearchStrategy[int]:
    """Two of three are small."""
    return st.integers(least, usual) | st.integers(least, usual) | st.integers(least, most)


ACT = st.sampled_from(ACTS)
GATE = st.none() | st.just(("relu", "hardsigmoid")) | st.tuples(ACT, ACT)
SHAPES = ("pw", "dw", "se", "dw+pw", "pw+dw+pw", "dense", "dense+dw+pw", "pw+pw")


@dataclass(frozen=True)
class Domain:
    """How large calls are, and which."""

    images: int = 5
    channels: tuple[int, int] = (9, 130)  # usually at most, at most
    map: tuple[int, int] = (9, 40)
    ways: tuple[str, ...] = ("chain", "function", "linked", "sequential")
    dtypes: tuple[torch.dtype, ...] = DTYPES
    shapes: tuple[str, ...] = SHAPES
    multiple: int = 1  # of which all widths are
    square: bool = False  # windows that are alike in both directions
    kernels: tuple[int, ...] = (3, 1, 5, 7)
    strides: tuple[int, ...] = (1, 2, 3)
    dilations: tuple[int, ...] = (1, 1, 2, 3)

    def width(self) -> st.SearchStrategy[int]:
        return size(*self.channels).map(lambda c: c * self.multiple)


#: What an interpreter of Triton's kernels runs in about a second.
TRITON = Domain(
    images=2, channels=(5, 20), map=(4, 8), ways=("chain", "function"), dtypes=(torch.float32, torch.bfloat16)
)
#: What the CUDA kernels take.
CUDA = replace(
    TRITON,
    ways=("chain",),
    channels=(2, 4),
    multiple=8,
    square=True,
    kernels=(3, 5, 7),
    strides=(1, 2),
    dilations=(1,),
    shapes=("dw", "dw+pw", "pw+dw+pw"),
)


@st.composite
def window(draw: st.DrawFn, domain: Domain, same: bool, symmetric: bool) -> dict:
    """Kernel, stride, dilation and pads: of a stage that keeps the size, or any; alike on both sides, or not."""

    def pair(values: Sequence[int]) -> tuple[int, int]:
        first = draw(st.sampled_from(values))
        return first, first if domain.square else draw(st.sampled_from(values))

    kernel, dilation = pair(domain.kernels), pair(domain.dilations)
    stride = (1, 1) if same else pair(domain.strides)
    keeps, pads = same or draw(st.booleans()), []
    for k, d in zip(kernel, dilation, strict=True):
        around = d * (k - 1)
        if symmetric:
            pads += [around // 2 if keeps else draw(st.integers(0, k))] * 2
        elif keeps:
            top = draw(st.just(around // 2) | st.integers(0, around))
            pads += [top, around - top]
        else:
            pads += [draw(st.integers(0, k)), draw(st.integers(0, k))]
    return {"k": kernel, "stride": stride, "dilation": dilation, "padding": tuple(pads)}


@st.composite
def part(draw: st.DrawFn, domain: Domain, shape: tuple[int, ...], shapes: Sequence[str], module: bool) -> Case:
    kind = draw(st.sampled_from(shapes))
    without = ("dense", "se") if module else ("dense",)  # there is no module of these with a residual
    if kind.startswith("dense"):  # of an image's few channels
        shape = (shape[0], draw(st.integers(1, 4)), *shape[2:])
    inner, residual = shape[1], kind not in without and draw(st.sampled_from((False, False, True)))
    stages: list[StageCase] = []
    names = kind.split("+")
    for i, name in enumerate(names):
        # Stock's own hard-sigmoid, as a stem's module has it in evaluation, is no oracle: see exact_hardsigmoid.
        act = ACT.filter(lambda act: act != "hardsigmoid") if name == "dense" and module else ACT
        fields = {"act": draw(act), "affine": draw(st.sampled_from((True, True, True, False)))}
        if not module and draw(st.integers(0, 9)) == 9:
            fields |= {"norm": False, "affine": False}
        if name != "dense" and name != "se" and draw(st.booleans()):
            fields["gate"] = draw(GATE)
        out = inner if residual and i == len(names) - 1 else draw(domain.width())
        channels = (stages[-1].out if stages and name == "dw" else 0) or inner
        if name == "pw":
            stages.append(pw(out, **fields))
        elif name == "se":
            stages.append(se(*draw(st.tuples(ACT, ACT))))
        else:
            of = draw(window(domain, residual, module))
            if module and name == "dw" and channels == 1 and of["k"] == (1, 1):
                of = {"k": (1, 1), "padding": 0}  # a strided 1x1 convolution of one channel would be no stage's
            stages.append(dw(**of, **fields) if name == "dw" else dense(out, **of, **fields))
    return Case("call", shape, tuple(stages), residual)


@st.composite
def calls(draw: st.DrawFn, domain: Domain = Domain()) -> Call:
    """Any call, mostly a small one."""
    way = draw(st.sampled_from(domain.ways))
    images, height, width = draw(st.integers(0, domain.images)), draw(size(*domain.map)), draw(size(*domain.map))
    parts = _parts(draw, domain, (images, draw(domain.width()), height, width), way)
    mode = draw(st.sampled_from(MODES[::2] if way == "linked" else MODES))
    names = st.sampled_from(tuple(LAYOUTS)) | st.sampled_from((*LAYOUTS, *EXPANDED))
    # Of zeros in training nothing is left but roundings, whose size no other rounding of zeros would show.
    special = draw(st.just("none") | st.sampled_from(tuple(SPECIAL)[: -1 if mode == "training" else None]))
    layouts = tuple(draw(st.lists(names, min_size=3, max_size=5)))
    if mode == "training" and (special == "constant channel" or layouts[0] in ("expanded map", "expanded")):
        parts = tuple(replace(case, stages=tuple(map(_off_kinks, case.stages))) for case in parts)
    return Call(
        parts,
        mode,
        draw(st.sampled_from(domain.dtypes)),
        way,
        draw(st.just(-1) | st.integers(0, 2**20 - 1)),
        layouts,
        special,
        draw(st.sampled_from((0.1, 0.01, 1.0))),
        draw(st.integers(0, 2**16)),
    )


def _off_kinks(stage: StageCase) -> StageCase:
    """What is constant is 0 once it is normalised, on a kink that only a bias would move it from."""
    return replace(stage, act="silu") if stage.act in KINKS and stage.norm and not stage.affine else stage


def _parts(draw: st.DrawFn, domain: Domain, shape: tuple[int, ...], way: str) -> tuple:
    if way == "function":
        return (_function(draw, domain, shape),)
    module = way == "sequential"
    shapes = [s for s in domain.shapes if not (module and s == "dense+dw+pw")]
    first = draw(part(domain, shape, shapes, module))
    if way == "chain":
        return (first,)
    if way == "linked":  # ends in a norm without a gate, and the second begins with a convolution
        *others, last = first.stages
        last = last if last.conv != "none" else pw(draw(domain.width()))
        first = replace(first, stages=(*others, replace(last, norm=True, gate=None)), residual=False)
        shapes = [s for s in shapes if s != "se" and not s.startswith("dense")]
    elif module:
        shapes = [s for s in shapes if s != "dense"]
    between = output_shape(first)
    second = draw(part(domain, between, shapes, module))
    return first, replace(second, residual=second.residual and way != "linked")


def _function(draw: st.DrawFn, domain: Domain, shape: tuple[int, ...]) -> Case:
    case = draw(part(domain, shape, ("pw", "dw", "se"), True))
    (stage,) = case.stages
    if stage.conv == "none":
        return replace(case, residual=False)
    return Case("call", shape, (replace(stage, gate=None),), case.residual and stage.conv == "pointwise")


def output_shape(case: Case) -> tuple[int, int, int, int]:
    shape = case.shape
    for stage in case.stages:
        (parsed,) = chain.parse(chain.chain_spec("call", [stage.spec(False)])).stages
        shape = parsed.output_shape(shape, (stage.out,))
    return shape
