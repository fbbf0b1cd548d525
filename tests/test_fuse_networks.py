"""fuse() on the networks of torchvision and timm: what they compute and how they train stays what it was."""

from __future__ import annotations

import copy

import peers
import pytest
import stock
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbn_kernels

STEPS = 5
#: Of float32, beside twice stock's own error: where stock happens to be nearly exact.
LEAST = 1e-6
DRAWS = 6


@pytest.fixture(autouse=True)
def exact_hardsigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's derivative of hard-sigmoid has a float32's 1/6 in it in float64, too."""
    own = F.hardsigmoid

    def exact(x: Tensor, inplace: bool = False) -> Tensor:
        return (x + 3).clamp(0, 6) / 6 if x.dtype == torch.float64 else own(x)

    monkeypatch.setattr(F, "hardsigmoid", exact)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 3, 33, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def flat(tensors: list[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


def passes(module: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step of a copy; what is random is the same for all."""
    module = copy.deepcopy(module).train(training)
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    stock.pull(out)
    gradients = [leaf.grad, *(p.grad for p in module.parameters())]
    floating = [b for b in module.buffers() if b.is_floating_point()]
    return {"out": flat([out]), "gradients": flat(gradients), "buffers": flat(floating)}


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def trained(module: nn.Module, noise: float = 0.0) -> Tensor:
    """Parameters and buffers after five steps of SGD with momentum, minus what they were; dropped paths and all."""
    before = flat(list(module.state_dict().values()))
    optimizer = torch.optim.SGD(module.parameters(), 1e-4, momentum=0.9)
    module.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        x = (images() + 0.1 * step) * (1 + noise * torch.randn(images().shape, dtype=torch.float64))
        torch.manual_seed(step)
        F.cross_entropy(module(x), torch.tensor([1, 4, 7])).backward()
        optimizer.step()
    return flat(list(module.state_dict().values())) - before


def check_float32(plain: nn.Module, fused: nn.Module, x: Tensor, exact: dict[str, Tensor], training: bool) -> None:
    """An error of at most twice stock's. Where rounding moves a number across an activation's kink, a gradient jumps,
    stock's as well as ours: of a few inputs that differ by rounding, our smallest error is held to stock's largest.
    """
    plain32, fused32 = copy.deepcopy(plain).float(), copy.deepcopy(fused).float()
    errors: list[dict[str, float]] = [{}, {}]
    for draw in range(DRAWS):
        exact = passes(plain, x.double(), training) if draw else exact
        for found, module, choose in zip(errors, (plain32, fused32), (max, min), strict=True):
            got = passes(module, x, training)
            found.update({k: choose(error(got[k], v), found.get(k, error(got[k], v))) for k, v in exact.items()})
        if all(e <= 2 * errors[0][k] + LEAST for k, e in errors[1].items()):
            return
        x = x * (1 + (draw + 1) * torch.finfo(x.dtype).eps * (torch.rand_like(x) - 0.5))
    raise AssertionError(f"errors of stock {errors[0]}, of the fused model {errors[1]}")


@pytest.mark.parametrize("name", peers.NETWORKS)
def test_network(name: str) -> None:
    plain = stock.randomize(peers.network(name))
    model = copy.deepcopy(plain)
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        before = model.eval()(images())
    report = mbn_kernels.fuse(model)
    assert len(report.fused) >= 8, report
    assert not [row for row in report.skipped if "not what it was" in row.what or "compared" in row.what], report
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(t is kept[k] for k, t in (*model.named_parameters(), *model.named_buffers()))
    with torch.no_grad():
        assert error(flat([model.eval()(images())]), flat([before])) < 1e-12
    for training in (True, False):
        x = images(torch.float32)
        expected, got = passes(plain, x.double(), training), passes(model, x.double(), training)
        assert all(error(got[k], v) < 1e-10 for k, v in expected.items()), (training, report)
        check_float32(plain, model, x, expected, training)
    mbn_kernels.unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [list(m.__dict__) for m in model.modules()] == [list(m.__dict__) for m in plain.modules()]
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), before)


@pytest.mark.parametrize("name", peers.FAMILIES)
def test_training_steps(name: str) -> None:
    """Five steps end as near to stock's as stock's do from inputs that differ in the 13th digit: where a ReLU's input
    is all but 0, or a batch norm has a handful of values, that is all that can be asked.
    """
    plain = peers.network(name)
    model = copy.deepcopy(plain)
    mbn_kernels.fuse(model, verify=False)
    expected = trained(copy.deepcopy(plain))
    assert expected.norm() > 1e-3
    found, own = error(trained(model), expected), 0.0
    for _ in range(DRAWS):
        own = max(own, error(trained(copy.deepcopy(plain), 1e-13), expected))
        if found <= own + 1e-9:
            return
    raise AssertionError(f"{found:.1e} from stock's; stock is {own:.1e} from itself")


# Detection and segmentation -------------------------------------------------------------------------------------------


def segmentation(name: str) -> nn.Module:
    models = peers.import_torchvision().models.segmentation
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=3)


def detection() -> nn.Module:
    models = peers.import_torchvision().models.detection
    return models.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).backbone


TASKS = {
    "lraspp": (lambda: segmentation("lraspp_mobilenet_v3_large"), 15),
    "deeplab": (lambda: segmentation("deeplabv3_mobilenet_v3_large"), 15),
    "ssdlite": (detection, 20),
}


@pytest.mark.parametrize("task", TASKS)
def test_detection_and_segmentation(task: str) -> None:
    """Dilated blocks, features in the middle, blocks cut in two."""
    make, least = TASKS[task]
    plain = stock.randomize(make().double())
    for m in plain.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # what is drawn goes by a map's memory, and a chain's output is channels-last
    model = copy.deepcopy(plain)
    report = mbn_kernels.fuse(model)
    assert len(report.fused) >= least, report
    x = torch.randn(2, 3, 65, 96, dtype=torch.float64)
    for training in (True, False):
        results = []
        for m in (plain, model):
            m.train(training).zero_grad()
            torch.manual_seed(0)
            out = m(x)
            outs = list(out.values())
            sum(o.square().mean() for o in outs).backward()
            results.append([*outs, *(p.grad for p in m.parameters() if p.grad is not None), *m.buffers()])
        assert list(out) and len(results[0]) == len(results[1])
        stock.assert_same(results[1], results[0], 1e-7)


def test_features_only() -> None:
    timm = pytest.importorskip("timm")
    peers.import_torchvision()
    plain = timm.create_model("mobilenetv3_small_050", features_only=True).double()
    model = copy.deepcopy(plain)
    assert len(mbn_kernels.fuse(model).fused) >= 10
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    stock.assert_same(model.train()(x), plain.train()(x), 1e-9)


def test_extracted_features() -> None:
    """torchvision's extractor traces: the nodes of a fused model are those of the model."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain = peers.network("torchvision mobilenet_v3_small")
    model = copy.deepcopy(plain)
    mbn_kernels.fuse(model, verify=False)
    nodes = {"features.4.block.1": "middle", "features.12": "last"}
    found = [
        feature_extraction.create_feature_extractor(m.eval(), nodes)(torch.randn(2, 3, 64, 48).double())
        for m in (plain, model)
    ]
    assert list(found[0]) == list(found[1]) == ["middle", "last"]
