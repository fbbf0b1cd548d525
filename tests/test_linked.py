"""Blocks in training of which one leaves its last value to the next: it is not stored, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import stock
import torch
from test_memory import bytes_of, saved_for_backward
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import mbn_kernels
from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, FusedPointwiseConvBNAct, FusedSequential, models, ops


def separable() -> FusedSequential:
    return FusedSequential(
        FusedDepthwiseSeparable(8, 12, nl="relu"), FusedDepthwiseSeparable(12, 17, s=2), FusedDepthwiseSeparable(17, 5)
    )


def inverted() -> FusedSequential:
    """Of five blocks the last two have a residual, and the second a gate inside."""
    return FusedSequential(
        FusedInvResBlock(8, 3, 24, 12, False, "relu", 1),
        FusedInvResBlock(12, 5, 30, 16, True, "hardswish", 2),
        FusedInvResBlock(16, 3, 16, 17, False, "hardswish", 1),
        FusedInvResBlock(17, 3, 34, 17, False, "hardswish", 1),
        FusedInvResBlock(17, 3, 34, 17, True, "hardswish", 1),
    )


def mixed() -> FusedSequential:
    return FusedSequential(
        FusedPointwiseConvBNAct(8, 20), FusedDepthwiseSeparable(20, 7), FusedPointwiseConvBNAct(7, 9)
    )


NETS = {"separable": (separable, [3]), "inverted": (inverted, [3]), "mixed": (mixed, [3])}


@pytest.fixture
def linked(needs_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many chains each run of linked ones had."""
    found: list[int] = []
    apply = ops.LinkFunction.apply

    def counted(spec, link, backend, update, x, rows, *params):
        if rows is None:
            found.append(0)
        found[-1] += 1
        return apply(spec, link, backend, update, x, rows, *params)

    monkeypatch.setattr(ops.LinkFunction, "apply", counted)
    yield found


def step(net: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output, gradients and buffers after a step."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    out = net(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape))
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def one_by_one(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for part in model:
            x = part(x)
        return x

    return run


def both(model: FusedSequential, x: Tensor) -> tuple[list, list]:
    twin = copy.deepcopy(model)
    return step(model, model, x), step(one_by_one(twin), twin, x)


@pytest.mark.parametrize("shape", ((2, 8, 9, 11), (1, 8, 5, 4), (0, 8, 6, 6), (5, 8, 3, 3)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NETS)
def test_same_as_one_by_one(linked: list, name: str, dtype: torch.dtype, shape: tuple) -> None:
    build, chains = NETS[name]
    model = stock.randomize(build(), 3).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    found, expected = both(model, x)
    assert linked == chains
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-3}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.isfinite().all()
        a, b = a.double(), b.double()
        assert (a - b).norm() <= tolerance * (b.norm() + 1)


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_is_as_near_to_float64(linked: list, name: str) -> None:
    """What is not stored is not rounded either."""
    build, chains = NETS[name]
    model = stock.randomize(build(), 3).to(torch.bfloat16)
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    wide = copy.deepcopy(model).double()
    found, expected = both(model, x)
    exact = step(one_by_one(wide), wide, x.detach().double().requires_grad_())
    assert linked == chains

    def error(of: list) -> float:
        # A bias before another norm has no gradient but rounding.
        pairs = [(a.double(), b.double()) for a, b in zip(of, exact, strict=True) if b.double().norm() > 1e-6]
        return sum(((a - b).norm() / b.norm()).item() for a, b in pairs)

    assert error(found) <= 2 * error(expected)


@pytest.mark.parametrize("threads", (2, 3))
def test_same_bits(linked: list, threads: int) -> None:
    """Run after run, and for any number of threads."""
    x = torch.randn(3, 8, 17, 15, requires_grad=True)
    model = stock.randomize(separable(), 2)
    runs = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        runs.append(step(twin := copy.deepcopy(model), twin, x))
    for a, b, c in zip(*runs, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_bytes_saved(linked: list) -> None:
    """Of each block its input or none, and its raw outputs: half of what stays where each block is called itself."""
    model, x = separable(), torch.randn(2, 8, 32, 32)
    kept = bytes_of(saved_for_backward(lambda: model(x), model)[1])
    alone = bytes_of(saved_for_backward(lambda: one_by_one(model)(x), model)[1])
    maps = 4 * 2 * (32 * 32 * (8 + 8 + 12) + 16 * 16 * (12 + 17 + 17 + 5))
    between = 4 * 2 * (32 * 32 * 12 + 16 * 16 * 17)
    assert maps <= kept <= maps + 4 * 40 * 12 and alone >= kept + between


@pytest.mark.parametrize("wanted", ("x", "first", "second", "last", "norms"))
def test_what_is_wanted(linked: list, wanted: str) -> None:
    model = stock.randomize(separable(), 3).double()
    model.requires_grad_(False)
    trained = {"first": model[0], "second": model[1], "last": model[2]}.get(wanted)
    if trained is not None:
        trained.requires_grad_(True)
    for m in model.modules():
        if wanted == "norms" and isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(True)
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64, requires_grad=wanted == "x")
    found, expected = both(model, x)
    assert linked == {"second": [2], "last": []}.get(wanted, [3])
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_evaluation_with_gradients(linked: list) -> None:
    model = stock.randomize(inverted(), 3).double().eval()
    found, expected = both(model, torch.randn(2, 8, 9, 8, dtype=torch.float64, requires_grad=True))
    assert linked == [3]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_who_is_not_linked(linked: list) -> None:
    """A hook, a residual, dropped paths, a gate behind the last stage and foreign layers end a run."""
    x = torch.randn(2, 8, 9, 8)
    hooked = separable()
    hooked[1].register_forward_hook(lambda *_: None)
    hooked(x)
    assert linked == []
    foreign = FusedSequential(*separable()[:2], nn.Identity(), FusedDepthwiseSeparable(17, 5))
    foreign(x)
    assert linked == [2]
    linked.clear()
    gated = FusedSequential(
        FusedDepthwiseSeparable(8, 8), mbn_kernels.FusedSqueezeExcite(8), FusedDepthwiseSeparable(8, 8)
    )
    gated(x)
    assert linked == []
    with torch.autocast("cpu"):
        separable()(x)
    with mbn_kernels.use_backend("reference"):
        separable()(x)
    with torch.no_grad():
        separable()(x)
    assert linked == []


def test_a_layer_that_changes_the_dtype(linked: list) -> None:
    class Wider(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model = FusedSequential(
        *separable()[:2], Wider(), FusedDepthwiseSeparable(17, 6).double(), FusedDepthwiseSeparable(6, 5).double()
    )
    found, expected = both(stock.randomize(model, 1), torch.randn(2, 8, 9, 8, requires_grad=True))
    assert linked == [2, 2] and found[0].dtype == torch.float64
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_double_backward_is_refused(linked: list) -> None:
    x = torch.randn(2, 8, 9, 8, requires_grad=True)
    (g,) = torch.autograd.grad(separable()(x).square().sum(), x, create_graph=True)
    assert linked == [3]
    with pytest.raises(NotImplementedError, match="double backward"):
        g.sum().backward()


def test_backward_twice(linked: list) -> None:
    """A graph that is kept gives the same gradients again, and one that is not says so."""
    model, x = separable().double(), torch.randn(2, 8, 9, 8, dtype=torch.float64, requires_grad=True)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_tensors_may_lie_elsewhere(linked: list) -> None:
    model, x = separable().double(), torch.randn(2, 8, 9, 8, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(model)
    expected = step(one_by_one(twin), twin, x)

    def run(t: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda s: s.clone(memory_format=torch.contiguous_format), lambda s: s
        ):
            return model(t)

    found = step(run, model, x)
    assert linked == [3]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_checkpoint(linked: list) -> None:
    model = stock.randomize(separable(), 1).double()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    found = [
        step(lambda t, run=run: torch.utils.checkpoint.checkpoint(run, t, use_reentrant=False), m, x)
        for run, m in ((model, model), (one_by_one(twin), twin))
    ]
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    assert linked == [3, 3]


@pytest.mark.parametrize("grad", (True, False))
def test_a_global_hook_sees_every_block(linked: list, grad: bool) -> None:
    """Of a network also the Sequential of its blocks, and the layers of the stem."""
    model, seen = models.mobilenet_v1(width_mult=0.25).train(grad), []
    x = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(grad):
        model(x)
        linked.clear()
    handle = global_hooks.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.set_grad_enabled(grad):
            model(x)
    finally:
        handle.remove()
    assert linked == []
    inside = {m for block in model.blocks for m in block.modules() if m is not block}
    assert set(model.modules()) - inside == set(seen)
