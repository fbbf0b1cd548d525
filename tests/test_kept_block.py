"""A fused module called on its own keeps its evaluation, too; every change of it between two calls is seen."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import stock
import torch
from evaluating import counted, twins
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import FusedInvResBlock, fuse, unfuse

X = torch.randn(2, 12, 9, 7, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


def block(fused: bool = True) -> FusedInvResBlock:
    return FusedInvResBlock(12, 5, 30, 12, True, "hs", 1, fused=fused)


class Own(nn.Module):
    """A user's block, which fuse() reads."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.pointwise = nn.Sequential(nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.depthwise(x))


def adopted(fused: bool = True) -> Own:
    made = Own()
    if fused:
        fuse(made)
    return made


BUILT = {"block": block, "adopted": adopted}


@pytest.fixture(params=BUILT)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A module whose evaluation is kept, and its stock twin."""
    fused, plain = twins(BUILT[request.param])
    for _ in range(2):
        fused(X)
    assert fused._kept is not None
    return fused, plain


def same(fused: nn.Module, plain: nn.Module, x: Tensor = X) -> None:
    for _ in range(3):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def convolution(m: nn.Module) -> nn.Conv2d:
    return next(c for c in m.modules() if isinstance(c, nn.Conv2d) and c.kernel_size != (1, 1))


def norm(m: nn.Module) -> nn.BatchNorm2d:
    return next(c for c in m.modules() if isinstance(c, nn.BatchNorm2d))


def act(m: nn.Module) -> nn.Module:
    return next(c for c in m.modules() if isinstance(c, (nn.ReLU, nn.Hardswish)))


class Doubled(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(m: nn.Module) -> None:
    norm(m).weight = nn.Parameter(norm(m).weight * 1.5, False)


def halved(m: nn.Module) -> None:
    m.register_forward_hook(lambda _m, _i, out: out * 0.5)


def with_a_forward(m: nn.Module) -> None:
    old = convolution(m).forward
    convolution(m).forward = lambda x: old(x) * 0.5


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: convolution(m).weight.mul_(1.5),
    "one number": lambda m: convolution(m).weight.view(-1)[17].add_(3.0),
    "through data": lambda m: norm(m).running_var.data.mul_(1.5),
    "other data": lambda m: setattr(convolution(m).weight, "data", convolution(m).weight.data * 1.5),
    "through numpy": lambda m: norm(m).bias.numpy().__imul__(1.5),
    "another parameter": replaced,
    "loaded": lambda m: m.load_state_dict(
        {k: v * 2 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "eps": lambda m: setattr(norm(m), "eps", 0.5),
    "dilation and padding": lambda m: convolution(m).__dict__.update(
        dilation=(2, 2), padding=tuple(2 * p for p in convolution(m).padding)
    ),
    "an activation's class": lambda m: setattr(act(m), "__class__", Doubled),
    "a hook on a child": lambda m: halved(convolution(m)),
    "a hook on itself": halved,
    "a child's own forward": with_a_forward,
    "a batch norm in training": lambda m: norm(m).train(),
    "all of it in training": lambda m: m.train(),
    "no running statistics": lambda m: norm(m)._buffers.update(running_mean=None, running_var=None),
    "not fused": lambda m: m.__dict__.update(fused=False),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "-"))
def test_a_change(pair: tuple, change: str) -> None:
    for module in pair:
        CHANGES[change](module)
    same(*pair)


def test_a_childs_own_forward_is_the_reason(pair: tuple) -> None:
    fused = pair[0]
    with_a_forward(fused)
    assert fused.why_not_fused() == "a forward of its own, set on a child"
    del convolution(fused).forward
    assert fused.why_not_fused() is None


def test_is_one_call_without_a_look_at_the_tree(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair
    calls = counted(monkeypatch)
    smaller = X[:1, :, 2:, 1:]
    expected = plain(X), plain(smaller)
    monkeypatch.setattr(type(fused), "call", lambda *_: pytest.fail("read anew"))
    for x, out in zip((X, smaller), expected, strict=True):
        torch.testing.assert_close(fused(x), out, rtol=1e-4, atol=1e-4)
    assert calls == [1, 1]


def test_a_hook_comes_and_goes(pair: tuple) -> None:
    fused, plain = pair
    seen: list[int] = []
    for module in (fused, convolution(fused)):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        same(fused, plain)
        handle.remove()
        assert len(seen) == 3
        seen.clear()
        same(fused, plain)
        assert not seen and fused._kept is not None
    with_all = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m is fused))
    same(fused, plain)
    with_all.remove()
    assert any(seen)


def test_gradients_and_autocast_are_not_kept(pair: tuple) -> None:
    fused, plain = pair
    with torch.enable_grad():
        fused.requires_grad_(), plain.requires_grad_()
        same(fused, plain)
        assert fused(X).requires_grad
    expected = fused(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = fused(X)
        assert narrow.dtype == plain(X).dtype
        assert not torch.allclose(narrow, expected, rtol=1e-5, atol=1e-5)
    fused.train(), plain.train()
    same(fused, plain)
    fused.eval(), plain.eval()
    same(fused, plain)


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
def test_copies_keep_nothing(pair: tuple, copied: Callable) -> None:
    fused, plain = pair
    twin = copied(fused)
    assert twin._kept is None
    convolution(fused).weight.zero_()
    same(twin, plain)


def test_lets_go_of_what_was_replaced() -> None:
    fused = twins(block)[0]
    for _ in range(2):
        fused(X)
    gone = weakref.ref(convolution(fused).weight)
    convolution(fused).weight = nn.Parameter(torch.randn(30, 1, 5, 5), False)
    fused(X)
    gc.collect()
    assert gone() is None


def test_holds_nothing_after_it() -> None:
    fused = twins(block)[0]
    for _ in range(2):
        fused(X)
    held, parameter = fused._kept.run._held, weakref.ref(convolution(fused).weight)
    del fused
    gc.collect()
    assert parameter() is None
    with pytest.raises(RuntimeError, match=r"^evaluate: held: expected [^\n]+, got \d+"):
        torch.ops.mbn.evaluate_held(X, held, 0, torch.empty_like(X))


def test_unfused_again() -> None:
    fused, plain = twins(adopted)
    fused(X)
    unfuse(fused)
    assert type(fused) is Own and "_kept" not in fused.__dict__
    assert torch.equal(fused(X), plain(X))


# The compiled look at dictionaries ------------------------------------------------------------------------------------


def notes(objects: list, dictionaries: list[dict]) -> bytes:
    found = [id(type(o)) for o in objects]
    for d in dictionaries:
        found += len(d), *(note for item in d.items() for note in map(id, item))
    return array("Q", found).tobytes()


@pytest.fixture
def unchanged(needs_cpu: None) -> Callable[[tuple, tuple, bytes], bool]:
    from mbn_kernels import _C

    return _C.unchanged


DICTIONARY_CHANGES: dict[str, Callable[[dict], object]] = {
    "a value": lambda d: d.update(b=object()),
    "an equal value": lambda d: d.update(a=float("1.5")),
    "a key more": lambda d: d.update(c=None),
    "a key less": lambda d: d.popitem(),
    "another order": lambda d: d.update(a=d.pop("a")),
    "none": lambda d: d.clear(),
}


@pytest.mark.parametrize("kind", (dict, OrderedDict))
def test_unchanged(unchanged: Callable, kind: type) -> None:
    module = nn.ReLU()
    for change in DICTIONARY_CHANGES.values():
        d, e = kind(a=1.5, b=object()), kind()
        asked = (module,), (d, e), notes([module], [d, e])
        assert unchanged(*asked) is True
        change(d)
        assert unchanged(*asked) is False
    d = kind(a=1.5, b=object())
    noted = array("Q", notes([module], [d]))
    noted[-1] = 0
    d["b"] = None
    assert unchanged((module,), (d,), noted.tobytes()) is True  # 0 stands for any value
    module.__class__ = nn.ReLU6
    assert unchanged((module,), (), notes([nn.ReLU()], [])) is False


@pytest.mark.parametrize("missing", range(0, 49, 4))
def test_unchanged_by_notes_that_end_early(unchanged: Callable, missing: int) -> None:
    d = {"a": 1, "b": 2}
    noted = notes([d], [d])
    assert len(noted) == 48
    assert unchanged((d,), (d,), noted[: len(noted) - missing]) is (missing == 0)


@pytest.mark.parametrize(
    "wrong",
    ((), ((), ()), ([], (), b""), ((), [], b""), ((), (), bytearray()), ((), (1,), b""), ((), (), b"", 1)),
    ids=repr,
)
def test_unchanged_of_others(unchanged: Callable, wrong: tuple) -> None:
    with pytest.raises(TypeError, match=r"^unchanged: expected [^\n]+, got others$"):
        unchanged(*wrong)


def test_randomized_modules_differ() -> None:
    """What the comparisons above rest on: a change of numbers changes the output."""
    fused, plain = twins(block)
    stock.randomize(fused, 11)
    assert not torch.allclose(fused(X), plain(X), rtol=1e-2)
