"""The CPU library's sources compile for aarch64, whatever this machine is: with the clang of the package ziglang."""

from __future__ import annotations

import os
import re
import shlex
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
# The C library of PyTorch's own wheels for aarch64.
TARGET = "aarch64-linux-gnu.2.28"
# -O0 instantiates every template and makes machine code of it in 8 s for the kernels, -O1 takes six times as long.
# Without -fno-sanitize, zig would have undefined behaviour checked at -O0.
FLAGS = ["-std=c++17", "-O0", "-g0", "-fno-sanitize=undefined", "-fPIC", "-fvisibility=hidden"]
# What an initializer leaves out is zero, which is meant.
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
ELF_RELOCATABLE, ELF_AARCH64 = 1, 183


def compile_for_aarch64(source: Path, made: Path) -> None:
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    # Whose warnings are not ours.
    for others in (Path(torch.__file__).parent / "include", sysconfig.get_path("include")):
        include += ["-isystem", str(others)]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", TARGET, *FLAGS, *include]
    command += ["-c", str(source), "-o", str(made)]
    cache = str(made.parent / "cache")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_aarch64(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.o"
    compile_for_aarch64(source, made)
    contents = made.read_bytes()
    assert contents[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    assert struct.unpack_from("<HH", contents, 16) == (ELF_RELOCATABLE, ELF_AARCH64)
    # The tables of kernels_avx*.cpp, which nothing would define there: the library would not load.
    assert re.findall(rb"kAvx\w*", contents) == []
