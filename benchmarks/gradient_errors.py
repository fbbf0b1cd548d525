"""How far off the gradients of one training step of a whole network are: of each parameter, stock's own and ours.

The oracle is the plain network in float64 on the same rounded weights and images. Errors are L2 norms over a parameter
and maxima; a ratio is ours over stock's. `python -m benchmarks.accuracy` runs this.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbn_kernels import models

from .cpu_runs import DASH, markdown
from .implementations import IMPLEMENTATIONS

MODEL = "mobilenet_v3_large"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NCHW, CHANNELS_LAST, FUSED = "eager-nchw", "eager-channels-last", "fused"
BY_NAME = {i.name: i for i in IMPLEMENTATIONS if i.name in (NCHW, CHANNELS_LAST, FUSED)}
#: Who over whom; the last says what stock's own two layouts differ by.
PAIRS = ((FUSED, NCHW), (FUSED, CHANNELS_LAST), (CHANNELS_LAST, NCHW))
#: Of the largest norm of a gradient: below it is one that batch norm makes 0, and its relative error says nothing.
ZERO = 1e-12
#: Parameters whose ratio is above it are in the list.
LISTED = 1.05
DIGITS = 4


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--draws", type=int, default=21, help="steps in each dtype, of other weights and images each")
    group.add_argument("--gradient-batch", type=int, default=8)
    group.add_argument("--resolution", type=int, default=96)


# A step ---------------------------------------------------------------------------------------------------------------


class ExactHardsigmoid(nn.Module):
    """In the oracle's gates: even in float64 PyTorch's own gradient rounds 1/6 to float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


class ExactHardswish(ExactHardsigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


EXACT = {nn.Hardsigmoid: ExactHardsigmoid, nn.Hardswish: ExactHardswish}


def make_exact(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in EXACT:
                setattr(parent, name, EXACT[type(child)]())


def gradients(
    name: str, dtype: torch.dtype, state: dict[str, Tensor], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """In float64, by parameter, of the mean cross-entropy; there is no dropout, as each would draw another."""
    implementation = BY_NAME[name]
    model: nn.Module = getattr(models, MODEL)(10, dropout=0.0, fused=implementation.fused)
    model.load_state_dict(state)
    model = model.to(dtype, memory_format=implementation.memory_format)
    if dtype == torch.float64:
        make_exact(model)
    logits = model(images.to(dtype, memory_format=implementation.memory_format))
    F.cross_entropy(logits if dtype == torch.float64 else logits.float(), labels).backward()
    return {parameter: p.grad.double() for parameter, p in model.named_parameters()}


def draw(dtype: torch.dtype, seed: int, batch: int, resolution: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A new network's state, random images and labels, in float32 but rounded to ``dtype``."""
    torch.manual_seed(seed)
    state = getattr(models, MODEL)(10).state_dict()
    state = {name: t.to(dtype).float() if t.is_floating_point() else t for name, t in state.items()}
    images = torch.randn(batch, 3, resolution, resolution).to(dtype).float()
    return state, images, torch.randint(10, (batch,))


def rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def measure(dtype: str, seed: int, options: argparse.Namespace) -> dict:
    """One row: by parameter the norm and the largest number of the exact gradient; by implementation the norm and the
    largest number of what its own differs by. Columns follow the names in ``parameters``.
    """
    given = draw(DTYPES[dtype], seed, options.gradient_batch, options.resolution)
    exact = gradients(NCHW, torch.float64, *given)
    found = {name: gradients(name, DTYPES[dtype], *given) for name in BY_NAME}
    off = {name: {p: g - exact[p] for p, g in by_parameter.items()} for name, by_parameter in found.items()}

    def norms(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
        of = {"l2": lambda t: t.norm().item(), "max": lambda t: t.abs().max().item()}
        return {kind: [rounded(f(t)) for t in tensors.values()] for kind, f in of.items()}

    what = {"model": MODEL, "dtype": dtype, "seed": seed, "batch": options.gradient_batch}
    what |= {"resolution": options.resolution, "threads": torch.get_num_threads()}
    return {
        **what,
        "parameters": list(exact),
        "exact": norms(exact),
        "errors": {name: norms(tensors) for name, tensors in off.items()},
    }


def rows(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict]]]:
    for dtype, seed in product(DTYPES, range(options.draws)):
        yield f"gradients in {dtype}, draw {seed}", lambda d=dtype, s=seed: measure(d, s, options)


# What the rows say ----------------------------------------------------------------------------------------------------


def of_dtype(result: dict, dtype: str) -> list[dict]:
    return [row for row in result["rows"] if row["dtype"] == dtype]


def zeros(rows: list[dict]) -> set[str]:
    """The parameters whose gradient is 0 but for rounding: biases that the next batch norm takes away again."""
    found = set()
    for row in rows:
        norms = row["exact"]["l2"]
        found |= {p for p, n in zip(row["parameters"], norms, strict=True) if n <= ZERO * max(norms)}
    return found


def ratios(rows: list[dict], of: str, to: str, kind: str = "l2") -> dict[str, list[float]]:
    """By parameter, one number for each draw: an error over another's. Where both are right it is 1."""
    found: dict[str, list[float]] = {}
    for row in rows:
        errors = (row["errors"][name][kind] for name in (of, to))
        for parameter, above, below in zip(row["parameters"], *errors, strict=True):
            ratio = above / below if below else (float("inf") if above else 1.0)
            found.setdefault(parameter, []).append(ratio)
    return found


def as_one(row: dict, errors: list[float]) -> float:
    """The L2 error of all parameters as one vector, relative to their gradient as one."""
    return math.hypot(*errors) / math.hypot(*row["exact"]["l2"])


def summary(rows: list[dict], of: str, to: str) -> list[str]:
    """Relative errors of all parameters as one vector, their ratio, and how many ratios by parameter are above 1."""
    whole = {name: [as_one(row, row["errors"][name]["l2"]) for row in rows] for name in (of, to)}
    ratio = [a / b for a, b in zip(whole[of], whole[to], strict=True)]
    cells = [f"{statistics.median(whole[name]):.1e}" for name in (of, to)]
    cells.append(f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})")
    for kind in ("l2", "max"):
        by_parameter = ratios(rows, of, to, kind)
        above = [statistics.median(numbers) for numbers in by_parameter.values()]
        always = sum(min(numbers) > 1 for numbers in by_parameter.values())
        cells.append(f"{sum(m > 1 for m in above)}, {always}, {max(above):.2f}")
    return cells


def table(result: dict) -> str:
    """For each dtype, who over whom."""
    ways = "of parameters: above 1, in every draw, the largest"
    heads = ["a over b", "error of a", "error of b", "a over b (all draws)", f"L2 {ways}", f"maximum, {ways}"]
    cells = []
    for dtype in DTYPES:
        rows = of_dtype(result, dtype)
        for of, to in PAIRS if rows else ():
            cells.append([f"{dtype}: {of} over {to}", *summary(rows, of, to)])
    return markdown(heads, cells)


def above_table(result: dict) -> str:
    """The parameters whose L2 ratio to the better of stock's layouts, median over the draws, is above LISTED; worst
    first. The better layout is the one to which the ratio is larger.
    """
    cells = []
    for dtype in DTYPES:
        rows = of_dtype(result, dtype)
        by_layout = [ratios(rows, FUSED, to) for to in (NCHW, CHANNELS_LAST)]
        worst = {p: max((by[p] for by in by_layout), key=statistics.median) for p in by_layout[0]}
        zero = zeros(rows)
        for parameter, numbers in sorted(worst.items(), key=lambda item: -statistics.median(item[1])):
            ratio = statistics.median(numbers)
            if ratio > LISTED:
                size = "0 but for rounding" if parameter in zero else "not 0"
                above = f"{sum(n > 1 for n in numbers)} of {len(numbers)}"
                cells.append([f"{dtype}, {parameter}", size, f"{ratio:.2f}", f"{min(numbers):.2f}", above])
    heads = ["parameter", "its gradient", "ratio, median", "smallest", "draws above 1"]
    return markdown(heads, cells or [[DASH] * len(heads)])
