"""Every check of a caller's arguments. Messages are one sentence: ``op: argument: expected …, got …``."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .activations import ACTIVATIONS
from .chain import accumulate_dtype
from .errors import fail, short
from .stages import BIAS, MOST, RUNNING, Chain, Stage, parse, stage_parameters


def check_tensor(op: str, argument: str, value: Any, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, Tensor):
        fail(op, argument, "a tensor", type(value).__name__, TypeError)


def check_bool(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(op, argument, "True or False", short(value), TypeError)


def number(
    op: str,
    argument: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = math.inf,
) -> float:
    """A finite number of any library, also a tensor of one, as a float; no bool, and no text."""
    if type(value) not in (float, int):
        # As torch takes them: a NumPy number, or a tensor without dimensions.
        several = isinstance(value, Tensor) and value.dim() > 0
        logical = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
        if several or logical or isinstance(value, (str, bytes)) or not hasattr(type(value), "__float__"):
            fail(op, argument, "a number", short(value), TypeError)
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):  # of several numbers, complex, on the meta device
        fail(op, argument, "a number", short(value), TypeError)
    except OverflowError:
        fail(op, argument, "a number that a float holds", short(value))
    if not -math.inf < found < math.inf:  # nor NaN; torch.compile traces it where it is a symbol
        fail(op, argument, "a finite number", short(value))
    if least is not None and found < least:
        fail(op, argument, f"at least {least:g}", short(value))
    if above is not None and found <= above:
        fail(op, argument, f"more than {above:g}", short(value))
    if found > most:
        fail(op, argument, f"at most {most:g}", short(value))
    return found


def check_act(op: str, argument: str, name: Any) -> None:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        fail(op, argument, f"one of {', '.join(ACTIVATIONS)}", short(name))


def _index(value: Any) -> int | None:
    """The int that an integer of any library is, also a tensor of one, as torch does; None for a bool and others."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: on the meta device
        return None


def integer(op: str, argument: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """An int from ``least`` to ``most``, of any library's integer."""
    found = _index(value)
    if found is None:
        fail(op, argument, "an integer", short(value), TypeError)
    return _between(op, argument, found, least, most, value)


def _between(op: str, argument: str, found: int, least: int, most: int, value: Any) -> int:
    if found < least:
        fail(op, argument, f"at least {least}", short(value))
    if found > most:
        fail(op, argument, f"at most {most}", short(value))
    return found


def integers(op: str, argument: str, value: Any, counts: Sequence[int], least: int) -> tuple[int, ...]:
    """An int, or a sequence of 1 or as many ints as one of ``counts``, each from ``least`` to ``MOST``; a single one
    is repeated counts[0] times.
    """
    single = _index(value)
    values = (single,) if single is not None else value
    if not isinstance(values, (tuple, list)) or len(values) not in (1, *counts):
        lengths = " or ".join(str(c) for c in counts)
        fail(op, argument, f"an integer or {lengths} integers", short(value), TypeError)
    found = [_index(v) for v in values]
    if None in found:
        fail(op, argument, "integers", short(value), TypeError)
    for v in found:
        _between(op, argument, v, least, MOST, value)
    return tuple(found) * (counts[0] if len(found) == 1 else 1)


def check_dense(op: str, name: str, t: Tensor) -> None:
    if t.layout != torch.strided or t.is_quantized or t.is_nested:
        kind = "a quantized one" if t.is_quantized else "a nested one" if t.is_nested else f"layout {t.layout}"
        fail(op, name, "a dense tensor", kind, TypeError)


def check_beside(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Checks a parameter: dense, on x's device, of x's dtype or (but for a weight) the one that x accumulates in."""
    check_tensor(op, name, t)
    if t.device != x.device:
        fail(op, name, f"a tensor on {x.device} as x is", f"one on {t.device}")
    check_dense(op, name, t)
    if isinstance(t, FakeTensor) and not isinstance(x, FakeTensor):
        fail(op, name, "a tensor with memory, as x is one", "a FakeTensor", TypeError)
    wider = accumulate_dtype(x.dtype)
    if t.dtype != x.dtype and (name == "weight" or t.dtype != wider):
        also = "" if name == "weight" or wider == x.dtype else f" or {wider}"
        fail(op, name, f"{x.dtype}{also} for x of {x.dtype}", t.dtype, TypeError)


def check_chain(
    op: str, x: Tensor, stages: Sequence[Stage], params: Sequence[Tensor], residual: bool
) -> tuple[int, ...]:
    """Checks every tensor of a chain against its stages: rank, shape, dtype, device, layout; returns the output's
    shape.
    """
    check_input(op, x)
    check_count(op, stages, params)
    shape = tuple(x.shape)
    for stage, p in zip(stages, stage_parameters(stages, params), strict=True):
        shape = _check_stage(op, x, shape, stage, p)
    if residual and shape != tuple(x.shape):
        fail(op, "residual", f"the output's shape {shape}", tuple(x.shape))
    return shape


def check_count(op: str, stages: Sequence[Stage], params: Sequence[Tensor]) -> None:
    """Checks that there are as many parameters as the stages have."""
    count = sum(len(stage.parameter_names) for stage in stages)
    if len(params) != count:
        fail(op, "params", f"{count} tensors", len(params))


def check_kinds(chain: Chain, x: Tensor, params: Sequence[Tensor]) -> None:
    """Checks what holds for a chain's tensors before an autocast, too, and whatever device they are on."""
    check_input(chain.name, x)
    check_count(chain.name, chain.stages, params)
    names = [name for stage in chain.stages for name in stage.parameter_names]
    for name, t in zip(names, params, strict=True):
        check_tensor(chain.name, name, t)
        check_dense(chain.name, name, t)


def check_dispatched(chain: Chain, x: Tensor, params: Sequence[Tensor]) -> None:
    """Checks why the dispatcher might not have found a kernel, or a cast have failed."""
    check_kinds(chain, x, params)
    check_memory(chain.name, "x", x)
    check_memories(chain, params)
    if isinstance(x, FakeTensor) and not all(isinstance(p, FakeTensor) for p in params):
        fail(chain.name, "params", "FakeTensors, as x is one", "others", TypeError)


def check_input(op: str, x: Tensor) -> None:
    """Checks that x is dense, of floating point, and ``[N, C, H, W]``."""
    check_dense(op, "x", x)
    if not x.dtype.is_floating_point:
        fail(op, "x", "a floating-point tensor", x.dtype, TypeError)
    if x.dtype.itemsize < 2:
        fail(op, "x", "a floating-point tensor of at least 16 bits", x.dtype, TypeError)
    if x.dim() != 4:
        fail(op, "x", "4 dimensions (N, C, H, W)", f"{x.dim()}")


def check_addend(op: str, name: str, t: Tensor) -> None:
    """Checks a tensor that is added to an output: of any dtype that PyTorch adds to it without losing its kind."""
    check_dense(op, name, t)
    if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
        fail(op, name, "a floating-point tensor of at least 16 bits", t.dtype, TypeError)


def check_call(op: str, x: Any, params: Any, running: Any, residual: Any) -> None:
    """Checks what an eager call of a chain is given, before a tensor is asked for anything."""
    check_tensor(op, "x", x)
    if not isinstance(params, (list, tuple)) or not all(isinstance(p, Tensor) for p in params):
        fail(op, "params", "a list of tensors", short(params), TypeError)
    if not isinstance(running, (list, tuple)) or not all(isinstance(r, tuple) and len(r) == 4 for r in running):
        fail(op, "running", "a list of Running", short(running), TypeError)
    check_bool(op, "residual", residual)


def check_links(x: Any, chains: Any) -> None:
    """Checks that chains can leave their last value to the next."""
    op = "run_linked"
    if not isinstance(chains, (list, tuple)) or not all(isinstance(c, (list, tuple)) and len(c) == 3 for c in chains):
        fail(op, "chains", "(spec, parameters, running statistics) of each chain", short(chains), TypeError)
    for i, (spec, params, running) in enumerate(chains):
        check_call(op, x, params, running, False)
        last = parse(spec).stages[-1]
        if i + 1 < len(chains) and (last.norm == "none" or last.gate):
            fail(op, "chains", "chains of which all but the last end in a norm without a gate", short(spec))
        if any(stage.group is not None for stage in parse(spec).stages):
            fail(op, "chains", "chains that share no statistics", short(spec))


def check_no_gradient(op: str, running: Sequence[tuple]) -> None:
    """Checks that no gradient is wanted of statistics that a batch updates; stock refuses them, too."""
    for r in running:
        for name, t in zip(RUNNING, r, strict=False):
            if getattr(t, "requires_grad", False):
                fail(op, name, "a tensor that wants no gradient", "one that requires grad")


def check_statistics(batches: Sequence[tuple]) -> None:
    """Checks that a batch's statistics can be taken in: (running, mean, variance) of each batch norm."""
    op = "update_running"
    for r, *found in batches:
        if not isinstance(r, tuple) or len(r) != 4:
            fail(op, "running", "a list of Running", short(r), TypeError)
        for name, t, of_batch in zip(RUNNING, r, found, strict=False):
            if t is None and r[0] is r[1]:
                continue
            check_tensor(op, name, t)
            check_addend(op, name, t)
            if t.shape != of_batch.shape or t.device != of_batch.device:
                fail(op, name, f"shape {tuple(of_batch.shape)} on {of_batch.device}", f"{tuple(t.shape)} on {t.device}")
            _check_writable(op, name, t)
            check_memory(op, name, t)


def _check_writable(op: str, name: str, t: Tensor) -> None:
    if t.is_inference() and not torch.is_inference_mode_enabled():
        fail(op, name, "a tensor that may be written to", "one made in inference mode")
    if t.is_neg():
        fail(op, name, "a tensor that may be written to", "one that is negated where it is read")
    if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        fail(op, name, "memory of its own for each number", f"strides {t.stride()}")


def check_apart(op: str, written: dict[str, Tensor], read: dict[str, Tensor | None]) -> None:
    """Checks that what is written to shares memory with no other argument."""
    memory = {name: _memory(t) for name, t in {**written, **read}.items() if t is not None}
    for name in written:
        begin, end = memory.pop(name)
        for other, (first, last) in memory.items():
            if begin < last and first < end:
                fail(op, name, "memory of its own", f"some that is also {other}'s")


def _memory(t: Tensor) -> tuple[int, int]:
    """Where its first number begins and its last one ends; of none, nowhere."""
    if t.layout != torch.strided or t.is_nested:
        return 0, 0
    begin = t.data_ptr()
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return begin, begin + (span * t.itemsize if t.numel() else 0)


def check_memory(op: str, name: str, t: Tensor) -> None:
    """Checks that the tensor's memory was not freed, as who shards parameters frees it."""
    if t.numel() and not t.untyped_storage().nbytes():
        fail(op, name, "a tensor with memory", "one whose memory was freed")


def check_memories(chain: Chain, params: Sequence[Tensor]) -> None:
    """:func:`check_memory` of each parameter: for where a kernel found out."""
    names = [name for stage in chain.stages for name in stage.parameter_names]
    for name, t in zip(names, params, strict=True):
        check_memory(chain.name, name, t)


def check_fixed(chain: Chain, params: Sequence[Tensor]) -> None:
    """Checks that no gradient is wanted of running statistics, which have none; nor has stock one."""
    for i, name in chain.fixed:
        if params[i].requires_grad:
            fail(chain.name, name, "a tensor that wants no gradient", "one that requires grad")


def _check_stage(op: str, x: Tensor, shape: tuple[int, ...], stage: Stage, p: dict[str, Tensor]) -> tuple[int, ...]:
    for name, t in p.items():
        check_beside(op, name, t, x)
    channels, weight = shape[1], p.get("weight")
    if weight is not None:
        kernel, groups = tuple(stage.kernel), channels if stage.conv == "depthwise" else 1
        expected = (channels, 1, *kernel) if groups > 1 or stage.conv == "depthwise" else ("out", channels, *kernel)
        given = tuple(weight.shape) + ((1, 1) if stage.norm == "bias" and weight.dim() == 2 else ())  # a linear layer's
        if len(given) != 4 or given[1:] != expected[1:] or (stage.conv == "depthwise" and given[0] != channels):
            text = f"({', '.join(str(e) for e in expected)}) for an input of {channels} channels"
            fail(op, "weight", f"shape {text}", given)
    shape = stage.output_shape(shape, None if weight is None else weight.shape)
    if min(shape[2:]) < 1:
        fail(op, "x", f"height and width that the {stage.kernel[0]}x{stage.kernel[1]} window fits in", tuple(x.shape))
    for name in ("bn_weight", "bn_bias", *RUNNING, *BIAS):
        if name in p and tuple(p[name].shape) != (shape[1],):
            fail(op, name, f"shape ({shape[1]},)", tuple(p[name].shape))
    alone = stage.norm == "batch" and stage.group is None  # other processes' batches may hold more
    if alone and shape[0] * shape[2] * shape[3] == 1:
        fail(op, "x", "more than 1 value per channel when training", f"{shape} at the normalised stage")
    if stage.gate:
        _check_gate(op, shape[1], p)
    return shape


def _check_gate(op: str, channels: int, p: dict[str, Tensor]) -> None:
    hidden = p["w1"].shape[0] if p["w1"].dim() else 0
    expected = {"w1": (hidden, channels), "b1": (hidden,), "w2": (channels, hidden), "b2": (channels,)}
    for name, want in expected.items():
        given = tuple(p[name].shape)
        if given != want and given != (*want, 1, 1):
            fail(op, name, f"shape {want}", given)
