"""A chain as text, which is what a schema, a graph and a cache can hold, and as what the text says: its stages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import unquote

from .activations import ACTIVATIONS
from .errors import fail, short

#: Of a width, a kernel, a stride, a padding, a dilation: far beyond any that makes sense, and no product overflows.
MOST = 1 << 20

CONVS, NORMS = ("pointwise", "depthwise", "dense", "none", "pool"), ("batch", "running", "bias", "none")

# Parameters of a stage, in this order; a stage holds those that its fields call for.
WEIGHT, NORM, RUNNING, BIAS, GATE = (
    ("weight",),
    ("bn_weight", "bn_bias"),
    ("running_mean", "running_var"),
    ("bias",),
    ("w1", "b1", "w2", "b2"),
)


@dataclass(frozen=True)
class Stage:
    """What one stage computes. ``conv`` is "pointwise", "depthwise", "dense", as a network's stem is, or "none";
    ``norm`` is "batch", "running" or "none". No chain differentiates, but a backend may evaluate
    (:meth:`Kernels.evaluates`) the ``conv`` "pool", the mean over the image, and the ``norm`` "bias" of a linear layer.
    """

    conv: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    norm: str
    affine: bool
    eps: float
    act: str
    gate: tuple[str, str] | None  # the activation between the two layers, the gate's own activation
    group: str | None = None  # name of the process group whose processes share the statistics of "batch"

    @property
    def kind(self) -> str:
        """What profiles call it."""
        return "gate" if self.conv == "none" else self.conv

    @property
    def parameter_names(self) -> tuple[str, ...]:
        names = () if self.conv in ("none", "pool") else WEIGHT
        names += NORM if self.affine else ()
        names += RUNNING if self.norm == "running" else BIAS if self.norm == "bias" else ()
        return names + (GATE if self.gate else ())

    def output_shape(self, shape: Sequence[int], weight: Sequence[int] | None) -> tuple[int, int, int, int]:
        n, c, h, w = shape
        if self.conv == "pool":
            return n, c, 1, 1
        if self.conv == "pointwise":
            return n, weight[0], h, w
        if self.conv in ("depthwise", "dense"):
            c = weight[0] if self.conv == "dense" else c
            top, bottom, left, right = self.padding
            h = (h + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
            w = (w + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        return n, c, h, w


def stage_spec(
    conv: str,
    *,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    norm: str = "none",
    affine: bool = False,
    eps: float = 0.0,
    act: str = "identity",
    gate: tuple[str, str] | None = None,
    group: str | None = None,
) -> str:
    """One stage as text. The operators take a chain as text because a string is what a schema, a graph and a cache can
    hold. ``group`` is the name of a process group (``ProcessGroup.group_name``), for ``norm`` "batch" only.
    """
    try:
        # Taken from a set, eps is a constant to torch.compile; where modules differ in it, it would else be a symbol,
        # and those have no text.
        (eps,) = frozenset((eps,))
        gate_text = f"{gate[0]}/{gate[1]}" if gate else "-"
        # Fields are divided by spaces; any name may have been given to a group.
        norm_text = norm if group is None else f"{norm}@{group.replace('%', '%25').replace(' ', '%20')}"
        return (
            f"{conv} {kernel[0]},{kernel[1]} {stride[0]},{stride[1]} "
            f"{padding[0]},{padding[1]},{padding[2]},{padding[3]} "
            f"{dilation[0]},{dilation[1]} {norm_text} {int(affine)} {eps} {act} {gate_text}"
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        given = short((kernel, stride, padding, dilation, affine, eps, gate, group))
        fail("stage_spec", "kernel", "kernel, stride, padding, dilation, affine, eps, gate, group as annotated", given)


def chain_spec(name: str, stages: Sequence[str]) -> str:
    """A chain as text: the name that errors and profiles show, then its stages."""
    try:
        return name + ": " + "; ".join(stages)
    except TypeError:
        fail("chain_spec", "stages", "a name and stages as text", f"{short(name)} and {short(stages)}", TypeError)


@dataclass(frozen=True, eq=False)
class Chain:
    """A parsed chain. There is one object per text, compared by identity: what depends on a chain alone is cached by
    it.
    """

    name: str
    stages: tuple[Stage, ...]

    @cached_property
    def batch_norms(self) -> int:
        """How many stages normalise by their batch."""
        return sum(stage.norm == "batch" for stage in self.stages)

    @cached_property
    def fixed(self) -> list[tuple[int, str]]:
        """Where in the flat list of parameters running statistics are, and which: they have no gradient."""
        names = [name for stage in self.stages for name in stage.parameter_names]
        return [(i, name) for i, name in enumerate(names) if name in RUNNING]

    @cached_property
    def only_evaluates(self) -> bool:
        """Whether a stage is none that :func:`forward` knows."""
        return any(stage.conv == "pool" or stage.norm == "bias" for stage in self.stages)


def parse(spec: str) -> Chain:
    """The inverse of :func:`chain_spec`; ValueError for a text that it did not make."""
    if not isinstance(spec, str):
        fail("parse", "spec", "a chain as text", type(spec).__name__, TypeError)
    return _parse(spec)


@lru_cache(maxsize=4096)
def _parse(spec: str) -> Chain:
    name, _, body = spec.partition(": ")
    return Chain(name, tuple(_parse_stage(text) for text in body.split("; ")))


def _parse_stage(text: str) -> Stage:
    def numbers(count: int, least: int, field: str) -> tuple[int, ...]:
        found = tuple(int(t) for t in field.split(","))
        if len(found) != count or min(found) < least or max(found) > MOST:
            raise ValueError
        return found

    def one_of(known: Collection[str], field: str) -> str:
        if field not in known:
            raise ValueError
        return field

    try:
        conv, kernel, stride, padding, dilation, norm_text, affine, eps, act, gate = text.split(" ")
        norm, shared, group = norm_text.partition("@")
        acts = None if gate == "-" else tuple(one_of(ACTIVATIONS, name) for name in gate.split("/"))
        normed = norm in ("batch", "running")
        fits = (norm == "none" or conv not in ("none", "pool")) and (normed or affine == "0")
        if not fits or (acts is not None and len(acts) != 2) or (shared and norm != "batch"):
            raise ValueError
        return Stage(
            one_of(CONVS, conv),
            numbers(2, 1, kernel),
            numbers(2, 1, stride),
            numbers(4, 0, padding),
            numbers(2, 1, dilation),
            one_of(NORMS, norm),
            one_of(("0", "1"), affine) == "1",
            float(eps),
            one_of(ACTIVATIONS, act),
            acts,
            unquote(group) if shared else None,
        )
    except ValueError:
        expected = f"a stage as stage_spec says it, its numbers at most {MOST}"
        raise ValueError(f"parse: spec: expected {expected}, got {short(text)}") from None


def stage_parameters(stages: Sequence[Stage], flat: Sequence) -> list[dict]:
    """Splits a flat list (tensors, shapes, flags) into one dict per stage, by parameter name."""
    items = iter(flat)
    return [{name: next(items) for name in stage.parameter_names} for stage in stages]
