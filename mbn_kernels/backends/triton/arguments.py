"""Deferred tensors as the arguments of kernels."""

from __future__ import annotations

from ...activations import ACTIVATIONS
from ...chain import Gradient, Norm, Value


def value_arguments(u: Value) -> dict:
    return {"x": u.y, "scale": u.scale, "shift": u.shift, "gate": u.gate, "ACT": ACTIVATIONS[u.act].code}


def gradient_arguments(g: Gradient) -> dict:
    of = g.of
    needed = of.act != "identity" or g.b is not None  # else the raw output is not looked at, and so not read
    y, scale, shift = (of.y, of.scale, of.shift) if needed else (None, None, None)
    vectors = {"g_gate": of.gate, "g_q": g.q, "g_a": g.a, "g_b": g.b, "g_c": g.c}
    return {"g_dv": g.dv, "g_y": y, "g_scale": scale, "g_shift": shift, **vectors, "G_ACT": ACTIVATIONS[of.act].code}


def norm_arguments(norm: Norm | None) -> dict:
    return {"mean": norm and norm.mean, "rstd": norm and norm.rstd}
