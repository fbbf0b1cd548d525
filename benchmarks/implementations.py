"""The contestants, and the calls that are timed: evaluation and training of a block or of a whole network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Call = Callable[[], object]
#: What tables and charts call the networks of mbn_kernels.models.
TITLES = {
    "mobilenet_v1": "V1",
    "mobilenet_v2": "V2",
    "mobilenet_v3_large": "V3-Large",
    "mobilenet_v3_small": "V3-Small",
}


@dataclass(frozen=True)
class Implementation:
    """How a network is run. fused is mbn_kernels; the others are its plain twin, stock PyTorch."""

    name: str
    memory_format: torch.memory_format
    fused: bool = False
    compiled: bool = False


IMPLEMENTATIONS = (
    Implementation("eager-nchw", torch.contiguous_format),
    Implementation("eager-channels-last", torch.channels_last),
    Implementation("compile", torch.channels_last, compiled=True),
    Implementation("fused", torch.channels_last, fused=True),
)


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepare(
    implementation: Implementation, build: Callable[[bool], nn.Module], shape: tuple[int, ...], device: torch.device
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if implementation.compiled:
        torch.compiler.reset()  # left in place, the graphs of earlier cases count against the limit of recompilations
    module = build(implementation.fused).to(device=device, memory_format=implementation.memory_format)
    x = torch.randn(shape, device=device).contiguous(memory_format=implementation.memory_format)
    return module, x


def _synchronized(call: Call, device: torch.device) -> Call:
    if device.type != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(device)

    return run


def evaluation(
    implementation: Implementation, build: Callable[[bool], nn.Module], shape: tuple[int, ...], device: torch.device
) -> Call:
    """A forward pass in evaluation mode without gradients. torch.compile may freeze the weights, as users would."""
    module, x = _prepare(implementation, build, shape, device)
    module.eval()
    forward = torch.compile(module, fullgraph=True, options={"freezing": True}) if implementation.compiled else module

    def call() -> None:
        with torch.no_grad():
            forward(x)

    return _synchronized(call, device)


def block_training(
    implementation: Implementation, build: Callable[[bool], nn.Module], shape: tuple[int, ...], device: torch.device
) -> Call:
    """Forward and backward of one block in training mode, to the gradients of its input and every parameter."""
    module, x = _prepare(implementation, build, shape, device)
    module.train()
    x.requires_grad_()
    leaves = [x, *module.parameters()]
    forward = torch.compile(module, fullgraph=True) if implementation.compiled else module
    with torch.no_grad():
        gradient = torch.randn_like(module(x))

    def call() -> None:
        torch.autograd.grad(forward(x), leaves, gradient)

    return _synchronized(call, device)


def network_training(
    implementation: Implementation, build: Callable[[bool], nn.Module], shape: tuple[int, ...], device: torch.device
) -> Call:
    """A training step: forward, cross-entropy, backward, SGD."""
    module, x = _prepare(implementation, build, shape, device)
    module.train()
    labels = torch.randint(1000, (shape[0],), device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    forward = torch.compile(module, fullgraph=True) if implementation.compiled else module

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(forward(x), labels).backward()
        optimizer.step()

    return _synchronized(call, device)
