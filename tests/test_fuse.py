"""fuse() and unfuse(): what is found, what is left alone and why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import stock
import torch
import torch.nn.functional as F
from fusible import InPlaceBlock, InPlaceGate, Net, Separable, both, images, layers, net
from stock import assert_same, step
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mbn_kernels
from mbn_kernels import FusedInvResBlock, fuse, unfuse


def why_skipped(module: nn.Module) -> str:
    """The one reason for all of a module's convolutions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fuse(module)
    assert not report.fused
    (reason,) = {row.what for row in report.skipped}
    return reason


# What is found --------------------------------------------------------------------------------------------------------


def test_report() -> None:
    model = net()
    report = fuse(model)
    assert report.model is model
    assert [row.module for row in report.fused] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {row.kind for row in report.fused} == {"Separable"}
    stages = "pointwise 24 relu6 > depthwise 3x3 24 silu > squeeze-excite > pointwise 8 > drop + input"
    assert report.fused[0].what == stages
    assert report.fused[1].what == stages.replace("3x3", "3x3/2").replace(" + input", "")
    assert [(row.module, row.what) for row in report.skipped] == [
        ("stem.0", "a convolution that is neither pointwise nor depthwise")
    ]
    lines = str(report).splitlines()
    assert lines[0] == "mbn_kernels.fuse: 3 modules fused, 1 skipped" and len(lines) == 7
    assert lines[2].split(None, 2) == ["blocks.0", "Separable", stages]
    assert repr(report) == "<Report: 3 modules fused, 1 skipped>"


def test_same_results(backend: str) -> None:
    plain, model = both()
    for training in (True, False):
        assert_same(step(model.train(training), images()), step(plain.train(training), images()))
    with torch.no_grad():
        assert_same([model(images())], [plain(images())])


def test_what_writes_into_its_input(backend: str) -> None:
    """Blocks, and a squeeze-excite alone, which then leaves its input as it was."""
    plain, model = both(lambda: net(InPlaceBlock(), InPlaceGate(8), InPlaceBlock()))
    assert [m.why_not_fused() for m in model.blocks] == [None, None, None]
    for training in (True, False):
        assert_same(step(model.train(training), images()), step(plain.train(training), images()))
    for m in (plain, model):
        m.blocks[0].layers[1][2] = nn.SiLU()
    assert_same(step(model, images()), step(plain, images()))


def test_it_does_run_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both()
    ran: list[str] = []
    run = mbn_kernels.modules.fused.run_chain
    monkeypatch.setattr(
        mbn_kernels.modules.fused, "run_chain", lambda x, spec, *a: ran.append(spec) or run(x, spec, *a)
    )
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    model.stem = nn.Identity()
    model(torch.randn(2, 8, 7, 7))
    assert len(ran) == 3 and ran[0].startswith("Separable: pointwise")


def test_class_attributes_and_tensors_stay() -> None:
    model = net()
    block, before = model.blocks[0], dict(model.named_parameters()) | dict(model.named_buffers())
    fuse(model)
    assert isinstance(block, Separable) and type(block).__name__ == "Separable" and block.out_channels == 8
    assert type(block).__module__ == "fusible" and "Separable(" in repr(block) and "fused" in repr(block)
    assert all(before[name] is t for name, t in (*model.named_parameters(), *model.named_buffers()))
    assert block.why_not_fused() is None


def test_unfuse_restores() -> None:
    plain, model = both()
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [list(m.__dict__) for m in model.modules()] == [list(m.__dict__) for m in plain.modules()]
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))
    assert unfuse(FusedInvResBlock(*stock.SIGNATURE)).why_not_fused() is None


def test_a_copy() -> None:
    model = net()
    report = fuse(model, inplace=False)
    assert type(model.blocks[0]) is Separable and report.model is not model
    assert report.model.blocks[0].why_not_fused() is None
    assert report.model.head.weight is not model.head.weight


def test_only_some_blocks() -> None:
    assert [row.module for row in fuse(net(), blocks=["blocks.1"]).fused] == ["blocks.1"]
    assert len(fuse(net(), blocks=[Separable]).fused) == 3
    report = fuse(net(Separable(), FusedInvResBlock(8, 3, 16, 8, True, "hs", 1)), blocks=Separable)
    assert [row.module for row in report.fused] == ["blocks.0"]
    assert ("stem.0", "not among the blocks asked for") in [(row.module, row.what) for row in report.skipped]
    assert ("blocks.1", "fused already") in [(row.module, row.what) for row in report.skipped]


def test_fusing_twice_changes_nothing() -> None:
    _, model = both()
    classes = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="no module was fused"):
        report = fuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert [row.what for row in report.skipped if row.module == "blocks.0"] == ["fused already"]


def test_fusing_what_was_left_out() -> None:
    _, model = both()
    unfuse(model)
    fuse(model, blocks=["blocks.0"])
    assert [row.module for row in fuse(model).fused] == ["blocks.1", "blocks.2"]
    assert_same(step(model, images()), step(net(), images()))


def test_layers_of_a_sequential() -> None:
    plain, model = both(lambda: stock.randomize(nn.Sequential(*layers())))
    assert [row.module for row in fuse(copy.deepcopy(plain)).fused] == ["[3:8]", "[10:11]"]
    assert_same(step(model, images()), step(plain, images()))
    with torch.no_grad():
        assert_same([model.eval()(images())], [plain.eval()(images())])
        assert_same([model[:9](images()), model[3:](model[:3](images()))], [plain[:9](images()), plain(images())])
    assert list(model.state_dict()) == list(plain.state_dict()) and len(list(model.modules())) == 13
    unfuse(model)
    assert type(model) is nn.Sequential and list(model.__dict__) == list(plain.__dict__)


@pytest.mark.parametrize("change", ("replace", "append", "delete", "convert"))
def test_a_changed_sequential(change: str) -> None:
    plain, model = both(lambda: stock.randomize(nn.Sequential(*layers())))
    for m in (plain, model):
        if change == "replace":
            m[4] = stock.randomize(nn.BatchNorm2d(8, eps=0.5))
        elif change == "append":
            m.append(nn.Softplus())
        elif change == "delete":
            del m[5]
    if change == "convert":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert_same(step(model, images()), step(plain, images()))


def test_a_changed_block() -> None:
    """Layers may be exchanged; what a trace would have to see anew runs as its own forward has it."""
    plain, model = both()
    for m in (plain, model):
        m.blocks[0].deep[2] = nn.ReLU()
        m.blocks[1].deep.append(nn.Tanh())
        m.blocks[2].narrow[1] = nn.Identity()
    assert_same(step(model, images()), step(plain, images()))
    assert model.blocks[0].why_not_fused() is None
    assert model.blocks[1].why_not_fused() == "its children are no longer those that fuse() read"
    assert model.blocks[2].why_not_fused() == "Identity in the place of BatchNorm2d"
    assert "not fused: Identity" in repr(model)


# What is left alone ---------------------------------------------------------------------------------------------------


class Shifted(Separable):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Fickle(Separable):
    """What a trace sees depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.narrow(self.deep(F.relu6(self.norm(self.wide(x)))))


class Branching(Separable):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Multiplied(Separable):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.narrow(self.deep(self.norm(self.wide(x))))


class Twice(Separable):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class Unready(Separable):
    def __init__(self) -> None:
        super().__init__()
        self.units = 3


def with_biased() -> nn.Module:
    block = Separable()
    block.wide = nn.Conv2d(8, 24, 1)
    return block


def with_norm() -> nn.Module:
    block = Separable()
    block.norm = nn.GroupNorm(2, 24)
    return block


def with_act() -> nn.Module:
    block = Separable()
    block.deep[2] = nn.Mish()
    return block


def with_hook() -> nn.Module:
    block = Separable()
    block.deep[1].register_forward_hook(lambda m, a, out: None)
    return block


def with_forward() -> nn.Module:
    block = Separable()
    block.forward = block.narrow.forward
    return block


def with_group() -> nn.Module:
    block = Separable()
    block.deep[0] = nn.Conv2d(24, 24, 3, padding=1, groups=4, bias=False)
    return block


def without_norm() -> nn.Module:
    block = Separable()
    block.narrow = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False))
    return block


def parametrized() -> nn.Module:
    block = Separable()
    parametrize.register_parametrization(block.wide, "weight", nn.Identity())
    return block


LEFT = {
    Shifted: "add: an operation that no stage has",
    Fickle: "not what it was in evaluation: the output differs",
    Branching: "its forward cannot be traced",
    Multiplied: "a product that is no squeeze-excite",
    Twice: "its forward takes more than one argument",
    Unready: "an attribute named 'units'",
    with_biased: "a convolution with a bias",
    with_norm: "GroupNorm in the place of BatchNorm2d",
    with_act: "activation Mish",
    with_hook: "a hook on an inner module, deep.1",
    with_forward: "a forward of its own",
    with_group: "neither pointwise nor depthwise",
    without_norm: "a convolution without batch norm",
}


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:.*no module was fused")
def test_what_is_left_alone(make: Callable[[], nn.Module]) -> None:
    """The block as a whole: what is a chain within it may be fused."""
    block = stock.randomize(make())
    plain, own = copy.deepcopy(block), type(block)
    report = fuse(block)
    assert type(block) is own and "(the model)" not in [row.module for row in report.fused]
    assert any(LEFT[make] in row.what for row in report.skipped), report
    if make is not Twice:
        x = torch.randn(3, 24 if make is with_forward else 8, 7, 6)
        assert_same(step(block, x), step(plain, x), 1e-4)  # a bias before a norm: its gradient is rounding


def test_without_verification_a_trace_is_trusted() -> None:
    assert fuse(Fickle(), verify=False).fused
    assert why_skipped(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))) == (
        "a convolution that is neither pointwise nor depthwise"
    )


def test_quantized() -> None:
    qat = torch.ao.nn.qat.Conv2d(4, 4, 1, bias=False, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86"))
    assert why_skipped(nn.Sequential(qat, nn.BatchNorm2d(4))) == "quantized"


def test_parametrized() -> None:
    report = fuse(nn.Sequential(parametrized(), Separable()))
    assert "a ParametrizedConv2d, which no chain knows" in [row.what for row in report.skipped]
    assert [row.module for row in report.fused if row.what.endswith("input")] == ["1"]


def test_a_script_module() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)))
    assert why_skipped(nn.Sequential(scripted)) == "a ScriptModule"


def test_verification_changes_nothing() -> None:
    """Not the module, not its hooks, not the random state; on any device."""
    model, seen = net(), []
    model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(1))
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert len(fuse(model).fused) == 3 and not seen
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(images())
    assert seen == [1]
    with torch.device("meta"):
        model = Net()
    assert len(fuse(model).fused) == 3


BAD = {
    "fuse: model: expected an nn.Module, got int": lambda: fuse(3),
    "unfuse: model: expected an nn.Module, got str": lambda: unfuse("model"),
    "fuse: blocks: expected classes of modules, or names, got 3": lambda: fuse(Net(), blocks=[3]),
    "fuse: blocks: expected classes of modules, or names, got <class 'int'>": lambda: fuse(Net(), blocks=[int]),
    "fuse: blocks: expected names of the model's modules, got 'blocks.7'": lambda: fuse(Net(), blocks=["blocks.7"]),
    "fuse: inplace: expected True or False, got 1": lambda: fuse(Net(), inplace=1),
    "fuse: verify: expected True or False, got None": lambda: fuse(Net(), verify=None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError if "'blocks.7'" in message else TypeError) as found:
        BAD[message]()
    assert str(found.value) == message


def norm_without_bias() -> nn.Module:
    """As ``BatchNorm2d(24, bias=False)``, which not every PyTorch has."""
    norm = nn.BatchNorm2d(24)
    norm.bias = None
    return norm


@pytest.mark.parametrize("norm", (norm_without_bias, lambda: nn.InstanceNorm2d(24)), ids=("no bias", "instance"))
def test_other_norms(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    block = Separable()
    block.norm = norm()
    plain = copy.deepcopy(block)
    fuse(block)
    assert type(block) is Separable and type(block.narrow) is not nn.Sequential
    x = torch.randn(3, 8, 7, 6)
    assert_same(step(block, x), step(plain, x))
