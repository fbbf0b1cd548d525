"""Training over several processes (gloo, on the CPU): SyncBatchNorm, DistributedDataParallel, FSDP2.

What the processes find is compared with one process that has the whole batch, or with stock PyTorch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import fusible
import pytest
import stock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import COLLECTIVE, Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mbn_kernels
from mbn_kernels import FusedInvResBlock, chain, models
from mbn_kernels.functional import Running, run_chain


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("pair"), 2) as processes:
        yield processes


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("trio"), 3) as processes:
        yield processes


# SyncBatchNorm --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    sizes: tuple[int, ...]  # each process's batch
    signature: tuple = stock.SIGNATURE
    shape: tuple[int, int] = (5, 4)

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("two-processes", (3, 2)),
    Case("two-processes-stride-2", (2, 5), (4, 5, 12, 6, False, "relu", 2)),
    Case("one-value-in-a-process", (1, 6), shape=(1, 1)),
    Case("three-processes", (2, 1, 4)),
    Case("three-processes-one-without-a-batch", (2, 0, 3)),
)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
BY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def given(case: Case, dtype: torch.dtype) -> stock.Tensors:
    """Input and gradient of the whole batch, and the state."""
    return stock.prepare_module(stock.InvResBlock(*case.signature), (sum(case.sizes), 4, *case.shape), dtype, True)


def plain(case: Case, t: stock.Tensors) -> nn.Module:
    block = stock.InvResBlock(*case.signature).to(t.x.dtype)
    block.load_state_dict(t.stages[0], strict=False)  # num_batches_tracked stays
    return block


def synchronized(case: Case, t: stock.Tensors, group: dist.ProcessGroup | None = None) -> nn.Module:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(FusedInvResBlock(*case.signature), group).to(t.x.dtype)
    block.load_state_dict(t.stages[0], strict=False)
    assert block.why_not_fused() is None
    return block


def step(module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(dout)
    found = {"out": out.detach(), "grad x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest element of each tensor; what should be 0 is rounding errors of the rest."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        error, scale = (got[name].to(want.dtype) - want).abs().max().item(), max(want.abs().max().item(), 1e-3)
        assert got[name].shape == want.shape and error <= tolerance * scale, f"{name}: {error} of {scale}"


def assert_as_one_process(ranks: Sequence[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and input gradients are the whole's, parameters' gradients add up to it, buffers are it everywhere."""
    got = {}
    for name in expected:
        each = [rank[name] for rank in ranks]
        if name in ("out", "grad x"):
            got[name] = torch.cat(each)
        elif name.startswith("grad"):
            got[name] = torch.stack(each).sum(0)
        else:
            got[name] = each[0]
            assert all(torch.equal(other, each[0]) for other in each), name
    assert_near(got, expected, tolerance)


def run_case(rank: int, backend: str, case: Case, t: stock.Tensors) -> dict[str, Tensor]:
    x, dout = (whole.split(case.sizes)[rank] for whole in (t.x, t.dout))
    with mbn_kernels.use_backend(backend):
        return step(synchronized(case, t), x, dout)


@pytest.mark.parametrize("case", CASES, ids=str)
@BY_DTYPE
def test_synchronized_is_one_process_with_the_whole_batch(pair, trio, backend: str, case: Case, dtype) -> None:
    t = given(case, dtype)
    ranks, t = (pair if len(case.sizes) == 2 else trio)(run_case, backend, case, t), t.map(Tensor.double)
    assert_as_one_process(ranks, step(plain(case, t), t.x, t.dout), TOLERANCE[dtype])


def run_in_groups(rank: int, case: Case, t: stock.Tensors) -> dict[str, Tensor]:
    groups = [dist.new_group(ranks, timeout=COLLECTIVE) for ranks in ((0, 2), (1,))]
    x, dout = (whole.split(case.sizes)[rank] for whole in (t.x, t.dout))
    return step(synchronized(case, t, groups[rank % 2]), x, dout)


def test_statistics_are_those_of_the_modules_group(needs_cpu, trio: Processes) -> None:
    """Processes 0 and 2 share theirs, process 1 is alone."""
    case = Case("groups", (2, 3, 2))
    t = given(case, torch.float64)
    ranks = trio(run_in_groups, case, t)
    for members in ((0, 2), (1,)):
        x, dout = (torch.cat([whole.split(case.sizes)[rank] for rank in members]) for whole in (t.x, t.dout))
        assert_as_one_process([ranks[rank] for rank in members], step(plain(case, t), x, dout), 1e-9)


def run_without_values(rank: int, backend: str, case: Case, t: stock.Tensors) -> list[dict[str, Tensor]]:
    """A step in which no process has a batch, then one in which the first has one of NaN."""
    with mbn_kernels.use_backend(backend):
        block, found = synchronized(case, t), []
        for size in (0, 2 if rank == 0 else 0):
            x = torch.full((size, 4, 5, 4), float("nan"))
            found.append(step(block, x, x))
        return found


def test_without_values_nothing_changes_but_nan_is_no_lack_of_values(pair: Processes, backend: str) -> None:
    t = given(CASES[0], torch.float32)
    for nothing, nan in pair(run_without_values, backend, CASES[0], t):
        assert nothing["out"].shape == nothing["grad x"].shape == (0, 4, 5, 4)
        assert not any(v.any() for name, v in nothing.items() if name.startswith("grad"))
        for name in (name for name in nothing if "running" in name):
            assert torch.equal(nothing[name], t.stages[0][name]) and nan[name].isnan().all(), name
        counts = [(nothing[name], nan[name]) for name in nothing if name.endswith("num_batches_tracked")]
        assert counts == [(1, 2)] * 3


COMPILED = ((3, 2), (4, 0))


def run_compiled(rank: int, backend: str, case: Case, t: stock.Tensors) -> list[tuple]:
    """A step of a compiled block and one of the block as it is."""
    found = []
    for sizes in COMPILED:
        x, dout = (whole[: sum(sizes)].split(sizes)[rank] for whole in (t.x, t.dout))
        compiled, eager = (synchronized(case, t) for _ in range(2))
        compiled.compile(fullgraph=True, backend="aot_eager")
        with mbn_kernels.use_backend(backend):
            found.append((step(compiled, x, dout), step(eager, x, dout)))
    return found


def test_compile(pair: Processes, backend: str) -> None:
    for found in pair(run_compiled, backend, CASES[0], given(CASES[0], torch.float32)):
        assert len(found) == len(COMPILED)
        for compiled, eager in found:
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


# Chains with a group --------------------------------------------------------------------------------------------------


def test_any_name_of_a_group_passes_through_the_text() -> None:
    for group in ("0", "a group", "50%20; x: y@z", ""):
        (stage,) = chain.parse(
            chain.chain_spec("op", [chain.stage_spec("pointwise", norm="batch", group=group)])
        ).stages
        assert (stage.norm, stage.group) == ("batch", group)


def two_stages(group: str | None) -> str:
    stage = chain.stage_spec("pointwise", norm="batch", affine=True, eps=1e-5, act="silu", group=group)
    return chain.chain_spec("op", [stage, stage])


def two_stages_tensors(*shape: int, **options) -> list[Tensor]:
    return [torch.randn(s, **options) for s in (shape, *((4, 4, 1, 1), (4,), (4,)) * 2)]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[str]:
    """The name of a process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1, timeout=COLLECTIVE)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_opcheck(backend: str, alone: str) -> None:
    x, *params = two_stages_tensors(2, 4, 3, 3, requires_grad=True)
    spec = two_stages(alone)
    torch.library.opcheck(torch.ops.mbn.chain.default, (x, params, spec, True, True, backend))
    x, *params = two_stages_tensors(2, 4, 3, 3)
    out, _, saved = torch.ops.mbn.chain(x, params, spec, True, True, backend)
    arguments = torch.randn_like(out), x, params, saved, spec, True, [True] * 7, backend
    torch.library.opcheck(torch.ops.mbn.chain_backward.default, arguments)


def test_one_value_is_refused_only_where_no_other_process_may_have_more(backend: str, alone: str) -> None:
    x, *params = two_stages_tensors(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_chain(x, two_stages(None), params)
    running = [Running(torch.zeros(4), torch.ones(4)) for _ in range(2)]
    assert run_chain(x, two_stages(alone), params, running).isfinite().all()
    assert running[0].mean.isfinite().all() and running[0].var.isnan().all()  # as stock's


def test_a_group_that_is_gone(backend: str) -> None:
    x, *params = two_stages_tensors(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"process group .* under the name gone"):
        run_chain(x, two_stages("gone"), params)


# Networks -------------------------------------------------------------------------------------------------------------

SIZES = (4, 3)
STEPS = 3


def network(fused: bool, stem_norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = models.mobilenet_v3_small(num_classes=5, width_mult=0.5, dropout=0.0, bn_momentum=0.3, fused=fused)
    if not stem_norm:  # the stem is stock's, whose SyncBatchNorm does not run on the CPU
        net.conv1[1] = nn.Identity()
    return net.double()


def batch(i: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(i)
    n = sum(SIZES)
    return torch.randn((n, 3, 64, 64), generator=g, dtype=torch.float64), torch.randint(5, (n,), generator=g)


def train(net: nn.Module, rank: int | None) -> list[Tensor]:
    """Losses of a few steps with the whole batches, or with one process's part of them. The mean of the processes'
    losses is that of the whole batch, and so is the mean of their gradients.
    """
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), []
    for i in range(STEPS):
        x, y = batch(i)
        scale = 1 / len(x)
        if rank is not None:
            x, y, scale = x.split(SIZES)[rank], y.split(SIZES)[rank], scale * len(SIZES)
        loss = F.cross_entropy(net(x), y, reduction="sum") * scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


class Trained(NamedTuple):
    losses: list[Tensor]
    state: dict[str, Tensor]


def replicate(rank: int, fused: bool, **options) -> Trained:
    net = DistributedDataParallel(network(fused), **options)
    return Trained(train(net, rank), net.module.state_dict())


def run_replicated(rank: int) -> tuple[Trained, Trained]:
    return replicate(rank, True), replicate(rank, False)


def run_replicated_synchronized(rank: int) -> Trained:
    net = DistributedDataParallel(network(True, stem_norm=False))
    # In this order, as DistributedDataParallel refuses a SyncBatchNorm on the CPU.
    nn.SyncBatchNorm.convert_sync_batchnorm(net.module)
    return Trained(train(net, rank), net.module.state_dict())


def shard(rank: int, net: nn.Module) -> Trained:
    mesh = init_device_mesh("cpu", (len(SIZES),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    losses = train(net, rank)
    for block in net.blocks:
        assert block.why_not_fused() is None and all(type(p) is DTensor for p in block.parameters())
    return Trained(losses, {k: v.full_tensor() if type(v) is DTensor else v for k, v in net.state_dict().items()})


def run_sharded(rank: int) -> tuple[Trained, Trained]:
    # FSDP2 does not send the first process's running statistics to the others.
    return shard(rank, network(True)), replicate(rank, True, broadcast_buffers=False)


def run_sharded_synchronized(rank: int) -> Trained:
    return shard(rank, nn.SyncBatchNorm.convert_sync_batchnorm(network(True, stem_norm=False)))


def users_network(fused: bool) -> nn.Module:
    """Of blocks that were not made for it, by mbn_kernels.fuse()."""
    net = stock.randomize(fusible.Net()).double()
    net.stem[1] = nn.Identity()
    assert not fused or len(mbn_kernels.fuse(net).fused) == 3
    return net


def run_users_replicated(rank: int) -> Trained:
    net = DistributedDataParallel(users_network(True), find_unused_parameters=True)
    nn.SyncBatchNorm.convert_sync_batchnorm(net.module)
    return Trained(train(net, rank), net.module.state_dict())


def run_users_sharded(rank: int) -> Trained:
    return shard(rank, nn.SyncBatchNorm.convert_sync_batchnorm(users_network(True)))


@pytest.mark.parametrize("work", (run_replicated, run_sharded))
def test_data_parallel(needs_cpu, pair: Processes, work: Callable) -> None:
    """DistributedDataParallel trains the fused network as the stock one, and FSDP2 as it does."""
    ranks = pair(work)
    for got, expected in ranks:
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-7, atol=0)
        assert_near(got.state, expected.state, 1e-6)
    one, other = ({name: v for name, v in got.state.items() if "running" not in name} for got, _ in ranks)
    assert_near(one, other, 0)


@pytest.mark.parametrize(
    "work", (run_replicated_synchronized, run_sharded_synchronized, run_users_replicated, run_users_sharded)
)
def test_data_parallel_with_synchronized_batch_norm(needs_cpu, pair: Processes, work: Callable) -> None:
    """As one process that trains the stock network on the whole batches."""
    ranks = pair(work)
    net = users_network(False) if "users" in work.__name__ else network(False, stem_norm=False)
    losses = torch.stack(train(net, None))
    for got in ranks:
        assert_near(got.state, net.state_dict(), 1e-6)
    torch.testing.assert_close(
        torch.stack([torch.stack(got.losses) for got in ranks]).mean(0), losses, rtol=1e-7, atol=0
    )


def run_until_one_dies(rank: int) -> None:
    net = DistributedDataParallel(network(True, stem_norm=False))
    nn.SyncBatchNorm.convert_sync_batchnorm(net.module)
    for i in range(STEPS):
        loss = net(batch(i)[0]).square().mean()
        if i == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()


def test_a_process_that_dies_ends_the_others_with_an_error(needs_cpu, tmp_path: Path) -> None:
    with Processes(tmp_path, 3) as processes:
        answers = processes.answers(run_until_one_dies)
    assert answers[1] == (False, f"ended with exit code {-signal.SIGKILL}")
    for done, error in (answers[0], answers[2]):
        assert not done and "RuntimeError" in error
