"""Large activations of the CPU kernels lie in memory that is used again: never shared, bounded, and given back."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mbn_kernels
from mbn_kernels import FusedInvResBlock
from mbn_kernels.backends import cpu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def empty(needs_cpu: None) -> Iterator[None]:
    gc.collect()
    mbn_kernels.empty_cache()
    yield
    mbn_kernels.empty_cache()


def take(megabytes: float) -> Tensor:
    return torch.ops.mbn.cpu_buffer(1, 1, 1, int(megabytes * MIB / 4), torch.float32)


def kept() -> int:
    return torch.ops.mbn.cpu_cached_bytes()


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 64, 33, 1), (2, 1, 900, 400)])
def test_is_what_torch_empty_would_be(shape: tuple, dtype: torch.dtype) -> None:
    t, twin = (
        torch.ops.mbn.cpu_buffer(*shape, dtype),
        torch.empty(shape, dtype=dtype, memory_format=torch.channels_last),
    )
    assert (t.shape, t.stride(), t.dtype, t.device) == (twin.shape, twin.stride(), twin.dtype, twin.device)
    assert t.data_ptr() % 64 == 0
    t.fill_(3)
    assert t.sum() == twin.fill_(3).sum()


def test_memory_is_used_again_once_it_is_free() -> None:
    first = take(8)
    address, view = first.data_ptr(), first[..., :4]
    del first
    assert take(8).data_ptr() != address  # a view keeps it
    del view
    assert take(8).data_ptr() == address
    parts = [take(4), take(4)]  # what is free is divided
    assert [part.data_ptr() - address for part in parts] == [0, 4 * MIB]
    del parts
    assert take(8).data_ptr() == address  # and joined again


def test_free_memory_is_used_before_fresh() -> None:
    """Also where fresh memory lies lower: what was in front of a tensor too large for the first chunk."""
    parts = [take(100), take(200)]
    address = parts.pop().data_ptr()
    before = kept()
    assert before >= 200 * MIB
    t = take(120)
    assert t.data_ptr() == address and kept() == before - 120 * MIB


def test_live_tensors_never_share_memory() -> None:
    live = {}
    for i in range(200):
        t = take(1 + i % 7 / 2).fill_(i)
        assert all(
            a.data_ptr() + a.nbytes <= t.data_ptr() or t.data_ptr() + t.nbytes <= a.data_ptr() for a in live.values()
        )
        live[i % 5] = t
        for j in range(max(0, i - 4), i + 1):
            assert live[j % 5].min() == live[j % 5].max() == j


def test_what_is_kept_is_bounded() -> None:
    """In use and kept together: no more than was in use at once, whatever the sizes, also beyond a chunk's."""
    for megabytes in (*range(1, 60), 255, 257, 300, 310, 290):
        del_me = take(megabytes)
        assert kept() + del_me.nbytes <= max(megabytes, 310 if megabytes == 290 else 0) * MIB
        del del_me
    assert kept() > 0
    mbn_kernels.empty_cache()
    assert kept() == 0


def test_a_training_step_takes_no_new_memory() -> None:
    block = FusedInvResBlock(32, 3, 192, 32, False, "relu6", 1)
    x = torch.randn(8, 32, 56, 56, requires_grad=True)

    def step() -> int:
        block(x).sum().backward()
        block.zero_grad()
        x.grad = None
        return kept()

    with mbn_kernels.use_backend("cpu"):
        after = [step() for _ in range(6)]
    assert after[0] > 8 * 192 * 56 * 56 * 4
    assert len(set(after[1:])) == 1


def test_outputs_are_ordinary_tensors(tmp_path) -> None:
    block = FusedInvResBlock(16, 3, 32, 16, False, "relu", 1).eval()
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        out = block(torch.randn(4, 16, 96, 96))
    assert out.nbytes >= cpu.LEAST_BUFFER
    twin = out.clone()
    torch.save(out, tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt"), twin)
    assert torch.equal(out.share_memory_(), twin)
    assert torch.equal(torch.from_numpy(out.numpy()), twin)
    assert torch.equal(torch.from_dlpack(out), twin)


def test_numpy_keeps_the_memory() -> None:
    array = take(2).fill_(5).numpy()
    for _ in range(4):
        take(2).fill_(6)
    assert (array == 5).all()


def test_threads() -> None:
    failed = []

    def work(number: int) -> None:
        for i in range(100):
            t = take(1 + (number + i) % 3).fill_(number)
            if not bool((t == number).all()):
                failed.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def in_a_child(t: Tensor, queue) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker does: the threads of OpenMP stay behind in the parent
    fresh = take(2).fill_(7)
    queue.put((float(t.max()), float(fresh.min())))


def test_after_fork() -> None:
    t = take(2).fill_(5)
    take(2)  # something to be kept
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_a_child, args=(t, queue), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == (5, 7)
    assert t.min() == 5


@pytest.mark.parametrize(
    "sizes", [(0, 1, 1, 1), (-1, 4, 4, 4), (1 << 40, 1 << 40, 1, 1), (1 << 20, 1 << 20, 1 << 10, 1)]
)
def test_impossible_sizes(sizes: tuple) -> None:
    with pytest.raises(RuntimeError, match="cpu_buffer: size: expected"):
        torch.ops.mbn.cpu_buffer(*sizes, torch.float32)


def test_other_dtypes() -> None:
    with pytest.raises(RuntimeError, match="cpu_buffer: dtype: expected Float, Double or BFloat16, got Half"):
        torch.ops.mbn.cpu_buffer(1, 1, 1, 1, torch.float16)
