"""A fused model stays an ordinary one wherever it is copied, hooked, converted, compiled or exported."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import peers
import pytest
import stock
import torch
from fusible import Separable, both, images, layers, net
from stock import assert_same, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mbn_kernels
from mbn_kernels import FusedInvResBlock, fuse, unfuse


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_file}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", (net, lambda: stock.randomize(nn.Sequential(*layers()))), ids=("blocks", "layers"))
def test_copies(make: Callable[[], nn.Module], how: str) -> None:
    plain, model = both(make)
    step(model, images()), step(plain, images())
    again = COPIES[how](model)
    with torch.no_grad():  # a copy's own weights
        for p in (*again.parameters(), *plain.parameters()):
            p.mul_(1.5)
    assert_same(step(again, images()), step(plain, images()))
    assert [type(m) for m in unfuse(again).modules()] == [type(m) for m in plain.modules()]


def test_hooks_on_a_block_and_features() -> None:
    plain, model = both()
    for m in (plain, model):
        m.blocks[1].register_forward_hook(lambda m, a, out: out * 2)
        m.blocks[0].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    assert_same(step(model, images()), step(plain, images()))
    with torch.no_grad():
        assert_same([model.eval()(images())], [plain.eval()(images())])


def test_a_hook_within_a_block_later() -> None:
    plain, model = both()
    seen: list[Tensor] = []
    handle = model.blocks[0].deep.register_forward_hook(lambda m, a, out: seen.append(out))
    assert_same(step(model, images()), step(plain, images()))
    assert len(seen) == 1 and model.blocks[0].why_not_fused() == "a hook on a child"
    handle.remove()
    assert model.blocks[0].why_not_fused() is None


def test_drops_are_random_as_stock_is() -> None:
    plain, model = both(lambda: net(Separable(p=0.5), Separable(p=0.3, stride=2)))
    for seed in range(3):
        results = []
        for m in (plain, model):
            torch.manual_seed(seed)
            results.append(step(m, images()))
        assert_same(*results)


def test_frozen_norms() -> None:
    """In evaluation mode within a training model, torchvision's own, those without statistics of their own."""
    frozen = peers.import_torchvision().ops.FrozenBatchNorm2d

    def change(module: nn.Module) -> nn.Module:
        module.blocks[0].norm.eval()
        module.blocks[1].norm = frozen(24)
        module.blocks[1].norm.weight.copy_(torch.linspace(0.5, 2, 24))
        module.blocks[2].norm = nn.BatchNorm2d(24, track_running_stats=False)
        module.blocks[2].deep[1].momentum = None
        module.blocks[2].narrow[1] = nn.BatchNorm2d(8, affine=False)
        return module

    torch.manual_seed(0)
    plain = change(net())
    model = copy.deepcopy(plain)
    assert len(fuse(model).fused) == 3
    for _ in range(2):
        assert_same(step(model, images()), step(plain, images()))
    assert_same(step(model.eval(), images()), step(plain.eval(), images()))


def test_half_runs_as_stock() -> None:
    """The CPU kernels have no float16; stock has."""
    plain, model = both()
    with pytest.warns(UserWarning, match="run unfused: x: expected float32, float64 or bfloat16 on the CPU, got"):
        mbn_kernels.fusing.adopted._warned.clear()
        got = model.half().eval()(images().half())
    assert torch.equal(got, plain.half().eval()(images().half()))
    with torch.no_grad():
        assert torch.equal(model(images().half()), plain(images().half()))


def test_bfloat16_and_autocast() -> None:
    plain, model = both()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(images()), plain(images())
        assert out.dtype == expected.dtype == torch.bfloat16
        assert_same([out.float()], [expected.float()], 0.05)
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert_same([model.bfloat16().eval()(images().bfloat16()).float()], [plain.eval()(images())], 0.05)


def test_changed_parameters_are_seen() -> None:
    """Evaluation on the CPU keeps weights packed."""
    plain, model = both()
    for m in (plain, model):
        m.eval()
    with torch.no_grad():
        for _ in range(2):
            assert_same([model(images())], [plain(images())])
            for p in (*plain.parameters(), *model.parameters()):
                p.mul_(1.1)
            for m in (*plain.modules(), *model.modules()):
                if isinstance(m, nn.BatchNorm2d):
                    m.running_var.mul_(1.3)


def test_checkpoint_functional_call_and_average() -> None:
    plain, model = both()
    results = []
    for m in (plain, model):
        m.zero_grad()
        out = m.head(checkpoint(m.blocks, m.stem(images()), use_reentrant=False).mean((2, 3)))
        out.sum().backward()
        average = torch.optim.swa_utils.AveragedModel(m.eval())
        average.update_parameters(m)
        changed = {name: p * 1.1 for name, p in m.named_parameters()}
        called = torch.func.functional_call(m, changed, (images(),))
        gradients = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([out, *gradients, average(images()), called, *m.buffers()])
    assert_same(*results)


def test_per_sample_gradients() -> None:
    """torch.func's transforms know no chain; the model's own forward runs under them."""
    plain, model = both()
    found = []
    for m in (plain.eval(), model.eval()):
        parameters = {k: p.detach() for k, p in m.named_parameters()}

        def loss(parameters: dict, x: Tensor, m: nn.Module = m) -> Tensor:
            return torch.func.functional_call(m, parameters, (x[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images())
        found.append([each["blocks.0.wide.weight"], each["blocks.1.up.weight"]])
    assert_same(*found)


def test_threads() -> None:
    plain, model = both()
    expected, found, x = plain.eval()(images()), [], images()
    model.eval()

    def call() -> None:
        with torch.no_grad():
            found.extend(model(x) for _ in range(8))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 32
    for out in found:
        assert_same([out], [expected])


@pytest.mark.parametrize("training", (True, False))
def test_compile(training: bool) -> None:
    plain, model = both()
    compiled = torch.compile(model.train(training), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        leaf, other = images(n).requires_grad_(), images(n).requires_grad_()
        out, expected = compiled(leaf), plain.train(training)(other)
        assert_same([out, *torch.autograd.grad(out.square().sum(), leaf)],
                    [expected, *torch.autograd.grad(expected.square().sum(), other)], 1e-4)  # fmt: skip
    assert_same(list(model.buffers()), list(plain.buffers()))


def test_export() -> None:
    plain, model = both()
    images_of = torch.export.Dim("images", min=2, max=64)
    exported = torch.export.export(model.eval(), (images(),), dynamic_shapes=({0: images_of},))
    assert [n for n in exported.graph.nodes if "mbn.chain" in str(n.target)]
    with torch.no_grad():
        assert_same([exported.module()(images(5))], [plain.eval()(images(5))])


def test_trace_and_fx() -> None:
    """They record the model's own forward, which runs where this package is not."""
    plain, model = both()
    traced = torch.jit.trace(model.eval(), images())
    assert "mbn" not in str(traced.inlined_graph) and torch.equal(traced(images()), plain.eval()(images()))
    blocks = torch.fx.symbolic_trace(model.blocks)
    assert "Conv2d" in str([type(m) for m in blocks.modules()])
    assert torch.equal(blocks(model.stem(images())), plain.blocks(plain.stem(images())))


@pytest.mark.parametrize("dynamo", (True, False))
@pytest.mark.filterwarnings("ignore")
def test_onnx(dynamo: bool, tmp_path) -> None:
    """A fused model as it is, and one of this package: ONNX gets ordinary operators, and onnxruntime agrees."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fused = both()[1]
    fused.blocks.append(stock.randomize(FusedInvResBlock(8, 3, 16, 8, True, "hs", 1)))
    file = tmp_path / "model.onnx"
    torch.onnx.export(fused.eval(), (images(),), file, dynamo=dynamo)
    session = onnxruntime.InferenceSession(file)
    (out,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    with torch.no_grad():
        assert_same([torch.from_numpy(out)], [fused(images())])


@pytest.mark.parametrize("make", (net, lambda: stock.randomize(nn.Sequential(*layers()))), ids=("blocks", "layers"))
def test_replicas_of_data_parallel(make: Callable[[], nn.Module]) -> None:
    plain, model = both(make)
    replicas = [stock.replica_of(model) for _ in range(2)]
    for replica in replicas:
        out = replica(images())
        stock.pull(out)
        assert_same([out.detach()], [plain(images()).detach()])
    stock.pull(plain(images()))
    got, expected = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, plain))
    assert_same(got, [2 * g for g in expected])


def test_gradients_lie_as_parameters_do() -> None:
    """To the very strides of dimensions of size 1: DDP compares them with its buckets'."""
    model = both()[1].to(memory_format=torch.channels_last)
    step(model, images())
    assert [p.grad.stride() for p in model.parameters() if p.grad is not None] == [
        p.stride() for p in model.parameters() if p.grad is not None
    ]
