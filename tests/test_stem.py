"""A network's stem in training: a dense stage, whose map the first block makes on load where that adds no residual."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import stock
import torch
from oracle import (
    Case,
    Tensors,
    compare_case,
    dense,
    dw,
    fused_chain,
    in_each_mode,
    magnitude,
    max_error,
    mode_id,
    prepare,
    pw,
    run,
    stock_chain,
)
from test_functional import LAYOUTS
from test_memory import bytes_of, saved_for_backward
from test_models import PAPER, build, oracle_of, scale, train_step, twins
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mbn_kernels
from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, FusedSequential, chain, functional, ops

DTYPES = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float64), ids=lambda d: str(d).removeprefix("torch.")
)
GATE = ("relu", "hardsigmoid")
CASES = (
    Case("plain", (2, 3, 9, 11), (dense(16, 3, "hardswish"),)),
    Case("stride-2", (2, 3, 9, 12), (dense(17, 3, "relu6", stride=2),)),
    Case("strides-differ", (2, 3, 9, 12), (dense(5, (3, 2), "relu", stride=(1, 3), padding=1),)),
    Case("one-channel", (2, 1, 8, 7), (dense(8, 3, "relu", stride=2),)),
    Case("one-channel-out", (2, 1, 8, 7), (dense(1, 3, "silu"),)),
    Case("one-image", (1, 3, 13, 10), (dense(8, 5, "hardswish", stride=2),)),
    Case("no-image", (0, 3, 8, 7), (dense(8, 3, "hardswish", stride=2),)),
    Case("1x1-map", (7, 3, 1, 1), (dense(8, 3, "relu"),)),
    Case("one-column", (3, 3, 9, 1), (dense(8, 3, "relu", stride=2),)),
    Case("dilation-2", (2, 3, 9, 8), (dense(8, 3, "hardswish", dilation=2),)),
    Case("four-pads", (2, 3, 8, 7), (dense(8, 3, "hardswish", stride=2, padding=(0, 1, 2, 3)),)),
    Case("no-padding-is-map", (5, 3, 3, 3), (dense(8, 3, "relu", padding=0),)),
    Case("not-affine", (2, 3, 8, 7), (dense(8, 3, "silu", affine=False),)),
    Case("no-norm", (2, 3, 8, 7), (dense(8, 3, "hardswish", norm=False),)),
    Case("gate", (2, 3, 8, 7), (dense(8, 3, "hardswish", gate=GATE),)),
    Case("residual", (2, 3, 8, 7), (dense(3, 3, "hardswish"),), True),
    Case("many-rows", (3, 3, 37, 33), (dense(20, 3, "hardswish"),)),
    Case("v1", (2, 3, 13, 9), (dense(16, 3, "relu", stride=2), dw(3, "relu"), pw(24, "relu"))),
    Case("v2", (2, 3, 13, 9), (dense(16, 3, "relu6", stride=2), dw(3, "relu6"), pw(8))),
    Case("v3", (2, 3, 13, 9), (dense(16, 3, "hardswish", stride=2), dw(3, "relu", stride=2, gate=GATE), pw(16))),
    Case("pointwise-behind", (2, 3, 13, 9), (dense(16, 3, "hardswish", stride=2), pw(24, "relu"))),
    Case("behind", (2, 5, 6, 7), (pw(7, "hardswish", gate=GATE), dense(4, 3, "silu"))),
)  # fmt: skip


@pytest.mark.parametrize("case, training", in_each_mode(CASES), ids=mode_id)
@DTYPES
def test_matches_the_oracle(backend: str, case: Case, training: bool, dtype: torch.dtype) -> None:
    compare_case(fused_chain, case, dtype, training)


#: Of which oneDNN, which stock calls, is wrong where maps are channels-last.
WRONG = (
    (Case("one-column-of-one-channel", (4, 1, 7, 7), (dense(11, (1, 7), stride=(1, 2), padding=0),)), torch.float32),
    (Case("one-column-of-one-channel", (4, 1, 9, 8), (dense(2, (5, 7), stride=(1, 2), padding=0),)), torch.bfloat16),
    (Case("one-depthwise-column", (4, 3, 8, 5), (pw(1), dw((7, 5), stride=(1, 3), padding=0))), torch.float32),
    (Case("one-column-stride-2", (4, 3, 24, 1), (dense(40, (5, 3), stride=(1, 2), padding=1),)), torch.bfloat16),
    (Case("two-columns-stride-3", (4, 2, 31, 2), (dense(16, 5, stride=(2, 3), padding=(0, 0, 2, 2)),)), torch.bfloat16),
    (Case("dilated-pixels", (4, 3, 6, 30), (dense(11, 1, stride=(1, 3), dilation=(1, 2)),)), torch.bfloat16),
)


@pytest.mark.parametrize("case, dtype", WRONG, ids=lambda v: str(v).removeprefix("torch."))
def test_where_a_library_is_wrong(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Against float64 alone, as stock is wrong there, too."""
    t = prepare(case, dtype, False)
    exact = run(stock_chain, case, t, False)
    typed = t.map(lambda v: v.to(dtype))
    for _ in range(64):  # a gradient that is not written would be that of the call before
        torch.full_like(typed.stages[0]["weight"], float("nan"))
    for name, v in run(fused_chain, case, typed, False).items():
        assert max_error(v, exact[name]) <= 16 * torch.finfo(dtype).eps * magnitude(exact[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((2, 3, 9, 8), (2, 1, 9, 8)), ids=("rgb", "grey"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_input_strides(backend: str, shape: tuple, layout: str, dtype: torch.dtype) -> None:
    training = layout != "one-pixel-expanded"
    case = Case("stem", shape, (dense(16, 3, "hardswish", stride=2), dw(3, "relu")))
    change = lambda t: Tensors(LAYOUTS[layout](t.x), t.stages, t.dout)  # noqa: E731
    compare_case(fused_chain, case, dtype, training, change=change)


def test_statistics_far_from_zero(backend: str) -> None:
    """A convolution whose outputs are all but their mean, as of an image with an offset."""
    case = Case("far", (2, 3, 40, 40), (dense(8, 3, padding=0),))
    compare_case(fused_chain, case, torch.float32, True, change=lambda t: Tensors(t.x + 50, t.stages, t.dout))


@DTYPES
@pytest.mark.parametrize("channels", (1, 8, 16, 37))
@pytest.mark.parametrize("pixels", ((1, 1), (3, 5), (16, 16), (40, 41)), ids=str)
def test_statistics(needs_cpu: None, channels: int, pixels: tuple, dtype: torch.dtype) -> None:
    """The same bits for any number of threads; near the reference's also where the first rows are unlike the rest."""
    y = (0.01 * torch.randn(9, channels, *pixels, dtype=torch.float64) + 3).to(dtype)
    y[0, :, :1] = 100
    y = torch.empty(y.shape, dtype=dtype, memory_format=torch.channels_last).copy_(y)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(mbn_kernels.backends.get("cpu").kernels.statistics(y))
        assert all(map(torch.equal, found[0], found[-1]))
    expected = mbn_kernels.backends.get("reference").kernels.statistics(y.double())
    for a, b in zip(found[0], expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


# In a network ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def chains(needs_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The convolutions of each chain that is to be differentiated, as they run; linked chains are one."""
    found: list[list[str]] = []
    forward = ops.chain.forward

    def counted(kernels, x, parsed, flat, residual, save, rows=None, link=chain.NO_LINK):
        convs = [stage.conv for stage in parsed.stages]
        if save and rows is None:
            found.append(convs)
        elif save:
            found[-1].extend(convs)
        return forward(kernels, x, parsed, flat, residual, save, rows, link)

    monkeypatch.setattr(ops.chain, "forward", counted)
    yield found


def is_fused(chains: list[list[str]]) -> bool:
    return any("dense" in convs for convs in chains)


@pytest.mark.parametrize("name", PAPER)
def test_network_in_float64(chains: list, name: str) -> None:
    """A step and its running statistics are the plain twin's; V3-Large's first block has a residual, V1 has none."""
    fused, plain = (m.double() for m in twins(name))
    x, target = torch.randn(3, 3, 40, 56, dtype=torch.float64), torch.arange(3)
    got, expected = train_step(fused, x, target), train_step(oracle_of(plain), x, target)
    floor = 1e-3 * max(t.abs().max().item() for key, t in expected.items() if key.startswith("grad"))
    for key, value in expected.items():
        bound = 1e-10 * max(scale(expected, key), floor if key.startswith("grad") else 0.0)
        assert (got[key] - value).abs().max().item() <= bound, key
    stages = {"mobilenet_v1": 27, "mobilenet_v2": 6, "mobilenet_v3_large": 1, "mobilenet_v3_small": 6}
    assert len(next(convs for convs in chains if "dense" in convs)) == stages[name]
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_running_statistics(chains: list, momentum: float | None, training: bool) -> None:
    fused, plain = (m.double() for m in twins("mobilenet_v2"))
    for model in (fused, plain):
        model.train(training).conv1[1].momentum = momentum
        for seed in range(3):
            stock.pull(model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).double()))
    assert is_fused(chains)
    for part in ("conv1", "blocks.0"):
        found = (model.get_submodule(part).state_dict() for model in (fused, plain))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("act", (nn.ReLU, nn.Hardswish))
@pytest.mark.parametrize("residual", (False, True))
def test_bytes_saved(needs_cpu: None, act: type[nn.Module], residual: bool) -> None:
    """The image and the convolution's output; with a residual the stem's map, too, which the block takes in."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), act())
    block = FusedInvResBlock(16, 3, 16, 16 if residual else 24, False, "relu", 1)
    net, x = FusedSequential(stem, block), torch.randn(2, 3, 64, 64)
    kept = saved_for_backward(lambda: net(x), net)[1]
    maps = 4 * 2 * 32 * 32 * (16 * (2 + residual) + (16 if residual else 24))
    assert maps + x.nbytes <= bytes_of(kept) <= maps + x.nbytes + 4 * 12 * 24
    before = saved_for_backward(lambda: block(stem(x)), net)[1]
    # Stock's ReLU keeps only its output, which is the block's input.
    assert bytes_of(kept) < bytes_of(before) + (4 * 4 * 16 if residual and act is nn.ReLU else 0)


@pytest.mark.parametrize("wanted", ("x", "conv", "norm", "block", "all but x"))
def test_what_is_wanted(chains: list, wanted: str) -> None:
    """Any part may be frozen; what has no use of a gradient has none."""
    fused = stock.randomize(FusedSequential(stem(), FusedDepthwiseSeparable(8, 12)), 3).double()
    plain = copy.deepcopy(fused)
    found = []
    for model in (fused, plain):
        x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_(wanted == "x")
        trained = {"conv": model[0][0], "norm": model[0][1], "block": model[1], "all but x": model}.get(wanted)
        model.requires_grad_(False)
        if trained is not None:
            trained.requires_grad_(True)
        stock.pull(model(x) if model is fused else model[1](model[0](x)))
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert is_fused(chains) == (wanted != "block")
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
            assert a.dtype == b.dtype


def test_a_frozen_front_stays_stock(chains: list) -> None:
    """It keeps nothing for backward, as stock does, and its kernels for evaluation are better."""
    net = FusedSequential(stem(), FusedInvResBlock(8, 3, 8, 8, False, "relu", 1), FusedDepthwiseSeparable(8, 12))
    net[:2].requires_grad_(False)
    net(torch.randn(2, 3, 9, 8)).sum().backward()
    assert not is_fused(chains)


# Who watches ----------------------------------------------------------------------------------------------------------


def stem() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())


WATCHED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "network": lambda m: m,
    "stem": lambda m: m.conv1,
    "convolution": lambda m: m.conv1[0],
    "norm": lambda m: m.conv1[1],
    "activation": lambda m: m.conv1[2],
    "first block": lambda m: m.blocks[0],
    "layer of the first block": lambda m: m.blocks[0].layers[0][1],
}
HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", WATCHED)
def test_hooks(chains: list, place: str, hook: str) -> None:
    model, fired = build("mobilenet_v2", True), []
    model.conv1[2].inplace = False  # with a backward hook around it PyTorch does not allow that
    getattr(WATCHED[place](model), f"register_{hook}")(lambda *_: fired.append(place))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert fired == [place]
    front = [convs for convs in chains if "dense" in convs]
    stages = {"network": 6, "first block": 1, "layer of the first block": 1}.get(place)
    assert [len(convs) for convs in front] == ([stages] if stages else [])


def test_other_watchers(chains: list) -> None:
    """A graph, autocast, a dispatch mode and a transform get the stem's own layers."""
    model = build("mobilenet_v2", True)
    x = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    twin = build("mobilenet_v2", True)
    twin.conv1.register_forward_hook(lambda *_: None)
    with FlopCounterMode(display=False) as other:
        twin(x).sum().backward()
    assert counter.get_total_flops() == other.get_total_flops() > 0
    with torch.autocast("cpu"):
        model(x).float().sum().backward()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    with mbn_kernels.use_backend("reference"):
        model(x).sum().backward()
    assert not is_fused(chains)


def test_changed_layers(chains: list) -> None:
    """Whatever else stands in the stem runs as it is."""

    class Other(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    changed = (
        lambda m: setattr(m, "conv1", Other(*m.conv1)),
        lambda m: m.conv1.__setitem__(0, nn.Conv2d(3, 32, 3, 2, 1)),
        lambda m: m.conv1.__setitem__(0, nn.Conv2d(3, 32, 3, 2, 1, bias=False, padding_mode="reflect")),
        lambda m: m.conv1.__setitem__(1, nn.GroupNorm(4, 32)),
        lambda m: m.conv1.__setitem__(2, nn.Tanh()),
        lambda m: setattr(m.conv1[0], "forward", lambda x: nn.functional.conv2d(x, m.conv1[0].weight, None, 2, 1)),
        lambda m: nn.utils.parametrizations.weight_norm(m.conv1[0]),
    )
    x = torch.randn(2, 3, 32, 32)
    for change in changed:
        model = build("mobilenet_v2", True)
        change(model)
        expected = model.conv1(x)
        for block in model.blocks:
            expected = block(expected)
        expected = model.classifier(model.gap(model.last_conv(expected)).flatten(1))
        torch.testing.assert_close(model(x), expected)
        assert not is_fused(chains)


def test_dropped_paths_stay_their_own_chain(chains: list) -> None:
    class Dropping(FusedDepthwiseSeparable):
        def __init__(self) -> None:
            super().__init__(8, 12)
            self.drop = nn.Dropout(0.5)

        def drops(self) -> list[nn.Module]:
            return [self.drop]

    net = FusedSequential(stem(), Dropping())
    x = torch.randn(2, 3, 9, 8)
    net(x).sum().backward()
    assert chains == [["dense"], ["depthwise", "pointwise"]]
    chains.clear()
    net[1].drop.eval()
    net(x).sum().backward()
    assert chains == [["dense", "depthwise", "pointwise"]]


def test_checkpoint(chains: list) -> None:
    """Computed again in backward, the front gives the same gradients, and its statistics are taken in as stock's."""
    nets = [FusedSequential(stem(), FusedDepthwiseSeparable(8, 12)).double() for _ in range(2)]
    nets[1].load_state_dict(stock.randomize(nets[0]).state_dict())
    x = torch.randn(2, 3, 9, 8).double()
    stock.pull(torch.utils.checkpoint.checkpoint(nets[0], x, use_reentrant=False))
    stock.pull(torch.utils.checkpoint.checkpoint(lambda t: nets[1][1](nets[1][0](t)), x, use_reentrant=False))
    assert is_fused(chains)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "x, words",
    (
        (
            torch.randn(2, 4, 9, 9),
            r"weight: expected shape \(out, 4, 3, 3\) for an input of 4 channels, got \(8, 3, 3, 3\)",
        ),
        (torch.randn(3, 9, 9), r"x: expected 4 dimensions \(N, C, H, W\), got 3"),
        (torch.randn(1, 3, 2, 2), r"x: expected more than 1 value per channel when training, got \(1, 8, 1, 1\)"),
        (torch.randn(2, 3, 9, 9, dtype=torch.float64), r"weight: expected torch.float64 for x of torch.float64"),
        (torch.randn(2, 3, 0, 9), r"x: expected height and width that the 3x3 window fits in, got \(2, 3, 0, 9\)"),
    ),
)
def test_bad_input(chains: list, x: Tensor, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^Sequential: " + words):
        FusedSequential(stem(), FusedDepthwiseSeparable(8, 12))(x)


def test_double_backward_is_refused(chains: list) -> None:
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    out = FusedSequential(stem())(x)
    assert is_fused(chains) and functional.runs_directly(x)
    (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        g.sum().backward()
