"""The Triton kernels of MobileNetV3-Large at its real shapes, batch 256, compiled for NVIDIA GPUs without one:
registers, spills, shared memory, wide loads, matrix instructions; and, from the launches alone, how many there are and
what they move.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
from oracle import Case, dw, pw, se
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_record import Launch, Recorded, record_block, record_case

from mbn_kernels.backends.triton import config, device
from mbn_kernels.models.tables import BlockShape, layer_shapes

pytestmark = pytest.mark.skipif(device.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")

LARGE = "mobilenet_v3_large"
BATCH = 256
#: What a program may have on the smallest of the GPUs from sm_80 on: sm_86, sm_89 and sm_120.
SHARED = 99 * 1024
#: Bytes a thread: ptxas keeps a few numbers in memory where one more program then fits on a multiprocessor. Products of
#: 64 by 128 numbers by four warps, which keep so many, were the fastest of all on an H100; on sm_100, where nothing was
#: measured, they keep more.
SPILLED = {80: 160, 90: 160, 100: 560}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


# Compiling ------------------------------------------------------------------------------------------------------------


def source(launch: Launch) -> ASTSource:
    """What the launch would compile: as Triton does, 1 and None are constants, and multiples of 16 are known to be, but
    of the arguments that say that it should not matter.
    """
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(launch.kernel.params):
        v = launch.arguments[p.name]
        if p.is_constexpr or v is None or (type(v) is int and v == 1 and not p.do_not_specialize):
            signature[p.name], constants[(i,)] = "constexpr", v
            continue
        if isinstance(v, torch.Tensor):
            signature[p.name], aligned = POINTERS[v.dtype], v.storage_offset() * v.element_size() % 16 == 0
        elif isinstance(v, float):
            signature[p.name], aligned = "fp32", False
        else:
            signature[p.name], aligned = "i32" if abs(v) < 2**31 else "i64", v % 16 == 0
            aligned = aligned and not p.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def options(launch: Launch) -> dict:
    return {name: launch.arguments[name] for name in OPTIONS}


def distinct(launches: Iterator[Launch]) -> list[Launch]:
    """One of the launches that compile to the same code."""
    found = {}
    for launch in launches:
        s = source(launch)
        found.setdefault((launch.name, str((s.signature, s.constants, s.attrs, options(launch)))), launch)
    return [found[key] for key in sorted(found)]


class Compiled(NamedTuple):
    """What ptxas made of a kernel."""

    registers: int
    spilled: int  # bytes of stack
    shared: int
    ptx: str
    cubin: bytes

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, tool("-sass", self.cubin)))


@functools.lru_cache(maxsize=2)  # to disassemble a kernel takes longer than all else here
def tool(what: str, cubin: bytes) -> str:
    """What the cuobjdump that Triton brings along prints of a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, what, file.name], capture_output=True, text=True, check=True).stdout


def compiled(launch: Launch, architecture: int) -> Compiled:
    binary = triton.compile(source(launch), target=GPUTarget("cuda", architecture, 32), options=options(launch))
    cubin = binary.asm["cubin"]
    used = tool("-res-usage", cubin)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", used)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack + local, binary.metadata.shared, binary.asm["ptx"], cubin)


def title(launch: Launch, architecture: int) -> str:
    sizes = {k: v for k, v in launch.arguments.items() if k.isupper() and isinstance(v, int)}
    return f"sm_{architecture} {launch.name} {sizes} num_warps {launch.arguments['num_warps']}"


PRECISIONS = {"bfloat16": (torch.bfloat16, True), "tf32": (torch.float32, True), "float32": (torch.float32, False)}
#: Every GPU with the dtype that it is trained with; float32 on one of them, as its tiles are smaller.
CHOICES = [(80, "bfloat16"), (90, "bfloat16"), (80, "tf32"), (90, "float32")]
#: The newest, for which nothing was tuned, takes minutes: with --runslow. Odd chains are compiled for sm_90 alone.
CHOICES += [pytest.param(100, "bfloat16", marks=pytest.mark.slow)]
#: So many processes at most can share a choice.
PIECES = 4


def only_own(patch: pytest.MonkeyPatch) -> None:
    """Every 1x1 convolution runs in Triton."""
    for name in ("library_forward", "library_backward"):
        patch.setattr(config, name, lambda *_: False)


@functools.cache
def recorded(precision: str, products: bool = False) -> tuple[Recorded, ...]:
    """``products``: with PyTorch's own where they are likely to be faster; else all is Triton's."""
    dtype, tf32 = PRECISIONS[precision]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        if not products:
            only_own(patch)
        return tuple(record_block(b, BATCH, dtype) for b in layer_shapes(LARGE))


@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("architecture, precision", CHOICES)
def test_every_kernel_compiles(architecture: int, precision: str, piece: int, record_property) -> None:
    # In float32 there are other products and windows; the rest is the same code.
    wanted = "" if precision == "bfloat16" else ("pointwise", "depthwise")
    launches = [
        launch for products in (False, True) for block in recorded(precision, products) for launch in block.launches
    ]
    found, faults = distinct(launch for launch in launches if launch.name.startswith(wanted)), []
    for launch in found[piece::PIECES]:
        made = compiled(launch, architecture)
        record_property("triton", (launch.name, architecture, precision, made.registers, made.spilled, made.shared))
        new = [f"{made.spilled} bytes spilled"] if made.spilled > SPILLED[architecture] else []
        new += [f"{made.shared} bytes of shared memory"] if made.shared > SHARED else []
        faults += [f"{title(launch, architecture)}: {fault}" for fault in new + instruction_faults(launch, made)]
    assert not faults, "\n".join(faults)


GATE = ("relu", "hardsigmoid")
#: Chains that give kernels every combination of arguments that can be absent, and windows that MobileNets have not.
ODD = (
    Case("v3", (2, 16, 9, 8), (pw(48, "hardswish"), dw(5, "hardswish", gate=GATE), pw(16)), True),
    Case("no-norm", (2, 16, 9, 8), (pw(32, "silu", norm=False), dw(3, norm=False), pw(16, norm=False)), True),
    Case("not-affine", (2, 17, 9, 8), (pw(32, "relu6", affine=False), dw(3, "relu6", affine=False))),
    Case("gate-first", (2, 16, 9, 8), (pw(24, "silu", gate=("silu", "sigmoid")), dw(3, "relu"), pw(16)), True),
    Case("two-gates", (2, 1, 9, 8), (dw(3, "relu", gate=GATE), pw(16, gate=GATE))),
    Case("squeeze-excite", (2, 16, 9, 8), (se(),)),
    Case("dilated", (2, 16, 15, 14), (dw(3, "relu", dilation=2), dw(5, "relu", dilation=(1, 3), stride=2))),
    Case("gaps", (2, 16, 15, 14), (dw(3, "relu", stride=2, dilation=2), dw((1, 2), stride=3, padding=0))),
    Case("7x7", (2, 16, 15, 14), (dw(7, "hardswish", stride=2),)),
)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_every_combination_of_arguments_compiles(case: Case) -> None:
    """The interpreter takes Python that the compiler does not."""
    launches = [each for training in (True, False) for each in record_case(case, torch.bfloat16, training)]
    names = set()
    for launch in distinct(launches):
        made = compiled(launch, 90)
        assert made.shared <= SHARED, title(launch, 90)
        names.add(launch.name)
    assert len(names) > 3


def test_a_residual_is_added_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler likes to begin a sum with it: in float32 each term would then be rounded to the residual's size."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    launches = [each for training in (True, False) for each in record_case(ODD[0], torch.float32, training)]
    found = [a for a in launches if a.name == "pointwise_backward" and a.arguments["residual"] is not None]
    assert found
    for launch in found:
        code = triton.compile(source(launch), target=GPUTarget("cuda", 90, 32), options=options(launch)).asm["ttir"]
        begun, loaded = (set(re.findall(p, code)) for p in (r"tt\.dot \S+ \S+ (%\w+)", r"(%\w+) = tt\.load"))
        assert begun and loaded and not begun & loaded


def instruction_faults(launch: Launch, made: Compiled) -> list[str]:
    """Narrow loads and stores where a kernel waits for memory, and products without the matrix units."""
    a, faults = launch.arguments, []
    if launch.name in ("_materialize", "_reduce_gradient", "_pool"):
        wide = 16
    elif launch.name.startswith("depthwise"):  # as wide as leaves room for the window in registers
        wide = a["COLUMNS"] * a["CHANNELS"] // (32 * a["num_warps"]) * a["x"].element_size()
    else:
        wide = 0
    bits = min(8 * wide, 128)
    if wide and bits > 32 and not made.count(rf"LDG\S*\.{bits}\b"):
        faults.append(f"no load of {wide} bytes")
    if wide and bits > 32 and launch.name not in ("_reduce_gradient", "_pool") and not made.count(rf"STG\S*\.{bits}\b"):
        faults.append(f"no store of {wide} bytes")
    if launch.name.startswith("pointwise"):
        rows_are_aligned = min(a["IN_UNIT"], a["OUT_UNIT"]) >= 8
        if rows_are_aligned and not made.count(r"(LDG|LDGSTS)\S*\.128\b"):
            faults.append("no load of 16 bytes")
        plain = a["x" if a["x"] is not None else "g_dv"].dtype == torch.float32 and a["PRECISION"] == "ieee"
        if a["PRECISION"] == "tf32" and "cvt.rna.tf32.f32" not in made.ptx:
            faults.append("operands are cut off, not rounded, to TF32")
        if not plain and not made.count(r"\b(HMMA|HGMMA|UTC\w*MMA)"):
            faults.append("no matrix instruction")
    return faults


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bfloat16", "float32"))
def test_few_candidates(dtype: torch.dtype) -> None:
    """At most eight tile sizes to try for a kernel, no two the same."""
    device = torch.device("meta")
    for inner in (1, 16, 24, 112, 960):
        for outer in (1, 16, 40, 200, 672):
            for rounding in ("ieee", "tf32"):
                lists = [
                    *(
                        config.pointwise_forward(50176, inner, outer, dtype, rounding, statistics, deferred, in_all)
                        for statistics in (True, False)
                        for deferred in (True, False)
                        for in_all in (49, 50176)
                    ),
                    *(
                        config.pointwise_backward(50176, inner, outer, dtype, rounding, together, sums)
                        for together in (True, False)
                        for sums in (0, 2, 5)
                    ),
                    config.pointwise_weight(50176, inner, outer, dtype, rounding),
                ]
                assert all(1 <= len(found) <= 8 for found in lists)
    for channels in (1, 16, 72, 960):
        for k in (3, 5, 7):
            for columns in (1, 7, 112):
                shape = (256, channels, columns, columns, (k, k))
                lists = [
                    config.depthwise_forward(*shape, 1, True, dtype, device),
                    config.depthwise_backward(*shape, dtype, device),
                    *(config.elementwise(channels, columns**2, numbers) for numbers in (0, 5)),
                ]
                assert all(1 <= len(found) <= 8 for found in lists)


# Launches and bytes ---------------------------------------------------------------------------------------------------


def test_launches_of_a_block() -> None:
    """(kernels, PyTorch's own) that training's forward, its backward and evaluation start, as docs/design.md says:
    first where all is Triton's, then by default.

    No kernel is there for batch norm's or an activation's backward, or to scale by squeeze-excite.
    """

    def counts(network: str, i: int) -> list[tuple[int, int]]:
        block = record_block(layer_shapes(network)[i], BATCH, torch.bfloat16)
        return [(len(launches), len(others)) for launches, others in block]

    with pytest.MonkeyPatch.context() as patch:
        only_own(patch)
        assert counts("mobilenet_v1", 2) == [(5, 0), (7, 0), (2, 0)]
        assert counts("mobilenet_v2", 2) == [(7, 0), (10, 0), (3, 0)]
        assert counts(LARGE, 13) == [(10, 0), (17, 2), (5, 0)]
    assert counts("mobilenet_v1", 2) == [(6, 1), (7, 2), (2, 0)]
    assert counts(LARGE, 13) == [(11, 2), (15, 6), (5, 0)]


def least_bytes(b: BlockShape) -> int:
    """The minimum of a training step of a block, in 16-bit numbers an image: docs/design.md, "What it costs".

    Forward: each convolution reads its input and writes its output, squeeze-excite reads the depthwise output, the last
    stage is materialised. Backward: each convolution reads its input, its output and the gradient of that, and writes
    the gradient of its input; the last stage's sums read its output and gradient.
    """
    pixels, after = b.height * b.width, -(-b.height // b.s) * -(-b.width // b.s)
    expands = b.exp_channels != b.in_channels
    x, e, d, p = b.in_channels * pixels, b.exp_channels * pixels, b.exp_channels * after, b.out_channels * after
    residual = p if b.s == 1 and b.in_channels == b.out_channels else 0
    expansion = (x + e, 2 * e + 2 * x) if expands else (0, 0)
    forward = expansion[0] + e + d + (d if b.se else 0) + d + p + 2 * p + residual
    backward = 2 * p + (2 * p + 2 * d) + (2 * d + 2 * e) + expansion[1] + residual
    return 2 * (forward + backward)


def moved_bytes(block: Recorded, *passes: int) -> float:
    return sum(each.bytes for i in passes for each in (*block[i][0], *block[i][1])) / BATCH


def test_bytes_of_a_training_step() -> None:
    """In Triton all of MobileNetV3-Large's blocks move at most 1.1 times the minimum: the figures of docs/design.md.

    Every launch reads and writes its tensors once (test_triton_interpreter.py counts), those for partial results and
    weights included. Programs that read the same rows run side by side, so that a second reading is the cache's.
    By default wide layers run PyTorch's products, which move more and take less time.
    """
    least = sum(least_bytes(b) for b in layer_shapes(LARGE))
    assert 58e6 < least < 59e6
    moved = sum(moved_bytes(block, 0, 1) for block in recorded("bfloat16"))
    assert 62e6 < moved < 63e6
    assert moved <= 1.10 * least
    evaluated = sum(moved_bytes(block, 2) for block in recorded("bfloat16"))
    assert 17.5e6 < evaluated < 18.8e6  # 18.8 MB is every tensor between two layers written and read once
    by_default = sum(moved_bytes(block, 0, 1) for block in recorded("bfloat16", True))
    assert by_default < 1.45 * least
