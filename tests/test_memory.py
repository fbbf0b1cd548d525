"""What is kept for backward, what backward allocates, and when it is let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import stock
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mbn_kernels
from mbn_kernels import FusedInvResBlock

# Hard-swish and squeeze-excite: rows of MobileNetV3-Large and -Small.
GATED = (
    ((80, 3, 480, 112, True, "hs", 1), 14),
    ((160, 5, 960, 160, True, "hs", 1), 7),
    ((40, 5, 240, 40, True, "hs", 1), 14),
)
OTHER = (
    ((80, 3, 184, 80, False, "hs", 1), 14),
    ((24, 3, 144, 32, False, "relu6", 2), 28),
    ((16, 3, 16, 16, True, "relu", 2), 56),
)


class Kept:
    """A saved tensor that can be watched."""

    def __init__(self, t: Tensor) -> None:
        self.tensor = t


def saved_for_backward(f: Callable[[], Tensor], module: nn.Module) -> tuple[Tensor, dict[int, Tensor]]:
    """The output, and one tensor for each storage that autograd keeps, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in own:
            found[address] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return f(), found


def bytes_of(found: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in found.values())


def in_place(module: nn.Module) -> nn.Module:
    """With activations in place, as the review writes them."""
    for m in module.modules():
        if hasattr(m, "inplace"):
            m.inplace = True
    return module


@pytest.mark.parametrize("signature, size", GATED, ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bytes_saved(backend: str, signature: tuple, size: int, dtype: torch.dtype) -> None:
    """A block of MobileNetV3 keeps at most 0.45 of what stock keeps, whichever way stock is written."""
    x = torch.randn(2, signature[0], size, size).to(dtype).requires_grad_()
    fused = FusedInvResBlock(*signature).to(dtype)
    kept = bytes_of(saved_for_backward(lambda: fused(x), fused)[1])
    assert kept > 0
    for twin in (stock.InvResBlock(*signature), in_place(stock.InvResBlock(*signature))):
        twin.to(dtype)
        assert kept <= 0.45 * bytes_of(saved_for_backward(lambda twin=twin: twin(x), twin)[1])


@pytest.mark.parametrize("signature, size", GATED + OTHER, ids=lambda v: str(v))
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_what_is_saved(backend: str, signature: tuple, size: int, training: bool) -> None:
    """The input, each convolution's output, and nothing else that has pixels."""
    c_in, _, exp, c_out, gated, _, s = signature
    fused = FusedInvResBlock(*signature).train(training)
    x = torch.randn(2, c_in, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    out, found = saved_for_backward(lambda: fused(x), fused)
    expanded = 2 * size * size * exp if c_in != exp else 0
    pixels = x.numel() + expanded + 2 * (size // s) ** 2 * exp + out.numel()
    small = 3 * 4 * max(exp, c_out) + 2 * 2 * exp * gated
    assert pixels * 4 <= bytes_of(found) <= (pixels + small) * 4


def test_nothing_is_saved_without_need(backend: str) -> None:
    fused = FusedInvResBlock(*GATED[0][0])
    x = torch.randn(1, 80, 14, 14)
    with torch.no_grad():
        assert not saved_for_backward(lambda: fused(x.requires_grad_()), fused)[1]
    fused.requires_grad_(False)
    for training in (True, False):
        fused.train(training)
        assert not saved_for_backward(lambda: fused(x.detach()), fused)[1]


def test_saved_tensors_die_with_the_graph(backend: str) -> None:
    """No cycle keeps them until the garbage collector happens to run."""
    fused, kept = FusedInvResBlock(*GATED[2][0]), []
    x = torch.randn(1, 40, 14, 14, requires_grad=True)

    def pack(t: Tensor) -> Kept:
        holder = Kept(t)
        kept.append(weakref.ref(holder))
        return holder

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            out = fused(x)
        assert kept and all(ref() is not None for ref in kept)
        del out
        assert not any(ref() is not None for ref in kept)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            out = fused(x)
        out.sum().backward()
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


class Watch(TorchDispatchMode):
    """Every operator called, and the largest tensor that it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        largest = max((t.numel() for t in tensors if isinstance(t, Tensor)), default=0)
        self.calls.append((str(func), largest))
        return out


def test_backward_makes_no_zero_gradients(backend: str) -> None:
    """Autograd would make a zero gradient for each saved tensor, as large as it, unless told not to."""
    signature, size = GATED[0]
    fused = FusedInvResBlock(*signature)
    x = torch.randn(2, signature[0], size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = fused(x)
    g = torch.randn_like(out)
    with Watch() as watch:
        out.backward(g)
    assert [name for name, _ in watch.calls if "chain_backward" in name] == ["mbn.chain_backward.default"]
    large = [(name, numel) for name, numel in watch.calls if numel >= x.numel() and "mbn." not in name]
    assert not [name for name, _ in large if any(word in name for word in ("zero", "full", "empty", "fill"))], large


def allocations(monkeypatch: pytest.MonkeyPatch, f: Callable[[], object]) -> list[int]:
    sizes: list[int] = []

    def counted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args, **kwargs) -> Tensor:
            t = allocate(*args, **kwargs)
            sizes.append(t.numel())
            return t

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (Tensor, "new_empty"), (Tensor, "new_empty_strided")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        f()
    return sizes


@pytest.mark.parametrize("signature, size", GATED[1:] + OTHER, ids=lambda v: str(v))
def test_evaluation_never_stores_the_expanded_tensor(needs_cpu, monkeypatch, signature: tuple, size: int) -> None:
    fused = FusedInvResBlock(*signature).eval()
    x = torch.randn(2, signature[0], size, size)
    with mbn_kernels.use_backend("cpu"), torch.no_grad():
        sizes = allocations(monkeypatch, lambda: fused(x))
        assert sizes == [fused(x).numel()]


@pytest.mark.parametrize("wanted", ("everything", "input", "parameters"))
def test_backward_allocates_what_it_returns(needs_cpu, monkeypatch, wanted: str) -> None:
    """One gradient per stored tensor, in the compiled backend; none of the input's size where it is not wanted."""
    signature, size = GATED[0]
    fused = FusedInvResBlock(*signature).requires_grad_(wanted != "input")
    x = torch.randn(2, signature[0], size, size, requires_grad=wanted != "parameters")
    with mbn_kernels.use_backend("cpu"):
        out = fused(x)
        g = torch.randn_like(out).contiguous(memory_format=torch.channels_last)
        sizes = allocations(monkeypatch, lambda: out.backward(g))
    expanded = 2 * size * size * signature[2]
    assert sum(n == expanded for n in sizes) == 2
    assert sum(n == x.numel() for n in sizes) == (wanted != "parameters")
