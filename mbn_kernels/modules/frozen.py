"""``freeze(model)``: a model's evaluation with its parameters as they are now, in one call that looks at no module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_dense, check_tensor
from ..errors import fail
from .kept import KeepsEvaluation, forget


class FrozenEvaluation(nn.Module):
    """What :func:`freeze` returns: ``forward(x)`` is the model's evaluation, for any image and batch size.

    It has no parameters, knows no gradient and is not seen by torch.compile or autocast. Its numbers are not in its
    state_dict: freeze the model again after loading one.
    """

    def __init__(self, run, flat: bool, dtype: torch.dtype, name: str) -> None:
        super().__init__()
        self._run, self._flat, self._dtype, self._name = run, flat, dtype, name

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("FrozenEvaluation", "x", x)
        check_dense("FrozenEvaluation", "x", x)
        if x.dtype != self._dtype or x.dim() != 4 or not x.is_cpu:
            expected = f"a dense tensor of {self._dtype} on the CPU with 4 dimensions (N, C, H, W)"
            fail("FrozenEvaluation", "x", expected, f"{x.layout}, {x.dtype} on {x.device} with {x.dim()}")
        try:
            out = self._run(x.detach())
        except RuntimeError:
            self._run.explain("FrozenEvaluation", x)
            raise
        return out.flatten(1) if self._flat else out

    def extra_repr(self) -> str:
        return f"{self._name}, {self._dtype}"


def freeze(model: nn.Module, example: Tensor) -> FrozenEvaluation:
    """The model's evaluation as a function of x alone: its parameters are packed and folded once, and what later
    becomes of the model is not seen. For serving: a small network's batch of one takes not much longer than looking
    through all its modules for changes.

    Args:
        model: a network of :mod:`mbn_kernels.models`, a :class:`~mbn_kernels.FusedSequential`, a fused module, or a
            module that :func:`~mbn_kernels.fuse` has changed, in evaluation mode, on the CPU.
        example: an input, of the dtype and on the device that others will have.

    Raises:
        ValueError: not all of the model runs in one call; the message says what does not.

    >>> net, x = mbn_kernels.FusedSequential(mbn_kernels.FusedDepthwiseSeparable(4, 8)).eval(), torch.randn(1, 4, 8, 8)
    >>> frozen = mbn_kernels.freeze(net, x)
    >>> with torch.no_grad():
    ...     torch.equal(frozen(x), net(x))
    True
    """
    check_tensor("freeze", "example", example)
    if not isinstance(model, KeepsEvaluation):
        expected = "a network of mbn_kernels.models, or a fused module"
        fail("freeze", "model", expected, type(model).__name__, TypeError)
    if model.training:
        fail("freeze", "model", "a module in evaluation mode", "one in training mode")
    forget(model)
    with torch.no_grad():
        model(example)
        model(example)  # the second finds what the first has kept
    kept = model._kept
    if kept is None:
        fail("freeze", "model", "a module of which all runs in one call of the cpu backend", "one with other parts")
    with torch.no_grad():
        return FrozenEvaluation(kept.run.freeze(example), kept.flat, example.dtype, type(model).__name__)
