"""A process in which memory runs out, for test_out_of_memory.py: ``out_of_memory.py WORK THREADS [LIBRARY EVERY]``.

With LIBRARY, that of failing_memory.cpp, requests that the kernels make for memory fail in turn; without, the address
space is bounded at rising margins. Whatever fails must say so in a Python exception, and the next call must
give the very numbers that it always gives. Prints how often that was.
"""

from __future__ import annotations

import ctypes
import faulthandler
import re
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, FusedSequential
from mbn_kernels.models import MobileNet

PATIENCE = 240  # seconds, after which a process that hangs says where, and ends
MIB = 1 << 20
#: What may be said: by this library's buffers and scratch, by PyTorch's own allocator, and by C++ of a small thing.
WORDS = re.compile(
    r"RuntimeError: cpu_buffer: size: expected at most the free memory, got \d+ bytes"
    r"|MemoryError: mbn_kernels: scratch: expected at most the free memory, got \d+ bytes"
    r"|RuntimeError: .*DefaultCPUAllocator: (can't allocate memory|not enough memory): you tried to allocate \d+ bytes"
    r"|MemoryError: std::bad_alloc"
    r"|MemoryError: $"
)


def training(height: int) -> Callable[[], list[Tensor]]:
    net = FusedSequential(FusedInvResBlock(8, 3, 24, 8, True, "hs", 1), FusedDepthwiseSeparable(8, 12, s=2)).train()
    x, state = torch.randn(4, 8, height, 96), {name: t.clone() for name, t in net.state_dict().items()}

    def work() -> list[Tensor]:
        net.load_state_dict(state)
        net.zero_grad()
        out = net(x)
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]

    return work


def evaluation(images: int, height: int) -> Callable[[], list[Tensor]]:
    blocks = FusedInvResBlock(8, 3, 48, 8, True, "hs", 1), FusedInvResBlock(8, 5, 24, 16, False, "relu6", 2)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
    net = MobileNet(stem, FusedSequential(*blocks), nn.Sequential(nn.Linear(16, 10))).eval()
    x = torch.randn(images, 3, height, 64)

    def work() -> list[Tensor]:
        with torch.no_grad():
            return [net(x), net(x)]

    return work


WORKS = {
    "training": training,
    "one image": lambda height: evaluation(1, 16 * height),  # whose rows the threads share
    "images": lambda height: evaluation(8, height),  # which the threads share
}


def outcome(work: Callable[[], list[Tensor]]) -> tuple[list[Tensor] | None, str]:
    try:
        return work(), "done"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def in_a_new_thread(work: Callable[[], list[Tensor]]) -> tuple[list[Tensor] | None, str]:
    """Without scratch memory from earlier calls: a new thread, and its new team, have none."""
    found = []

    def run() -> None:
        mbn_kernels.empty_cache()
        found.append(outcome(work))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def check(said: str) -> str:
    """What was said without its numbers."""
    assert said == "done" or WORDS.match(said), said
    return re.sub(r"\d+", "N", said.splitlines()[0])


def assert_same(found: tuple[list[Tensor] | None, str], expected: list[Tensor]) -> None:
    assert found[1] == "done", found[1]
    assert all(map(torch.equal, found[0], expected))


def refuse_each_request(work: Callable[[], list[Tensor]], path: str, every: int) -> Counter:
    """Each large one, and every so many-th of all."""
    library, said = ctypes.CDLL(path), Counter()
    library.refuse.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool, ctypes.c_long)
    library.requests.restype = ctypes.c_long
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "_C.abi3.so" in line]
    begin, end = int(lines[0].split("-")[0], 16), int(lines[-1].split("-")[1], 16)
    expected, _ = in_a_new_thread(work)
    for large, step in ((True, 1), (False, every)):
        n, reached = 0, True
        while reached:
            library.refuse(begin, end, large, n)
            found = in_a_new_thread(work)
            reached = library.requests() > n
            library.refuse(0, 0, large, -1)
            if found[1] == "done":
                assert_same(found, expected)
            said[check(found[1])] += 1
            assert_same(in_a_new_thread(work), expected)
            n += step
    return said


def bound_the_address_space(small: Callable[[], list[Tensor]], large: Callable[[], list[Tensor]]) -> Counter:
    """The large work, until it is done; a small one goes before it, for the threads to be there, and after each."""
    expected, _ = outcome(small)
    said, margin, unlimited = Counter(), 0, resource.getrlimit(resource.RLIMIT_AS)
    while not said["done"]:
        mbn_kernels.empty_cache()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + margin, unlimited[1]))
        found = outcome(large)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        said[check(found[1])] += 1
        assert_same(outcome(small), expected)
        margin += max(MIB, margin // 8)
    assert_same(outcome(large), found[0])
    return said


if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.manual_seed(0)
    make, threads, refusing = WORKS[sys.argv[1]], int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(threads)
    if refusing:
        counted = refuse_each_request(make(40), refusing[0], int(refusing[1]))
    else:
        counted = bound_the_address_space(make(40), make(1024))
    for words, times in counted.items():
        print(times, words)
