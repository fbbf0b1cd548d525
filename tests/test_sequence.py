"""FusedSequential: neighbours in one call, and nn.Sequential in everything that can be seen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import stock
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSequential,
    FusedSqueezeExcite,
    backends,
)


def blocks() -> list[nn.Module]:
    """Every kind of block: strides, a residual, gates, another kernel size, widths that are no multiple of 8."""
    return [
        FusedInvResBlock(5, 3, 5, 7, False, "relu", 1),
        FusedInvResBlock(7, 5, 21, 16, True, "hs", 2),
        FusedInvResBlock(16, 3, 40, 16, True, "hs", 1),
        FusedDepthwiseSeparable(16, 24, 3, 2, nl="relu6"),
        FusedInvResBlock(24, 3, 48, 24, False, "relu6", 1),
        FusedDepthwiseConvBNAct(24, 3, act="silu"),
        FusedPointwiseConvBNAct(24, 33),
    ]


def sequences(modules: list[nn.Module] | None = None) -> tuple[FusedSequential, nn.Sequential]:
    fused = stock.randomize(FusedSequential(*(modules or blocks())), 5).eval()
    return fused, nn.Sequential(*copy.deepcopy(list(fused))).eval()


@pytest.fixture
def calls(needs_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many chains each call of the CPU backend's ``evaluate`` has."""
    found: list[int] = []
    evaluate = backends.cpu.CpuKernels.evaluate

    def counted(self, x: Tensor, chains: tuple, *rest):
        found.append(len(chains))
        return evaluate(self, x, chains, *rest)

    monkeypatch.setattr(backends.cpu.CpuKernels, "evaluate", counted)
    with mbn_kernels.use_backend("cpu"):
        yield found


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", ((1, 5, 17, 13), (4, 5, 8, 8), (3, 5, 1, 2), (9, 5, 12, 20), (0, 5, 9, 9)))
@pytest.mark.parametrize("threads", (1, 2))
def test_same_as_one_by_one(calls: list[int], shape: tuple, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    fused, plain = (m.to(dtype) for m in sequences())
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        out = fused(x)
        assert calls == [7]
        expected = plain(x)
    assert calls == [7] + [1] * 7
    if dtype == torch.bfloat16 and backends.cpu.instruction_set() != "avx512_bf16":
        # What goes from block to block is float32 then, which a block's own call rounds to bfloat16.
        scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
        torch.testing.assert_close(out, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)
    else:
        assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_in_the_mode_of_every_block(backend: str) -> None:
    fused, plain = sequences()
    x = torch.randn(2, 5, 12, 12)
    for training in (False, True):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            fused.train(training), plain.train(training)
            with mode():
                assert torch.equal(fused(x), plain(x))
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_those_of_the_blocks(backend: str) -> None:
    fused, plain = sequences()
    x, y = (torch.randn(2, 5, 12, 12).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    for module, t in ((fused, x), (plain, y)):
        module(t).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("at", (0, 3, 6))
def test_hooks_divide(calls: list[int], at: int) -> None:
    """A block with a hook runs by itself, and the hook fires; so does one whose child has a hook."""
    fused, plain = sequences()
    x, fired = torch.randn(1, 5, 12, 12), []
    expected = plain.eval()(x)
    handle = fused[at].register_forward_hook(lambda m, i, o: fired.append(m))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)
    assert fired == [fused[at]]
    assert calls[-3:] == [n for n in (at, 1, 6 - at) if n][-3:]
    handle.remove()
    next(m for m in fused[at].modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda m, i, o: fired.append(m)
    )
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    assert len(fired) == 2


def test_other_modules_divide(calls: list[int]) -> None:
    modules = blocks()
    modules = [nn.ReLU(), *modules[:2], nn.Identity(), modules[2], FusedSqueezeExcite(16), *modules[3:]]
    modules[-1] = nn.Conv2d(24, 3, 1)
    modules[4].fused = False
    fused, plain = sequences(modules)
    x = torch.randn(1, 5, 12, 12)
    with torch.no_grad():
        out = fused(x)
        assert calls == [2, 3]
        assert torch.equal(out, plain(x))


def test_a_block_in_training_mode_divides(calls: list[int]) -> None:
    fused, plain = sequences()
    fused[2].train(), plain[2].train()
    x = torch.randn(2, 5, 12, 12)
    with torch.no_grad():
        out = fused(x)
        assert calls == [2, 4]
        assert torch.equal(out, plain(x))
    assert torch.equal(fused[2].layers[0][1].running_mean, plain[2].layers[0][1].running_mean)


def test_watchers_see_every_block(calls: list[int]) -> None:
    """Under a dispatch mode each chain is an operator's call."""
    fused, plain = sequences()
    x = torch.randn(1, 5, 12, 12)
    totals = []
    for module in (fused, plain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0
    with torch.no_grad(), torch.autocast("cpu"):
        assert fused(x).dtype == torch.bfloat16
        assert torch.equal(fused(x), plain(x))


def test_compiled(backend: str) -> None:
    fused, plain = sequences()
    x = torch.randn(1, 5, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), plain(x))


def test_is_a_sequential(backend: str) -> None:
    fused, plain = sequences()
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(1, 5, 12, 12)
    with torch.no_grad():
        expected = plain(x)
        for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        assert torch.equal(fused[:3](x), plain[:3](x))
        assert type(fused[:3]) is FusedSequential
        assert torch.equal(FusedSequential()(x), x)


@pytest.mark.parametrize(
    "x, words",
    (
        (torch.randn(1, 6, 12, 12), "FusedInvResBlock: weight: expected shape"),
        (torch.randn(5, 12, 12), "FusedInvResBlock: x: expected 4 dimensions"),
        (torch.ones(1, 5, 12, 12, dtype=torch.int32), "FusedInvResBlock: x: expected a floating-point tensor"),
        (torch.ones(1, 5, 12, 12, dtype=torch.float64), "FusedInvResBlock: weight: expected torch.float64"),
        (torch.ones(1, 5, 12, 12, device="meta"), "FusedInvResBlock: weight: expected"),
        ("x", "FusedInvResBlock: x: expected a tensor, got str"),
    ),
)
def test_bad_input_is_refused_in_the_blocks_words(calls: list[int], x: object, words: str) -> None:
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=words):
        sequences()[0](x)


def test_bad_input_of_a_later_block(calls: list[int]) -> None:
    fused = FusedSequential(FusedInvResBlock(5, 3, 5, 7, False, "relu", 1), FusedDepthwiseSeparable(8, 8)).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="FusedDepthwiseSeparable: weight: expected shape"):
        fused(torch.randn(1, 5, 6, 6))
