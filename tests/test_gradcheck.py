"""Analytic against numerical derivatives in float64, of every functional operator and of chains of 1 to 3 stages."""

from __future__ import annotations

import pytest
import torch
from oracle import ACTS, Case, dense, dw, fused_chain, fused_functional, in_each_mode, mode_id, prepare, pw, se

import mbn_kernels

GATE = ("relu", "hardsigmoid")

FUNCTIONAL = (
    *(Case(f"depthwise-{act}", (2, 3, 5, 4), (dw(3, act),)) for act in ACTS),
    *(Case(f"pointwise-{act}", (2, 3, 4, 3), (pw(4, act),)) for act in ACTS),
    Case("depthwise-odd", (2, 2, 7, 5),
         (dw((3, 5), "hardswish", stride=(2, 1), dilation=(2, 1), padding=(2, 1, 0, 3)),)),
    Case("depthwise-not-affine", (2, 3, 5, 4), (dw(3, "silu", affine=False),)),
    Case("pointwise-residual", (2, 3, 4, 3), (pw(3, "hardswish"),), True),
    Case("squeeze-excite", (3, 4, 3, 2), (se(),)),
    Case("squeeze-excite-silu-sigmoid", (3, 4, 3, 2), (se("silu", "sigmoid"),)),
)  # fmt: skip
CHAINS = (
    *(Case(f"gate-{act}-{gate}", (2, 4, 5, 4), (dw(3, act, gate=(gate, out)),)) for act, gate, out in
      (("hardswish", "relu", "hardsigmoid"), ("relu", "silu", "sigmoid"), ("identity", "hardswish", "identity"))),
    Case("pointwise-gate-residual", (2, 4, 3, 4), (pw(4, "silu", gate=GATE),), True),
    Case("depthwise-residual", (2, 4, 3, 4), (dw(3, "hardswish"),), True),
    Case("depthwise-pointwise", (2, 3, 5, 4), (dw(3, "relu", stride=2), pw(4, "relu"))),
    Case("depthwise-gate-pointwise", (2, 4, 5, 4), (dw(5, "hardswish", gate=GATE), pw(3))),
    Case("depthwise-pointwise-residual", (2, 4, 5, 4), (dw(3, "relu6"), pw(4)), True),
    Case("pointwise-depthwise", (2, 3, 5, 4), (pw(5, "hardswish"), dw(3, "silu"))),
    Case("depthwise-depthwise", (2, 3, 5, 4), (dw(3, "hardswish"), dw((1, 3), "silu"))),
    Case("pointwise-pointwise-gates", (2, 3, 3, 4), (pw(4, "hardswish", gate=GATE), pw(3, "silu", gate=GATE)), True),
    Case("inverted-residual", (2, 3, 5, 4), (pw(6, "relu6"), dw(3, "relu6"), pw(3)), True),
    Case("inverted-residual-stride", (2, 3, 5, 5), (pw(6, "hardswish"), dw(5, "hardswish", stride=2), pw(4))),
    Case("inverted-residual-gate", (2, 3, 5, 4), (pw(6, "hardswish"), dw(3, "hardswish", stride=2, gate=GATE), pw(4))),
    Case("inverted-residual-gate-residual", (2, 3, 4, 3),
         (pw(4, "hardswish"), dw(5, "hardswish", gate=GATE), pw(3)), True),
    Case("dense", (2, 3, 6, 5), (dense(4, 3, "hardswish", stride=2),)),
    Case("dense-dilated", (2, 2, 7, 6), (dense(3, (3, 2), "silu", dilation=(2, 1), padding=(2, 1, 0, 3)),)),
    Case("dense-residual", (2, 3, 4, 5), (dense(3, 3, "relu6", affine=False),), True),
    Case("stem", (2, 3, 7, 6), (dense(4, 3, "hardswish", stride=2), dw(3, "relu", gate=GATE), pw(3))),
    Case("dense-behind", (2, 3, 4, 5), (pw(4, "hardswish", gate=GATE), dense(3, 3, "silu"))),
    Case("norm-in-the-middle-only", (2, 3, 4, 4), (pw(6, norm=False), dw(3, "hardswish"), pw(3, norm=False)), True),
)  # fmt: skip


# Whole Jacobians of these; random projections, which are much faster, of the others.
WHOLE = ("depthwise-odd", "pointwise-residual", "squeeze-excite", "inverted-residual-gate-residual", "stem")


def check(f, case: Case, training: bool) -> None:
    t = prepare(case, torch.float64, training)
    names = list(t.leaves())
    values = [v.clone().requires_grad_() for v in t.leaves().values()]

    def g(*args: torch.Tensor) -> torch.Tensor:
        again = t.map(torch.Tensor.clone)
        for name, v in zip(names, args, strict=True):
            if name == "x":
                again.x = v
            else:
                stage, _, key = name.partition(".")
                again.stages[int(stage)][key] = v
        return f(case, again, training)

    assert torch.autograd.gradcheck(g, values, fast_mode=case.name not in WHOLE)


@pytest.mark.parametrize("case, training", in_each_mode(FUNCTIONAL), ids=mode_id)
def test_functional(backend: str, case: Case, training: bool) -> None:
    check(fused_functional, case, training)


@pytest.mark.parametrize("case, training", in_each_mode(CHAINS), ids=mode_id)
def test_chain(backend: str, case: Case, training: bool) -> None:
    check(fused_chain, case, training)


def test_the_check_notices() -> None:
    """A derivative that is wrong in one parameter, or missing, fails."""

    def doubled(case: Case, t, training: bool) -> torch.Tensor:
        w = t.stages[0]["bn_weight"]
        t.stages[0]["bn_weight"] = w + (w - w.detach())
        return fused_functional(case, t, training)

    def missing(case: Case, t, training: bool) -> torch.Tensor:
        w = t.stages[0]["bn_weight"]
        t.stages[0]["bn_weight"] = w.detach() + 0 * w
        return fused_functional(case, t, training)

    with mbn_kernels.use_backend("reference"):
        for f in (doubled, missing):
            with pytest.raises(RuntimeError, match="Jacobian"):
                check(f, FUNCTIONAL[0], True)
