"""Every kernel operator has all the pieces that CONTRIBUTING.md's five steps name, and every path it names is there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_ops import kernel_calls

import mbn_kernels
from mbn_kernels.schemas import CUDA_SCHEMAS, KERNEL_SCHEMAS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
STEPS = PAGE.split("## Add a kernel operator in five steps")[1].split("\n## ")[0]

Sources = Mapping[str, str]  # by path, the text


class Piece(NamedTuple):
    """What a step asks for: a pattern that one of the files has to hold, in the class or table that begins with
    ``within``. In it stand the operator, its method of the backends, its struct, and the name of its kernel.
    """

    name: str
    step: int
    files: str
    pattern: str
    within: str = ""


METHOD = r"^    (def {method}\(|{method} = )"
PIECES = (
    Piece("schema", 1, "mbn_kernels/schemas.py", r'^    "{op}": ', "KERNEL_SCHEMAS = {"),
    Piece("reference", 2, "mbn_kernels/backends/reference.py", METHOD, "class ReferenceKernels"),
    Piece("protocol", 2, "mbn_kernels/chain.py", METHOD, "class Kernels(Protocol)"),
    Piece("struct", 3, "csrc/cpu/types.h", r"^struct {Struct} \{{"),
    Piece("template", 3, "csrc/cpu/*.h", r"\bvoid {kernel}\(const {Struct}<S>& p\) \{{"),
    Piece("row", 3, "csrc/cpu/kernels.h", r"\bvoid \(\*{kernel}\)\(const {Struct}<S>&\);"),
    Piece("row of the set", 3, "csrc/cpu/kernel_table.h", r"\bMBN_ISA::{kernel}<S>"),
    Piece("binding", 3, "csrc/cpu/*.cpp", r'\bm\.impl\("{op}", TORCH_BOX\(&mbn::(\w+::)*{op}\)\)'),
    Piece("call of the kernel", 3, "csrc/cpu/*.cpp", r"\bkernels_for<S>\(\)\.(\w+\.)?{kernel}\(p\)"),
    Piece("call of the operator", 3, "mbn_kernels/backends/cpu.py", r"\b_ops\.{op}\("),
    Piece("Triton kernel", 3, "mbn_kernels/backends/triton/*.py", r"^@kernel\ndef _?{method}\("),
    Piece("its launch", 3, "mbn_kernels/backends/triton/*.py", r"(?<!@kernel\n)^def {method}\("),
    Piece("line of Triton's", 3, "mbn_kernels/backends/triton/kernels.py", METHOD, "class TritonKernels"),
    Piece("use", 4, "mbn_kernels/chain.py", r"\bkernels\.{method}\("),
)
CUDA_PIECES = (
    Piece("schema", 1, "mbn_kernels/schemas.py", r'^    "{op}": ', "CUDA_SCHEMAS = {"),
    Piece("struct", 3, "csrc/cuda/types.h", r"^struct {Struct} \{{"),
    Piece("kernel", 3, "csrc/cuda/*.cuh", r"^MBN_KERNEL\(.*\) {kernel}\(const {Struct} p\) \{{"),
    Piece("declaration", 3, "csrc/cuda/kernels.h", r"^void run_{kernel}\(const {Struct}& p, "),
    Piece("start", 3, "csrc/cuda/kernel_table.cuh", r"^void run_{kernel}<MBN_STORAGE>\(const {Struct}& p, "),
    Piece("binding", 3, "csrc/cuda/*.cpp", r'\bm\.impl\("{op}", TORCH_BOX\(&mbn::{method}\)\)'),
    Piece("call of the kernel", 3, "csrc/cuda/*.cpp", r"\brun_{kernel}<.+>\(p, "),
    Piece("call of the operator", 3, "mbn_kernels/backends/cuda/*.py", r"\btorch\.ops\.mbn\.{op}\.default\("),
    Piece("case", 3, "tests/cuda_host_calls.py", r"\b(depthwise|blocks)\.{method}\("),
)
WITHOUT_KERNEL = dict.fromkeys(("struct", "template", "row", "row of the set", "call of the kernel"))
WITHOUT_TRITON = dict.fromkeys(("Triton kernel", "its launch"))
#: What an operator has otherwise, as the page says: another file, another method, or (None) no such piece.
OTHERWISE: dict[str, dict[str, dict[str, str] | None]] = {
    "norm_forward": WITHOUT_KERNEL,
    "norm_backward": WITHOUT_KERNEL,
    "evaluate": {"reference": {"method": "evaluates"}, "use": {"files": "mbn_kernels/ops.py"}} | WITHOUT_TRITON,
    "evaluate_held": {"use": {"files": "mbn_kernels/modules/kept.py"}} | WITHOUT_KERNEL | WITHOUT_TRITON,
}
METHODS = {"norm_forward": "running_norm", "evaluate_held": "prepared"}
KERNELS = {"cuda_gated_project": "inverted_residual"}


def load() -> dict[str, str]:
    kinds = ("mbn_kernels/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cuh", "tests/cuda_host_calls.py")
    return {str(file.relative_to(ROOT)): file.read_text() for kind in kinds for file in ROOT.glob(kind)}


def part_of(text: str, within: str) -> str:
    """The indented lines below the one that begins so."""
    found = re.search(rf"^{re.escape(within)}.*\n((?:[ \t].*\n|\n)*)", text, re.MULTILINE)
    return found[1] if found else ""


def has(sources: Sources, op: str, piece: Piece, other: dict[str, str]) -> bool:
    own = op.removeprefix("cuda_")
    kernel = KERNELS.get(op, own)
    names = {"op": op, "kernel": kernel, "method": other.get("method", METHODS.get(op, own))}
    pattern = piece.pattern.format(**names, Struct="".join(map(str.capitalize, kernel.split("_"))))
    files = [path for path in sources if Path(path).match(other.get("files", piece.files))]
    texts = (part_of(sources[path], piece.within) if piece.within else sources[path] for path in files)
    return any(re.search(pattern, text, re.MULTILINE) for text in texts)


def missing(op: str, sources: Sources, reached: set[str]) -> list[str]:
    """The pieces of the five steps that an operator lacks, by name; ``reached``: operators that the cases call."""
    pieces, otherwise, lacks = CUDA_PIECES if op.startswith("cuda_") else PIECES, OTHERWISE.get(op, {}), []
    for piece in pieces:
        other = otherwise.get(piece.name, {})
        if other is not None and not has(sources, op, piece, other):
            lacks.append(piece.name)
    return lacks if op.startswith("cuda_") or op in reached else [*lacks, "case"]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return load()


@pytest.fixture(scope="module")
def reached() -> set[str]:
    reason = mbn_kernels.available_backends()["cpu"]
    if reason != "available":
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        return set(kernel_calls(patch))


@pytest.mark.parametrize("op", [*KERNEL_SCHEMAS, *CUDA_SCHEMAS])
def test_every_step_was_taken(op: str, sources: Sources, reached: set[str]) -> None:
    assert missing(op, sources, reached) == []


def test_every_binding_has_a_schema(sources: Sources) -> None:
    """A library's operator that Python does not define could be called by nobody."""
    bound = {op for text in sources.values() for op in re.findall(r'\bm\.impl\("(\w+)"', text)}
    defined = set(re.findall(r'^library\.define\(\s*"(\w+)\(', sources["mbn_kernels/schemas.py"], re.MULTILINE))
    assert bound == {*KERNEL_SCHEMAS, *CUDA_SCHEMAS, *defined}


@pytest.mark.parametrize("op", [*KERNEL_SCHEMAS, *CUDA_SCHEMAS])
def test_outputs_are_arguments(op: str) -> None:
    schema = getattr(torch.ops.mbn, op).default._schema
    assert not schema.returns
    assert any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments)


# A made-up operator ---------------------------------------------------------------------------------------------------

OP, CUDA_OP = "mirror_rows", "cuda_mirror_rows"
SCHEMAS, ELEMENTWISE, TRITON = "mbn_kernels/schemas.py", "csrc/cpu/elementwise", "mbn_kernels/backends/triton"
#: By piece: a file, the beginning of a line of it, and what is added in front.
ADDED = {
    "schema": (SCHEMAS, '    "pool": ', '    "mirror_rows": f"{_VALUE}, Tensor(a!) out",\n'),
    "reference": ("mbn_kernels/backends/reference.py", "    def pool(", "    def mirror_rows(self, u): ...\n"),
    "protocol": ("mbn_kernels/chain.py", "    def pool(", "    def mirror_rows(self, u): ...\n"),
    "struct": ("csrc/cpu/types.h", "template <class S>\nstruct Pool", "template <class S>\nstruct MirrorRows {\n};\n"),
    "template": (f"{ELEMENTWISE}.h", "template", "template <class S>\nvoid mirror_rows(const MirrorRows<S>& p) {\n}\n"),
    "row": ("csrc/cpu/kernels.h", "  void (*pool)", "  void (*mirror_rows)(const MirrorRows<S>&);\n"),
    "row of the set": ("csrc/cpu/kernel_table.h", "        MBN_ISA::pool", "        MBN_ISA::mirror_rows<S>, "),
    "binding": (f"{ELEMENTWISE}.cpp", "  m.impl(", '  m.impl("mirror_rows", TORCH_BOX(&mbn::mirror_rows));\n'),
    "call of the kernel": (f"{ELEMENTWISE}.cpp", "void pool(", "f() { kernels_for<S>().mirror_rows(p); }\n"),
    "call of the operator": ("mbn_kernels/backends/cpu.py", "    def pool(", "    _ops.mirror_rows(1)\n"),
    "Triton kernel": (f"{TRITON}/elementwise.py", "@kernel", "@kernel\ndef _mirror_rows(x): ...\n"),
    "its launch": (f"{TRITON}/elementwise.py", "def pool(", "def mirror_rows(u): ...\n"),
    "line of Triton's": (f"{TRITON}/kernels.py", "    pool = ", "    mirror_rows = elementwise.mirror_rows\n"),
    "use": ("mbn_kernels/chain.py", "def forward(", "def f(kernels): kernels.mirror_rows(u)\n"),
}
OF_CUDA = "csrc/cuda/depthwise"
CUDA_ADDED = {
    "schema": (SCHEMAS, '    "cuda_gated_project"', '    "cuda_mirror_rows": "Tensor(a!) out",\n'),
    "struct": ("csrc/cuda/types.h", "struct Launch", "struct MirrorRows {\n};\n"),
    "kernel": (f"{OF_CUDA}_forward.cuh", "MBN_KERNEL", "MBN_KERNEL(1, 2) mirror_rows(const MirrorRows p) {\n}\n"),
    "declaration": ("csrc/cuda/kernels.h", "template", "void run_mirror_rows(const MirrorRows& p, void* stream);\n"),
    "start": (
        "csrc/cuda/kernel_table.cuh",
        "template",
        "void run_mirror_rows<MBN_STORAGE>(const MirrorRows& p, x) {\n",
    ),
    "binding": (f"{OF_CUDA}.cpp", "  m.impl(", '  m.impl("cuda_mirror_rows", TORCH_BOX(&mbn::mirror_rows));\n'),
    "call of the kernel": (f"{OF_CUDA}.cpp", "void depthwise", "f() { run_mirror_rows<float>(p, stream); }\n"),
    "call of the operator": (
        "mbn_kernels/backends/cuda/blocks.py",
        "def",
        "torch.ops.mbn.cuda_mirror_rows.default()\n",
    ),
    "case": ("tests/cuda_host_calls.py", "def forward", "blocks.mirror_rows(x)\n"),
}


def with_added(sources: Sources, pieces: dict[str, tuple[str, str, str]]) -> dict[str, str]:
    found = dict(sources)
    for file, line, text in pieces.values():
        assert line in found[file], f"{file}: {line!r}"
        found[file] = found[file].replace(line, text + line, 1)
    return found


@pytest.mark.parametrize(
    "op, added, pieces", [(OP, ADDED, PIECES), (CUDA_OP, CUDA_ADDED, CUDA_PIECES)], ids=[OP, CUDA_OP]
)
def test_a_step_left_out_is_found(op: str, added: dict, pieces: tuple[Piece, ...], sources: Sources) -> None:
    names = [piece.name for piece in pieces]
    assert list(added) == names
    assert missing(op, sources, set()) == names + ["case"] * (op == OP)
    assert missing(op, with_added(sources, added), {op}) == []
    for left_out in names:
        others = {name: piece for name, piece in added.items() if name != left_out}
        assert missing(op, with_added(sources, others), {op}) == [left_out]
    if op == OP:
        assert missing(op, with_added(sources, added), set()) == ["case"]


def test_what_is_otherwise_is_so_and_on_the_page(sources: Sources, reached: set[str], monkeypatch) -> None:
    for op, otherwise in list(OTHERWISE.items()):
        with monkeypatch.context() as patch:
            patch.delitem(OTHERWISE, op)
            assert set(missing(op, sources, reached)) == set(otherwise)
    for op, name in (METHODS | KERNELS).items():
        with monkeypatch.context() as patch:
            patch.setattr(f"{__name__}.METHODS", {})
            patch.setattr(f"{__name__}.KERNELS", {})
            assert missing(op, sources, reached)
        assert f"`{op}`" in STEPS and f"`{name}`" in STEPS
    assert all(f"`{op}`" in STEPS for op in OTHERWISE)


# Paths ----------------------------------------------------------------------------------------------------------------


def paths_of(text: str) -> list[str]:
    """The paths that a text names in `code`; one without a folder lies beside the one before."""
    found: list[str] = []
    for name in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", name):
            found.append(name)
        elif re.fullmatch(r"[\w*-]+\.(py|h|cuh|cpp|md)", name) and found:
            found.append(f"{found[-1].rpartition('/')[0]}/{name}")
    return found


def test_every_path_is_there() -> None:
    table = PAGE.split("## Where things are")[1].split("\n## ")[0]
    assert len(paths_of(table)) > 25 and len(paths_of(STEPS)) > 20
    assert [path for path in paths_of(PAGE) if not any(ROOT.glob(path.rstrip("/")))] == []


def test_paths_are_found() -> None:
    text = "`a/b.py`, `c.py`, `a/*.h`, `d/`, `KERNEL`, `use_backend`, `op: a/b`, `x.y`, `../e/f.h`"
    assert paths_of(text) == ["a/b.py", "a/c.py", "a/*.h", "d/", "../e/f.h"]


def test_the_steps_name_what_is_looked_for() -> None:
    steps = re.split(r"^\d\. ", STEPS, flags=re.MULTILINE)[1:]
    assert len(steps) == 5
    others = [piece["files"] for each in OTHERWISE.values() for piece in each.values() if piece and "files" in piece]
    for piece in (*PIECES, *CUDA_PIECES):
        assert piece.files in paths_of(steps[piece.step - 1]), piece
    assert set(others) <= set(paths_of(STEPS))
    assert "`kernel_calls`" in steps[4] and "tests/test_ops.py" in paths_of(steps[4])
