"""What is counted of a pass and not timed: operations, bytes kept for backward, launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .implementations import Prepared

#: Operators that neither read nor write a tensor's numbers, unless one that they call does.
NOTHING = frozenset({"mbn::cpu_buffer"}) | {
    f"aten::{name}"
    for name in (
        *("alias", "as_strided", "as_strided_", "chunk", "contiguous", "detach", "detach_", "empty", "empty_like"),
        *("empty_strided", "expand", "expand_as", "flatten", "item", "lift_fresh", "narrow", "new_empty", "permute"),
        *("new_empty_strided", "reshape", "resize_", "resolve_conj", "resolve_neg", "result_type", "select", "slice"),
        *("split", "split_with_sizes", "squeeze", "t", "to", "_to_copy", "transpose", "unbind", "unflatten", "view"),
        *("unsqueeze", "view_as", "_reshape_alias", "_unsafe_view", "_local_scalar_dense"),
    )
}
#: Of the operations of the forward, how many a pass has; a gradient of either kind costs what the forward does.
TIMES = {"evaluation": 1, "forward": 1, "dx": 1, "dw": 1, "backward": 2}


def forward_flops(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Two for each multiply-add of convolutions and linear layers, as PyTorch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.to("meta").eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def saved_bytes(prepared: Prepared) -> int | None:
    """What a training forward keeps for its backward beyond what is there anyway; None of other passes."""
    if prepared.forward is None:
        return None
    skipped, kept = {t.untyped_storage().data_ptr() for t in prepared.known}, {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in skipped:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no other gets its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prepared.forward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def launches(prepared: Prepared, device: torch.device) -> int:
    """Kernels that a call starts on a GPU; on a CPU operators that are neither a view nor an allocation."""
    activity = torch.profiler.ProfilerActivity
    arguments, on_gpu = prepared.given(), device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        prepared.call(*arguments)
        if on_gpu:
            torch.cuda.synchronize(device)
    events = profile.events()
    if on_gpu:
        kinds = (torch.autograd.DeviceType.CUDA,)
        return sum(e.device_type in kinds and not e.name.startswith(("Mem", "mbn::")) for e in events)
    return sum(_operators(event) for event in events if event.cpu_parent is None)


def _operators(event) -> int:
    below = sum(map(_operators, event.cpu_children))
    counts = event.name.startswith(("aten::", "mbn::")) and event.name not in NOTHING
    return max(below, 1) if counts else below


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory of a GPU that a call has in use beyond what there was; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
