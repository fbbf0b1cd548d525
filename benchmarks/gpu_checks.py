"""What a contestant gives, compared with float64 just before it is timed: who is off has no time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .correct import Verdict, allowed, relative_errors
from .gpu_contestants import EAGER, EXACT, Contestant, Timed, turn
from .gpu_timing import Setting, in_one_line, median_seconds

#: The results of each pass, by its name.
Results = Callable[[Contestant], Iterable[tuple[str, list[Tensor]]]]
#: (pass, errors of eager PyTorch in the dtype itself) -> how far off each result may be.
Limits = Callable[[str, list[float]], list[float]]
Calls = Callable[[Contestant], Iterator[Timed]]


class Exact(NamedTuple):
    """The results of a pass in float64, in the host's memory, so that the GPU's is free while others are timed; and
    how far off each may be. ``missing`` says why there are none.
    """

    results: list[Tensor]
    allowed: list[float]
    missing: str | None = None

    def judge(self, found: Sequence[Tensor]) -> Verdict:
        """Of the first result that is off, or else of the first; RuntimeError where nothing is known."""
        if self.missing:
            raise RuntimeError(self.missing)
        verdicts = [Verdict(e, t) for e, t in zip(errors_of(found, self.results), self.allowed, strict=True)]
        return next((v for v in verdicts if not v.holds), verdicts[0])

    def sentence(self, found: Sequence[Tensor], name: str, errors: dict[str, float]) -> str | None:
        """What is wrong, None where it is right. The error is noted, unless it is no number."""
        verdict = self.judge(found)
        if math.isfinite(verdict.error):
            errors[name] = verdict.error
        if verdict.holds:
            return None
        return f"is off by {verdict.error:.1e}, {verdict.tolerance:.1e} are allowed"


def errors_of(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The relative error of each, one after the other: each is there in float64 only while it is compared."""
    return [relative_errors([f], [x.to(f.device)])[0] for f, x in zip(found, exact, strict=True)]


def exact_of(names: Iterable[str], results: Results, limits: Limits) -> dict[str, Exact]:
    """What each pass has to give. Where that cannot be computed nobody is right: each check then says why."""
    try:
        with turn(EXACT):
            exact = {name: [t.cpu() for t in found] for name, found in results(EXACT)}
        with turn(EAGER):
            off = {name: errors_of(found, exact[name]) for name, found in results(EAGER)}
    except Exception as error:
        return dict.fromkeys(names, Exact([], [], f"nothing to compare with: {in_one_line(error)}"))
    return {name: Exact(exact[name], limits(name, off[name])) for name in names}


def results_of(call: Callable[..., object], given: Callable[[], tuple] | None = None) -> list[Tensor]:
    """What a call gives, without its graph."""
    found = call(*(given() if given else ()))
    return [t.detach() for t in ([found] if isinstance(found, Tensor) else found)]


def exact_passes(names: Iterable[str], calls: Calls, setting: Setting) -> dict[str, Exact]:
    """What each pass over a stage or a block has to give."""

    def results(contestant: Contestant) -> Iterator[tuple[str, list[Tensor]]]:
        return ((name, results_of(call, given)) for name, call, given in calls(contestant))

    return exact_of(names, results, lambda name, off: allowed(off, setting.dtype, kinks=name == "backward"))


def measure_passes(rows: dict[str, dict], contestants: list[Contestant], calls: Calls, setting: Setting) -> None:
    """Each contestant's times, into the row of their pass, if it is right there; what is wrong or fails is noted there,
    as the rest is worth measuring still. ``share``: the part of a copy's speed that the least bytes reach.
    """
    exact = exact_passes(rows, calls, setting)

    def measure(contestant: Contestant) -> None:
        name = contestant.name
        for direction, call, given in calls(contestant):
            row = rows[direction]
            wrong = exact[direction].sentence(results_of(call, given), name, row["errors"])
            if wrong:
                row["failed"][name] = wrong
                continue
            seconds = median_seconds(call, setting.milliseconds, given=given)
            row["seconds"][name] = seconds
            row["share"][name] = row["minimum_bytes"] / seconds / setting.copy

    for contestant in contestants:
        with turn(contestant):
            try:
                measure(contestant)
            except Exception as error:
                for row in rows.values():
                    if contestant.name not in row["seconds"]:
                        row["failed"].setdefault(contestant.name, in_one_line(error))
