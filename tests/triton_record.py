"""What the Triton backend would launch for a block at its real shape, without a GPU: launches recorded on the meta
device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from oracle import Case, make_tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mbn_kernels import FusedDepthwiseSeparable, FusedInvResBlock, chain
from mbn_kernels.models.tables import BlockShape

pytest.importorskip("triton", reason="Triton is not installed")
from mbn_kernels.backends.triton import launch
from mbn_kernels.backends.triton.kernels import TritonKernels


class Launch(NamedTuple):
    kernel: object
    programs: int
    arguments: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.arguments.items() if isinstance(t, Tensor)}

    @property
    def bytes(self) -> int:
        """Of memory read and written once: every tensor that the launch is given, whole."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Operator(str):
    """The name of one of PyTorch's own operators; ``bytes``: of its tensors, each once."""

    bytes = 0


class _Others(TorchDispatchMode):
    """Counts the operators of PyTorch itself that would start a kernel; fill is that of the tests' poisoned memory."""

    FREE = (
        "fill",
        "empty",
        "new_empty",
        "new_empty_strided",
        "view",
        "select",
        "slice",
        "unbind",
        "expand",
        "detach",
        "unsqueeze",
        "alias",
        "as_strided",
        "permute",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Operator] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not name.strip("_").startswith(self.FREE) and name not in ("_to_copy", "t"):
            found = Operator(name)
            given = {id(t): t for t in (*args, out) if isinstance(t, Tensor)}
            found.bytes = sum(t.numel() * t.element_size() for t in given.values())
            self.names.append(found)
        return out


def record(run: Callable[[], object]) -> tuple[list[Launch], list[Operator]]:
    """(the launches of a call, the names of PyTorch's own operators in it)."""
    found: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch, _Others() as others:
        patch.setattr(launch, "execute", lambda kernel, programs, a: found.append(Launch(kernel, programs, a)))
        run()
    return found, others.names


def module_of(b: BlockShape) -> nn.Module:
    if b.kind == "separable":
        return FusedDepthwiseSeparable(b.in_channels, b.out_channels, b.k, b.s)
    return FusedInvResBlock(b.in_channels, b.k, b.exp_channels, b.out_channels, b.se, b.nl, b.s)


class Recorded(NamedTuple):
    """(launches, PyTorch's own operators) of a block's training and evaluation."""

    forward: tuple[list[Launch], list[Operator]]
    backward: tuple[list[Launch], list[Operator]]
    evaluation: tuple[list[Launch], list[Operator]]

    @property
    def launches(self) -> list[Launch]:
        return [each for part in self for each in part[0]]


def _meta(module: nn.Module, dtype: torch.dtype):
    """(chain, parameters, residual) under autocast to dtype: weights in it, everything else in float32."""
    call = module.call()
    parsed = chain.parse(call.spec)
    names = [name for stage in parsed.stages for name in stage.parameter_names]
    params = [
        p.detach().to("meta", dtype if name == "weight" else torch.float32)
        for p, name in zip(call.params, names, strict=True)
    ]
    return parsed, params, call.residual


def chain_of(case: Case, dtype: torch.dtype, training: bool, device: str) -> tuple[chain.Chain, list[Tensor], list]:
    """(chain, parameters, which of x and them need gradients) under autocast to dtype."""
    specs = [stage.spec(training) for stage in case.stages]
    parsed, params, needs = chain.parse(chain.chain_spec(case.name, specs)), [], [True]
    for stage, p in zip(parsed.stages, make_tensors(case).stages, strict=True):
        params += [p[name].to(device, dtype if name == "weight" else torch.float32) for name in stage.parameter_names]
        needs += [not name.startswith("running") for name in stage.parameter_names]
    return parsed, params, needs


def step(x: Tensor, parsed: chain.Chain, params: list[Tensor], needs: list, residual: bool) -> None:
    """Forward and backward of a chain."""
    kernels = TritonKernels()
    out, _, saved = chain.forward(kernels, x, parsed, params, residual, True)
    chain.backward(kernels, torch.empty_like(out), x, parsed, params, saved, residual, needs)


def record_case(case: Case, dtype: torch.dtype, training: bool) -> list[Launch]:
    """The launches of a chain and its backward; not in training, batch norm is frozen."""
    x = torch.empty(case.shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    return record(lambda: step(x, *chain_of(case, dtype, training, "meta"), case.residual))[0]


def record_block(b: BlockShape, batch: int, dtype: torch.dtype) -> Recorded:
    kernels, module = TritonKernels(), module_of(b)
    shape = (batch, b.in_channels, b.height, b.width)
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    parsed, params, residual = _meta(module.train(), dtype)
    results: list = []

    def forward() -> None:
        results.extend(chain.forward(kernels, x, parsed, params, residual, True))

    def backward() -> None:
        out, _, saved = results
        needs = [True] * (1 + len(params))
        chain.backward(kernels, torch.empty_like(out), x, parsed, params, saved, residual, needs)

    recorded = record(forward), record(backward)
    parsed, params, residual = _meta(module.eval(), dtype)
    return Recorded(*recorded, record(lambda: kernels.evaluate(x, (parsed,), params, (residual,))))
