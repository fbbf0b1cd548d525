"""Builds the CUDA library's sources for the CPU, with the functions of tests/cuda_host/gpu_on_host.h for a GPU's."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
HOST = Path(__file__).parent / "cuda_host"
SANITIZE = "MBN_SANITIZE_CUDA_HOST"


def compiler() -> str | None:
    return shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])


def build(edits: tuple[tuple[str, str, str], ...] = (), sanitize: bool = False) -> Path:
    """The library, built once for each state of the sources. ``edits``: (file, text, what stands in its place) in a
    copy of csrc; ``sanitize``: with AddressSanitizer.
    """
    files = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir(), *HOST.iterdir()])
    state = hashlib.sha256(repr((torch.__version__, edits, sanitize, Path(__file__).read_text())).encode())
    for file in files:
        state.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_host" / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several processes test at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "host.so"
        if not library.exists():
            _compile(folder, edits, sanitize, library)
        return library


def _compile(folder: Path, edits: tuple[tuple[str, str, str], ...], sanitize: bool, library: Path) -> None:
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cpu"))
    for name, text, instead in edits:
        file = sources / "cuda" / name
        assert file.read_text().count(text) == 1, f"{name}: {text!r}"
        file.write_text(file.read_text().replace(text, instead))
    include = ["-I" + str(path) for path in (sources, sources / "cuda", HOST)]
    include += ["-isystem", str(Path(torch.__file__).parent / "include")]  # whose warnings are not ours
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DMBN_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-fsanitize=address", "-fno-omit-frame-pointer"] if sanitize else []
    command = [*shlex.split(os.environ.get("CXX", "c++")), *flags, *include]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}-{source.suffix[1:]}.o"
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    units = [*(sources / "cuda").glob("*.cpp"), *(sources / "cuda").glob("*.cu"), *HOST.glob("*.cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, units))
    libraries = ["-L" + str(Path(torch.__file__).parent / "lib"), "-ltorch", "-ltorch_cpu"]
    made = library.with_suffix(".new")
    _run([*command, "-shared", *map(str, objects), *libraries, "-o", str(made)])
    os.replace(made, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


class Host:
    """The library in this process, and what tests may tell it."""

    def __init__(self) -> None:
        library = build(sanitize=os.environ.get(SANITIZE) == "1")
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._library.mbn_host_skip.restype = ctypes.c_bool
        self._library.mbn_host_skip.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._library.mbn_host_launches.restype = ctypes.c_long
        self._library.mbn_host_order.argtypes = [ctypes.c_bool]

    def order(self, from_the_last: bool) -> None:
        """Threads from the last on and copies at once, instead of from the first on and copies at the last moment."""
        self._library.mbn_host_order(from_the_last)

    def skip(self, file: str = "", line: int = 0) -> bool:
        """Leaves out the barrier or wait at that line; returns whether one was left out since the last call."""
        return self._library.mbn_host_skip(file.encode(), line)

    def launches(self) -> int:
        """Kernels started since the last call."""
        return self._library.mbn_host_launches()
