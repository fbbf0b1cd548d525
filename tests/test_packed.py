"""Evaluation on the CPU keeps a block's parameters packed: made once, never stale, gone with the block."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import stock
import torch
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import FusedInvResBlock, functional
from mbn_kernels.backends import cpu

SIGNATURE = (20, 3, 40, 20, True, "hs", 1)
TENSORS = tuple(n for n in FusedInvResBlock(*SIGNATURE).state_dict() if not n.endswith("num_batches_tracked"))


@pytest.fixture(autouse=True)
def fresh(needs_cpu: None) -> Iterator[None]:
    gc.collect()
    mbn_kernels.empty_cache()
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


def block(dtype: torch.dtype = torch.float32) -> FusedInvResBlock:
    return stock.randomize(FusedInvResBlock(*SIGNATURE), 3).to(dtype).eval()


def plain(module: FusedInvResBlock, x: Tensor) -> Tensor:
    """Stock's answer with the module's parameters of this moment."""
    twin = FusedInvResBlock(*SIGNATURE, fused=False).to(x.dtype).eval()
    twin.load_state_dict(module.state_dict())
    return twin(x)


def numbers() -> list[Tensor]:
    return [packed.numbers for packed in cpu._packed_chains.values()]


def named(module: nn.Module, name: str) -> Tensor:
    return dict([*module.named_parameters(), *module.named_buffers()])[name]


def poke(t: Tensor) -> None:
    t.flatten()[t.numel() // 3].add_(2)


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "one number": poke,
    "one number to the last": lambda t: t.view(-1)[-1:].mul_(3),
    "all": lambda t: t.mul_(1.5),
    "all through data": lambda t: t.data.mul_(1.5),
    "other data": lambda t: setattr(t, "data", t.data * 1.5),
    "other data, once more": lambda t: setattr(t, "data", torch.rand_like(t)),
    "through numpy": lambda t: t.detach().numpy().__imul__(1.5),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "-"))
def test_any_change_is_seen(name: str, change: str) -> None:
    module, x = block(), torch.randn(2, 20, 6, 5)
    module(x)
    for _ in range(2):
        before = numbers()[0].clone()
        CHANGES[change](named(module, name))
        torch.testing.assert_close(module(x), plain(module, x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(numbers()[0], before)  # the output need not show it: a gate may be saturated


@pytest.mark.parametrize("name", TENSORS)
def test_another_tensor_in_its_place_is_seen(name: str) -> None:
    module, x = block(), torch.randn(2, 20, 6, 5)
    module(x)
    owner, _, leaf = name.rpartition(".")
    old, parent = named(module, name), module.get_submodule(owner)
    new = old.detach().clone().mul_(1.25)
    setattr(parent, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    torch.testing.assert_close(module(x), plain(module, x), rtol=1e-4, atol=1e-4)


def test_other_shapes_are_seen() -> None:
    """The first weight stays, the last becomes narrower: what was packed no longer fits."""
    module, x = FusedInvResBlock(20, 3, 40, 24, False, "relu", 1).eval(), torch.randn(1, 20, 6, 5)
    assert module(x).shape[1] == 24
    module.layers[-1][0], module.layers[-1][1] = nn.Conv2d(40, 8, 1, bias=False), nn.BatchNorm2d(8).eval()
    assert torch.allclose(module(x), module.stock_forward(x), atol=1e-5)
    module.layers[-1][0].weight.data, module.layers[-1][1] = torch.randn(40, 40, 1, 1), nn.BatchNorm2d(40).eval()
    module.layers[-1][0].out_channels = 40
    assert torch.allclose(module(x), module.stock_forward(x), atol=1e-4)


def test_dtypes_have_their_own() -> None:
    module = block()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        x = torch.randn(1, 20, 6, 5).to(dtype)
        torch.testing.assert_close(module.to(dtype)(x), plain(module, x), rtol=2e-2, atol=2e-2)


def test_made_once() -> None:
    module, x = block(), torch.randn(1, 20, 6, 5)
    module(x)
    (first,) = numbers()
    mark = first[16].item() + 1  # behind what tells which parameters they are
    first[16] = mark  # packing again would write over it
    module(torch.randn(3, 20, 9, 9))
    module(x)
    assert numbers()[0] is first
    assert first[16] == mark
    poke(named(module, TENSORS[0]))
    module(x)
    assert numbers()[0] is first
    assert first[16] != mark


def test_gone_with_the_block() -> None:
    module, x = block(), torch.randn(1, 20, 6, 5)
    module(x)
    twin = copy.deepcopy(module)
    twin(x)
    assert len(numbers()) == 2
    del module
    gc.collect()
    assert len(numbers()) == 1
    mbn_kernels.empty_cache()
    assert not numbers()
    torch.testing.assert_close(twin(x), plain(twin, x), rtol=1e-4, atol=1e-4)


def test_functions_leave_nothing_behind() -> None:
    vectors = [torch.rand(8) + 0.5 for _ in range(4)]
    for _ in range(3):
        functional.pointwise_conv_bn_act(torch.randn(1, 5, 4, 4), torch.randn(8, 5, 1, 1), *vectors)
    gc.collect()
    assert not numbers()


def test_inference_tensors() -> None:
    """They count no versions, so that nothing can be told of them: they are packed for each call."""
    with torch.inference_mode():
        module, x = block(), torch.randn(1, 20, 6, 5)
        module(x)
        for name in TENSORS:
            poke(named(module, name))
            torch.testing.assert_close(module(x), plain(module, x), rtol=1e-4, atol=1e-4)


def test_bytes_stay_where_they_were_given() -> None:
    """A packed tensor of another size, or too few numbers for the stages, is refused before anything is written."""
    module, x = block(), torch.randn(1, 20, 6, 5).contiguous(memory_format=torch.channels_last)
    seen = []
    real = cpu._ops.evaluate
    try:
        cpu._ops.evaluate = lambda *args: (seen.append(args), real(*args))[1]
        module(x)
    finally:
        cpu._ops.evaluate = real
    *head, packed, out = seen[0]
    for wrong in (packed[:-1], torch.zeros(len(packed) + 16), packed.double(), torch.zeros(0)):
        with pytest.raises(RuntimeError, match="evaluate: packed: expected"):
            real(*head, wrong, out)


def test_threads_share_a_block_that_changes_between_calls() -> None:
    module, x, failed = block(), torch.randn(1, 20, 6, 5), []
    torch.set_num_threads(1)
    for round_ in range(5):
        stock.randomize(module, round_)
        expected = plain(module, x)

        def work(expected: Tensor = expected) -> None:
            with torch.no_grad():
                for _ in range(10):
                    if not torch.allclose(module(x), expected, rtol=1e-4, atol=1e-4):
                        failed.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def test_threads_share_a_weight_and_nothing_else() -> None:
    """One weight under two batch norms: what one thread packs must not be what the other reads."""
    torch.set_num_threads(1)
    x, weight = torch.randn(4, 128, 14, 14), torch.randn(256, 128, 1, 1)
    norms = [(torch.full((256,), scale), *torch.zeros(2, 256), torch.ones(256)) for scale in (1.0, 3.0)]
    expected = [functional.pointwise_conv_bn_act(x, weight, *norm) for norm in norms]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad(), mbn_kernels.use_backend("cpu"):
            for _ in range(200):
                if not torch.equal(functional.pointwise_conv_bn_act(x, weight, *norms[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
