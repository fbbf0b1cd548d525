"""Whether an implementation is right, asked just before it is timed."""

from __future__ import annotations

import math
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


class Oracle(NamedTuple):
    """Results in float64 from the same rounded numbers, and the errors of eager PyTorch in the dtype itself."""

    exact: list[Tensor]
    errors: list[float]
    least: float

    def judge(self, prepared: Prepared) -> Verdict:
        allowed = [FACTOR * e + self.least for e in self.errors]
        found = [Verdict(e, t) for e, t in zip(relative_errors(prepared.results(), self.exact), allowed, strict=True)]
        return max(found, key=excess)


def excess(verdict: Verdict) -> float:
    """The error as part of what is allowed; infinite where either is NaN."""
    found = verdict.error / verdict.tolerance
    return math.inf if math.isnan(found) else found


def oracle(given: Pass) -> Oracle:
    """What all implementations of a pass are compared with."""
    exact = prepare(EAGER, given, exact=True).results()
    least = ROUNDINGS * torch.finfo(given.dtype).eps
    if given.direction not in ("evaluation", "forward"):
        least += KINKS
    return Oracle(exact, relative_errors(prepare(EAGER, given).results(), exact), least)


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """|found - exact| / |exact| of each tensor."""
    pairs = zip(found, exact, strict=True)
    return [((f.double() - x).norm() / x.norm().clamp_min(torch.finfo(torch.float64).tiny)).item() for f, x in pairs]
