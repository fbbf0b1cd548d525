"""Threads, forks and the end of a process, while kernels run; and steps without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PATIENCE = 1200  # seconds, of the slow tests on a busy machine

SLOW = pytest.mark.slow
#: One number of threads in the quick run, the other with --runslow.
ONE_FIRST = pytest.mark.parametrize("threads", (1, pytest.param(2, marks=SLOW)))
TWO_FIRST = pytest.mark.parametrize("threads", (2, pytest.param(1, marks=SLOW)))

pytestmark = [
    pytest.mark.usefixtures("needs_cpu"),
    pytest.mark.skipif(sys.platform != "linux", reason="fork and /proc as Linux has them"),
]

PREAMBLE = """
    import copy, faulthandler, os, signal, sys, threading, time
    import torch
    from torch import nn
    import stock
    import mbn_kernels
    from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, FusedSequential, models

    faulthandler.dump_traceback_later(1200, exit=True)
    torch.manual_seed(0)

    def network():
        blocks = FusedDepthwiseSeparable(4, 8), FusedInvResBlock(8, 3, 24, 8, True, "hs", 1)
        return stock.randomize(FusedSequential(*blocks)).eval()

    @torch.no_grad()
    def evaluate(net, x):
        return net(x)
"""


def run(script: str, *arguments: object, threads: int = 1, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", before + textwrap.dedent(PREAMBLE) + textwrap.dedent(script), *map(str, arguments)]
    path = f"{TESTS.parent}{os.pathsep}{TESTS}"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-6000:])
    return done.stdout


# Threads --------------------------------------------------------------------------------------------------------------

START = """
    sys.setswitchinterval(1e-6)
    x, failed, wrong = torch.randn(2, 4, 9, 9), [], 0
    expected = evaluate(network(), x)
    for _ in range(int(sys.argv[1])):
        net, found, at_once = network(), [], threading.Barrier(8)

        def work():
            for change in range(4):
                if at_once.wait() == 0:
                    net[0].note = object()  # as any attribute, so that what was kept no longer holds
                at_once.wait()
                try:
                    found.extend(evaluate(net, x) for _ in range(3))
                except BaseException as error:
                    failed.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        wrong += sum(not torch.equal(out, expected) for out in found)
    print(wrong, failed)
"""


def test_threads_start_with_one_model_at_once() -> None:
    """The first calls in eight threads, which keep what they were made of, and those after a change."""
    assert output(run(START, 30)) == "0 []\n"


SHARE = """
    sys.setswitchinterval(1e-5)
    net, end = network(), time.monotonic() + float(sys.argv[1])
    inputs = [torch.randn(1 + i % 3, 4, 7 + i, 9) for i in range(8)]
    expected = [evaluate(net, x) for x in inputs]
    calls, updates, failed = [0] * 8, 0, []

    def work(i):
        try:
            while time.monotonic() < end and not failed:
                assert torch.equal(evaluate(net, inputs[i]), expected[i]), "a wrong number"
                calls[i] += 1
        except BaseException as error:
            failed.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    while time.monotonic() < end and not failed:
        other = copy.deepcopy(net)
        for _ in range(3):
            with torch.no_grad():
                for p in other.parameters(): p.mul_(1.01)
            assert torch.equal(evaluate(other, inputs[0]), evaluate(copy.deepcopy(other), inputs[0]))
            assert not torch.equal(evaluate(other, inputs[0]), expected[0])
            stock.step(other.train(), inputs[1])
            other.eval()
            updates += 1
    for t in threads: t.join()
    assert not failed, failed
    assert min(calls) > 0 and updates > 0
    print(sum(calls), "calls,", updates, "updates")
"""


@pytest.mark.parametrize("seconds", (1, pytest.param(60, marks=SLOW)))
@TWO_FIRST
def test_threads_share_a_model_while_a_copy_changes(seconds: int, threads: int) -> None:
    print(output(run(SHARE, seconds, threads=threads)))


# Fork -----------------------------------------------------------------------------------------------------------------

FORK = """
    sys.setswitchinterval(1e-5)
    net, x, end = network(), torch.randn(2, 4, 9, 9), []
    large = torch.randn(2, 4, 128, 128)  # whose maps are buffers
    expected, step = evaluate(net, x), stock.step(copy.deepcopy(net).train(), large)

    def busy():  # packs wide weights, and takes and gives back buffers, nearly all the time
        wide, pixel = FusedInvResBlock(128, 3, 768, 128, False, "relu", 1).eval(), torch.randn(1, 128, 1, 1)
        while not end:
            evaluate(wide, pixel)
            with torch.no_grad():
                wide.layers[0][1].bias.add_(1)
            torch.ops.mbn.cpu_buffer(1, 1, 1, 1 << 18, torch.float32)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for t in threads: t.start()
    codes = []
    for _ in range(int(sys.argv[1])):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that waits for a thread that it does not have ends so
            torch.set_num_threads(1)  # as a DataLoader's worker does: the threads of OpenMP stay behind in the parent
            same = torch.equal(evaluate(net, x), expected)
            same = same and all(map(torch.equal, stock.step(copy.deepcopy(net).train(), large), step))
            with torch.no_grad():
                next(net.parameters()).mul_(2)
            same = same and not torch.equal(evaluate(net, x), expected)
            os._exit(0 if same else 1)
        codes.append(os.waitpid(child, 0)[1])
    end.append(True)
    for t in threads: t.join()
    assert torch.equal(evaluate(net, x), expected)
    print(len(codes), set(codes))
"""


@pytest.mark.parametrize("forks", (5, pytest.param(300, marks=SLOW)))
@ONE_FIRST
def test_forks_while_threads_work(forks: int, threads: int) -> None:
    assert output(run(FORK, forks, threads=threads)) == f"{forks} {{0}}\n"


LOADER = """
    from torch.utils.data import DataLoader, Dataset
    net, items = network(), torch.randn(24, 1, 4, 9, 9)
    expected = [evaluate(net, x) for x in items]

    class Outputs(Dataset):
        def __len__(self):
            return len(items)

        def __getitem__(self, i):
            return i, evaluate(net, items[i])

    found = list(DataLoader(Outputs(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert all(torch.equal(out, expected[i]) for i, out in found)
    print(len(found))
"""


@TWO_FIRST
def test_workers_of_a_data_loader(threads: int) -> None:
    assert output(run(LOADER, threads=threads)) == "24\n"


# Steps without end ----------------------------------------------------------------------------------------------------

STEPS = """
    net = network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    inputs = [torch.randn(1 + i, 4, 32 + 8 * i, 64) for i in range(5)]  # some of whose maps are buffers
    steps, seen = int(sys.argv[1]), []
    page = os.sysconf("SC_PAGESIZE")
    for i in range(steps):
        optimizer.zero_grad()
        net(inputs[i % 5]).square().mean().backward()
        optimizer.step()
        if i % 50 == 0:
            evaluate(copy.deepcopy(net).eval(), inputs[0])
        if (i + 1) % (steps // 10) == 0:
            with open("/proc/self/statm") as f:
                seen.append((int(f.read().split()[1]) * page, torch.ops.mbn.cpu_cached_bytes()))
    resident, cached = zip(*seen)
    grown = max(resident[5:]) - max(resident[1:5])
    print("resident MiB", [n >> 20 for n in resident], "cached MiB", [n >> 20 for n in cached])
    assert grown < (4 << 20), grown
    assert max(cached[5:]) <= max(cached[:5]), cached
"""


@pytest.mark.parametrize("steps", (100, pytest.param(10_000, marks=SLOW)))
def test_memory_stays_flat(steps: int) -> None:
    print(output(run(STEPS, steps)))


# The end of a process -------------------------------------------------------------------------------------------------

EXIT = """
    faulthandler.cancel_dump_traceback_later()  # a forked child would wait at its end for the thread that does it
    def while_a_thread_works(net, x):
        threading.Thread(target=lambda: [stock.step(copy.deepcopy(net), x) for _ in range(5)]).start()
        sys.exit(7)

    def from_an_exit_handler(net, x):
        net.eval()
        expected = evaluate(net, x), stock.step(copy.deepcopy(net), x)

        def again():
            assert torch.equal(evaluate(net, x), expected[0])
            assert all(map(torch.equal, stock.step(copy.deepcopy(net), x), expected[1]))
            print("again", end=" ", flush=True)

        handlers.append(again)
        sys.exit(7)

    def in_a_hook_of_forward(net, x):
        net[1].register_forward_hook(lambda *_: sys.exit(7))
        net(x)

    def in_a_hook_of_backward(net, x):
        net[1].register_full_backward_hook(lambda *_: sys.exit(7))
        stock.step(net, x)

    def with_a_graph_alive(net, x):
        globals()["out"] = net(x.requires_grad_())
        sys.exit(7)

    def with_a_kept_evaluation(net, x):
        net.eval()
        globals()["out"] = evaluate(net, x), evaluate(net, x)
        sys.exit(7)

    ways = (while_a_thread_works, from_an_exit_handler, in_a_hook_of_forward, in_a_hook_of_backward)
    for way in (*ways, with_a_graph_alive, with_a_kept_evaluation):
        child = os.fork()  # before any kernel ran: importing everything anew would take seconds
        if child == 0:
            signal.alarm(60)
            way(network().train(), torch.randn(4, 4, 48, 48))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ", flush=True)
    os._exit(0)
"""
EARLY_HANDLERS = "import atexit\nhandlers = []\natexit.register(lambda: [handler() for handler in handlers])\n"


@ONE_FIRST
def test_exits_in_the_middle(threads: int) -> None:
    """Also from an exit handler that is older than this package, and so comes after its own."""
    done = run(EXIT, threads=threads, before=EARLY_HANDLERS)
    assert (output(done), done.stderr) == ("7 again 7 7 7 7 7 ", "")


DAEMONS = """
    faulthandler.cancel_dump_traceback_later()  # as above

    def work():
        net, x = network(), torch.randn(4, 4, 96, 96)
        while True:
            evaluate(net, x)
            stock.step(net, x)

    for i in range(int(sys.argv[1])):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            for _ in range(3): threading.Thread(target=work, daemon=True).start()
            time.sleep(0.5 + i / 100)
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)
"""


@pytest.mark.parametrize("exits", (4, pytest.param(100, marks=SLOW)))
@TWO_FIRST
def test_daemon_threads_at_the_end(exits: int, threads: int) -> None:
    """Before Python 3.14 a thread that comes back to Python from an operator of PyTorch then may end the process with
    SIGABRT, stock or not, and says so in these words; nothing else may happen.
    """
    done = run(DAEMONS, exits, threads=threads)
    codes = list(map(int, output(done).split()))
    assert len(codes) == exits and set(codes) <= {7, -signal.SIGABRT}
    said = done.stderr.splitlines()
    # Several threads of one process may say it, also of one that ends as asked before it is aborted.
    assert set(said) <= {"terminate called without an active exception"} and len(said) >= codes.count(-signal.SIGABRT)
    print(codes.count(7), "of", exits, "ended as asked")
