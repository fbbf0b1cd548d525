"""The CUDA backend: kernels of ``csrc/cuda`` for NVIDIA GPUs, loaded where they were built; the rest is Triton's."""

from __future__ import annotations

from pathlib import Path

import torch

from ... import schemas  # noqa: F401  (the library implements these schemas)
from .. import triton

LIBRARY = Path(__file__).resolve().parents[2] / "_CUDA.abi3.so"
#: Compute capability of the oldest GPU that has what the kernels use.
OLDEST = (8, 0)


def load():
    """(the kernels, None), or (None, why they cannot be used)."""
    if not LIBRARY.exists():
        return None, (
            f"{LIBRARY.name} is not built: run `pip install -e .` in the source tree with a CUDA build of PyTorch and "
            "nvcc (with MBN_BUILD_CUDA=1 it says what is missing)"
        )
    _, missing = triton.load()
    if missing:
        return None, missing
    if not torch.cuda.is_available():
        return None, "there is no GPU that torch can use"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip or capability < OLDEST:
        return None, f"expected an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, got {capability}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        cause = error.__cause__ or error  # torch's own message leaves the reason out
        return None, f"{LIBRARY.name} does not load: {cause}; build it again with `pip install -e .`"
    missing = torch.ops.mbn.cuda_missing.default()
    if missing:
        return None, f"{LIBRARY.name} has no code for this GPU: {missing}; build it with TORCH_CUDA_ARCH_LIST set"
    from .kernels import CudaKernels

    return CudaKernels(), None


supports = triton.supports
