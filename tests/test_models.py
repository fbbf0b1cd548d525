"""Whole networks: the fused ones against their plain twins, and the review's against its own arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import DRAWS, Expected, exact_hardsigmoid, magnitude, max_error
from torch import Tensor, nn

from mbn_kernels.models import (
    MobileNetV3,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3_large,
    mobilenet_v3_small,
    review_large_cfgs,
    review_small_cfgs,
)
from mbn_kernels.modules import FusedModule

PAPER = {f.__name__: f for f in (mobilenet_v1, mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small)}
CFGS = {"review_large": review_large_cfgs(), "review_small": review_small_cfgs()}
EVERY = pytest.mark.parametrize("name", [*PAPER, *CFGS])


class ExactHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return exact_hardsigmoid(x)


def build(name: str, fused: bool, **options) -> nn.Module:
    """A network of ten classes without dropout."""
    if name in PAPER:
        return PAPER[name](10, dropout=0.0, fused=fused, **options)
    model = MobileNetV3(3, CFGS[name], 10, fused=fused, **options)
    model.classifier[2].p = 0.0
    return model


def calibrate(model: nn.Module) -> None:
    """Random batch norm weights, and the running statistics of a batch: as initialised, the logits are all but 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        nn.init.uniform_(m.weight, 0.5, 1.5)
        nn.init.normal_(m.bias, 0, 0.2)
        m.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def twins(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """The fused network and its plain twin with the same numbers in them."""
    plain, fused = build(name, False, **options), build(name, True, **options)
    calibrate(plain)
    fused.load_state_dict(plain.state_dict(), strict=True)
    return fused, plain


def oracle_of(plain: nn.Module) -> nn.Module:
    """The plain twin in float64, with hard-sigmoids whose gradient is float64, too."""
    oracle = copy.deepcopy(plain).double()
    for module in list(oracle.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, child_name, ExactHardsigmoid())
    return oracle


def scale(found: dict[str, Tensor], key: str) -> float:
    """The largest magnitude; for a mean, which may cancel, at least that of the deviation from it."""
    deviation = magnitude(found[key[:-4] + "var"]) ** 0.5 if key.endswith("running_mean") else 0.0
    return max(magnitude(found[key]), deviation)


def train_step(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and running statistics of one step, by name; the model is left as it was."""
    model = copy.deepcopy(model).train()
    loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), target)
    loss.backward()
    found = {"loss": loss.detach()} | {f"grad {k}": p.grad for k, p in model.named_parameters()}
    return found | {k: b for k, b in model.named_buffers() if "running" in k}


@EVERY
def test_twins_load_each_other(name):
    fused, plain = build(name, True), build(name, False)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for source, destination in ((fused, plain), (plain, fused)):
        nn.init.normal_(source.conv1[0].weight)
        destination.load_state_dict(source.state_dict(), strict=True)
        for key, value in destination.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key


@EVERY
def test_every_part_is_fused(name):
    """The plain twin fuses nothing; the fused network everything but stem and classifier."""
    for fused in (True, False):
        parts = [m for m in build(name, fused).modules() if isinstance(m, FusedModule)]
        assert len(parts) > 10
        assert all((m.why_not_fused() is None) == fused for m in parts)


@EVERY
def test_same_seed_same_weights(name):
    models = []
    for fused in (True, False):
        torch.manual_seed(3)
        models.append(build(name, fused))
    for (key, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), key


@EVERY
def test_evaluation(name):
    fused, plain = (model.eval() for model in twins(name))
    oracle, x = oracle_of(plain), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        got = {"out": fused(x)}
        expected = Expected(torch.float32, {"out": oracle(x.double())}, {"out": plain(x)})
        for _ in range(DRAWS):
            if not expected.breaches(got):
                break
            drawn = (x * (1 + torch.finfo(x.dtype).eps * (torch.rand(x.shape, dtype=torch.float64) - 0.5))).float()
            expected.draw({"out": oracle(drawn.double())}, {"out": plain(drawn)})
        assert not expected.breaches(got), "\n".join(["beyond the tolerance:", *expected.breaches(got)])


@EVERY
def test_training(name):
    """Float64 shows that every gradient is the right one, float32 that a network adds up no more error than stock."""
    fused, plain = twins(name)
    x, target = torch.randn(4, 3, 64, 64), torch.arange(4)
    oracle = train_step(oracle_of(plain), x, target)
    double = train_step(copy.deepcopy(fused).double(), x, target)
    assert double.keys() == oracle.keys()
    # Of a bias that the next batch norm takes out again the gradient is 0 but for rounding: others give it its scale.
    floor = 1e-3 * max(magnitude(value) for key, value in oracle.items() if key.startswith("grad"))
    for key, value in oracle.items():
        least = floor if key.startswith("grad") else 0.0
        assert max_error(double[key], value) <= 1e-9 * max(scale(oracle, key), least), key

    def errors(found: dict[str, Tensor]) -> list[float]:
        """Of the loss, the running statistics and the gradient, each as a whole: errors travel through a network."""
        running = [max_error(found[key], oracle[key]) / scale(oracle, key) for key in oracle if "running" in key]
        grads = [key for key in oracle if key.startswith("grad")]
        gradient, exact = (torch.cat([f[key].flatten().double() for key in grads]) for f in (found, oracle))
        relative = (gradient - exact).norm() / exact.norm()
        return [max_error(found["loss"], oracle["loss"]) / magnitude(oracle["loss"]), max(running), relative.item()]

    eps = torch.finfo(torch.float32).eps
    # Stock's loss, one number, may be right by luck; and among a million values a few may round to the other side of a
    # kink than in float64, in stock as here, which one change of gradient shows.
    slack = [16 * eps, eps, 0.03]
    got, stock = (errors(train_step(model, x, target)) for model in (fused, plain))
    for error, stock_error, allowed in zip(got, stock, slack, strict=True):
        assert error <= 2 * stock_error + allowed


@pytest.mark.parametrize("width", [0.25, 0.35, 0.75, 1.4])
@EVERY
def test_widths_and_odd_resolutions(name, width):
    options = {"width_mult": width} if name in PAPER else {"width_exp": width}
    plain, fused = build(name, False, **options).double(), build(name, True, **options).double()
    fused.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 97, 65, dtype=torch.float64)
    with torch.no_grad():
        for training in (True, False):
            got, expected = fused.train(training)(x), plain.train(training)(x)
            assert got.shape == (2, 10)
            assert max_error(got, expected) <= 1e-9 * magnitude(expected)
    buffers = dict(plain.named_buffers())
    for key, value in buffers.items():
        assert max_error(fused.get_buffer(key), value) <= 1e-9 * scale(buffers, key), key


@EVERY
def test_initialisation(name):
    model = build(name, True)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            k = module.kernel_size[0]
            std = (2 / (module.out_channels * k * k)) ** 0.5  # fan out, which counts a depthwise layer's groups as one
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(std, rel=0.15), key
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), key
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.15), key
            assert (module.bias == 0).all(), key


@pytest.mark.parametrize(
    "name, eps, momenta",
    [
        ("mobilenet_v1", 1e-5, {0.1}),
        ("mobilenet_v2", 1e-5, {0.1}),
        ("mobilenet_v3_large", 1e-3, {0.01}),
        ("mobilenet_v3_small", 1e-3, {0.01}),
        ("review_large", 1e-5, {0.99, 0.1}),
        ("review_small", 1e-5, {0.99, 0.1}),
    ],
)
def test_batch_norm_settings(name, eps, momenta):
    model = build(name, True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {eps} and {m.momentum for m in norms} == momenta
    if name in CFGS:
        assert model.get_submodule("last_conv.1").momentum == 0.1
    else:
        norms = [m for m in build(name, True, bn_eps=2e-5, bn_momentum=0.2).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum) for m in norms} == {(2e-5, 0.2)}


def review_network(state: dict[str, Tensor], cfgs: list, x: Tensor) -> Tensor:
    """The review's network in evaluation, from nothing but its state_dict and cfgs; takes every key it uses away."""
    acts = {"relu": F.relu, "hs": F.hardswish, None: lambda h: h}

    def conv_bn(h, key, act, **options):
        h = F.conv2d(h, state.pop(f"{key}.0.weight"), **options)
        mean, var, weight, bias = (state.pop(f"{key}.1.{p}") for p in ("running_mean", "running_var", "weight", "bias"))
        state.pop(f"{key}.1.num_batches_tracked")
        return acts[act](F.batch_norm(h, mean, var, weight, bias))

    def linear(h, key):
        return F.linear(h, state.pop(f"{key}.weight"), state.pop(f"{key}.bias"))

    def squeeze_excite(h, key):
        hidden = linear(h.mean((2, 3)), f"{key}.excitation.0").relu()
        return h * exact_hardsigmoid(linear(hidden, f"{key}.excitation.2"))[:, :, None, None]

    h = conv_bn(x, "conv1", "hs", stride=2, padding=1)
    for i, (k, exp, out, se, nl, s) in enumerate(cfgs[:-2]):
        block_input, key = h, (f"blocks.{i}.layers.{j}" for j in range(4))
        if h.shape[1] != exp:
            h = conv_bn(h, next(key), nl)
        h = conv_bn(h, next(key), nl, stride=s, padding=k // 2, groups=exp)
        if se:
            h = squeeze_excite(h, next(key))
        h = conv_bn(h, next(key), None)
        if s == 1 and block_input.shape[1] == out:
            h = h + block_input
    h = conv_bn(h, "last_conv", cfgs[-2][4])
    if cfgs[-2][3]:
        h = squeeze_excite(h, "se_block")
    return linear(F.hardswish(linear(h.mean((2, 3)), "classifier.0")), "classifier.3")


@pytest.mark.parametrize("name", CFGS)
def test_review_network(name):
    for model in twins(name):
        model.double().eval()
        x, state = torch.randn(2, 3, 64, 64, dtype=torch.float64), dict(model.state_dict())
        with torch.no_grad():
            expected, got = review_network(state, CFGS[name], x), model(x)
        assert not state, f"keys that the review does not have: {sorted(state)}"
        assert max_error(got, expected) <= 1e-9 * magnitude(expected)


def test_review_parameter_order():
    """An optimiser's state goes by the order of the parameters: the review registers se_block before last_conv."""
    parts = dict.fromkeys(key.split(".")[0] for key, _ in MobileNetV3(3, review_small_cfgs(), 10).named_parameters())
    assert list(parts) == ["conv1", "blocks", "se_block", "last_conv", "classifier"]


def test_review_arguments():
    """zero_init_residual changes nothing; width_exp scales what the blocks put out; a last 3x3 has no padding."""
    weights = []
    for zero_init_residual in (True, False):
        torch.manual_seed(0)
        weights.append(MobileNetV3(1, review_small_cfgs(), 10, zero_init_residual).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    wide = MobileNetV3(3, review_small_cfgs(), 10, True, 2.0)
    assert wide.blocks[-1].layers[-1][0].weight.shape == (192, 576, 1, 1)
    assert wide.get_parameter("last_conv.0.weight").shape == (576, 192, 1, 1)

    cfgs = [(3, 16, 16, True, "relu", 2), (3, None, 24, True, "relu", 1), 32]
    small = MobileNetV3(3, cfgs, 5).eval()
    with torch.no_grad():
        h = small.last_conv(small.blocks(small.conv1(torch.randn(2, 3, 32, 32))))
    assert h.shape == (2, 24, 6, 6) and isinstance(small.get_submodule("last_conv.2"), nn.ReLU)
    assert small.se_block.excitation[0].out_features == 6


def test_input_channels_and_options():
    model = mobilenet_v3_small(7, in_channels=1, last_se=True, squeeze_divisor=4).eval()
    assert model(torch.zeros(2, 1, 33, 48)).shape == (2, 7)
    assert model.se_block.excitation[0].out_features == 144
    for f in (mobilenet_v1, mobilenet_v2):
        assert f(7, in_channels=1).eval()(torch.zeros(2, 1, 33, 48)).shape == (2, 7)
