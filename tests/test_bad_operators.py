"""torch.ops.mbn.*, called directly with what does not fit: refused, and nothing is written. Each operator's calls are
in a process of their own, so that one that ends it has a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from apart import apart
from junk import TENSORS
from torch import Tensor

import mbn_kernels
from mbn_kernels import schemas
from mbn_kernels.chain import chain_spec, stage_spec

N, C, H, W, K = 2, 8, 5, 6, 12  # K channels behind a pointwise convolution
#: What each operator writes.
WRITTEN = {
    "pointwise_forward": ("y", "mean", "var"),
    "pointwise_backward": ("du", "sums", "dweight"),
    "depthwise_forward": ("y", "mean", "var"),
    "depthwise_backward": ("du", "sums", "dweight"),
    "norm_forward": ("norm",),
    "norm_backward": ("dweight", "dbias", "b", "c"),
    "pool": ("pooled",),
    "materialize": ("out",),
    "materialize_gradient": ("out",),
    "statistics": ("mean", "var"),
    "reduce_gradient": ("sums",),
}


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> None:
    torch.set_num_threads(1)


def image(channels: int = C) -> Tensor:
    return torch.randn(N, channels, H, W).contiguous(memory_format=torch.channels_last)


def value() -> dict:
    c = torch.randn(2, C)
    return {"u_y": image(), "u_scale": c[0], "u_shift": c[1], "u_gate": torch.rand(N, C), "u_act": 3}


def gradient(channels: int) -> dict:
    vectors = {f"g_{name}": torch.randn(channels) for name in ("scale", "shift", "a", "b", "c")}
    gates = {f"g_{name}": torch.rand(N, channels) for name in ("gate", "q")}
    return {"g_dv": image(channels), "g_y": image(channels), "g_act": 2, **vectors, **gates}


def backward(weight: Tensor) -> dict:
    sums = {"mean": torch.randn(C), "rstd": torch.rand(C), "sums": torch.zeros(5, N, C)}
    return {"weight": weight, "residual": image(), "du": image(), "dweight": torch.zeros_like(weight), **sums}


def found(channels: int) -> dict:
    return {"mean": torch.zeros(channels), "var": torch.zeros(channels)}


WINDOW = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}
#: Of each operator a call with all that it takes.
CALLS: dict[str, Callable[[], dict]] = {
    "pointwise_forward": lambda: {**value(), "weight": torch.randn(K, C, 1, 1), "y": image(K), **found(K)},
    "pointwise_backward": lambda: {**gradient(K), **value(), **backward(torch.randn(K, C, 1, 1))},
    "depthwise_forward": lambda: {**value(), "weight": torch.randn(C, 1, 3, 3), **WINDOW, "y": image(), **found(C)},
    "depthwise_backward": lambda: {**gradient(C), **value(), **WINDOW, **backward(torch.randn(C, 1, 3, 3))},
    "norm_forward": lambda: {**found(C), "weight": torch.ones(C), "bias": torch.zeros(C), "eps": 1e-5,
                             "norm": torch.zeros(4, C)},
    "norm_backward": lambda: {"sums": torch.randn(5, N, C), "gate": torch.rand(N, C), "q": torch.randn(N, C),
                              "norm": torch.randn(4, C), "count": 9,
                              **{name: torch.zeros(C) for name in WRITTEN["norm_backward"]}},
    "pool": lambda: {**value(), "pooled": torch.zeros(N, C)},
    "materialize": lambda: {**value(), "residual": image(), "out": image()},
    "materialize_gradient": lambda: {**gradient(C), "residual": image(), "out": image()},
    "statistics": lambda: {"y": image(), **found(C)},
    "reduce_gradient": lambda: {"dv": image(), **value(), "mean": torch.randn(C), "rstd": torch.rand(C),
                                "sums": torch.zeros(5, N, C)},
}  # fmt: skip


def cut(t: Tensor) -> Tensor:
    """Whose storage ends a number too early."""
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.itemsize)
    return t


WRONG: dict[str, Callable[[Tensor], object]] = {
    **{name: make for name, make in TENSORS.items() if name not in ("a dimension more", "no dimension")},
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "a row less": lambda t: t[:-1],
    "twice as wide": lambda t: torch.cat([t, t], -1),
    "another dtype": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "a stride of 2": lambda t: torch.stack([t, t], -1)[..., 0],
    "strides of 0": lambda t: t.new_zeros(1).expand(t.shape),
    "no numbers": lambda t: t.new_zeros(0),
    "one number": lambda t: t.new_zeros(()),
    "2^60 numbers": lambda t: t.new_zeros(1).expand(1 << 20, 1 << 20, 1 << 10, 1 << 10),
    "too little memory": cut,
    "text": lambda t: "t",
}
#: A whole image more or less, or another dtype, is another call where nothing else says how many there are.
FREE = {"pool": ("twice as wide",), "statistics": ("a row more", "a row less", "twice as wide", "another dtype")}
#: Arguments without which an operator does something else, or that have no partner.
OPTIONAL = ("u_gate", "g_gate", "g_q", "g_a", "residual", "dweight", "sums")
LISTS = ([], [1], [-1] * 4, [-1, -1], [0, 0], [1 << 40] * 4, [1 << 40] * 2, [(1 << 63) - 1] * 4, None, "x", [None] * 2)
NUMBERS = {"count": (0, -1, None, "x", 1 << 63), "eps": (None, "x", [1.0])}
ACTS = (-1, 7, 99, 1 << 62, 1 << 63, None, "relu", 1.5)


def bad_calls(name: str) -> Iterator[tuple[str, dict]]:
    for argument, good in CALLS[name]().items():
        if isinstance(good, Tensor):
            for kind, make in WRONG.items():
                if argument not in ("y", "u_y") or kind not in FREE.get(name, ()):
                    yield f"{argument}: {kind}", CALLS[name]() | {argument: make(good)}
            if argument not in OPTIONAL:
                yield f"{argument}: None", CALLS[name]() | {argument: None}
        else:
            values = LISTS if isinstance(good, list) else ACTS if argument.endswith("act") else NUMBERS[argument]
            for wrong in values:
                yield f"{argument}: {wrong}", CALLS[name]() | {argument: wrong}
    yield from aliases(name)


def aliases(name: str) -> Iterator[tuple[str, dict]]:
    """Every output beside every other tensor, one number of it in the other's memory."""
    for output in WRITTEN[name]:
        for argument, other in CALLS[name]().items():
            if argument != output and isinstance(other, Tensor):
                given = CALLS[name]()
                out, other = given[output], given[argument]
                memory = torch.randn(out.numel() + other.numel())
                given[output] = memory.as_strided(out.shape, out.stride()).copy_(out)
                given[argument] = memory.as_strided(other.shape, other.stride(), out.numel() - 1).copy_(other)
                yield f"{output}: in the memory of {argument}", given


def ordinary(t: object) -> bool:
    """Whether it has numbers that can be looked at."""
    if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_nested or t.is_quantized or not t.is_cpu:
        return False
    return t.untyped_storage().nbytes() >= t.numel() * t.itemsize


def fault(name: str, given: dict) -> str | None:
    """What is wrong with how a call was refused; None: nothing."""
    written = [given[output] for output in WRITTEN[name] if ordinary(given[output])]
    before = [t.clone() for t in written]
    try:
        getattr(torch.ops.mbn, name).default(**given)
    except (RuntimeError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        # What the schema or the tensor's own kind rules out, PyTorch says.
        if not re.match(rf"{name}: (\w+): expected .+, got .+$|mbn::{name}\(\) |Could not run 'mbn::{name}'", first):
            return f"not one sentence: {first}"
        same = all(torch.equal(t, b) for t, b in zip(written, before, strict=True))
        return None if same else "something was written"
    return "was not refused"


@pytest.mark.parametrize("name", CALLS)
def test_refused(name: str) -> None:
    def faults() -> list[str]:
        found = ((label, fault(name, given)) for label, given in bad_calls(name))
        return [f"{label}: {what}" for label, what in found if what]

    answer = apart(faults)
    if answer.startswith("ended by"):  # by which of them?
        ends = [(label, apart(lambda given=given: fault(name, given))) for label, given in bad_calls(name)]
        answer = "; ".join(f"{label}: {end}" for label, end in ends if end != "None")
    assert answer == "[]"


@pytest.mark.parametrize("name", CALLS)
def test_accepted(name: str) -> None:
    """What the wrong ones differ from, and what may be left out, is right; and it writes all that it is said to."""
    given = CALLS[name]()
    before = {output: given[output].clone() for output in WRITTEN[name]}
    getattr(torch.ops.mbn, name)(**given)
    assert not any(torch.equal(given[output], t) for output, t in before.items())
    for absent in set(OPTIONAL) & given.keys() - {"sums" if name == "reduce_gradient" else ""}:
        gates = {"sums": None} if absent == "u_gate" and "sums" in given and name != "reduce_gradient" else {}
        sums = {"sums": torch.zeros(2, C)} if absent == "u_gate" and name == "reduce_gradient" else gates
        if name != "norm_backward":
            getattr(torch.ops.mbn, name)(**CALLS[name]() | {absent: None} | sums)


def test_every_operator_is_here() -> None:
    assert set(CALLS) == set(schemas.KERNEL_SCHEMAS) - {"evaluate", "evaluate_held"}  # test_evaluate_operators.py's
    assert sum(1 for name in CALLS for _ in bad_calls(name)) > 2000


# Statistics, evaluations ----------------------------------------------------------------------------------------------


def test_update_running() -> None:
    def given() -> list:
        return [[torch.zeros(C), torch.ones(C)], [torch.randn(C), torch.rand(C)], [0.1], [torch.tensor(0)]]

    # Of a count the same, or not to be had.
    same = (
        "integers",
        "one number",
        "no dimension",
        "2^60 numbers",
        "oneDNN",
        "quantized",
        "strides of 0",
        "a stride of 2",
    )

    def faults() -> list[str]:
        found = []
        for place in (0, 1, 3):
            for kind, make in WRONG.items():
                wrong = given()
                if kind == "text" or (place == 3 and kind in same):
                    continue
                wrong[place][-1] = make(wrong[place][-1] if place < 3 else torch.zeros(1, dtype=torch.int64))
                before = [t.clone() for t in (wrong[0][0], *(wrong[3] if place != 3 else ()))]
                try:
                    torch.ops.mbn.update_running(*wrong)
                except (RuntimeError, TypeError):
                    after = (wrong[0][0], *(wrong[3] if place != 3 else ()))
                    if not all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
                        found.append(f"{place}, {kind}: something was written")
                else:
                    found.append(f"{place}, {kind}: was not refused")
        for place, wrong in ((0, []), (1, []), (2, []), (2, [0.1, 0.1]), (0, [torch.zeros(C)]), (2, None), (0, [None])):
            try:
                torch.ops.mbn.update_running(*(wrong if i == place else v for i, v in enumerate(given())))
            except (RuntimeError, TypeError):
                continue
            found.append(f"{place}, {wrong}: was not refused")
        return found

    assert apart(faults) == "[]"


EVALUATION = chain_spec("example", [stage_spec("pointwise", norm="running", act="relu")])


def evaluation(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> tuple:
    """What torch.ops.mbn.evaluate is called with, but for what it writes."""
    seen, ops = [], mbn_kernels.backends.cpu._ops
    real = ops.evaluate
    try:
        ops.evaluate = lambda *given: (seen.append(given), real(*given))[1]
        with torch.no_grad():
            mbn_kernels.functional.run_chain(x, EVALUATION, [weight, mean, var])
    finally:
        ops.evaluate = real
    return seen[0]


@pytest.mark.parametrize("other", ("x", "weight", "mean", "packed"))
@pytest.mark.parametrize("place", ("first", "last"))
def test_evaluate_into_other_memory(other: str, place: str) -> None:
    """The output begins in the last number of another tensor, or ends in its first one."""
    sizes = {"out": N * C * H * W, "x": N * C * H * W, "weight": C * C, "mean": C}
    memory = torch.zeros(3 * sizes["out"])
    given = {"x": image(), "weight": torch.randn(C, C, 1, 1), "mean": torch.zeros(C)}
    x, params, stages, eps, blocks, version, packed, out = evaluation(*given.values(), torch.ones(C))
    size = sizes.get(other, packed.numel())
    begin = 0 if place == "first" else sizes["out"]  # of the other tensor
    start = size - 1 if place == "first" else 1  # of the output
    shared = {"x": x, "weight": params[0], "mean": params[1], "packed": packed}[other]
    moved = memory.as_strided(shared.shape, shared.stride(), begin)
    moved.copy_(shared)
    out = memory.as_strided(out.shape, out.stride(), start)
    x, packed = moved if other == "x" else x, moved if other == "packed" else packed
    params = [moved if other == name else p for name, p in zip(("weight", "mean", ""), params, strict=True)]
    before = memory.clone()
    with pytest.raises(RuntimeError, match=r"^evaluate: (out|packed): expected memory of its own, got"):
        torch.ops.mbn.evaluate(x, params, stages, eps, blocks, version, packed, out)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("make", (cut, TENSORS["freed"], lambda t: None), ids=("cut", "freed", "None"))
def test_evaluate_with_too_little_memory(make: Callable[[Tensor], Tensor | None]) -> None:
    good = evaluation(image(), torch.randn(C, C, 1, 1), torch.zeros(C), torch.ones(C))

    def faults() -> list[str]:
        found = []
        for place, given in enumerate(good):
            for i, t in enumerate(given if isinstance(given, list) else [given]):
                if not isinstance(t, Tensor):
                    continue
                wrong = [*given[:i], make(t), *given[i + 1 :]] if isinstance(given, list) else make(t)
                try:
                    torch.ops.mbn.evaluate(*good[:place], wrong, *good[place + 1 :])
                except RuntimeError as error:
                    if re.match(r"evaluate: \w+: expected .+, got .+|mbn::evaluate\(\) ", str(error)):
                        continue
                found.append(f"argument {place}, {i}")
        return found

    assert apart(faults) == "[]"


# Chains ---------------------------------------------------------------------------------------------------------------

SPEC = chain_spec("example", [stage_spec("pointwise", norm="batch", affine=True, act="relu")])


def test_chain(backend: str) -> None:
    x, params = image(), [torch.randn(K, C, 1, 1), torch.ones(K), torch.zeros(K)]
    run = torch.ops.mbn.chain
    for wrong in (params[:2], [*params, params[1]], [params[0], params[0], params[0]], []):
        with pytest.raises(ValueError, match=r"^example: (params|bn_weight): expected"):
            run(x, wrong, SPEC, False, True, backend)
    for wrong in ("", "x", "x: y", SPEC[:-1], SPEC + "; "):
        with pytest.raises(ValueError, match=r"^parse: spec: expected"):
            run(x, params, wrong, False, True, backend)
    with pytest.raises(ValueError, match=r"^use_backend: name: expected"):
        run(x, params, SPEC, False, True, "gpu")
    with pytest.raises(ValueError, match=r"^example: residual: expected"):
        run(x, params, SPEC, True, True, backend)
    for wrong in (None, [None], "x", [1.0]):
        with pytest.raises((RuntimeError, TypeError)):
            run(x, wrong, SPEC, False, True, backend)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"^example: x: expected a floating"),
    ):
        run(x.long(), params, SPEC, False, True, backend)


@pytest.mark.parametrize("change", ("dout", "dtype", "saved", "fewer saved", "needs", "params", "x"))
def test_chain_backward(backend: str, change: str) -> None:
    """Of what another call has saved, or for another output: refused, instead of a wrong gradient."""
    x, params = image(), [torch.randn(K, C, 1, 1), torch.ones(K), torch.zeros(K)]
    out, _, saved = torch.ops.mbn.chain(x, params, SPEC, False, True, backend)
    given = {"dout": torch.ones_like(out), "x": x, "params": params, "saved": saved, "needs": [True] * 4}
    wrong = {
        "dout": {"dout": out[:1]},
        "dtype": {"dout": out.double()},
        "saved": {"saved": [saved[0], saved[1][:2]]},
        "fewer saved": {"saved": saved[:1]},
        "needs": {"needs": [True] * 3},
        "params": {"params": params[:2]},
        "x": {"x": x[:1]},
    }[change]

    def run(dout, x, params, saved, needs) -> list[Tensor]:
        return torch.ops.mbn.chain_backward(dout, x, params, saved, SPEC, False, needs, backend)

    assert len(run(**given)) == 4

    def attempt() -> None:
        run(**given | wrong)

    assert re.match(r"(ValueError|TypeError): example: \w+: expected .+, got .+$", apart(attempt))


def test_tensors_without_memory_among_others() -> None:
    """The fake kernels do nothing; among tensors with memory that would leave outputs unwritten."""
    given = CALLS["pool"]()
    meta = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in given.items()}
    torch.ops.mbn.pool(**meta)
    with pytest.raises(RuntimeError, match=r"^pool: device: expected all tensors on one device, got cpu and meta$"):
        torch.ops.mbn.pool(**meta | {"pooled": given["pooled"]})
