"""A call that ends in an exception, wherever it comes from: each fused module's state is that before the call or that
after it, never between, and the next call is as if nothing had happened.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import stock
import torch
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, FusedSequential, models
from mbn_kernels.modules import watch

PACKAGE = str(Path(mbn_kernels.__file__).parent)

pytestmark = pytest.mark.usefixtures("needs_cpu")


def linked() -> FusedSequential:
    """Two blocks that are linked in training and one call in evaluation."""
    return FusedSequential(FusedDepthwiseSeparable(4, 6), FusedInvResBlock(6, 3, 12, 8, True, "hs", 2))


def cumulative() -> FusedInvResBlock:
    return FusedInvResBlock(4, 3, 12, 4, False, "relu6", 1, bn_momentum=None)


def one_norm_twice() -> FusedInvResBlock:
    module = cumulative()
    module.layers[1][1] = module.layers[0][1]
    return module


MODULES = {
    "block": stock.block,
    "linked": linked,
    "cumulative momentum": cumulative,
    "one norm twice": one_norm_twice,
}
BY_MODULE = pytest.mark.parametrize("name", MODULES)


class Lines(NamedTuple):
    """At which of the lines that a work runs it is interrupted: every so many-th in files whose path begins so."""

    path: str
    every: int = 1


COMMIT = Lines(PACKAGE + "/running.py")  # where running statistics change
SOME, ALL = Lines(PACKAGE, 61), Lines(PACKAGE)
SLOW = pytest.mark.slow
ANYWHERE = (
    pytest.param(SOME, KeyboardInterrupt, id="some"),
    pytest.param(ALL, KeyboardInterrupt, id="all", marks=SLOW),
    pytest.param(ALL, MemoryError, id="all-MemoryError", marks=SLOW),
)


def call_until_line(n: int, path: str, error: type[BaseException], work: Callable[[], object]) -> bool:
    """Calls ``work``, with ``error`` raised at the n-th line that it runs of those files, from 0; whether it has so
    many.
    """
    left, before = n, sys.gettrace()

    def trace(frame, event: str, _argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(path):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise error
        return trace

    sys.settrace(trace)
    try:
        work()
    except error:
        assert left < 0
    finally:
        sys.settrace(before)
    return left < 0


def interrupted(lines: Lines, error: type[BaseException], start: Callable[[], Callable[[], object]]) -> Iterator[None]:
    """Ends the work that ``start`` makes at its first line, then anew at a later one, to its last; yields each time."""
    n, times = 0, 0
    while call_until_line(n, lines.path, error, start()):
        yield
        n, times = n + lines.every, times + 1
    assert times > 2


def fused_modules(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, FusedSequential) else [module]


def states(module: nn.Module) -> list[list[Tensor]]:
    """Parameters and buffers of each fused module."""
    return [[t.clone() for t in part.state_dict().values()] for part in fused_modules(module)]


def are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def assert_never_between(module: nn.Module, before: list[list[Tensor]], after: list[list[Tensor]]) -> None:
    for own, old, new in zip(states(module), before, after, strict=True):
        assert are_equal(own, old) or are_equal(own, new)


def assert_goes_on(module: nn.Module, fresh: nn.Module, x: Tensor) -> None:
    """A step of the module has the very numbers of one of a module that nothing happened to."""
    twin = copy.deepcopy(fresh)
    twin.load_state_dict(module.state_dict())
    assert are_equal(stock.step(module, x), stock.step(twin, x))


@pytest.mark.parametrize("lines, error", (pytest.param(COMMIT, KeyboardInterrupt, id="running.py"), *ANYWHERE))
@BY_MODULE
def test_a_training_step_interrupted_at_a_line(name: str, lines: Lines, error: type[BaseException]) -> None:
    fresh, x, tried = stock.randomize(MODULES[name]()), stock.make_input(), []
    done = copy.deepcopy(fresh)
    stock.step(done, x)
    before, after = states(fresh), states(done)
    assert not any(map(are_equal, before, after))

    def start() -> Callable[[], object]:
        tried[:] = [copy.deepcopy(fresh)]
        return lambda: stock.step(tried[0], x)

    seen = set()
    for _ in interrupted(lines, error, start):
        module = tried[0]
        assert_never_between(module, before, after)
        seen.add(tuple(map(are_equal, states(module), after)))
        assert_goes_on(module, fresh, x)
    assert len(seen) > 1 or lines is COMMIT  # some were interrupted before their statistics changed, others after


@pytest.mark.parametrize("lines, error", ANYWHERE)
@BY_MODULE
def test_an_evaluation_interrupted_at_a_line(name: str, lines: Lines, error: type[BaseException]) -> None:
    """The first call, which keeps what it was made of, the next, which finds that, and one after a weight changed."""
    fresh, x, tried = stock.randomize(MODULES[name]()).eval(), stock.make_input(), []

    def calls(module: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            found = [module(x), module(x)]
            next(module.parameters()).mul_(2)
            return [*found, module(x)]

    expected = calls(copy.deepcopy(fresh))
    assert not torch.equal(expected[0], expected[2])

    def start() -> Callable[[], object]:
        tried[:] = [copy.deepcopy(fresh)]
        return lambda: calls(tried[0])

    for _ in interrupted(lines, error, start):
        module = tried[0]
        module.load_state_dict(fresh.state_dict())
        assert are_equal(calls(module), expected)


class Plain(nn.Sequential):
    """Of stock's blocks, which fuse() finds."""

    def __init__(self) -> None:
        super().__init__(stock.InvResBlock(*stock.SIGNATURE), stock.Separable(4, 6, 3, 2))


@pytest.mark.parametrize("every", (2999, pytest.param(101, marks=SLOW)))
def test_fuse_interrupted_at_a_line(every: int) -> None:
    """What is fused by then runs fused, the rest as it was; fuse() takes that up."""
    fresh, x, tried = stock.randomize(Plain()), stock.make_input(), []
    expected = stock.step(copy.deepcopy(fresh), x)
    mbn_kernels.fuse(fused := copy.deepcopy(fresh))
    after = stock.step(fused, x)

    def start() -> Callable[[], object]:
        tried[:] = [copy.deepcopy(fresh)]
        return lambda: mbn_kernels.fuse(tried[0])

    for _ in interrupted(Lines(PACKAGE, every), KeyboardInterrupt, start):
        module = tried[0]
        assert are_equal(list(module.state_dict().values()), list(fresh.state_dict().values()))
        assert all(m.training for m in module.modules())
        stock.assert_same(stock.step(copy.deepcopy(module), x), expected)
        mbn_kernels.fuse(module)
        assert are_equal(stock.step(module, x), after)


class Broken(Exception):
    pass


def broken(*_arguments: object) -> None:
    raise Broken


def on_parameter(module: nn.Module):
    return next(module.parameters()).register_hook(broken)


HOOKS = {
    "forward pre": lambda m: m.register_forward_pre_hook(broken),
    "forward": lambda m: m.register_forward_hook(broken),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(broken),
    "full backward": lambda m: m.register_full_backward_hook(broken),
    "of a parameter": on_parameter,
    "accumulated": lambda m: next(m.parameters()).register_post_accumulate_grad_hook(broken),
    "global forward pre": lambda m: nn.modules.module.register_module_forward_pre_hook(broken),
    "global forward": lambda m: nn.modules.module.register_module_forward_hook(broken),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", (0, 1))
def test_an_exception_in_a_hook(place: int, hook: str) -> None:
    module, x = stock.randomize(linked()), stock.make_input()
    fresh, done = copy.deepcopy(module), copy.deepcopy(module)
    stock.step(done, x)
    handle = HOOKS[hook](module[place])
    with pytest.raises(Broken):
        stock.step(module, x)
    handle.remove()
    assert_never_between(module, states(fresh), states(done))
    assert_goes_on(module, fresh, x)


@pytest.mark.parametrize("nth", range(12))
@pytest.mark.parametrize("way", ("pack", "unpack"))
def test_an_exception_in_a_hook_on_saved_tensors(way: str, nth: int) -> None:
    module, x, left = stock.randomize(linked()), stock.make_input(), [nth]
    fresh, done = copy.deepcopy(module), copy.deepcopy(module)
    stock.step(done, x)

    def counted(t: Tensor) -> Tensor:
        left[0] -= 1
        return broken() if left[0] < 0 else t

    hooks = (counted, lambda t: t) if way == "pack" else (lambda t: t, counted)
    with pytest.raises(Broken), torch.autograd.graph.saved_tensors_hooks(*hooks):
        stock.step(module, x)
    assert_never_between(module, states(fresh), states(done))
    assert_goes_on(module, fresh, x)


def test_a_module_that_changes_while_it_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another thread forgets what it kept."""
    module, note = stock.block(), watch._note

    def change(name: str, value: object) -> int:
        module.changed = True
        return note(name, value)

    monkeypatch.setattr(watch, "_note", change)
    assert not watch.Watch([module]).holds()


@pytest.mark.slow
def test_a_network_interrupted_at_any_line() -> None:
    """Some minutes: stem, linked blocks, pool and classifier of MobileNetV3-Small, a step each."""
    fresh = models.mobilenet_v3_small(num_classes=4)
    x, done, tried = torch.randn(2, 3, 32, 32), copy.deepcopy(fresh), []
    fresh.classifier[2].p = done.classifier[2].p = 0.0  # as dropout is drawn anew each time
    stock.step(done, x)

    def parts(module: nn.Module) -> nn.Sequential:
        return FusedSequential(module.conv1, *module.blocks, module.last_conv)

    before, after = states(parts(fresh)), states(parts(done))

    def start() -> Callable[[], object]:
        tried[:] = [copy.deepcopy(fresh)]
        return lambda: stock.step(tried[0], x)

    for n, _ in enumerate(interrupted(ALL, KeyboardInterrupt, start)):
        assert_never_between(parts(tried[0]), before, after)
        if n % 7 == 0:
            assert_goes_on(tried[0], fresh, x)
