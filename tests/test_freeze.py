"""freeze(): a model's evaluation as a function of its input alone."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stock
import torch
from evaluating import BY_DTYPE, DTYPES, NETWORKS, SMALL_CHAINS, counted, hold_module, networks, small, twins
from torch import nn

import mbn_kernels
from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, FusedSequential, freeze, fuse, unfuse
from mbn_kernels.backends import cpu

X = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(7))
SENTENCE = re.compile(r"^(?P<op>\w+): (?P<argument>\w+): expected [^\n]+, got [^\n]+$")


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    return twins(small)


def blocks() -> FusedSequential:
    return FusedSequential(FusedInvResBlock(3, 3, 12, 5, True, "hs", 1), FusedDepthwiseSeparable(5, 7))


def adopted() -> nn.Sequential:
    """A stock Sequential that fuse() has changed."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    pointwise = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
    model = nn.Sequential(stem, depthwise, pointwise).eval()
    fuse(model)
    return model


def block() -> FusedInvResBlock:
    return FusedInvResBlock(3, 3, 12, 5, True, "hs", 1)


MODELS = {"network": small, "blocks": blocks, "adopted": adopted, "block": block}


@pytest.mark.parametrize("kind", MODELS)
@BY_DTYPE
def test_is_the_models_own_output(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, for images of any size and any number, in any layout, with any number of threads."""
    model = stock.randomize(MODELS[kind]()).to(dtype).eval()
    frozen = freeze(model, X.to(dtype))
    calls = counted(monkeypatch)
    for shape in ((2, 3, 20, 24), (1, 3, 33, 17), (0, 3, 20, 24), (5, 3, 8, 9), (4, 3, 64, 64)):
        x = torch.randn(shape).to(dtype)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for t in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
                out, expected = frozen(t), model(t)
                assert torch.equal(out, expected)
                assert (out.dtype, out.stride()) == (expected.dtype, expected.stride())
        torch.set_num_threads(1)
    chains = {"network": SMALL_CHAINS, "blocks": 2, "adopted": 3, "block": 1}
    assert set(calls) == {chains[kind]}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    for dtype in DTYPES:
        fused, plain = networks(name, dtype)
        frozen, x = freeze(fused, torch.randn(1, 3, 32, 32).to(dtype)), torch.randn(2, 3, 48, 33).to(dtype)
        assert torch.equal(frozen(x), fused(x))
    hold_module(frozen(x), plain, x)


@pytest.mark.parametrize("kind", MODELS)
def test_changes_are_not_seen(kind: str) -> None:
    model = stock.randomize(MODELS[kind]()).eval()
    frozen = freeze(model, X)
    expected = model(X)
    assert torch.equal(frozen(X), expected)

    def unchanged() -> None:
        assert torch.equal(frozen(X), expected)

    stock.randomize(model, 3)
    assert not torch.allclose(model(X), expected, atol=1e-3)
    unchanged()
    again = freeze(model, X)
    assert torch.equal(again(X), model(X)) and not torch.equal(again(X), expected)
    for p in model.parameters():
        p.data.zero_()
    mbn_kernels.empty_cache()
    unchanged()
    model.train()
    model(X)
    unchanged()
    next(model.children()).register_forward_hook(lambda *_: 1 / 0)
    unchanged()
    if kind == "adopted":
        unfuse(model)
        unchanged()
    del model
    unchanged()


def test_other_shapes_of_the_models_parameters_are_not_seen(pair: tuple) -> None:
    """Also for a size of image that the model has seen since."""
    model, plain = pair
    frozen, x = freeze(model, X), torch.randn(1, 3, 40, 33)
    model.classifier[3].weight.data, model.classifier[3].bias.data = torch.randn(20, 24), torch.randn(20)
    assert model(x).shape == (1, 20)
    torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-4)


def test_two_of_one_model(pair: tuple) -> None:
    model, found = pair[0], []
    for seed in range(3):
        stock.randomize(model, seed)
        found.append((freeze(model, X), model(X)))
    for frozen, expected in found:
        assert torch.equal(frozen(X), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_any_example_will_do(pair: tuple, dtype: torch.dtype) -> None:
    """Also one without images."""
    model = pair[0].to(dtype)
    for example in (torch.randn(0, 3, 8, 8), torch.randn(7, 3, 9, 31).mT, torch.randn(1, 3, 1, 1).requires_grad_()):
        assert torch.equal(freeze(model, example.to(dtype))(X.to(dtype)), model(X.to(dtype)))


def test_is_a_module_without_parameters(pair: tuple) -> None:
    frozen = freeze(pair[0], X)
    assert type(frozen).__name__ in repr(frozen) and "MobileNet, torch.float32" in repr(frozen)
    assert not list(frozen.parameters()) and not list(frozen.buffers()) and not frozen.state_dict()
    model = nn.Sequential(frozen, nn.Softmax(1))
    torch.testing.assert_close(model(X), pair[0](X).softmax(1))
    frozen.train()
    assert torch.equal(frozen(X), pair[0](X))


def test_needs_no_gradient(pair: tuple) -> None:
    with torch.enable_grad():
        frozen = freeze(pair[0].requires_grad_(), X)
        out = frozen(X.clone().requires_grad_())
        assert not out.requires_grad
        assert torch.is_grad_enabled()
    assert torch.equal(out, pair[0](X))


def test_under_other_modes(pair: tuple) -> None:
    frozen, expected = freeze(pair[0], X), pair[0](X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen(X), expected)
    with torch.inference_mode():
        assert torch.equal(frozen(X), expected)
    with mbn_kernels.use_backend("reference"):
        assert torch.equal(frozen(X), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(frozen, backend="aot_eager")(X), expected)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("how", COPIES)
@BY_DTYPE
def test_copies(how: str, dtype: torch.dtype) -> None:
    model = twins(small, dtype)[0]
    frozen, x = freeze(model, X.to(dtype)), torch.randn(1, 3, 33, 17).to(dtype)
    twin = COPIES[how](frozen)
    expected = frozen(x)
    for t in (twin, frozen):
        assert torch.equal(t(x), expected)
    del frozen
    assert torch.equal(twin(x), expected)


def test_saved(pair: tuple) -> None:
    frozen, file = freeze(pair[0], X), io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), frozen(X))


READ = """
import sys, torch
frozen, x, expected = torch.load(sys.argv[1], weights_only=False)
try:
    with torch.no_grad():
        out = frozen(x)
except Exception as error:
    sys.exit(f"refused: {error}")
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("written", ("baseline",))
def test_read_by_another_processor(tmp_path: Path, written: str) -> None:
    """What is packed for one instruction set is refused by another, or gives the same; it is never misread.

    Widths are such that the packed tensor is as large for all of them.
    """
    if cpu.instruction_set() == written:
        pytest.skip("no other instruction set")
    model = stock.randomize(FusedSequential(FusedInvResBlock(32, 3, 64, 32, False, "relu", 1))).eval()
    x = torch.randn(1, 32, 5, 5)
    torch.save((freeze(model, x), x, model(x)), tmp_path / "frozen.pt")
    result = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "frozen.pt")],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MBN_CPU_ISA": written},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 or "refused: " in result.stderr, result.stderr[-1000:]


# What is refused ------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object], kind: type[Exception] = ValueError, op: str = "freeze") -> str:
    """The argument that the one sentence names."""
    with pytest.raises(kind) as error:
        call()
    message = SENTENCE.match(str(error.value))
    assert type(error.value) is kind and message, f"not one sentence: {error.value!r}"
    assert message["op"] == op
    return message["argument"]


def test_training_mode_is_refused(pair: tuple) -> None:
    assert refused(lambda: freeze(pair[0].train(), X)) == "model"


@pytest.mark.parametrize(
    "model",
    (nn.Conv2d(3, 4, 1), nn.Sequential(), None, "model", small),
    ids=lambda model: getattr(model, "__name__", type(model).__name__),
)
def test_another_type_is_refused(model: object) -> None:
    assert refused(lambda: freeze(model.eval() if isinstance(model, nn.Module) else model, X), TypeError) == "model"


@pytest.mark.parametrize("example", (None, 3, [1.0], (2, 3, 20, 24)), ids=str)
def test_another_example_is_refused(pair: tuple, example: object) -> None:
    assert refused(lambda: freeze(pair[0], example), TypeError) == "example"


def test_the_plain_twin_is_refused(pair: tuple) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^freeze: model: expected [^\n]+, got [^\n]+$"):
        freeze(pair[1], X)


def another_block(m: nn.Module) -> None:
    m.blocks[0] = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Hardswish())


OTHER_PARTS: dict[str, Callable[[nn.Module], object]] = {
    "a stock block": another_block,
    "fused switched off": lambda m: setattr(m.blocks[1], "fused", False),
    "a hook on the stem": lambda m: m.conv1.register_forward_hook(lambda *_: None),
    "a hook in a block": lambda m: m.blocks[1].layers[0][0].register_forward_hook(lambda *_: None),
    "a hook on the blocks": lambda m: m.blocks.register_forward_hook(lambda *_: None),
    "a batch norm in training": lambda m: m.blocks[1].layers[0][1].train(),
    "another classifier": lambda m: setattr(m, "classifier", nn.Linear(40, 7)),
    "another pool": lambda m: setattr(m, "gap", nn.AdaptiveMaxPool2d(1)),
    "another activation": lambda m: m.classifier.append(nn.Softmax(1)),
    "a stem of five channels": lambda m: setattr(m.conv1, "0", nn.Conv2d(5, 8, 3, 2, 1, bias=False)),
}


@pytest.mark.parametrize("evaluated", (False, True), ids=("new", "evaluated"))
@pytest.mark.parametrize("part", OTHER_PARTS, ids=lambda name: name.replace(" ", "-"))
def test_a_part_that_runs_alone_is_refused(pair: tuple, part: str, evaluated: bool) -> None:
    """Also in a model that has run in one call before it was given that part."""
    model = pair[0]
    for _ in range(2 * evaluated):
        model(X)
    OTHER_PARTS[part](model)
    example = torch.randn(1, 5, 20, 24) if "five" in part else X
    model(example)  # it runs, in several calls
    assert refused(lambda: freeze(model, example)) == "model"


@pytest.mark.parametrize("evaluated", (False, True), ids=("new", "evaluated"))
def test_another_backend_is_refused(pair: tuple, evaluated: bool) -> None:
    for _ in range(2 * evaluated):
        pair[0](X)
    with mbn_kernels.use_backend("reference"):
        assert refused(lambda: freeze(pair[0], X)) == "model"


def test_under_autocast_it_is_refused_or_not_stale(pair: tuple) -> None:
    """Autocast's own numbers are other ones."""
    model = pair[0]
    model(X), model(X)
    stock.randomize(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            frozen = freeze(model, X)
        except ValueError:
            return
    assert torch.equal(frozen(X), model(X))


def test_an_example_that_does_not_fit_is_refused(pair: tuple) -> None:
    """In the model's own words."""
    for wrong in (X.double(), X[:, :2], X[0]):
        with pytest.raises((TypeError, ValueError), match="expected"):
            freeze(pair[0], wrong)


BAD: dict[str, object] = {
    "double": X.double(),
    "bfloat16": X.bfloat16(),
    "integers": X.int(),
    "no batch": X[0],
    "five dimensions": X[None],
    "meta": X.to("meta"),
    "sparse": X.to_sparse(),
    "none": None,
    "a list": [1.0],
    "more channels": torch.randn(1, 4, 20, 24),
    "fewer channels": torch.randn(1, 2, 20, 24),
    "no pixels": torch.randn(1, 3, 0, 0),
    "no rows": torch.randn(1, 3, 0, 7),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_is_refused(kind: str, name: str) -> None:
    model = stock.randomize(MODELS[kind]()).eval()
    frozen, expected = freeze(model, X), model(X)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        frozen(BAD[name])
    assert re.match(r"^\w+: \w+: expected [^\n]+, got [^\n]+$", str(error.value)), error.value
    assert torch.equal(frozen(X), expected)


def test_is_public() -> None:
    assert "freeze" in mbn_kernels.__all__
    assert sorted(mbn_kernels.__all__) == list(mbn_kernels.__all__)
    assert all(hasattr(mbn_kernels, name) for name in mbn_kernels.__all__)
