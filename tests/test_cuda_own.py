"""What is the CUDA backend's own, on a GPU: every way to evaluate a block, every tile of a depthwise kernel."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import stock
import torch
from oracle import Case, Tensors, compare_case, fused_chain, hold
from test_blocks import REAL, pair
from test_cuda import (  # noqa: F401 (fixtures, too)
    BY_DTYPE,
    CASES,
    choose_ways,
    counted_calls,
    cuda_alone,
    full_precision,
    prefer_whole_blocks,
    to_cuda,
    warm_up,
)
from torch import Tensor, nn

from mbn_kernels import models
from mbn_kernels.models.tables import BlockShape

pytestmark = pytest.mark.cuda


def likely_ways(module: nn.Module, x: Tensor) -> list:
    """Ways to evaluate a block on x: the six likely best, and the likely best of every kind."""
    found = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        choose_ways(patch, lambda ways: found.extend(ways) or ways)
        module(x)
    kinds = [way.kind for way in found]
    return [way for i, way in enumerate(found) if i < 6 or kinds.index(kinds[i]) == i]


@pytest.mark.parametrize("batch", (1, 32))
@pytest.mark.parametrize("shape", REAL, ids=REAL.get)
@torch.no_grad()
def test_every_way_to_evaluate_a_block(on_cuda, calls: Counter, shape: BlockShape, batch: int) -> None:
    """Not only in the way that the planner puts first: another may be the fastest where shapes are tuned."""
    dtype = torch.bfloat16
    fused, twin = (m.to("cuda", dtype).eval() for m in pair(shape))
    fused.load_state_dict(stock.randomize(twin).state_dict())
    x = 0.3 + torch.randn(batch, shape.in_channels, shape.height, shape.width, device="cuda")
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    state = {name: t for name, t in twin.state_dict().items() if t.is_floating_point()}
    got = {}
    for way in likely_ways(fused, x):
        with pytest.MonkeyPatch.context() as patch:
            choose_ways(patch, lambda _, way=way: [way])
            calls.clear()
            got[str(way)] = fused(x)
            assert calls["cuda_inverted_residual"] == bool(way.count)
            assert calls["cuda_gated_project"] == bool(way.gate_height)
            assert torch.equal(fused(x), got[str(way)])

    def by_stock(t: Tensors) -> dict[str, Tensor]:
        module = copy.deepcopy(twin).to(t.x.dtype)
        module.load_state_dict(t.stages[0], strict=False)
        return dict.fromkeys(got, module(t.x))

    hold(got, by_stock, Tensors(x, [state]), dtype)


def test_most_blocks_can_be_fused(on_cuda) -> None:
    """Else the test above would compare little. V1's wide outputs do not fit."""

    def fuses(b: BlockShape) -> bool:
        x = torch.zeros(1, b.in_channels, b.height, b.width, dtype=torch.bfloat16, device="cuda")
        return any(way.count or way.gate_height for way in likely_ways(pair(b)[0].to(x.device, x.dtype).eval(), x))

    assert sum(map(fuses, REAL)) >= 0.75 * len(REAL)


@BY_DTYPE
@pytest.mark.parametrize("tile", range(6))
@pytest.mark.parametrize("case", (CASES[0], CASES[1], CASES[3]), ids=str)
def test_every_tile_of_a_depthwise_kernel(
    on_cuda, calls: Counter, monkeypatch: pytest.MonkeyPatch, case: Case, tile: int, dtype: torch.dtype
) -> None:
    """Likewise."""
    from mbn_kernels.backends.cuda import config
    from mbn_kernels.backends.triton import tuning

    tiles = config.depthwise

    def one_of_them(*args: object) -> list:
        found = tiles(*args)
        return [found[tile % len(found)]]

    monkeypatch.setattr(config, "depthwise", one_of_them)
    monkeypatch.setattr(tuning, "_plans", {})
    compare_case(fused_chain, case, dtype, True, change=to_cuda)
    assert calls["cuda_depthwise_forward"] and calls["cuda_depthwise_backward"]


@pytest.mark.parametrize("whole", (False, True), ids=("as planned", "whole blocks"))
@torch.no_grad()
def test_graph_of_all_blocks_of_a_network(
    on_cuda, calls: Counter, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """The same bits as without a graph. The stem and the classifier are PyTorch's own."""
    if whole:
        prefer_whole_blocks(monkeypatch)
    net = stock.randomize(models.mobilenet_v3_large(num_classes=10)).to("cuda", torch.bfloat16).eval()
    stem = net.conv1(torch.randn(2, 3, 224, 224, dtype=torch.bfloat16, device="cuda"))

    def run() -> Tensor:
        return net.last_conv(net.blocks(stem))

    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    assert calls["cuda_inverted_residual"] and calls["cuda_gated_project"] if whole else calls
    for _ in range(2):
        stem.copy_(torch.randn_like(stem))
        graph.replay()
        got = out.clone()
        assert got.isfinite().all() and got.count_nonzero() > got.numel() / 4
        assert torch.equal(got, run())
