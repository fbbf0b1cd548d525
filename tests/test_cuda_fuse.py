"""On a GPU: fused models of torchvision and timm against stock, in float32, half precision and under autocast."""

from __future__ import annotations

import copy

import peers
import pytest
import stock
import torch
import torch.nn.functional as F
from test_cuda import full_precision  # noqa: F401 (a fixture)
from torch import Tensor, nn

import mbn_kernels

pytestmark = pytest.mark.cuda
DRAWS = 4
NETWORKS = ("torchvision mobilenet_v3_small", "timm mobilenetv2_050", "timm tf_mobilenetv3_small_100", "timm lcnet_050")


def both(name: str) -> tuple[nn.Module, nn.Module]:
    plain = stock.randomize(peers.network(name).float()).cuda()
    model = copy.deepcopy(plain)
    assert len(mbn_kernels.fuse(model).fused) > 8
    return plain, model


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 64, 72, generator=torch.Generator().manual_seed(0)).cuda()


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_evaluation(name: str, dtype: torch.dtype) -> None:
    plain, model = (m.to(dtype).eval() for m in both(name))
    x = images().to(dtype)
    exact = copy.deepcopy(plain).double()(x.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        assert error(model(x), exact) <= 2 * error(plain(x), exact) + torch.finfo(dtype).eps


def losses(model: nn.Module, dtype: torch.dtype | None) -> Tensor:
    """Of ten steps of training."""
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    found = []
    for step in range(10):
        torch.manual_seed(step)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images()), torch.arange(8, device="cuda"))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    return torch.tensor(found)


def rounded_anew(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights are off by half an eps at most."""
    model, g = copy.deepcopy(model), torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps * (torch.rand(p.shape, generator=g, device="cuda") - 0.5))
    return model


@pytest.mark.parametrize("dtype", (None, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_of_ten_steps(name: str, dtype: torch.dtype | None) -> None:
    """Under autocast with a scaler where float16 needs one: fused and stock learn the same.

    Where a few steps of a network make much of a rounding error, as those of an untrained MobileNetV2 do, they may
    differ by twice what stock's own losses differ by from weights rounded once more at random.
    """
    stock_model, model = both(name)
    again = copy.deepcopy(stock_model)
    plain, fused = losses(stock_model, dtype), losses(model, dtype)
    assert plain.isfinite().all() and plain[-1] != plain[0]
    off = (fused - plain)[:3].abs()
    allowed = (1e-4 if dtype is None else 0.02) * plain[:3].abs().clamp(min=1)
    for draw in range(DRAWS):
        if (off <= allowed).all():
            break
        drawn = losses(rounded_anew(again, draw), dtype)
        allowed = torch.maximum(allowed, 2 * (drawn - plain)[:3].abs())
    assert (off <= allowed).all(), (plain, fused, allowed)
    assert fused.isfinite().all() and fused[-1] <= plain.max()


def test_float64_and_compile() -> None:
    plain, model = both("torchvision mobilenet_v3_small")
    with torch.no_grad():
        expected = plain.eval()(images())
        assert error(torch.compile(model.eval(), fullgraph=True)(images()), expected.double()) < 1e-4
        assert error(model.double()(images().double()), plain.double()(images().double())) < 1e-6
