"""Whether an implementation is right, asked just before it is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .implementations import STOCK, Pass, Prepared, prepare

#: Errors of one draw scatter: twice the factor that the tests allow, which look at many.
FACTOR = 4
#: So many roundings are always allowed.
ROUNDINGS = 8
#: And of a gradient so much: rounding takes a few values in a million across the kink of an activation, by chance.
KINKS = 1e-3
EAGER = next(i for i in STOCK if i.name == "eager-channels-last")


class Verdict(NamedTuple):
    """Of the result that is worst: its relative error, and what is allowed there."""

    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # not where it is NaN


def factored(error: float) -> float:
    """What eager's error allows; nothing where eager overflows."""
    return FACTOR * error if math.isfinite(error) else 0.0


def allowed(errors: Sequence[float], dtype: torch.dtype, *, kinks: bool = False) -> list[float]:
    """For results of which eager PyTorch has these errors in the dtype; ``kinks`` for those that are gradients."""
    least = ROUNDINGS * torch.finfo(dtype).eps + (KINKS if kinks else 0.0)
    return [factored(error) + least for error in errors]


class Oracle(NamedTuple):
    """Results in float64 from the same rounded numbers, and how far off each may be."""

    exact: list[Tensor]
    allowed: list[float]

    def judge(self, prepared: Prepared) -> Verdict:
        errors = relative_errors(prepared.results(), self.exact)
        return max((Verdict(e, t) for e, t in zip(errors, self.allowed, strict=True)), key=excess)


def excess(verdict: Verdict) -> float:
    """The error as part of what is allowed; infinite where either is NaN."""
    found = verdict.error / verdict.tolerance
    return math.inf if math.isnan(found) else found


def oracle(given: Pass) -> Oracle:
    """What all implementations of a pass are compared with."""
    exact = prepare(EAGER, given, exact=True).results()
    errors = relative_errors(prepare(EAGER, given).results(), exact)
    return Oracle(exact, allowed(errors, given.dtype, kinks=given.direction not in ("evaluation", "forward")))


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """|found - exact| / |exact| of each tensor."""
    pairs = zip(found, exact, strict=True)
    return [((f.double() - x).norm() / x.norm().clamp_min(torch.finfo(torch.float64).tiny)).item() for f, x in pairs]
