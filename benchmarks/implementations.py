"""The contestants, and the calls that are timed and checked: of a stage, of a block, of a whole network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mbn_kernels import available_backends

Call = Callable[[], object]
Build = Callable[[bool], nn.Module]
#: What tables and charts call the networks of mbn_kernels.models.
TITLES = {
    "mobilenet_v1": "V1",
    "mobilenet_v2": "V2",
    "mobilenet_v3_large": "V3-Large",
    "mobilenet_v3_small": "V3-Small",
}
#: Of mbn_kernels, for each type of device; the last that can be used there is its default.
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


@dataclass(frozen=True)
class Implementation:
    """How a network is run. fused is mbn_kernels, with that backend or its own choice; the others are its plain twin,
    stock PyTorch.
    """

    name: str
    memory_format: torch.memory_format
    fused: bool = False
    compiled: bool = False
    backend: str | None = None


STOCK = (
    Implementation("eager-nchw", torch.contiguous_format),
    Implementation("eager-channels-last", torch.channels_last),
    Implementation("compile", torch.channels_last, compiled=True),
)
FUSED = Implementation("fused", torch.channels_last, fused=True)
IMPLEMENTATIONS = (*STOCK, FUSED)


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def contestants(device: torch.device, full: bool) -> tuple[Implementation, ...]:
    """Stock, and mbn_kernels with each backend that can be used on the device; the reference only in full."""
    states = available_backends()
    names = ["reference"] * full + [name for name in BACKENDS[device.type] if states[name] == "available"]
    ours = (Implementation(f"fused-{name}", torch.channels_last, fused=True, backend=name) for name in names)
    return (*STOCK, *ours)


class Prepared(NamedTuple):
    """``call(*given())`` is what is timed, without ``given``; ``results`` makes anew what must be right, as long as no
    call has changed anything: outputs, or gradients.
    """

    call: Callable[..., object]
    results: Callable[[], list[Tensor]]
    given: Callable[[], tuple] = tuple
    forward: Call | None = None  # in training, what keeps something for a backward
    known: Sequence[Tensor] = ()  # what is there anyway: parameters, buffers, the input


class Pass(NamedTuple):
    """A pass over a module: "evaluation", "forward", "backward", "dx", "dw" (the gradient of the input alone, of the
    parameters alone) or "training", a step of a network with cross-entropy and SGD. Evaluation is in ``dtype``,
    training in float32 under autocast to it.
    """

    direction: str
    build: Build
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32


def prepare(implementation: Implementation, given: Pass, *, exact: bool = False) -> Prepared:
    """The same weights and input for all; with ``exact`` in float64 from the same rounded numbers."""
    if implementation.compiled:
        torch.compiler.reset()  # left in place, the graphs of earlier cases count against the limit of recompilations
    torch.manual_seed(0)
    evaluates = given.direction == "evaluation"
    module = given.build(implementation.fused).to(given.device, memory_format=implementation.memory_format)
    x = torch.randn(given.shape, device=given.device).contiguous(memory_format=implementation.memory_format)
    x = x if given.direction == "training" else x.to(given.dtype)  # a network is given float32, autocast casts it
    module = (module.to(given.dtype) if evaluates else module).train(not evaluates)
    if exact:
        module, x = module.double(), x.double()
    cast = torch.autocast(given.device.type, dtype=given.dtype, enabled=given.dtype != torch.float32 and not exact)
    # torch.compile may freeze the weights of an evaluation, as users would.
    options = {"freezing": True} if evaluates else None
    run = torch.compile(module, fullgraph=True, options=options) if implementation.compiled else module

    def forward(run: Callable[[Tensor], Tensor] = run) -> Tensor:
        with cast:
            return run(x)

    if evaluates:
        return _evaluation(lambda: run(x))
    if given.direction == "training":
        return _step(module, x, forward)
    return _gradients(module, x, forward, lambda: forward(module), given.direction)


def _evaluation(forward: Callable[[], Tensor]) -> Prepared:
    def call() -> Tensor:
        with torch.no_grad():
            return forward()

    return Prepared(call, lambda: [call()])


def _gradients(
    module: nn.Module, x: Tensor, forward: Callable[[], Tensor], plain: Callable[[], Tensor], direction: str
) -> Prepared:
    """``plain`` is the forward that is not compiled: it would be compiled once more for a call without gradients."""
    x.requires_grad_(direction != "dw")
    module.requires_grad_(direction != "dx")
    if direction == "forward":
        return Prepared(forward, lambda: [forward().detach()], forward=forward, known=_known(module, x))
    leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
    with torch.no_grad():
        like = plain()
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(like.shape, generator=generator).to(like)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, gradient)

    return Prepared(backward, lambda: list(backward(forward())), lambda: (forward(),))


def _known(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *module.parameters(), *module.buffers()]


def _step(module: nn.Module, x: Tensor, forward: Callable[[], Tensor]) -> Prepared:
    labels = torch.arange(x.shape[0], device=x.device) % 1000
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def loss() -> Tensor:
        out = forward()
        return nn.functional.cross_entropy(out if out.dtype == torch.float64 else out.float(), labels)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    def results() -> list[Tensor]:
        # As one vector: of single small gradients deep in a network, rounding is most of what is left.
        return [torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(module.parameters()))])]

    return Prepared(call, results, forward=loss, known=_known(module, x))


def network_training(
    implementation: Implementation, build: Build, shape: tuple[int, ...], device: torch.device
) -> Call:
    """A training step of a network in float32."""
    return prepare(implementation, Pass("training", build, shape, device)).call
