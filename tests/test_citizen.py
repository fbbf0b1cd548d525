"""The modules behave as ordinary PyTorch modules wherever one is copied, saved, hooked, converted, frozen or shared."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import stock
import torch
from stock import SIGNATURE, assert_same, block, make_input, step, twin_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSqueezeExcite,
    backends,
)

MODULES = {
    "v3": lambda **o: FusedInvResBlock(*SIGNATURE, **o),
    "v2": lambda **o: FusedInvResBlock(4, 3, 24, 6, False, "relu6", 2, **o),
    "v1": lambda **o: FusedDepthwiseSeparable(4, 8, 3, 2, **o),
    "depthwise": lambda **o: FusedDepthwiseConvBNAct(4, 5, **o),
    "pointwise": lambda **o: FusedPointwiseConvBNAct(4, 9, act="silu", **o),
    "squeeze-excite": lambda **o: FusedSqueezeExcite(4, 2, **o),
}
BY_MODULE = pytest.mark.parametrize("name", MODULES)


# Copies, files, state -------------------------------------------------------------------------------------------------


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_file,
}


@BY_MODULE
@pytest.mark.parametrize("how", COPIES)
def test_copies(backend: str, name: str, how: str) -> None:
    module = stock.randomize(MODULES[name]())
    step(module, make_input())  # whatever a call leaves behind is copied, too
    module.zero_grad()
    again = COPIES[how](module)
    assert again.why_not_fused() is None
    expected = step(module, make_input())
    assert_same(step(again, make_input()), expected, 0)
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr()


@BY_MODULE
def test_state_dict_is_that_of_the_plain_twin(backend: str, name: str) -> None:
    fused, plain = MODULES[name](), MODULES[name](fused=False)
    stock.randomize(fused)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert_same(step(fused, make_input()), step(plain, make_input()))
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert plain.why_not_fused() == "built with fused=False"


@pytest.mark.parametrize("se", (True, False))
@pytest.mark.parametrize("widths", ((4, 12, 4), (4, 12, 6), (8, 8, 8)))
def test_state_dict_is_that_of_the_review(se: bool, widths: tuple[int, int, int]) -> None:
    c_in, exp, out = widths
    fused = FusedInvResBlock(c_in, 3, exp, out, se, "hs", 1)
    review = stock.InvResBlock(c_in, 3, exp, out, se, "hs", 1)
    fused.load_state_dict(review.state_dict(), strict=True)
    review.load_state_dict(fused.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(review.state_dict())
    assert [p.shape for p in fused.parameters()] == [p.shape for p in review.parameters()]
    assert all(m.momentum == 0.99 for m in fused.modules() if isinstance(m, nn.BatchNorm2d))


def test_children_are_found(backend: str) -> None:
    kinds = [type(m) for m in block().modules()]
    assert kinds.count(nn.Conv2d) == 3 and kinds.count(nn.BatchNorm2d) == 3 and kinds.count(nn.Linear) == 2
    assert not [p for p in block().parameters() if type(p) is not nn.Parameter]


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_to_dtype(backend: str, dtype: torch.dtype) -> None:
    module = block().to(dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 0.2
    got, expected = step(module, make_input(dtype)), step(twin_of(module), make_input(dtype))
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert_same(got[:1], expected[:1], tolerance)
    module.to(torch.float32)
    assert module(make_input()).dtype == torch.float32


def test_to_channels_last(backend: str) -> None:
    module = block()
    twin = twin_of(module)
    module.to(memory_format=torch.channels_last)
    x = make_input().contiguous(memory_format=torch.channels_last)
    assert_same(step(module, x), step(twin, x))


def test_meta_device() -> None:
    # Not within torch.device("meta"): of torch.empty, which these tests replace, it knows nothing.
    module, x = FusedInvResBlock(*SIGNATURE).to("meta"), torch.zeros(2, 4, 7, 6, device="meta")
    assert module(x).shape == (2, 4, 7, 6)
    module.to_empty(device="cpu")
    stock.randomize(module)
    module(make_input())


def test_optimizer_step(backend: str) -> None:
    """Three steps of SGD with momentum and weight decay stay with the twin's."""
    fused = block()
    twin = twin_of(fused)
    for module in (fused, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)
        for i in range(3):
            optimizer.zero_grad()
            stock.pull(module(make_input(seed=i)))
            optimizer.step()
    assert_same(list(fused.state_dict().values()), list(twin.state_dict().values()), 1e-4)


# Modes ----------------------------------------------------------------------------------------------------------------


@BY_MODULE
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(backend: str, name: str, mode, training: bool) -> None:
    module, plain = MODULES[name](), MODULES[name](fused=False)
    plain.load_state_dict(stock.randomize(module).state_dict())
    module.train(training), plain.train(training)
    x = make_input().requires_grad_()
    with mode():
        out = module(x)
        torch.testing.assert_close(out, plain(x), rtol=2e-5, atol=2e-5)
        assert not out.requires_grad and out.is_inference() == (mode is torch.inference_mode)
    assert_same(list(module.state_dict().values()), list(plain.state_dict().values()))
    if mode is torch.no_grad:
        step(module, make_input())


def test_frozen_parameters(backend: str) -> None:
    module = block().requires_grad_(False)
    assert not module(make_input()).requires_grad
    module.layers[3].requires_grad_(True)
    module(make_input()).sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == [
        "layers.3.0.weight", "layers.3.1.weight", "layers.3.1.bias"]  # fmt: skip


def test_gradients_accumulate(backend: str) -> None:
    module = block().eval()
    stock.pull(module(make_input()))
    once = [p.grad.clone() for p in module.parameters()]
    stock.pull(module(make_input()))
    assert_same([p.grad for p in module.parameters()], [2 * g for g in once])


def test_a_block_twice_in_one_graph(backend: str) -> None:
    results = []
    for m in (block().double(), twin_of(block().double())):
        x = make_input(torch.float64).requires_grad_()
        (m(m(x)) * m(x)).sum().backward()
        results.append([x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    assert_same(*results, 1e-6)


def test_retained_graph_and_freed_graph(backend: str) -> None:
    module, x = block().eval(), make_input().requires_grad_()
    out = module(x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)


def test_saved_input_is_guarded(backend: str) -> None:
    """An input changed in place between forward and backward is noticed, as everywhere in PyTorch."""
    x = make_input().requires_grad_()
    h = x * 1
    out = block()(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_functional_call(backend: str) -> None:
    module = block().double().eval()
    parameters = {k: v * 1.5 for k, v in module.state_dict().items() if v.is_floating_point()}
    parameters = {k: v.detach().requires_grad_("running" not in k) for k, v in parameters.items()}
    out = torch.func.functional_call(module, parameters, make_input(torch.float64))
    other = copy.deepcopy(module)
    other.load_state_dict(parameters, strict=False)
    torch.testing.assert_close(out, other(make_input(torch.float64)))
    out.sum().backward()
    assert all(v.grad is not None for k, v in parameters.items() if "running" not in k)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoint(backend: str, reentrant: bool) -> None:
    module, plain = block(), block()
    x, y = (make_input().requires_grad_() for _ in range(2))
    out = checkpoint(module, x, use_reentrant=reentrant)
    stock.pull(out), stock.pull(plain(y))
    assert_same([x.grad, *(p.grad for p in module.parameters())], [y.grad, *(p.grad for p in plain.parameters())], 0)


def test_threads(backend: str) -> None:
    """Blocks of several sizes, in four threads at once, as one after another."""
    sizes = ((4, 3, 12, 4, True, "hs", 1), (8, 5, 40, 8, True, "relu", 2), (16, 3, 96, 24, False, "relu6", 1))
    modules = [stock.randomize(FusedInvResBlock(*s)) for s in (*sizes, sizes[0])]
    inputs = [torch.randn(3, m.layers[0][0].in_channels, 20 + i, 17) for i, m in enumerate(modules)]

    def work(i: int) -> list[list[torch.Tensor]]:
        module = copy.deepcopy(modules[i])
        return [step(module, inputs[i]) for _ in range(4)]

    expected, got = [work(i) for i in range(4)], [None] * 4
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, work(i))) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(got, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other, 1e-5)


def test_distributed_data_parallel(backend: str, tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        module = nn.parallel.DistributedDataParallel(block())
        expected = step(twin_of(block()), make_input())
        assert_same(step(module, make_input()), expected)
        # The last to leave a process group joins its threads, and a module does so holding the lock they may wait for.
        del module
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_of_data_parallel(backend: str) -> None:
    """Their parameters are ordinary attributes; running statistics belong to the replica that ran."""
    module = block()
    module.layers[3][0] = nn.Conv2d(12, 4, 1)  # a bias: that convolution runs as stock, in a replica, too
    for m in (module, block()):
        before = [v.clone() for v in m.buffers()]
        replica, leaf, other = stock.replica_of(m), make_input().requires_grad_(), make_input().requires_grad_()
        assert replica.why_not_fused() == m.why_not_fused()
        out = replica(leaf)
        stock.pull(out)
        assert all(torch.equal(v, w) for v, w in zip(before, m.buffers(), strict=True))
        got = [out.detach(), leaf.grad, *(p.grad.clone() for p in m.parameters()), *replica.buffers()]
        m.zero_grad()
        expected = m(other)
        stock.pull(expected)
        assert_same(got, [expected.detach(), other.grad, *(p.grad for p in m.parameters()), *m.buffers()])


# Choosing a backend ---------------------------------------------------------------------------------------------------


def test_use_backend() -> None:
    cpu = torch.device("cpu")
    default = backends.choose(cpu, torch.float32)
    with mbn_kernels.use_backend("reference"):
        assert backends.choose(cpu, torch.float32) == "reference"
        with mbn_kernels.use_backend(None):
            assert backends.choose(cpu, torch.float32) == default
        assert backends.choose(cpu, torch.float32) == "reference"
    assert backends.choose(cpu, torch.float32) == default
    mbn_kernels.use_backend("reference")
    assert backends.choose(cpu, torch.float32) == "reference"
    mbn_kernels.use_backend(None)
    assert backends.choose(cpu, torch.float32) == default == "cpu"


def test_use_backend_leaves_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), mbn_kernels.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.choose(torch.device("cpu"), torch.float32) == "cpu"
    with pytest.raises(ValueError, match=r"use_backend: name: expected one of .*, got 'other'"):
        mbn_kernels.use_backend("other")
    assert backends.choose(torch.device("cpu"), torch.float32) == "cpu"
