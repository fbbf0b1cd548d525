"""What stands before and behind a network's blocks, as chains: a dense stem; the pool and the linear layers.

They are stock modules; where a gradient is wanted, the pool and the linear layers run as such.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..chain import chain_spec, parse, stage_spec
from ..checks import check_chain, check_dispatched
from ..ops import AUTOCAST_DEVICES
from .fused import Call
from .units import ACTS, Unit, _parameter, append_tensors, describe_stem, stage_unit
from .watch import has_hook


def stem_call(module: nn.Module) -> Call | None:
    """The chain of a Sequential of (convolution, batch norm[, activation]), or None where it is something else."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward or _hooked(module):
        return None
    stage = describe_stem(module).stage
    if stage is None:
        return None
    params: list[Tensor] = []
    append_tensors(Unit(*stage_unit(module)[:3]), params, running := [])
    return Call(chain_spec(type(module).__name__, [stage]), params, running, False)


def explain_stem(module: nn.Module, x: Tensor) -> None:
    """Where a network refused ``x``: ValueError or TypeError if it is its stem, stock modules, that it does not fit."""
    call = stem_call(module)
    if call is None:
        return
    parsed, weight = parse(call.spec), call.params[0]
    check_dispatched(parsed, x, call.params)
    casts = x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    check_chain(parsed.name, x.to(weight.dtype) if casts else x, parsed.stages, call.params, False)


class Head:
    """A network's end: the mean over the image, then a Sequential of linear layers, activations and dropout."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d, classifier: nn.Sequential) -> None:
        self.pool, self.classifier = pool, classifier

    def __call__(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(x).flatten(1))

    def modules(self) -> tuple[nn.Module, ...]:
        return self.pool, self.classifier

    def calls(self) -> list[Call] | None:
        """One chain each, with an output of one pixel, or None where a layer is something else."""
        layers = list(self.classifier._modules.values())
        if type(self.classifier) is not nn.Sequential or _hooked(self.classifier):
            return None
        if has_hook(self.pool) or "forward" in self.pool.__dict__:
            return None
        if type(self.pool) is not nn.AdaptiveAvgPool2d or self.pool.output_size not in (1, (1, 1)):
            return None
        calls = [Call(chain_spec("Head", [stage_spec("pool")]), [], [], False)]
        layers = [layer for layer in layers if not (type(layer) is nn.Dropout and not layer.training)]
        while layers:
            layer = layers.pop(0)
            if type(layer) is not nn.Linear or _parameter(layer, "bias") is None:
                return None
            act = ACTS[type(layers.pop(0))] if layers and type(layers[0]) in ACTS else "identity"
            stage = stage_spec("pointwise", norm="bias", act=act)
            params = [_parameter(layer, "weight"), _parameter(layer, "bias")]
            calls.append(Call(chain_spec("Head", [stage]), params, [], False))
        return calls if len(calls) > 1 else None


def _hooked(module: nn.Sequential) -> bool:
    """Whether it, or a layer of it, does more than its class says."""
    return any(has_hook(m) or "forward" in m.__dict__ for m in (module, *module._modules.values()))
