"""Whether the CUDA library of the installed package is as it should be: `make test-cuda-build`. Needs no GPU.

It loads, registers its operators, keeps to the stable ABI, exports nothing of its own and has code for the GPUs that it
was built for: TORCH_CUDA_ARCH_LIST, or what setup.py builds for without it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import mbn_kernels

LIBRARY = Path(mbn_kernels.__file__).parent / "_CUDA.abi3.so"
GPUS = re.split("[; ]", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX")
FOREIGN = ("at::", "c10::", "torch::")


def expect(condition: object, message: str) -> None:
    if not condition:
        sys.exit(f"{LIBRARY}: {message}")


def output_of(*command: object) -> list[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.splitlines()


def operators() -> dict[str, bool]:
    """The CUDA kernels' operators by name, and whether something implements each for CUDA tensors."""
    implemented = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mbn::cuda_"))
    return {name: implemented(name, "CUDA") for name in names}


def names_in(symbols: list[str], parts: tuple[str, ...]) -> list[str]:
    return [symbol for symbol in symbols if any(part in symbol for part in parts)]


def cuobjdump() -> str | None:
    """Triton's wheel has one, for toolkits that do not."""
    triton = importlib.util.find_spec("triton")
    folders = [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton and triton.origin else []
    return shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def main() -> None:
    expect(LIBRARY.is_file(), "expected to be installed, got no file")
    torch.ops.load_library(LIBRARY)
    found = operators()
    missing = [name for name, implemented in found.items() if not implemented]
    expect(not missing, f"expected to implement every operator, got none of {missing}")
    name = "mbn::cuda_depthwise_forward"
    expect(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"expected a kernel for {name}, got none")

    undefined = output_of("nm", "-D", "--undefined-only", "--demangle", LIBRARY)
    expect(names_in(undefined, ("aoti_torch_",)), "expected to need torch's stable ABI, got no such symbol")
    unstable = names_in(undefined, FOREIGN)
    expect(not unstable, f"expected to need no C++ of torch, got {unstable}")
    ours = names_in(output_of("nm", "-D", "--defined-only", "--demangle", LIBRARY), (*FOREIGN, "mbn"))
    expect(not ours, f"expected to export nothing, got {ours}")

    tool = cuobjdump()
    listed = " ".join(output_of(tool, "--list-elf", "--list-ptx", LIBRARY)) if tool else ""
    for gpu in GPUS:
        name = gpu.removesuffix("+PTX").replace(".", "")
        for kind in ("cubin", "ptx") if gpu.endswith("+PTX") else ("cubin",):
            expect(not tool or f"sm_{name}.{kind}" in listed, f"expected a {kind} for {gpu}, got {listed}")
    code = f"code for {', '.join(GPUS)}" if tool else "GPU code not looked at, as there is no cuobjdump"
    print(f"{LIBRARY}: loads; implements {', '.join(found)}; stable ABI, exports nothing; {code}")


if __name__ == "__main__":
    main()
