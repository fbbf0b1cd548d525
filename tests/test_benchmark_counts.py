"""What `pytest --benchmark` counts of a pass: operations, bytes, launches, and what part of the ceilings they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytest_benchmark")
from test_benchmark_pieces import BLOCK, COMPILE, CPU, EAGER, GPU, OURS, of_block

from benchmarks import ceilings, conftest
from benchmarks.counts import forward_flops, launches, saved_bytes
from benchmarks.implementations import Implementation, Pass, Prepared, prepare
from benchmarks.layers import minimum_bytes
from benchmarks.stages import StageShape, all_stages, alone_bytes, deferred_bytes
from mbn_kernels import FusedDepthwiseConvBNAct
from mbn_kernels.models import build_block
from mbn_kernels.models.tables import NETWORKS, BlockShape, layer_shapes


@pytest.mark.parametrize(
    ("shape", "multiply_adds"),
    [
        # depthwise, pointwise
        (BlockShape(8, 3, 8, 16, False, "relu", 2, 9, 9, "separable"), 25 * (8 * 9 + 8 * 16)),
        # expansion, depthwise, projection
        (
            BlockShape(8, 3, 24, 16, False, "relu6", 2, 9, 9, "inverted_residual"),
            81 * 8 * 24 + 25 * (24 * 9 + 24 * 16),
        ),
        # the same, and two linear layers of 8 squeezed channels
        (BLOCK, 64 * (8 * 24 + 24 * 25 + 24 * 8) + 2 * 24 * 8),
    ],
    ids=("v1", "v2", "v3"),
)
def test_operations(shape: BlockShape, multiply_adds: int) -> None:
    size = (3, shape.in_channels, shape.height, shape.width)
    assert forward_flops(build_block(shape, fused=False), size) == 3 * 2 * multiply_adds


def saved_in(prepared: Prepared) -> int:
    """Bytes that the nodes of the graph hold beyond what is known: found in the graph itself, each storage once."""
    out, found, seen = prepared.forward(), {}, set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                value = getattr(node, name)
                tensors = value if isinstance(value, (tuple, list)) else [value]
                found |= {t.untyped_storage().data_ptr(): t for t in tensors if isinstance(t, Tensor)}
    for known in prepared.known:
        found.pop(known.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in found.values())


def test_bytes_that_a_block_keeps(needs_cpu: None) -> None:
    """Fused: each convolution's output once, four numbers a channel, and the squeezed means and the gate."""
    stock, fused = (prepare(i, of_block("forward")) for i in (EAGER, OURS))
    outputs, channels, gate = 2 * 64 * (24 + 24 + 8), 24 + 24 + 8, 2 * 2 * 24
    assert saved_bytes(fused) == 4 * (outputs + 4 * channels + gate) == saved_in(fused)
    assert saved_bytes(stock) == saved_in(stock) > 2 * saved_bytes(fused)


def test_bytes_that_a_stage_keeps(needs_cpu: None) -> None:
    """Stock keeps the raw output and the activation's, and two numbers a channel. Also where memory is shared out of
    large pieces.
    """
    build = lambda fused: FusedDepthwiseConvBNAct(64, 3, act="relu", fused=fused)  # noqa: E731
    given = Pass("forward", build, (2, 64, 64, 64), CPU)
    output = 2 * 64 * 64 * 64 * 4
    assert saved_bytes(prepare(EAGER, given)) == 2 * output + 2 * 64 * 4
    assert saved_bytes(prepare(OURS, given)) == output + 4 * 64 * 4


def test_what_is_there_anyway_is_not_kept() -> None:
    """Parameters and the input are not, in whatever view; a tensor that is saved twice is once."""
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)

    def forward() -> Tensor:
        y = x.t() @ weight.t()  # keeps views of both
        return y * y  # keeps y, twice

    def part() -> Tensor:
        return (x + 1)[:1] * weight[:1]  # keeps all of the sum's memory

    assert saved_bytes(Prepared(forward, list, forward=forward, known=[weight, x])) == 64
    assert saved_bytes(Prepared(part, list, forward=part, known=[weight, x])) == 64
    assert saved_bytes(Prepared(forward, list, forward=forward, known=[weight])) == 128
    assert saved_bytes(Prepared(forward, list)) is None


def test_launches_on_a_cpu() -> None:
    """Operators that work: no view, no allocation, and of one that calls others those alone."""
    x, w = torch.ones(2, 3, 4, 4), torch.ones(5, 4)

    def count(call: Callable[[], object]) -> int:
        return launches(Prepared(call, list), CPU)

    assert count(lambda: (x + 1).view(-1) + 1) == 2
    assert count(lambda: x.view(-1).unsqueeze(0).detach().reshape(8, 12).t()) == 0
    assert count(lambda: x.transpose(1, 3).contiguous()) == 1  # a copy
    assert count(lambda: x.contiguous()) == 0
    assert count(lambda: x.to(torch.bfloat16)) == 1
    assert count(lambda: torch.nn.functional.linear(x, w)) == 1  # calls a product
    assert count(lambda: torch.zeros(3)) == 1
    given = Prepared(lambda y: y.relu(), list, lambda: (x + x + x,))
    assert launches(given, CPU) == 1  # what makes the arguments is not counted


def test_launches_of_a_block(needs_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation is one call; eager PyTorch has one for each convolution, norm, activation and step of the gate."""
    monkeypatch.undo()  # what fills fresh memory with NaN would count
    stock, fused = (prepare(i, of_block("evaluation")) for i in (EAGER, OURS))
    fused.results()  # packs the weights, as the check before the timing does
    assert launches(fused, CPU) == 1
    # Three convolutions, three norms, two activations; mean, two linear layers, two activations, product; the residual.
    assert launches(stock, CPU) >= 3 + 3 + 2 + 6 + 1


def test_launches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels alone: neither copies and fills, nor ranges, nor what the host does."""
    kinds = torch.autograd.DeviceType
    names = [("kernel", kinds.CUDA), ("other", kinds.CUDA), ("Memcpy DtoD", kinds.CUDA), ("Memset", kinds.CUDA)]
    names += [("mbn::A/whole/forward", kinds.CUDA), ("cudaLaunchKernel", kinds.CPU)]
    events = [SimpleNamespace(name=name, device_type=kind) for name, kind in names]
    told: list[object] = []

    class Profile:
        def __init__(self, activities: list) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            told.append("begin")
            return self

        def __exit__(self, *exc: object) -> None:
            told.append("end")

        def events(self) -> list:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append(device))
    assert launches(Prepared(lambda: told.append("call"), list), GPU) == 2
    assert told == ["begin", "call", GPU, "end"]


def test_what_is_counted_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "launches", lambda prepared, device: 7)
    monkeypatch.setattr(conftest, "saved_bytes", lambda prepared: None if prepared.forward is None else 5)
    monkeypatch.setattr(conftest, "peak_bytes", lambda call, device: 3 if device.type == "cuda" else None)
    kept, gone = Prepared(lambda: None, list, forward=lambda: None), Prepared(lambda: None, list)
    block = of_block("forward")

    def counted(implementation: Implementation, prepared: Prepared, direction: str, device: torch.device) -> dict:
        return conftest.counted(implementation, prepared, block._replace(direction=direction, device=device))

    assert counted(OURS, kept, "forward", CPU) == {"saved_bytes": 5, "launches": 7}
    assert counted(OURS, gone, "backward", CPU) == {"launches": 7}
    assert counted(COMPILE, kept, "forward", CPU) == {"saved_bytes": 5}  # what it made is not seen on a CPU
    assert counted(COMPILE, gone, "dx", GPU) == {"launches": 7}
    assert counted(OURS, kept, "training", CPU) == {"saved_bytes": 5}
    assert counted(OURS, kept, "training", GPU) == {"saved_bytes": 5, "peak_bytes": 3}


# The least bytes ------------------------------------------------------------------------------------------------------


def passes() -> dict[str, list[Callable[[int, int], int]]]:
    """The last column of docs/design.md's table of passes: for each row a function of U and D for each amount there."""
    text = (Path(__file__).parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("| depthwise + BN + activation | stock eager | the least |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        name, _, least = (cell.strip() for cell in line.strip("|").split("|"))
        amounts = re.findall(r"(\d*)U \+ (\d*)D", least)
        found[name] = [lambda u, d, a=int(a or 1), b=int(b or 1): a * u + b * d for a, b in amounts]
    return found


def test_bytes_of_stages_are_those_of_the_design() -> None:
    evaluation, forward, backward = passes().values()
    shape = StageShape("depthwise", 24, 24, 3, 2, 9, 9, "hardswish")
    u, d = shape.bytes(2, torch.bfloat16)
    assert (u, d) == (2 * 24 * 81 * 2, 2 * 24 * 25 * 2)
    alone, deferred = alone_bytes(shape, 2, torch.bfloat16), deferred_bytes(shape, 2, torch.bfloat16)
    assert [alone["evaluation"]] == [deferred["evaluation"]] == [f(u, d) for f in evaluation]
    assert [deferred["forward"], alone["forward"]] == [f(u, d) for f in forward]
    assert [deferred["backward"]] == [f(u, d) for f in backward]
    # Both gradients in one pass read the raw output and its gradient once for both.
    assert [alone["dx"] + alone["dw"] - 4 * d] == [f(u, d) for f in backward]
    # Squeeze-excite: for the means, and with the gate; the gradient's sums, and with them.
    gate = StageShape("gate", 24, 24, 1, 1, 9, 9, "hardsigmoid")
    assert alone_bytes(gate, 2, torch.bfloat16) == {"evaluation": 3 * u, "forward": 3 * u, "dx": 4 * u, "dw": 2 * u}


@pytest.mark.parametrize("network", NETWORKS)
def test_bytes_of_a_block_are_those_of_its_stages(network: str) -> None:
    """Deferred but for the last; the sums' 2D are a stage's alone. A residual is read once more, either way."""
    for b in layer_shapes(network):
        after = -(-b.height // b.s), -(-b.width // b.s)
        chain = [StageShape("depthwise", b.exp_channels, b.exp_channels, b.k, b.s, b.height, b.width, "")]
        chain += [StageShape("pointwise", b.exp_channels, b.out_channels, 1, 1, *after, "")]
        if b.exp_channels != b.in_channels:
            chain.insert(0, StageShape("pointwise", b.in_channels, b.exp_channels, 1, 1, b.height, b.width, ""))
        (_, d), (_, out) = (stage.bytes(3, torch.bfloat16) for stage in chain[-2:])
        x = 3 * b.in_channels * b.height * b.width * 2
        residual = out if network != "mobilenet_v1" and b.s == 1 and b.in_channels == b.out_channels else 0
        forward = sum(deferred_bytes(stage, 3, torch.bfloat16)["forward"] for stage in chain) + 2 * out + residual
        sums = 2 * sum(stage.bytes(3, torch.bfloat16)[1] for stage in chain[:-1])
        backward = sum(deferred_bytes(stage, 3, torch.bfloat16)["backward"] for stage in chain) - sums + residual
        found = minimum_bytes(b, 3, 2)
        assert found["forward"] == forward + (d if b.se else 0)
        assert found["backward"] == backward
        assert found["evaluation"] == x + out + (min(x, 2 * d) if b.se else 0)


def test_every_squeeze_excite_is_a_stage() -> None:
    found = [s for s in all_stages("mobilenet_v3_large") if s.conv == "gate"]
    assert {s.inner for s in found} == {72, 120, 480, 672, 960}
    assert str(found[0]) == "gate 72x28x28-hardsigmoid"
    x = torch.randn(2, 72, 4, 4)
    plain, fused = (found[0].module(fused=fused).eval() for fused in (False, True))
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))


# Ceilings -------------------------------------------------------------------------------------------------------------


def test_ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda: calls.append("copy") or 2e10)
    monkeypatch.setattr(ceilings, "peak_gflops", lambda: calls.append("peak") or 150.0)
    ceilings.ceilings.cache_clear()
    try:
        first = ceilings.ceilings(CPU, torch.float32)
        assert first == (2e10, 150e9) and ceilings.ceilings(CPU, torch.float32) is first
        assert sorted(calls) == ["copy", "peak"]
        monkeypatch.setattr(ceilings, "peak_gflops", lambda: None)
        assert ceilings.ceilings(CPU, torch.bfloat16).peak_flops is None
    finally:
        ceilings.ceilings.cache_clear()


def test_a_copy_counts_what_it_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPIED", 1 << 20)
    monkeypatch.setattr(ceilings, "seconds", lambda call: call() is None or 0.5)
    assert ceilings.copy_bandwidth() == 2 * (1 << 20) / 0.5


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"minimum_bytes": 4_000_000, "flops": 10_000_000}
    monkeypatch.setattr(conftest, "ceilings", lambda device, dtype: ceilings.Ceilings(8e9, 1e11))
    found = conftest.rates(info, of_block("forward"), 0.001)
    assert found == pytest.approx(
        {
            "gb_per_s": 4.0, "gflop_per_s": 10.0, "copy_bandwidth": 8e9, "copy_share": 0.5, "peak_flops": 1e11,
            "peak_share": 0.1,
        }
    )  # fmt: skip
    monkeypatch.setattr(conftest, "ceilings", lambda device, dtype: ceilings.Ceilings(8e9, None))
    assert "peak_share" not in conftest.rates(info, of_block("forward"), 0.001)
