"""Random calls of any shape, strides, dtype and mode, against the float64 oracle.

property_cases.py draws them, property_checks.py checks them. A failure shows the smallest call that hypothesis found;
``property_checks.check(call, ("cpu",))`` runs it again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import property_checks
import pytest
import torch
from hypothesis import Phase, settings
from property_cases import MODES, Domain
from property_checks import DECIDED, check_many
from torch import Tensor

from mbn_kernels import checks, functional
from mbn_kernels.activations import ACTIVATIONS
from mbn_kernels.backends import reference

BACKENDS = ("reference", "cpu")


def run(start: int, count: int) -> Counter:
    """How many calls ran, by backend and mode, "refused" where stock refuses them."""
    counts: Counter = Counter()
    print(f"check_many({start}, {count}, {BACKENDS}, Domain(), Counter())")  # shown where it fails
    check_many(start, count, BACKENDS, Domain(), counts)
    decided = sum(counts.pop(key) for key in list(counts) if key[1] == DECIDED)
    assert decided <= count / 200
    print(decided, DECIDED)
    return counts


def test_calls(needs_cpu: None) -> None:
    """The same ones every time."""
    counts = run(0, 500)
    assert sum(counts.values()) == 500 * len(BACKENDS)
    assert set(counts) == {(name, mode) for name in BACKENDS for mode in (*MODES, "refused")}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_more_calls(needs_cpu: None, capsys: pytest.CaptureFixture, part: int) -> None:
    """A thousand others each, every time."""
    counts = run(random.SystemRandom().randrange(2**48), 1000)
    with capsys.disabled():
        print(f"\npart {part}:", ", ".join(f"{n} {mode} ({name})" for (name, mode), n in sorted(counts.items())))


# What the test would notice -------------------------------------------------------------------------------------------


def derivative_a_thousandth_off(patch: pytest.MonkeyPatch) -> None:
    silu = ACTIVATIONS["silu"]
    patch.setitem(ACTIVATIONS, "silu", silu._replace(derivative=lambda n: 1.001 * silu.derivative(n)))


def biased_variance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "unbiased", lambda var, count: var)


def gradient_in_the_input(patch: pytest.MonkeyPatch) -> None:
    """The gradient of the output is used as scratch memory."""
    reduce = reference.ReferenceKernels.reduce_gradient

    def reduced(self, dv: Tensor, *rest) -> Tensor:
        sums = reduce(self, dv, *rest)
        dv.mul_(1)[:1, :1, :1, :1].zero_()
        return sums

    patch.setattr(reference.ReferenceKernels, "reduce_gradient", reduced)


def updated_before_it_is_refused(patch: pytest.MonkeyPatch) -> None:
    run_chain = functional.run_chain

    def hasty(x: Tensor, spec: str, params: list, running: tuple = (), residual: bool = False) -> Tensor:
        with torch.no_grad():
            for r in running:
                if r.mean is not None and x.shape[2:] == (1, 1):
                    r.mean.add_(1)
        return run_chain(x, spec, params, running, residual)

    patch.setattr(functional, "run_chain", hasty)


def nothing_is_refused(patch: pytest.MonkeyPatch) -> None:
    fail = checks.fail
    patch.setattr(checks, "fail", lambda op, argument, *rest: None if argument == "x" else fail(op, argument, *rest))


@pytest.mark.parametrize(
    "fault",
    (
        derivative_a_thousandth_off,
        biased_variance,
        gradient_in_the_input,
        updated_before_it_is_refused,
        nothing_is_refused,
    ),
    ids=lambda f: f.__name__,
)
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, fault: Callable) -> None:
    """Within a hundred calls."""
    fault(monkeypatch)
    monkeypatch.setattr(property_checks, "ROUND", settings(property_checks.ROUND, phases=[Phase.generate]))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_many(0, 100, ("reference",), Domain(), Counter())
