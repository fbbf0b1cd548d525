"""Evaluation on the CPU: who takes another way than one call, and gets the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import stock
import torch
from evaluating import (
    BY_DTYPE,
    NETWORKS,
    SMALL_CHAINS,
    counted,
    hold_module,
    image,
    networks,
    small,
    twins,
    with_threads,
)
from torch import nn

import mbn_kernels


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> Iterator[None]:
    torch.set_num_threads(1)  # stock's threads wait for each other longest where a machine is busy
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return counted(monkeypatch)


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """The small network, already evaluated in one call, and its stock twin."""
    fused, plain = twins(small)
    for _ in range(2):
        fused(image(1, 3, 20, 24))
    return fused, plain


@BY_DTYPE
def test_small_network(calls: list[int], dtype: torch.dtype) -> None:
    fused, plain = twins(small, dtype)
    for shape in ((2, 3, 20, 24), (1, 3, 33, 47), (5, 3, 64, 31)):
        x = image(*shape, dtype=dtype)
        hold_module(with_threads(fused, x), plain, x)
    assert set(calls) == {SMALL_CHAINS}


def test_the_plain_twin_is_never_evaluated_here(pair: tuple, calls: list[int]) -> None:
    for name in NETWORKS:
        networks(name, torch.float32)[1](image(1, 3, 32, 32))
    pair[1](image(2, 3, 20, 24))
    assert not calls


PARTS = ("conv1", "conv1.0", "conv1.2", "blocks.1", "blocks.0.layers.1.0", "last_conv", "gap", "classifier",
         "classifier.0", "classifier.1", "classifier.3", "blocks", "")  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ("forward", "pre"))
def test_hooks_fire(pair: tuple, name: str, kind: str) -> None:
    """With what stock gives them, and what a hook returns is used."""
    x, seen = image(2, 3, 20, 24), [[], []]
    for module, found in zip(pair, seen, strict=True):
        part = module.get_submodule(name)

        def hook(_module, inputs, out=None, found=found):
            found.append((*inputs, *([] if out is None else [out])))
            return (inputs[0] if out is None else out) * 0.5

        part.register_forward_hook(hook) if kind == "forward" else part.register_forward_pre_hook(hook)
    fused, plain = pair
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert len(seen[0]) == 2


def test_training_mode(pair: tuple, calls: list[int]) -> None:
    x = image(4, 3, 20, 24)
    for m in pair:
        m.train()
        m.classifier[2].p = 0.0
    fused, plain = pair
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-4, atol=1e-4)
    assert not calls


def test_dropout_in_training_drops(pair: tuple, calls: list[int]) -> None:
    fused, plain = pair
    fused.classifier[2].train()
    x = image(2, 3, 20, 24)
    outs = [fused(x) for _ in range(4)]
    assert not torch.equal(outs[0], outs[1])
    assert set(calls) == {SMALL_CHAINS - 3}
    fused.classifier[2].eval()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_gradients(pair: tuple) -> None:
    x, found = image(2, 3, 20, 24), []
    for m in pair:
        m = copy.deepcopy(m).requires_grad_()
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            stock.pull(m(leaf))
        found.append({"x": leaf.grad} | {name: p.grad for name, p in m.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bfloat16", "float32"))
def test_autocast(pair: tuple, dtype: torch.dtype) -> None:
    fused, plain = pair
    x = image(2, 3, 20, 24).bfloat16()
    for m in pair:
        m.bfloat16().float()  # numbers that autocast need not round
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(x.to(dtype))
    hold_module(out, plain, x.to(dtype), autocast=torch.bfloat16)


def test_compiled(pair: tuple) -> None:
    torch._dynamo.reset()
    fused, plain = pair
    x = image(2, 3, 20, 24)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    hold_module(compiled(x), plain, x)


def test_traced(pair: tuple) -> None:
    fused, plain = pair
    x, other = image(2, 3, 20, 24), image(1, 3, 33, 20)
    traced = torch.jit.trace(fused, x, check_trace=False)
    for t in (x, other):
        torch.testing.assert_close(traced(t), plain(t), rtol=1e-4, atol=1e-4)


def test_functional_call_sees_other_parameters(pair: tuple) -> None:
    fused, plain = pair
    x, other = image(2, 3, 20, 24), {name: p * 0.7 for name, p in plain.named_parameters()}
    for _ in range(2):
        got = torch.func.functional_call(fused, other, x)
        torch.testing.assert_close(got, torch.func.functional_call(plain, other, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_views_that_are_not_resolved(pair: tuple) -> None:
    """A negative view is other numbers than lie in its memory."""
    x = torch.complex(image(2, 3, 20, 24), image(2, 3, 20, 24)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(pair[0](x), pair[1](x), rtol=1e-4, atol=1e-4)
