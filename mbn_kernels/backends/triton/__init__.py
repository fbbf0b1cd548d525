"""The Triton backend: loaded where Triton is installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load():
    """(the kernels, None), or (None, why they cannot be used)."""
    if find_spec("triton") is None:
        return None, "Triton is not installed: run `pip install triton`"
    try:
        from .device import INTERPRETED
        from .kernels import TritonKernels
    except Exception as error:  # whatever a broken or foreign installation raises, nothing else needs it
        return None, f"Triton cannot be used: {type(error).__name__}: {error}"
    if not INTERPRETED and not torch.cuda.is_available():
        return None, "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return TritonKernels(), None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    from .device import INTERPRETED

    wanted = "cpu" if INTERPRETED else "cuda"
    if device.type != wanted:
        return f"a tensor on {wanted}, got one on {device}"
    if dtype not in DTYPES:
        return f"float32, float16 or bfloat16, got {dtype}"
    return None
