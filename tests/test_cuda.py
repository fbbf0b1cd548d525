"""On a GPU, by the reference backend: the same answers as stock, until kernels of its own come."""

from __future__ import annotations

import warnings

import pytest
import stock
import torch
from oracle import Case, Tensors, compare_case, dw, fused_chain, hold, pw
from torch import nn

from mbn_kernels import FusedInvResBlock, available_backends, models, use_backend

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:mbn_kernels has no cuda kernels")]

GATE = ("relu", "hardsigmoid")
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
CASES = (
    Case("v3", (4, 16, 29, 28), (pw(64, "hardswish"), dw(5, "hardswish", gate=GATE), pw(16)), True),
    Case("v2", (4, 16, 29, 28), (pw(96, "relu6"), dw(3, "relu6", stride=2), pw(24))),
    Case("v1", (4, 17, 15, 14), (dw(3, "relu", stride=2), pw(33, "relu"))),
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def to_cuda(t: Tensors) -> Tensors:
    return t.map(torch.Tensor.cuda)


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("case", CASES, ids=str)
@MODES
def test_matches_the_oracle(case: Case, dtype: torch.dtype, training: bool) -> None:
    compare_case(fused_chain, case, dtype, training, change=to_cuda)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("out", (6, 4), ids=("plain", "residual"))
@MODES
def test_autocast(dtype: torch.dtype, out: int, training: bool) -> None:
    fused, twin = (cls(4, 3, 12, out, True, "hs", 1) for cls in (FusedInvResBlock, stock.InvResBlock))
    stock.compare_under_autocast(fused, twin, (3, 4, 8, 7), torch.float32, dtype, training, "cuda")


@pytest.mark.parametrize("make", (models.mobilenet_v1, models.mobilenet_v2, models.mobilenet_v3_large,
                                  models.mobilenet_v3_small), ids=lambda f: f.__name__)  # fmt: skip
def test_training_step(make) -> None:
    torch.manual_seed(0)
    fused = make(num_classes=10).cuda()
    plain = make(num_classes=10, fused=False).cuda()
    plain.load_state_dict(fused.state_dict())
    x, labels = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
    losses = []
    for model in (fused, plain):
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):  # the second loss shows the first step's gradients; later ones amplify rounding
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[:2], losses[2:], rtol=2e-3, atol=2e-3)


def test_mixed_devices_are_refused() -> None:
    block = FusedInvResBlock(4, 3, 12, 4, True, "hs", 1)
    with use_backend("reference"):
        with pytest.raises(ValueError, match="weight: expected a tensor on cuda:0"):
            block(torch.randn(2, 4, 6, 6, device="cuda"))
        with pytest.raises(ValueError, match="weight: expected a tensor on cpu"):
            block.cuda()(torch.randn(2, 4, 6, 6))


def test_the_reference_says_so_once() -> None:
    from mbn_kernels import backends

    backends._warned.discard("cuda")
    block, x = FusedInvResBlock(4, 3, 12, 4, True, "hs", 1).cuda(), torch.randn(2, 4, 6, 6, device="cuda")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        block(x), block(x)
    assert len([w for w in seen if "no cuda kernels" in str(w.message)]) == 1
    assert available_backends()["reference"] == "available"


def test_stock_module_on_cuda() -> None:
    """The comparison of modules, once, through their own children."""
    twin = stock.InvResBlock(16, 3, 64, 16, True, "hs", 1)
    t = to_cuda(stock.prepare_module(twin, (2, 16, 14, 14), torch.float32, True))
    fused, twin = FusedInvResBlock(16, 3, 64, 16, True, "hs", 1).cuda(), twin.cuda()
    hold(stock.run_module(fused, t), lambda t: stock.run_module(twin, t), t, torch.float32)
