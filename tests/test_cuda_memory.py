"""On a GPU: inputs of any layout, what is kept for backward, a training step's peak, tensors beyond 2**31 numbers."""

from __future__ import annotations

from math import prod

import pytest
import stock
import torch
from test_blocks import MODES, pair
from test_cuda import block, full_precision, images, on_each, only, results, triton_alone  # noqa: F401 (fixtures, too)
from test_memory import bytes_of, in_place, saved_for_backward
from torch import Tensor, nn

from mbn_kernels import FusedDepthwiseConvBNAct, FusedPointwiseConvBNAct
from mbn_kernels.models.tables import BlockShape, layer_shapes

pytestmark = pytest.mark.cuda
ON_TRITON = pytest.mark.usefixtures("on_triton")


# Layouts ------------------------------------------------------------------------------------------------------------


def misaligned(x: Tensor) -> Tensor:
    """Dense and channels-last, from an address that no wide load may start at."""
    n, c, h, w = x.shape
    return x.new_empty(x.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


LAYOUTS = {
    "nchw": lambda x: x,
    "slice": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "slice of channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
    "misaligned": misaligned,
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("layout", LAYOUTS)
@MODES
@pytest.mark.usefixtures("on_each")
def test_any_layout(layout: str, dtype: torch.dtype, training: bool) -> None:
    """What channels-last gives; narrower loads may add up in another order."""
    module, x = block(dtype).train(training), LAYOUTS[layout](images(dtype=dtype))
    dense = x.clone(memory_format=torch.channels_last)
    stock.assert_same(results(module, x), results(module, dense), 1e-5 if dtype == torch.float32 else 0.03)


# For backward, and at once --------------------------------------------------------------------------------------------

BLOCKS = {b: f"{i}-{b.nl}" for i, b in reversed([*enumerate(layer_shapes("mobilenet_v3_large"))])}
BY_BLOCK = pytest.mark.parametrize("shape", BLOCKS, ids=BLOCKS.get)
BATCH = 32
# Behind hard-swish stock keeps a convolution's output, what batch norm made of it, and what hard-swish made of that; of
# ReLU it keeps the result alone. The block without an expansion is the one with least to gain: three tensors of four.
MOST_KEPT = {"hs": 0.45, "relu": 0.8}


def modules(shape: BlockShape) -> list[nn.Module]:
    """The fused block, and stock's as it is and with activations in place."""
    (fused, twin), (_, other) = pair(shape), pair(shape)
    options = {"device": "cuda", "dtype": torch.bfloat16, "memory_format": torch.channels_last}
    return [m.to(**options) for m in (fused, twin, in_place(other))]


def channels_last(*shape: int) -> Tensor:
    t = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    return t.normal_()


@BY_BLOCK
@ON_TRITON
def test_bytes_saved(shape: BlockShape) -> None:
    x = channels_last(BATCH, shape.in_channels, shape.height, shape.width).requires_grad_()
    fused, *twins = (bytes_of(saved_for_backward(lambda m=m: m(x), m)[1]) for m in modules(shape))
    assert 0 < fused <= MOST_KEPT[shape.nl] * min(twins)


def peak(module: nn.Module, x: Tensor, gradient: Tensor) -> int:
    """Bytes that a training step has at most, above those that were there before it."""

    def step() -> None:
        torch.autograd.grad(module(x), [x, *module.parameters()], gradient)

    step()  # libraries take their workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@BY_BLOCK
@ON_TRITON
def test_peak_of_a_training_step(shape: BlockShape) -> None:
    """Not above stock's, but for partial sums: without an expansion both have five tensors of the block's at once."""
    x = channels_last(BATCH, shape.in_channels, shape.height, shape.width).requires_grad_()
    height, width = (-(-size // shape.s) for size in (shape.height, shape.width))
    gradient = channels_last(BATCH, shape.out_channels, height, width)
    fused, *twins = (peak(m, x, gradient) for m in modules(shape))
    assert 0 < fused <= 1.02 * min(twins)


# Beyond 31 bits -------------------------------------------------------------------------------------------------------

STAGES = {"pointwise": lambda: FusedPointwiseConvBNAct(16, 16), "depthwise": lambda: FusedDepthwiseConvBNAct(16, 3)}
BY_STAGE = pytest.mark.parametrize(
    "conv, backend", (("pointwise", "triton"), ("depthwise", "triton"), ("depthwise", "cuda"))
)
#: The last image begins at number 2**31, and so at byte 2**32.
HUGE = 33, 16, 2048, 2048
ENDS = 0, 32


def needs_tensors(count: int) -> None:
    """Skips where the GPU has not the memory for so many of them."""
    torch.cuda.empty_cache()
    needed, free = count * 2 * prod(HUGE) + 2**31, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of the GPU's memory, of which {free / 2**30:.0f} are free")


def stage(conv: str) -> nn.Module:
    return stock.randomize(STAGES[conv]()).to("cuda", torch.bfloat16).eval()


def ends(t: Tensor) -> Tensor:
    """The first and the last image alone."""
    return torch.stack([t[i] for i in ENDS]).contiguous(memory_format=torch.channels_last)


@BY_STAGE
@torch.no_grad()
def test_beyond_31_bits(conv: str, backend: str) -> None:
    needs_tensors(2)
    with only(backend):
        module, x = stage(conv), channels_last(*HUGE)
        out = module(x)
        torch.testing.assert_close(ends(out), module(ends(x)), rtol=2**-6, atol=2**-6)


@BY_STAGE
def test_gradients_beyond_31_bits(conv: str, backend: str) -> None:
    """Only two images have a gradient: those of the parameters are what a call with these alone gives."""
    needs_tensors(6)
    with only(backend):
        module, x = stage(conv), channels_last(*HUGE).requires_grad_()
        dout = torch.zeros_like(x)
        for i in ENDS:
            dout[i].normal_()
        dx, *grads = torch.autograd.grad(module(x), [x, *module.parameters()], dout)
        few = ends(x.detach()).requires_grad_()
        expected, *others = torch.autograd.grad(module(few), [few, *module.parameters()], ends(dout))
        assert expected.abs().max() > 0
        torch.testing.assert_close(ends(dx), expected, rtol=2**-6, atol=2**-6)
        assert not any(dx[i].any() for i in range(*ENDS) if i not in ENDS)
        stock.assert_same(grads, others, 2**-6)
