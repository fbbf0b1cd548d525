"""The CUDA C++ kernels as they ship, compiled for NVIDIA GPUs without one: registers and spills as ptxas tells them,
and what the machine code says of copies, matrix products and moves.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = (80, 90, 100)
STORAGES = ("float32", "float16", "bfloat16")
#: Bytes a thread that a window which MobileNets have not may keep in memory.
SPILLED = 64
#: Columns that a thread of a depthwise kernel has, at least: csrc/cuda/kernels.h.
COLUMNS = 4


def output(*command: str | Path, given: str | None = None) -> str:
    """What a program writes, to both of its streams."""
    run = subprocess.run(command, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, f"{' '.join(map(str, command))}\n{run.stdout}"
    return run.stdout


def disassembler() -> str | None:
    """The toolkit's cuobjdump, or the one that Triton brings along."""
    found = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends" / "nvidia" / "bin" for p in found.submodule_search_locations] if found else []
    return shutil.which("cuobjdump") or next((p for f in folders if (p := shutil.which("cuobjdump", path=f))), None)


def missing() -> str:
    """Why nothing can be compiled here; empty if everything can be."""
    for program, there in {**{p: shutil.which(p) for p in ("nvcc", "c++filt")}, "cuobjdump": disassembler()}.items():
        if not there:
            return f"there is no {program}"
    known = output("nvcc", "--list-gpu-arch").split()
    unknown = [f"sm_{a}" for a in ARCHITECTURES if f"compute_{a}" not in known]
    return f"this nvcc does not know {', '.join(unknown)}" if unknown else ""


MISSING = missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


# Compiling ------------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What ptxas made of a kernel."""

    name: str  # as in C++: depthwise_forward<bfloat16, 5, 1>
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a block, what the launch asks for not included
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    @property
    def moves(self) -> int:
        return self.count(r"MOV|IMAD\.MOV.*")

    @property
    def products(self) -> int:
        """a * b + c of float32; those of divisions and of exp round otherwise, for the most part."""
        return self.count("FFMA") + 2 * self.count("FFMA2")

    @property
    def window(self) -> int | None:
        """Of a depthwise kernel: how many rows and columns its window has."""
        found = re.match(r"depthwise_\w+<\w+, (\d+), \d+>", self.name)
        return int(found[1]) if found else None


def readable(text: str) -> str:
    """With the names of kernels as in C++, without namespaces, types and parameters."""
    named = output("c++filt", given=text)
    return re.sub(r"\bvoid mbn::(\w+(?:<.*>)?)\(.*\)", lambda m: m[1].replace("mbn::", ""), named)


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """How often a kernel has each instruction."""
    functions = readable(output(disassembler() or "", "-sass", cubin)).split("\tFunction : ")[1:]
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {f[: f.index("\n")]: Counter(pattern.findall(f)) for f in functions}


def compiled(storage: str, architecture: int, folder: Path) -> list[Kernel]:
    cubin = folder / "kernels.cubin"
    options = ("-O3", f"-arch=sm_{architecture}", "-I", CSRC, "-I", CSRC / "cuda", "-Xptxas", "-v")
    log = readable(output("nvcc", *options, "-cubin", "-o", cubin, CSRC / "cuda" / f"kernels_{storage}.cu"))
    code = instructions(cubin)
    report = re.compile(
        r"Compiling entry function '(?P<name>.*)' for .*\n.*\n"
        r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    kernels = []
    for found in report.finditer(log):
        spilled = max(int(found[each]) for each in ("stack", "stores", "loads"))
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        name = found["name"]
        kernels.append(Kernel(name, int(found["registers"]), spilled, int(shared[1]) if shared else 0, code.pop(name)))
    assert kernels and not code, f"kernels without a report: {sorted(code)}\n{log}"
    return kernels


# What is expected -----------------------------------------------------------------------------------------------------


def faults(kernel: Kernel, storage: str) -> list[str]:
    """Numbers that went to memory, narrow copies, and products without the matrix units."""
    k, found = kernel.window, []
    common = k is None or k in (3, 5)
    local = kernel.count(r"(LDL|STL)\b.*")
    if kernel.spilled > (0 if common else SPILLED):
        found.append(f"{kernel.spilled} bytes spilled")
    if common and local:
        found.append(f"{local} loads and stores of local memory")
    copies, wide = kernel.count(r"LDGSTS\b.*"), kernel.count(r"LDGSTS\..*\bBYPASS\.128\b.*")
    if copies == 0 or wide < copies:
        found.append(f"{wide} of {copies} copies to shared memory are of 16 bytes")
    if k is not None and kernel.products < 2 * k * k * COLUMNS:
        found.append(f"{kernel.products} products: a window is not unrolled")
    if k is not None and kernel.products <= (multiplied := kernel.count(r"FMUL2?\b.*")):
        found.append(f"{multiplied} multiplications without a sum, and {kernel.products} with one")
    if kernel.name.startswith("inverted_residual") and storage != "float32":
        found += [f"no {name}" for name in ("HMMA.16816", "LDSM") if not kernel.count(rf"{re.escape(name)}\b.*")]
    return found


# float16 is bfloat16 with other conversions: one GPU is enough.
@pytest.mark.parametrize(
    "storage, architecture", [(s, a) for s in STORAGES for a in ARCHITECTURES if s != "float16" or a == 90]
)
def test_kernels(storage: str, architecture: int, tmp_path: Path, record_property) -> None:
    """All that is checked of one compilation, which takes seconds."""
    kernels = compiled(storage, architecture, tmp_path)
    for k in kernels:
        row = (k.name, architecture, k.registers, k.spilled, k.shared, k.moves, k.products)
        record_property("cuda", row)
    wrong = [f"sm_{architecture} {k.name}: {fault}" for k in kernels for fault in faults(k, storage)]
    assert not wrong, "\n".join(wrong)
    for kernel in ("depthwise_forward", "depthwise_backward"):
        windows = {(k.window, k.name[-2]) for k in kernels if k.name.startswith(f"{kernel}<")}
        assert windows == {(window, stride) for window in (3, 5, 7) for stride in "12"}, kernel
