"""The family's blocks written again in stock PyTorch, with the keys and signatures that the fused ones promise.

Nothing of mbn_kernels is used in them, so that the oracle of a block is not the block's own plain path.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from oracle import KINKS, Tensors, exact_hardsigmoid, gap_shift, hold
from torch import Tensor, nn

from mbn_kernels import FusedInvResBlock

ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hs": nn.Hardswish, "hardswish": nn.Hardswish, "silu": nn.SiLU}


class ExactHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return exact_hardsigmoid(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        layers = nn.Linear(channels, squeeze), nn.ReLU(), nn.Linear(squeeze, channels), ExactHardsigmoid()
        self.excitation = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(x.mean((2, 3)))[:, :, None, None]


def conv_bn(c_in: int, c_out: int, k: int, s: int, groups: int, act: nn.Module | None, bn: dict) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, k, s, (k - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out, **bn), *([act] if act else []))


class InvResBlock(nn.Module):
    """The review's block; V2's without squeeze-excite and with relu6."""

    def __init__(self, in_channels, k, exp_channels, out_channels, se, nl, s, *, squeeze=None, bn=None) -> None:
        super().__init__()
        bn = bn or {"momentum": 0.99}
        self.skip_connect = s == 1 and in_channels == out_channels
        layers: list[nn.Module] = []
        if in_channels != exp_channels:
            layers.append(conv_bn(in_channels, exp_channels, 1, 1, 1, ACTS[nl](), bn))
        layers.append(conv_bn(exp_channels, exp_channels, k, s, exp_channels, ACTS[nl](), bn))
        if se:
            layers.append(SqueezeExcite(exp_channels, squeeze or exp_channels // 4))
        layers.append(conv_bn(exp_channels, out_channels, 1, 1, 1, None, bn))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip_connect else self.layers(x)


class Separable(nn.Module):
    """V1's block."""

    def __init__(self, in_channels, out_channels, k=3, s=1, *, nl="relu") -> None:
        super().__init__()
        depthwise = conv_bn(in_channels, in_channels, k, s, in_channels, ACTS[nl](), {})
        self.layers = nn.Sequential(depthwise, conv_bn(in_channels, out_channels, 1, 1, 1, ACTS[nl](), {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and buffers of unit scale, none of them at its initial value; weights of batch norm of either sign."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                fan = m.weight[0].numel()
                m.weight.copy_(torch.randn(m.weight.shape, generator=g) / fan**0.5)
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=g))
            elif isinstance(m, nn.BatchNorm2d):
                if m.affine:
                    sign = torch.randn(m.weight.shape, generator=g).sign()
                    m.weight.copy_(sign * (0.5 + torch.rand(m.weight.shape, generator=g)))
                    m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                if m.track_running_stats:
                    m.running_mean.copy_(0.3 * torch.randn(m.running_mean.shape, generator=g))
                    m.running_var.copy_(0.5 + torch.randn(m.running_var.shape, generator=g).abs())
    return module


_NAMES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", ExactHardsigmoid: "hardsigmoid"}


def avoid_kinks(module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """As oracle.avoid_kinks: shifts the bias in front of each activation that has kinks; ``module`` is in float64."""

    def shift(layer: nn.Module, act: str) -> Callable:
        def hook(_module, _inputs, n: Tensor) -> Tensor:
            by = gap_shift(n.transpose(0, 1).flatten(1).T, KINKS[act])
            moved = (layer.bias + by).to(dtype).double()
            by = moved - layer.bias
            layer.bias.copy_(moved)
            return n + (by[:, None, None] if n.dim() == 4 else by)

        return hook

    handles = []
    for parent in module.modules():
        children = list(parent.children()) if isinstance(parent, nn.Sequential) else []
        for layer, following in itertools.pairwise(children):
            if getattr(layer, "bias", None) is not None and type(following) in _NAMES:
                handles.append(layer.register_forward_hook(shift(layer, _NAMES[type(following)])))
    kept = {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "num_batches" in k}
    with torch.no_grad():
        module(x)
    module.load_state_dict(kept, strict=False)
    for h in handles:
        h.remove()


def prepare_module(stock: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> Tensors:
    """A random state for a stock module away from kinks, with input and gradient, all in ``dtype``."""
    stock = randomize(copy.deepcopy(stock)).to(dtype).double().train(training)
    g = torch.Generator().manual_seed(1)
    x = (0.3 + torch.randn(shape, generator=g)).to(dtype).double()
    avoid_kinks(stock, x, dtype)
    with torch.no_grad():
        out = copy.deepcopy(stock)(x).shape
    state = {k: v for k, v in stock.state_dict().items() if v.is_floating_point()}
    return Tensors(x, [state], torch.randn(out, generator=g).to(dtype).double()).map(lambda v: v.to(dtype))


def run_module(module: nn.Module, t: Tensors) -> dict[str, Tensor]:
    """Output, gradients and buffers of a copy of ``module`` that holds the state ``t.stages[0]``."""
    module = copy.deepcopy(module).to(t.x.dtype)
    missing, unexpected = module.load_state_dict(t.stages[0], strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    module.requires_grad_(True).train(module.training)
    x = t.x.detach().requires_grad_()
    out = module(x)
    out.backward(t.dout)
    found = {"out": out.detach(), "grad x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    found |= {name: b for name, b in module.named_buffers() if "running" in name}
    if not module.training:
        with torch.no_grad():
            found["out without gradients"] = module(x)
    return found


def compare_under_autocast(
    fused: nn.Module,
    twin: nn.Module,
    shape: tuple[int, ...],
    given: torch.dtype,
    dtype: torch.dtype,
    training: bool,
    device: str = "cpu",
) -> None:
    """Dtypes of outputs and gradients are stock's, values by the tolerance of autocast's ``dtype``; x is ``given``."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    randomize(twin).to(dtype).double().train(training)
    avoid_kinks(twin, x.double(), dtype)
    fused.load_state_dict(twin.float().state_dict())
    x = x.to(device, given)
    results = []
    for module, kind in ((fused, given), (twin, given), (twin, torch.float64)):
        wide = kind == torch.float64
        module = copy.deepcopy(module).to(device, kind if wide else torch.float32).train(training)
        leaf = x.detach().to(kind).requires_grad_()
        with torch.autocast(device, dtype=dtype, enabled=not wide):
            out = module(leaf)
        g = torch.linspace(-1, 1, out.numel(), device=device).to(dtype)
        out.backward(g.view(out.shape).to(out.dtype))
        found = {f"grad {k}": p.grad for k, p in module.named_parameters()} | {"grad x": leaf.grad}
        found |= {k: b for k, b in module.named_buffers() if "running" in k}
        results.append({"out": out.detach()} | found)
    got, own, oracle = results
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in own.items()}
    hold(got, lambda t: own if t.x.dtype == given else oracle, Tensors(x, []), dtype)


# One small block of every feature, for tests of how modules behave ----------------------------------------------------

SIGNATURE = (4, 3, 12, 4, True, "hs", 1)


def make_input(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block() -> FusedInvResBlock:
    return randomize(FusedInvResBlock(*SIGNATURE))


def twin_of(module: nn.Module) -> nn.Module:
    twin = InvResBlock(*SIGNATURE).to(next(module.parameters()).dtype)
    twin.load_state_dict(module.state_dict(), strict=True)
    return twin.train(module.training)


def replica_of(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes one for a GPU."""
    replicas = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, replica in replicas.items():
        for name, child in m._modules.items():
            setattr(replica, name, replicas[child])
        for name, p in m._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, p * 1)
        for name, b in m._buffers.items():
            setattr(replica, name, b.clone())
    return replicas[module]


def pull(out: Tensor) -> None:
    """Backward from a gradient that batch norm does not cancel, as it would that of a sum or of a sum of squares."""
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape))


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one training or evaluation step."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    pull(out)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [out.detach(), leaf.grad, *grads, *(b.clone() for b in module.buffers())]


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> None:
    """Equal to rounding of the largest element of each."""
    assert len(a) == len(b)
    for got, expected in zip(a, b, strict=True):
        scale = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)
