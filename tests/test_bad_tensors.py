"""Tensors of the wrong kind, given to all functions and modules: one sentence, and the next call is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import stock
import torch
from junk import TENSORS, freed, raised
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSequential,
    FusedSqueezeExcite,
    freeze,
    functional,
    models,
)

KINDS = (TypeError, ValueError, NotImplementedError)


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> None:
    pass


# Functions ------------------------------------------------------------------------------------------------------------


def normed(channels: int) -> dict[str, Tensor]:
    zero, one = torch.zeros(channels), torch.ones(channels)
    return {"bn_weight": one, "bn_bias": zero, "running_mean": zero.clone(), "running_var": one.clone()}


FUNCTIONS: dict[str, Callable[[], dict]] = {
    "depthwise_conv_bn_act": lambda: {"x": torch.randn(2, 3, 5, 4), "weight": torch.randn(3, 1, 3, 3), **normed(3)},
    "pointwise_conv_bn_act": lambda: {
        "x": torch.randn(2, 3, 5, 4), "weight": torch.randn(6, 3, 1, 1), **normed(6),
        "residual": torch.randn(2, 6, 5, 4),
    },
    "squeeze_excite": lambda: {
        "x": torch.randn(2, 8, 5, 4), "w1": torch.randn(2, 8), "b1": torch.zeros(2), "w2": torch.randn(8, 2),
        "b2": torch.zeros(8),
    },
}  # fmt: skip
ARGUMENTS = [(f, name) for f, given in FUNCTIONS.items() for name in given()]


def ways(function: str) -> Iterator[dict]:
    """Every way in which a function is called: the options of its own."""
    for backend in ("cpu", "reference"):
        for gradients in (True, False):
            for training in (True, False) if "conv" in function else (None,):
                with mbn_kernels.use_backend(backend), torch.set_grad_enabled(gradients):
                    yield {} if training is None else {"training": training}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("function, argument", ARGUMENTS, ids=lambda v: v)
def test_function(function: str, argument: str, kind: str) -> None:
    for options in ways(function):
        given = FUNCTIONS[function]()
        before = {name: t.clone() for name, t in given.items()}
        wrong = given | {argument: TENSORS[kind](given[argument])}
        message = raised(lambda wrong=wrong, options=options: getattr(functional, function)(**wrong, **options), *KINDS)
        assert message["op"] == function
        # Where x is on another device, it is the others that are not on its own.
        assert message["argument"] == argument or (argument == "x" and kind == "meta"), message[0]
        assert all(torch.equal(t, before[name]) for name, t in given.items())


def test_freed_x_of_either_layout() -> None:
    for options in ways("depthwise_conv_bn_act"):
        for layout in (torch.contiguous_format, torch.channels_last):
            given = FUNCTIONS["depthwise_conv_bn_act"]()
            given["x"] = freed(given["x"].contiguous(memory_format=layout))
            message = raised(lambda g=given, o=options: functional.depthwise_conv_bn_act(**g, **o), *KINDS)
            assert message["argument"] == "x"


STATISTICS: dict[str, Callable[[dict], dict]] = {
    "wants a gradient": lambda g: {"running_mean": torch.zeros(3, requires_grad=True)},
    "var wants a gradient": lambda g: {"running_var": torch.ones(3, requires_grad=True) * 1},
    "one number for all": lambda g: {"running_mean": torch.zeros(1).expand(3)},
    "its own var": lambda g: {"running_mean": g["running_var"]},
    "overlaps var": lambda g: dict(zip(("running_mean", "running_var"), overlapping(), strict=True)),
    "part of x": lambda g: {"running_mean": g["x"].view(-1)[5:8]},
    "part of weight": lambda g: {"running_var": g["weight"].view(-1)[:3]},
    "bn_weight": lambda g: {"running_var": g["bn_weight"]},
    "lazily negative": lambda g: {"running_mean": torch.ones(3, dtype=torch.complex64).conj().imag},
    "of another shape": lambda g: {"running_mean": torch.zeros(3, 1)},
}


def overlapping() -> tuple[Tensor, Tensor]:
    both = torch.ones(5)
    return both[:3], both[2:]


@pytest.mark.parametrize("way", STATISTICS)
def test_statistics_that_cannot_be_updated(way: str) -> None:
    for backend in ("cpu", "reference"):
        given = FUNCTIONS["depthwise_conv_bn_act"]()
        given |= STATISTICS[way](given)
        before = {name: t.clone() for name, t in given.items()}
        given["x"].requires_grad_("x" not in way)
        with mbn_kernels.use_backend(backend):
            message = raised(lambda g=given: functional.depthwise_conv_bn_act(**g, training=True), *KINDS)
        assert message["argument"] in ("running_mean", "running_var"), message[0]
        assert all(torch.equal(t, before[name]) for name, t in given.items())


def test_statistics_made_in_inference_mode() -> None:
    """The kernel updates them as stock does; in plain PyTorch nobody may."""
    given = FUNCTIONS["depthwise_conv_bn_act"]()
    with torch.inference_mode():
        given |= {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with mbn_kernels.use_backend("reference"):
        message = raised(lambda: functional.depthwise_conv_bn_act(**given, training=True), ValueError)
    assert message["argument"] == "running_mean" and not given["running_mean"].any()
    functional.depthwise_conv_bn_act(**given, training=True)
    assert given["running_mean"].all()


@pytest.mark.slow  # the first jagged tensor takes seconds
def test_jagged(backend: str) -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 5, 4), torch.randn(3, 5, 4)], layout=torch.jagged)
    for training in (True, False):
        wrong = FUNCTIONS["depthwise_conv_bn_act"]() | {"x": x}
        message = raised(lambda wrong=wrong, t=training: functional.depthwise_conv_bn_act(**wrong, training=t), *KINDS)
        assert message["argument"] == "x"


@pytest.mark.parametrize("name", ("running_mean", "running_var"))
def test_no_gradient_of_running_statistics(backend: str, name: str) -> None:
    """Stock refuses it, too: it has none. Without gradients such a tensor is as good as any."""
    given = FUNCTIONS["depthwise_conv_bn_act"]()
    given["weight"].requires_grad_()
    with torch.no_grad():
        expected = functional.depthwise_conv_bn_act(**given)
    given[name].requires_grad_()
    assert raised(lambda: functional.depthwise_conv_bn_act(**given), ValueError)["argument"] == name
    with torch.no_grad():
        assert torch.equal(functional.depthwise_conv_bn_act(**given), expected)
        functional.depthwise_conv_bn_act(**given, training=True)


def test_expanded_inputs_are_fine(backend: str) -> None:
    """What is only read may have strides of 0."""
    given = FUNCTIONS["depthwise_conv_bn_act"]()
    expanded = {name: t.new_full((1,), 0.5).expand(t.shape) for name, t in given.items()}
    dense = {name: t.contiguous() for name, t in expanded.items()}
    assert torch.equal(functional.depthwise_conv_bn_act(**expanded), functional.depthwise_conv_bn_act(**dense))


@pytest.mark.parametrize("shape", ((1 << 20, 3, 1 << 10, 1 << 10), (1 << 40, 3, 3, 3), (1, 3, 1 << 30, 1 << 31)))
def test_huge(backend: str, shape: tuple[int, ...]) -> None:
    """PyTorch's allocator says that there is no such memory, as for stock."""
    given = FUNCTIONS["depthwise_conv_bn_act"]() | {"x": torch.zeros(1, 3, 1, 1).expand(shape)}
    for training in (True, False):
        with pytest.raises(RuntimeError, match=r"can't allocate|overflow"):
            functional.depthwise_conv_bn_act(**given, training=training)


def test_fake_tensors_among_others() -> None:
    with FakeTensorMode() as mode:
        pass
    fake = mode.from_tensor(torch.randn(2, 3, 5, 4))
    given = FUNCTIONS["depthwise_conv_bn_act"]()
    assert raised(lambda: functional.depthwise_conv_bn_act(**given | {"x": fake}), TypeError)["argument"] == "params"
    weight = mode.from_tensor(given["weight"])
    wrong = given | {"weight": weight}
    assert raised(lambda: functional.depthwise_conv_bn_act(**wrong), TypeError)["argument"] == "weight"
    fakes = {name: mode.from_tensor(t) for name, t in given.items()}
    assert functional.depthwise_conv_bn_act(**fakes).shape == (2, 3, 3, 2)


# Modules --------------------------------------------------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    "FusedInvResBlock": lambda: FusedInvResBlock(4, 3, 12, 4, True, "hs", 1),
    "FusedSqueezeExcite": lambda: FusedSqueezeExcite(4),
    "FusedDepthwiseConvBNAct": lambda: FusedDepthwiseConvBNAct(4, 3),
    "FusedPointwiseConvBNAct": lambda: FusedPointwiseConvBNAct(4, 6),
    "FusedDepthwiseSeparable": lambda: FusedDepthwiseSeparable(4, 6),
    "FusedSequential": lambda: FusedSequential(FusedDepthwiseSeparable(4, 6), FusedDepthwiseSeparable(6, 6)),
    "mobilenet_v1": lambda: models.mobilenet_v1(10, 0.25, in_channels=4),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(10, 0.25, in_channels=4),
}
#: (training, gradients, autocast)
MODES = ((True, True, False), (True, False, False), (False, True, False), (False, False, False), (True, True, True))
INPUTS: dict[str, Callable[[Tensor], object]] = {
    **TENSORS,
    "freed, channels-last": lambda x: freed(x.contiguous(memory_format=torch.channels_last)),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "another width": lambda x: torch.cat([x, x], 1),
    "no channels": lambda x: x[:, :0],
    "without batch": lambda x: x[0],
    "None": lambda x: None,
    "numpy": lambda x: x.numpy(),
    "a list": lambda x: [x],
    "text": lambda x: "x",
}


@contextmanager
def mode(gradients: bool, autocast: bool) -> Iterator[None]:
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        yield


@pytest.mark.parametrize("training, gradients, autocast", MODES)
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, training: bool, gradients: bool, autocast: bool) -> None:
    """A wrong input in any mode, also where an evaluation is kept: it says so, and changes nothing."""
    module = stock.randomize(MODULES[name]()).train(training)
    x, twin = torch.randn(2, 4, 8, 8), copy.deepcopy(module)
    with mode(gradients, autocast):
        if not training:
            expected = [module(x), module(x)][1]  # the second is the kept one
        state = {key: t.clone() for key, t in module.state_dict().items()}
        for kind, make in INPUTS.items():
            if autocast and kind in ("float16", "meta"):
                continue  # cast as any other; and meta tensors know no autocast
            if name == "FusedSqueezeExcite" and autocast and kind == "float64":
                continue  # a gate takes no part in autocast
            try:
                message = raised(lambda make=make: module(make(x)), *KINDS)
            except BaseException as error:
                raise AssertionError(f"{kind}: {error}") from error
            assert message["op"], kind
            assert all(torch.equal(t, state[key]) for key, t in module.state_dict().items()), kind
            assert module.training == training
        torch.manual_seed(0)  # of a dropout
        found = module(x)
        torch.manual_seed(0)
        assert torch.equal(found, twin(x) if training else expected)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))


def test_frozen() -> None:
    module = stock.randomize(MODULES["FusedSequential"]()).eval()
    x = torch.randn(2, 4, 8, 8)
    frozen = freeze(module, x)
    expected = frozen(x)
    for kind, make in INPUTS.items():
        message = raised(lambda make=make: frozen(make(x)), *KINDS)
        assert message["op"] == "FrozenEvaluation", kind
        assert torch.equal(frozen(x), expected)
        raised(lambda make=make: freeze(module, make(x)), *KINDS)
    assert torch.equal(freeze(module, x)(x), expected)


@pytest.mark.parametrize("kind", ("freed", "nested", "sparse", "meta", "float8", "one number"))
@pytest.mark.parametrize("name", ("layers.0.1.running_mean", "layers.0.1.weight", "layers.0.0.weight"))
def test_a_child_with_a_wrong_tensor(name: str, kind: str) -> None:
    """As after surgery on a module, or where a parameter's memory was freed between two calls."""
    for training in (True, False):
        module = stock.randomize(MODULES["FusedInvResBlock"]()).train(training)
        x = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            module(x)
        child, attribute = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        place = child._buffers if attribute in child._buffers else child._parameters
        good = place[attribute]
        others = {key: t.clone() for key, t in module.state_dict().items() if key != name}
        place[attribute] = TENSORS[kind](good) if kind in TENSORS else good.detach().new_zeros(1)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                raised(lambda module=module, x=x: module(x), *KINDS)
        place[attribute] = good
        assert all(torch.equal(module.state_dict()[key], t) for key, t in others.items())
        module(x)
