"""A whole network keeps its evaluation from call to call; every change of the network between two calls is seen."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import stock
import torch
from evaluating import SMALL_CHAINS, counted, hold_module, small, twins
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import FusedInvResBlock, FusedSequential

X = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> Iterator[None]:
    torch.set_num_threads(1)  # that any number gives the same bits is test_evaluation.py's
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """The small network, whose evaluation is kept, and its stock twin."""
    fused, plain = twins(small)
    for _ in range(2):
        fused(X)
    return fused, plain


def same(fused: nn.Module, plain: nn.Module, x: Tensor = X) -> None:
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


# Tensors --------------------------------------------------------------------------------------------------------------

TENSORS = [n for n, t in small().state_dict().items() if t.is_floating_point()]


def put(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, str], None]:
    """A new tensor in the place of the old one."""

    def apply(module: nn.Module, name: str) -> None:
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        new = change(getattr(parent, leaf).detach().clone())
        setattr(parent, leaf, nn.Parameter(new, False) if leaf in parent._parameters else new)

    return apply


def to(change: Callable[[Tensor], object]) -> Callable[[nn.Module, str], None]:
    def apply(module: nn.Module, name: str) -> None:
        change(module.state_dict(keep_vars=True)[name])

    return apply


def loaded(module: nn.Module, name: str) -> None:
    module.load_state_dict({key: t * 1.5 if key == name else t for key, t in module.state_dict().items()})


def assigned(module: nn.Module, name: str) -> None:
    state = {key: t * 1.5 if key == name else t.clone() for key, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


OF_TENSORS: dict[str, Callable[[nn.Module, str], None]] = {
    "in place": to(lambda t: t.mul_(1.5)),
    "one number": to(lambda t: t.view(-1)[t.numel() // 3].add_(3.0)),
    "through data": to(lambda t: t.data.mul_(1.5)),
    "other data": to(lambda t: setattr(t, "data", t.data * 1.5)),
    "through numpy": to(lambda t: t.numpy().__imul__(1.5)),
    "another": put(lambda t: t * 1.5),
    "another of the same numbers, then changed": lambda m, name: (
        put(lambda t: t)(m, name), m(X), to(lambda t: t.mul_(1.5))(m, name)
    ),
    "a transposed one": put(lambda t: (t * 1.5).transpose(0, -1).contiguous().transpose(0, -1)),
    "loaded": loaded,
    "assigned": assigned,
}  # fmt: skip


@pytest.mark.parametrize("change", OF_TENSORS, ids=lambda name: name.replace(" ", "-"))
def test_a_changed_tensor(pair: tuple, change: str) -> None:
    """Each tensor of the network in turn, each at once."""
    fused, plain = pair
    for name in TENSORS:
        for module in pair:
            OF_TENSORS[change](module, name)
        same(fused, plain)


# Everything else ------------------------------------------------------------------------------------------------------


def in_training_for_a_moment(m: nn.Module) -> None:
    m.get_submodule("blocks.1.layers.1.1").train()
    m(X * 3 + 1)  # takes statistics in
    m.eval()


def as_module(name: str, new: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(m: nn.Module) -> None:
        torch.manual_seed(3)
        owner, _, leaf = name.rpartition(".")
        setattr(m.get_submodule(owner), leaf, stock.randomize(new(), 9).eval())

    return change


def attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    def change(m: nn.Module) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(m.get_submodule(owner), leaf, value)

    return change


def hooked(name: str) -> Callable[[nn.Module], None]:
    return lambda m: m.get_submodule(name).register_forward_hook(lambda _m, _i, out: out * 0.5) and None


def own_forward(name: str) -> Callable[[nn.Module], None]:
    """As libraries do that wrap a module's forward to move its weights or to look at what it returns."""

    def change(m: nn.Module) -> None:
        part = m.get_submodule(name)
        old = part.forward
        part.forward = lambda x: old(x) * 0.5

    return change


class Doubled(nn.Hardswish):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "all loaded": lambda m: m.load_state_dict(twins(small)[0].state_dict()) and None,
    "all random": lambda m: stock.randomize(m, 5) and None,
    "a batch norm in training for a moment": in_training_for_a_moment,
    "a batch norm in training": lambda m: m.get_submodule("blocks.1.layers.1.1").train() and None,
    "the stem's batch norm in training": lambda m: m.conv1[1].train() and None,
    "no running statistics": lambda m: m.conv1[1].__dict__.update(track_running_stats=False)
    or m.conv1[1]._buffers.update(running_mean=None, running_var=None),
    "eps of the stem": attribute("conv1.1.eps", 0.5),
    "eps of a block": attribute("blocks.0.layers.0.1.eps", 0.5),
    "eps of the last convolution": attribute("last_conv.1.eps", 0.5),
    "stride of the stem": attribute("conv1.0.stride", (1, 1)),
    "padding of the stem": attribute("conv1.0.padding", (2, 0)),
    "dilation of the stem": attribute("conv1.0.dilation", (2, 1)),
    "stride of a depthwise": attribute("blocks.2.layers.1.0.stride", (1, 2)),
    "padding of a depthwise": attribute("blocks.0.layers.0.0.padding", (3, 0)),
    "padding mode": attribute("blocks.0.layers.0.0.padding_mode", "reflect"),
    "the pool's output size, said otherwise": attribute("gap.output_size", (1, 1)),
    "another pool": as_module("gap", lambda: nn.AdaptiveMaxPool2d(1)),
    "another activation in the stem": as_module("conv1.2", nn.ReLU),
    "an unknown activation in the stem": as_module("conv1.2", nn.GELU),
    "an activation's class": lambda m: setattr(m.conv1[2], "__class__", Doubled),
    "another activation in a block": as_module("blocks.1.layers.0.2", nn.ReLU),
    "an unknown activation in a block": as_module("blocks.1.layers.0.2", nn.GELU),
    "another activation in the classifier": as_module("classifier.1", nn.ReLU6),
    "an unknown activation in the classifier": as_module("classifier.1", nn.Tanh),
    "another stem": as_module("conv1", lambda: nn.Sequential(nn.Conv2d(3, 8, 5, bias=False), nn.BatchNorm2d(8))),
    "a stem that stays stock": as_module("conv1", lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8))),
    "another convolution in the stem": as_module("conv1.0", lambda: nn.Conv2d(3, 8, 5, 2, bias=False)),
    "another stage": as_module(
        "blocks.0.layers.1", lambda: nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12))
    ),
    "an identity": as_module("blocks.2", lambda: nn.Sequential(nn.Conv2d(12, 16, 1), nn.Identity())),
    "more classes": as_module("classifier.3", lambda: nn.Linear(24, 11)),
    "one class": as_module("classifier.3", lambda: nn.Linear(24, 1)),
    "no bias": as_module("classifier.3", lambda: nn.Linear(24, 7, bias=False)),
    "more layers": lambda m: m.classifier.extend([nn.ReLU(), stock.randomize(nn.Linear(7, 5), 4)]) and None,
    "fewer layers": lambda m: m.classifier.__delitem__(slice(1, 4)),
    "another classifier": as_module("classifier", lambda: nn.Linear(40, 7)),
    "softmax": lambda m: m.classifier.append(nn.Softmax(1)) and None,
    "no classifier": as_module("classifier", nn.Sequential),
    "a longer network": lambda m: m.blocks.append(nn.Sequential(nn.BatchNorm2d(16).eval())) and None,
    "a hook on the stem": hooked("conv1"),
    "a hook in the stem": hooked("conv1.1"),
    "a hook on a block": hooked("blocks.0"),
    "a hook in a block": hooked("blocks.1.layers.1.0"),
    "a hook on all blocks": hooked("blocks"),
    "a hook on the pool": hooked("gap"),
    "a hook on the classifier": hooked("classifier"),
    "a hook in the classifier": hooked("classifier.0"),
    "a forward of its own in the stem": own_forward("conv1.0"),
    "a forward of its own on the stem": own_forward("conv1"),
    "a forward of its own on the pool": own_forward("gap"),
    "a forward of its own on the classifier": own_forward("classifier"),
    "a forward of its own in the classifier": own_forward("classifier.0"),
    "a forward of its own on a block": own_forward("blocks.0"),
    "not affine": lambda m: m.conv1[1]._parameters.update(weight=None, bias=None),
    "weights shared": lambda m: setattr(m.conv1[1], "weight", m.blocks[0].layers[0][1].weight),
    "weights swapped": lambda m: m.blocks[0].layers[0][1]._parameters.update(
        weight=m.blocks[0].layers[0][1].bias, bias=m.blocks[0].layers[0][1].weight
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "-"))
def test_a_change(pair: tuple, change: str) -> None:
    fused, plain = pair
    for module in pair:
        torch.manual_seed(1)
        CHANGES[change](module)
    same(fused, plain)


def test_fused_switched_off_and_on(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair
    calls = counted(monkeypatch)
    fused.blocks[1].fused = False
    same(fused, plain)
    assert calls == [2, 5] * 2
    calls.clear()
    fused.blocks[1].fused = True
    same(fused, plain)
    assert calls == [SMALL_CHAINS] * 2


def test_hook_removed(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair
    calls = counted(monkeypatch)
    for name in ("conv1", "conv1.0", "blocks.1", "blocks.1.layers.0.0", "gap", "classifier", "classifier.3"):
        seen = []
        handle = fused.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        same(fused, plain)
        assert len(seen) == 2, name
        assert SMALL_CHAINS not in calls
        handle.remove()
        same(fused, plain)
        assert len(seen) == 2, name
        assert calls[-2:] == [SMALL_CHAINS] * 2
        calls.clear()


def test_one_after_the_other(pair: tuple) -> None:
    """Training and evaluation in turn, as a training loop has them."""
    fused, plain = pair
    for m in pair:
        m.requires_grad_().classifier[2].p = 0.0
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in pair]
    for _ in range(3):
        for m, optimizer in zip(pair, optimizers, strict=True):
            m.train()
            with torch.enable_grad():
                stock.pull(m(X))
            optimizer.step()
            m.eval()
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-3, atol=1e-3)
    fresh = small()
    fresh.load_state_dict(fused.state_dict())
    assert torch.equal(fresh.eval()(X), fused(X))


def test_to_another_dtype_and_back(pair: tuple) -> None:
    fused, plain = pair
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.bfloat16):
        for m in pair:
            m.to(dtype)
        for _ in range(2):
            hold_module(fused(X.to(dtype)), plain, X.to(dtype))


def test_to_another_memory_format(pair: tuple) -> None:
    fused, plain = pair
    for _ in range(2):
        for m in pair:
            m.to(memory_format=torch.channels_last)
            stock.randomize(m, 8)
        same(fused, plain)


def test_a_copy_is_another(pair: tuple) -> None:
    fused, plain = pair
    twin = copy.deepcopy(fused)
    for _ in range(2):
        stock.randomize(twin, 11)
        same(fused, plain)
        assert not torch.allclose(twin(X), fused(X), atol=1e-2)
    stock.randomize(plain, 11)
    same(twin, plain)
    shallow = copy.copy(fused)
    shallow._modules = dict(fused._modules)
    shallow.conv1 = twin.conv1
    expected = copy.deepcopy(shallow)(X)
    assert torch.equal(shallow(X), expected)
    assert torch.equal(fused(X), copy.deepcopy(fused)(X))


def test_written_and_read(pair: tuple) -> None:
    fused, plain = pair
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        assert twin._kept is None
        same(twin, plain)
        same(twin, plain)


def test_another_backend_in_between(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = pair
    calls = counted(monkeypatch)
    with mbn_kernels.use_backend("reference"):
        same(fused, plain)
        assert not calls
        stock.randomize(fused, 4), stock.randomize(plain, 4)
        same(fused, plain)
    same(fused, plain)
    assert calls == [SMALL_CHAINS] * 2


def test_other_sizes_and_batches(pair: tuple) -> None:
    fused, plain = pair
    for shape in [(n, 3, h, w) for n in (1, 2, 0, 5) for h in (1, 19, 32, 20) for w in range(1, 40, 9)]:
        x = torch.randn(shape)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x, words", (
    (torch.randn(3, 20, 24), "x: expected 4 dimensions"),
    (torch.randn(1, 2, 3, 20, 24), "x: expected 4 dimensions"),
    (torch.randn(2, 4, 20, 24), "weight: expected shape"),
    (torch.randn(2, 3, 20, 24).double(), "weight: expected torch.float64"),
    (torch.randn(2, 3, 0, 24), "x: expected height and width"),
    (torch.randn(2, 3, 20, 24).to_sparse(), "x: expected a dense tensor"),
), ids=lambda v: v.split(":")[0] if isinstance(v, str) else f"{tuple(v.shape)}-{v.dtype}-{v.layout}")  # fmt: skip
def test_bad_input_is_refused_in_the_same_words(pair: tuple, x: Tensor, words: str) -> None:
    """Whether or not an evaluation is kept."""
    for module in (stock.randomize(small()).eval(), pair[0]):
        with pytest.raises((TypeError, ValueError), match=words):
            module(x)
        module(X)


@pytest.mark.parametrize("shape", ((5, 6, 6), (1, 1, 5, 6, 6), (1, 6, 6, 6), (1, 5, 0, 6)), ids=str)
def test_bad_input_of_blocks_is_refused_in_the_same_words(shape: tuple) -> None:
    module, messages = FusedSequential(FusedInvResBlock(5, 3, 5, 7, False, "relu", 1)).eval(), []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"FusedInvResBlock: .*expected") as error:
            module(torch.randn(shape))
        messages.append(str(error.value))
        for _ in range(2):
            module(torch.randn(1, 5, 6, 6))
    assert messages[0] == messages[1]


def test_parameters_of_another_shape(pair: tuple) -> None:
    """The same objects, of other widths."""
    fused, plain = pair
    for m in pair:
        m.classifier[3].weight.data, m.classifier[3].bias.data = torch.ones(20, 24), torch.arange(20.0)
    same(fused, plain)
    fused.conv1[0].weight.data = torch.randn(8, 2, 3, 3)
    with pytest.raises(ValueError, match="expected shape"):
        fused(X)
    for m in pair:
        m.conv1[0].weight.data = torch.ones(8, 3, 3, 3)
    same(fused, plain)
    for m in pair:
        m.conv1[0].weight.data = torch.ones(8, 3, 5, 1)
    with pytest.raises(ValueError, match="expected shape"):
        fused(X)


def test_elsewhere(pair: tuple) -> None:
    """The operator would do nothing for tensors without numbers, and what it was to fill would be returned."""
    fused, _ = pair
    with pytest.raises((RuntimeError, ValueError)):
        fused(X.to("meta"))
    fused.to("meta")
    with pytest.raises(ValueError, match="expected a tensor on cpu"):
        fused(X)


def test_empty_cache_forgets(pair: tuple) -> None:
    """Also of a few numbers of a long weight, changed behind PyTorch's back."""
    fused, plain = pair
    for m in pair:
        m.classifier[0] = stock.randomize(nn.Linear(40, 400))
        m.classifier[3] = stock.randomize(nn.Linear(400, 7))
    same(fused, plain)
    for m in pair:
        m.classifier[0].weight.data.view(-1)[10:300] += 1.0
    mbn_kernels.empty_cache()
    same(fused, plain)


def test_nothing_is_left_behind() -> None:
    fused = twins(small)[0]
    fused(X), fused(X)
    weights = [weakref.ref(p) for p in fused.parameters()]
    del fused
    gc.collect()
    assert not any(w() is not None for w in weights)


def test_in_inference_mode(pair: tuple) -> None:
    """Its tensors count no versions."""
    with torch.inference_mode():
        fused, plain = twins(small)
        for seed in range(3):
            stock.randomize(fused, seed), stock.randomize(plain, seed)
            same(fused, plain, X.clone())
    for m in pair:  # parameters with versions, in a mode without
        with torch.inference_mode():
            m(X)
        stock.randomize(m, 3)
    same(*pair)


def test_threads_share_a_network(pair: tuple) -> None:
    fused, plain = pair
    images = [torch.randn(n, 3, 20, 24) for n in (1, 2, 3, 5)]
    expected, wrong = [fused(x) for x in images], []
    torch.testing.assert_close(expected, [plain(x) for x in images], rtol=1e-4, atol=1e-4)
    for threads in (1, 2):
        torch.set_num_threads(threads)

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.equal(fused(images[i]), expected[i]):
                        wrong.append(i)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


def test_replicas(pair: tuple) -> None:
    """As nn.DataParallel makes them: what the original keeps is not theirs."""
    fused, plain = pair
    replica = stock.replica_of(fused)
    same(replica, plain)
    stock.randomize(fused, 6)
    same(replica, plain)
    assert torch.equal(fused(X), copy.deepcopy(fused)(X))
