"""Wrong numbers, flags, names and texts, given to everything public; and other libraries' numbers, which are right."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from junk import raised
from torch import nn

import mbn_kernels
from mbn_kernels import (
    FusedDepthwiseConvBNAct,
    FusedDepthwiseSeparable,
    FusedInvResBlock,
    FusedPointwiseConvBNAct,
    FusedSequential,
    FusedSqueezeExcite,
    chain,
    functional,
    models,
    modules,
    ranges,
)
from mbn_kernels.functional import Running

NAN, HUGE = math.nan, 10**400
OBJECTS = (None, "3", b"3", (), {}, [3], object(), nn.ReLU(), 1j, (i for i in ()))

#: What is wrong of a kind of argument: (values of another type, values out of range).
COUNT = ((*OBJECTS, True, 1.5, NAN, np.float32(3), np.bool_(True), torch.tensor([3]), torch.tensor(True)),
         (0, -1, 2**31, 2**63, HUGE))  # fmt: skip
CLASSES = (COUNT[0], (0, -1, 2**31, 2**63, HUGE))
PADDING = ((*OBJECTS[1:], True, 1.5, "same"), (-1, 2**31, 2**63))
STRIDE = (tuple(v for v in COUNT[0] if v != [3]), COUNT[1])
EPS = ((*OBJECTS, True, "1e-5", np.bool_(True), torch.tensor([0.1]), torch.tensor(True)), (-1e-5, NAN, math.inf, HUGE))
MOMENTUM = (EPS[0][1:], (NAN, math.inf, -math.inf, HUGE))
WIDTH = (EPS[0], (0, -0.5, NAN, math.inf, 2**31, 2**63, HUGE))
DROPOUT = (EPS[0], (-0.1, 1.5, NAN, math.inf))
FLAG = ((*OBJECTS, 1, 0, 1.0, np.bool_(True), torch.tensor(True)), ())
SE = (tuple(v for v in FLAG[0] if type(v) is not int), ())
ACT = ((), ("gelu", "Relu", "", 3, *OBJECTS))

BLOCK = {"in_channels": 4, "k": 3, "exp_channels": 12, "out_channels": 4, "se": True, "nl": "hs", "s": 1}
BN = {"bn_eps": EPS, "bn_momentum": MOMENTUM, "fused": FLAG}
NET = {"num_classes": CLASSES, "in_channels": COUNT, "dropout": DROPOUT, **BN}


def tensors(*given: str) -> dict:
    made = {
        "x": torch.randn(2, 3, 5, 4), "weight": torch.randn(3, 1, 3, 3), "bn_weight": None, "bn_bias": None,
        "running_mean": torch.zeros(3), "running_var": torch.ones(3),
    }  # fmt: skip
    return made | {name: torch.randn(3, 3, 1, 1) for name in given}


#: (what is called, what it is called with, what is tried in the place of which)
TABLE: tuple[tuple[Callable, dict, dict], ...] = (
    (FusedInvResBlock, BLOCK, {**dict.fromkeys(("in_channels", "k", "exp_channels", "out_channels", "s"), COUNT),
                               "se": SE, "nl": ACT, "squeeze_divisor": COUNT, **BN}),
    (FusedSqueezeExcite, {"channels": 8}, {"channels": COUNT, "r": COUNT, "fused": FLAG,
                                           "squeeze_channels": (COUNT[0][1:], COUNT[1])}),
    (FusedDepthwiseConvBNAct, {"channels": 4, "k": 3}, {**dict.fromkeys(("channels", "k", "stride", "dilation"), COUNT),
                                                         "padding": PADDING, "act": ACT, **BN}),
    (FusedPointwiseConvBNAct, {"in_channels": 4, "out_channels": 3}, {"in_channels": COUNT, "out_channels": COUNT,
                                                                      "act": ACT, **BN}),
    (FusedDepthwiseSeparable, {"in_channels": 4, "out_channels": 3},
     {**dict.fromkeys(("in_channels", "out_channels", "k", "s"), COUNT), "nl": ACT, **BN}),
    (models.mobilenet_v1, {"width_mult": 0.25}, NET),
    (models.mobilenet_v2, {"width_mult": 0.25}, NET),
    (models.mobilenet_v3_small, {"width_mult": 0.25}, NET | {"squeeze_divisor": COUNT, "last_se": FLAG}),
    (models.mobilenet_v3_large, {"width_mult": 0.25}, NET),
    (models.layer_shapes, {"network": "mobilenet_v2"},
     {"network": ACT, "resolution": STRIDE, "width_mult": WIDTH}),
    (models.MobileNetV3, {"in_channels": 3, "cfgs": models.review_small_cfgs(), "num_classes": 10},
     {"in_channels": COUNT, "num_classes": CLASSES, "width_exp": WIDTH,
      "cfgs": ((*OBJECTS, models.review_small_cfgs()[:-1], models.review_small_cfgs()[-1:], [(3, 16), 3, 4]), ())}),
    (functional.depthwise_conv_bn_act, tensors(),
     {"stride": STRIDE, "dilation": STRIDE, "padding": (tuple(v for v in PADDING[0] if v != [3]), PADDING[1]),
      "act": ACT, "training": FLAG, "momentum": (EPS[0], MOMENTUM[1]), "eps": EPS}),
    (functional.pointwise_conv_bn_act, tensors("weight"),
     {"act": ACT, "training": FLAG, "momentum": (EPS[0], MOMENTUM[1]), "eps": EPS}),
)  # fmt: skip
ROWS = [(f, given, name, wrong) for f, given, table in TABLE for name, wrong in table.items()]


@pytest.mark.parametrize("f, given, name, wrong", ROWS, ids=[f"{r[0].__name__}-{r[2]}" for r in ROWS])
def test_wrong(f: Callable, given: dict, name: str, wrong: tuple[tuple, tuple]) -> None:
    fused = f.__name__ if name != "fused" else None  # a network leaves that to its blocks
    for kind, values in zip((TypeError, ValueError), wrong, strict=True):
        for value in values:
            message = raised(lambda value=value: f(**given | {name: value}), kind)
            assert message["argument"] == name and fused in (None, message["op"]), message[0]


SPEC = chain.chain_spec("example", [chain.stage_spec("pointwise", act="relu")])
BATCH = chain.chain_spec("example", [chain.stage_spec("pointwise", norm="batch")])
GATED = chain.chain_spec("example", [chain.stage_spec("none", gate=("relu", "sigmoid"))])
POOL = chain.chain_spec("example", [chain.stage_spec("pool")])
WEIGHT = torch.randn(3, 3, 1, 1)


def run_chain(**changes) -> Callable[[], object]:
    given = {"x": torch.randn(2, 3, 5, 4), "spec": SPEC, "params": [WEIGHT]}
    return lambda: functional.run_chain(**given | changes)


def run_linked(chains: object, x: object = WEIGHT.new_ones(2, 3, 5, 4), backend: object = "cpu"):
    return lambda: functional.run_linked(x, chains, backend)


def batch(**changes) -> Callable[[], object]:
    running = Running(torch.zeros(3), torch.ones(3))._replace(**changes)
    return run_chain(spec=BATCH, running=[running])


def update(running: object, statistics: object = None, values: int = 8) -> Callable[[], object]:
    found = [torch.zeros(3), torch.ones(3)] if statistics is None else statistics
    return lambda: functional.update_running(running, found, values)


def stage(**fields) -> Callable[[], object]:
    return lambda: chain.parse(chain.chain_spec("example", [chain.stage_spec(**{"conv": "pointwise"} | fields)]))


LAYERS = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
STEM = {"conv1": nn.Identity(), "blocks": nn.Identity(), "classifier": nn.Identity()}
SHAPE = models.layer_shapes("mobilenet_v1")[0]

#: (call, exception, argument)
CALLS = (
    *((run_chain(x=v), TypeError, "x") for v in (None, 1.0, [1.0], "x")),
    *((run_chain(spec=v), TypeError, "spec") for v in (None, 1, b"", ["x"])),
    *((run_chain(spec=v), ValueError, "spec") for v in ("", "x", "x: ", SPEC + "; ", SPEC + " relu", SPEC[:-2])),
    *((run_chain(params=v), TypeError, "params") for v in (None, WEIGHT, [None], ["w"], {}, (w for w in [WEIGHT]))),
    *((run_chain(params=v), ValueError, "params") for v in ([], [WEIGHT, WEIGHT])),
    *((run_chain(running=v), TypeError, "running") for v in (None, 1, Running, {}, (r for r in ()))),
    *((run_chain(residual=v), TypeError, "residual") for v in (None, 1, "yes", torch.tensor(True), [])),
    (run_chain(spec=BATCH, running=[Running(), Running()]), ValueError, "running"),
    (run_chain(spec=SPEC, running=[Running()]), ValueError, "running"),
    (run_chain(spec=BATCH, running=[None]), TypeError, "running"),
    (run_chain(spec=POOL, params=[], x=torch.randn(1, 3, 2, 2, requires_grad=True)), NotImplementedError, "spec"),
    (batch(mean=torch.zeros(4)), ValueError, "running_mean"),
    (batch(mean=torch.zeros(1)), ValueError, "running_mean"),
    (batch(var=torch.zeros(3, dtype=torch.int64)), TypeError, "running_var"),
    (batch(mean=0.0), TypeError, "running_mean"),
    (batch(var=None), TypeError, "running_var"),
    (batch(mean=None), TypeError, "running_mean"),
    (batch(mean=torch.zeros(3, device="meta")), ValueError, "running_mean"),
    (update([]), ValueError, "running"),
    (update([Running(), Running()]), ValueError, "running"),
    (update([Running(torch.zeros(4), torch.ones(4))]), ValueError, "running_mean"),
    (update([Running(torch.zeros(1).expand(3), torch.ones(3))]), ValueError, "running_mean"),
    (update([Running(torch.zeros(3), torch.ones(2))]), ValueError, "running_var"),
    *((run_linked(v), TypeError, "chains") for v in (None, 1, "x", [SPEC], [(SPEC, [WEIGHT])])),
    (run_linked([(SPEC, [WEIGHT], [])], x=None), TypeError, "x"),
    (run_linked([(SPEC, WEIGHT, [])]), TypeError, "params"),
    (run_linked([(None, [WEIGHT], [])]), TypeError, "spec"),
    (run_linked([(SPEC, [WEIGHT], [])] * 2), ValueError, "chains"),
    (run_linked([(GATED, [WEIGHT], [])] * 2), ValueError, "chains"),
    *((run_linked([(SPEC, [WEIGHT], [])], backend=v), ValueError, "name") for v in (None, 1, "gpu", [])),
    *((lambda v=v: functional.evaluates(v, False, "cpu"), TypeError, "spec") for v in (None, 1, [])),
    *((lambda v=v: functional.evaluates(SPEC, v, "cpu"), TypeError, "residual") for v in (None, 1, [])),
    *((lambda v=v: functional.evaluates(SPEC, False, v), ValueError, "name") for v in (None, 1, "gpu", [])),
    *((stage(conv=v), ValueError, "spec") for v in (None, "conv", "point wise", 1)),
    *((stage(norm=v), ValueError, "spec") for v in (None, "layer", "batch norm", "running@0")),
    *((stage(act=v), ValueError, "spec") for v in (None, "gelu", "relu relu", nn.ReLU())),
    *((stage(stride=v), ValueError, "spec") for v in ((0, 1), (1, 2**31), (1.5, 1), ("a", "b"), (None, 1))),
    *((stage(padding=v), ValueError, "spec") for v in ((-1, 0, 0, 0), (0, 0, 0, 2**63))),
    *((stage(kernel=v), ValueError, "kernel") for v in (3, None, (3,), ())),
    *((stage(padding=v), ValueError, "kernel") for v in ((1, 1), 1, None)),
    *((stage(eps=v), ValueError, "spec") for v in (None, "x", (), 1j)),
    *((stage(eps=v), ValueError, "kernel") for v in ([], {})),
    *((stage(gate=v), ValueError, "spec") for v in ("relu", ("relu", "tanh"), (1, 2))),
    (stage(gate=("relu",)), ValueError, "kernel"),
    (stage(affine="yes"), ValueError, "kernel"),
    (stage(affine=True), ValueError, "spec"),  # of no norm
    (stage(norm="running", group="all"), ValueError, "spec"),
    (stage(conv="none", norm="batch"), ValueError, "spec"),
    *((lambda v=v: chain.chain_spec(v, [""]), TypeError, "stages") for v in (None, 1, [])),
    *((lambda v=v: chain.chain_spec("x", v), TypeError, "stages") for v in (None, 1, [1], [None])),
    *((lambda v=v: chain.parse(v), TypeError, "spec") for v in (None, 1, [], b"x", {})),
    *((lambda v=v: chain.parse(v), ValueError, "spec") for v in ("", ":", "a: b", "a:\n", "\0", "a: " + "; " * 9)),
    *((lambda v=v: mbn_kernels.use_backend(v), ValueError, "name") for v in ("", "CPU", "gpu", 0, b"cpu", [])),
    *((lambda v=v: ranges.enable(v), TypeError, "wanted") for v in (None, 1, "on", [])),
    *((lambda v=v: mbn_kernels.fuse(v), TypeError, "model") for v in (None, 1, nn.ReLU, [nn.ReLU()])),
    *((lambda v=v: mbn_kernels.unfuse(v), TypeError, "model") for v in (None, 1, nn.ReLU, [nn.ReLU()])),
    *((lambda v=v: mbn_kernels.fuse(LAYERS, blocks=v), TypeError, "blocks")
      for v in (1, True, [1], [int], object(), nn.ReLU(), torch.tensor(1), np.array(1))),
    *((lambda v=v: mbn_kernels.fuse(LAYERS, blocks=v), ValueError, "blocks") for v in ("x", ["0", "9"])),
    *((lambda v=v: mbn_kernels.fuse(LAYERS, inplace=v), TypeError, "inplace") for v in (None, 1, "yes")),
    *((lambda v=v: mbn_kernels.fuse(LAYERS, verify=v), TypeError, "verify") for v in (None, 0, "no")),
    *((lambda v=v: mbn_kernels.freeze(v, WEIGHT), TypeError, "model") for v in (None, nn.ReLU(), FusedSqueezeExcite)),
    *((lambda v=v: mbn_kernels.freeze(FusedSqueezeExcite(4).eval(), v), TypeError, "example") for v in (None, [1.0])),
    (lambda: mbn_kernels.freeze(FusedSqueezeExcite(4), WEIGHT), ValueError, "model"),
    *((lambda v=v: FusedSequential(v), TypeError, "modules") for v in (None, 1, nn.ReLU, [nn.ReLU()], {"0": 1})),
    *((lambda v=v: FusedSequential(nn.ReLU(), v), TypeError, "modules") for v in (None, {"0": nn.ReLU()})),
    *((lambda n=n, v=v: models.MobileNet(**STEM | {n: v}), TypeError, n)
      for n in (*STEM, "last_conv", "se_block") for v in (1, nn.ReLU, "x")),
    *((lambda v=v: models.build_block(v), TypeError, "shape") for v in (None, BLOCK, (4, 3), replace(SHAPE, kind="x"))),
    *((lambda v=v: modules.make_divisible(v), TypeError, "v") for v in (None, "8", [])),
    *((lambda v=v: modules.make_divisible(8, v), ValueError, "divisor") for v in (0, -8, 2**63)),
)  # fmt: skip


def test_there_are_hundreds() -> None:
    assert len(CALLS) + sum(len(values) for *_, wrong in ROWS for values in wrong) >= 1000


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_call(backend: str, number: int) -> None:
    call, kind, argument = CALLS[number]
    assert raised(call, kind)["argument"] == argument


@pytest.mark.parametrize("training", (True, False))
def test_running_statistics_are_as_before(backend: str, training: bool) -> None:
    """The second batch norm's cannot be updated: neither are the first one's, nor is a batch counted."""
    block = FusedDepthwiseSeparable(4, 6)
    good, block.layers[1][1].running_var = block.layers[1][1].running_var, torch.ones(7)
    state = {key: t.clone() for key, t in block.state_dict().items()}
    x = torch.randn(2, 4, 6, 6, requires_grad=training)
    with torch.set_grad_enabled(training):
        assert raised(lambda: block(x), ValueError)["argument"] == "running_var"
    assert all(torch.equal(t, state[key]) for key, t in block.state_dict().items())
    block.layers[1][1].running_var = good
    block(x)
    assert block.layers[0][1].num_batches_tracked == block.layers[1][1].num_batches_tracked == 1


INTEGERS = (np.int64, np.int32, np.uint8, torch.tensor, np.array)
NUMBERS = (np.float32, np.float64, torch.tensor, np.array)


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_integers_of_other_libraries(backend: str, kind: Callable) -> None:
    """As stock takes them, with the same results."""
    given = tensors()
    plain = functional.depthwise_conv_bn_act(**given, stride=2, padding=(1, 2), dilation=1)
    for stride in (kind(2), (kind(2), kind(2)), [kind(2)]):
        options = {"stride": stride, "padding": (kind(1), kind(2)), "dilation": [kind(1), kind(1)]}
        assert torch.equal(functional.depthwise_conv_bn_act(**given, **options), plain)
    assert torch.equal(functional.depthwise_conv_bn_act(**given, stride=2, padding=torch.Size((1, 2))), plain)
    block = FusedInvResBlock(**{name: kind(v) if type(v) is int else v for name, v in BLOCK.items()})
    twin = FusedInvResBlock(**BLOCK)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), twin(x)) and block.skip_connect
    assert all(type(v) is int for conv in (block.layers[1][0],) for v in (*conv.stride, *conv.padding, conv.groups))


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.__name__)
def test_numbers_of_other_libraries(backend: str, kind: Callable) -> None:
    given = tensors()
    eps, momentum = kind(0.25), kind(0.5)
    found = functional.depthwise_conv_bn_act(**given, training=True, eps=eps, momentum=momentum)
    twin = tensors() | {name: given[name] for name in ("x", "weight")}
    assert torch.equal(found, functional.depthwise_conv_bn_act(**twin, training=True, eps=0.25, momentum=0.5))
    assert torch.equal(given["running_mean"], twin["running_mean"])
    block = FusedPointwiseConvBNAct(4, 4, bn_eps=eps, bn_momentum=momentum)
    assert (block.get_submodule("1").eps, block.get_submodule("1").momentum) == (0.25, 0.5)
    assert len(models.layer_shapes("mobilenet_v2", width_mult=kind(0.5))) == 17


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def refused(call: Callable[[], object]) -> int:
    """Without pytest.raises, whose error would keep the call's tensors until the next garbage collection."""
    try:
        call()
    except ValueError:
        return 1
    return 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc/self/statm")
def test_failing_calls_keep_no_memory(needs_cpu: None) -> None:
    """A thousand of them: x is 1 MB, so that what each left behind would show."""
    block = FusedInvResBlock(16, 3, 64, 16, True, "hs", 1)
    x, wrong = torch.randn(1, 16, 128, 128), torch.randn(1, 17, 128, 128)
    last = block.layers[2].excitation[2]
    good, short = last.bias, nn.Parameter(torch.zeros(3))  # which is found late

    def fail() -> int:
        count = 0
        for training in (True, False):
            block.train(training)
            count += refused(lambda: block(wrong))
            last.bias = short
            count += refused(lambda: block(x))
            last.bias = good
        return count + refused(lambda: functional.run_chain(x, SPEC, [WEIGHT]))

    with mbn_kernels.use_backend("cpu"), torch.no_grad():
        assert sum(fail() for _ in range(20)) == 100
        before, kept = resident(), torch.ops.mbn.cpu_cached_bytes()
        assert sum(fail() for _ in range(200)) == 1000
        assert torch.ops.mbn.cpu_cached_bytes() == kept
        assert resident() - before < 8 * x.nbytes
