"""What comes with the package and what it does to who installs it: the source archive is whole, build backends have
bounds, an import is quick, and neither that nor a training step runs text, starts a process, writes a file or asks a
network.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mbn_kernels

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mbn_kernels.__file__).parent


def run(program: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """What Python prints with the package from here, and files of it compiled nowhere."""
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(PACKAGE.parent)} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What is installed ----------------------------------------------------------------------------------------------------


def test_the_source_archive_is_whole(tmp_path: Path) -> None:
    """Also where it is made by a machine that builds nothing, whose setup.py names no sources."""
    pytest.importorskip("setuptools", "77", reason="setuptools>=77 makes the archive")
    packed = ("csrc", "mbn_kernels", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
    for name in packed:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_something.py").touch()  # setuptools would take it, without what tests need
    program = "import sys; sys.path.insert(0, ''); from setuptools import build_meta; build_meta.build_sdist('.')"
    run(program, cwd=tmp_path, MBN_BUILD_CPU="0", MBN_BUILD_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {member.name.partition("/")[2] for member in opened if member.isfile()}
    wanted = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.*")}
    wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / "mbn_kernels").rglob("*.py")}
    wanted |= {name for name in packed if (ROOT / name).is_file()}
    assert any(name.endswith(".cu") for name in wanted) and "csrc/cpu/python.cpp" in wanted
    assert wanted - held == set()
    made = re.compile(r"PKG-INFO|setup\.cfg|mbn_kernels\.egg-info/.*")
    assert [name for name in sorted(held - wanted) if not made.fullmatch(name)] == []


def test_build_backends_have_bounds() -> None:
    """So that a build of today is one of tomorrow: no next major is taken untried."""
    section = re.search(r"^\[build-system\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    requires = re.search(r"^requires = (\[.*\])$", section[1], re.MULTILINE)[1]
    named = dict(re.fullmatch(r"(\w+)(.*)", each).groups() for each in json.loads(requires))
    assert named.keys() == {"setuptools", "ninja"}
    for name, bounds in named.items():
        assert re.fullmatch(r">=\d+(\.\d+)*,<\d+", bounds), f"{name}{bounds}: expected a lower and an upper bound"


# What is read of sources ----------------------------------------------------------------------------------------------

#: Modules that run what a file or a peer says, or talk to one.
MODULES = {
    "code", "codeop", "ctypes", "dill", "ftplib", "http", "joblib", "marshal", "pickle", "requests", "runpy", "shelve",
    "smtplib", "socket", "socketserver", "ssl", "subprocess", "torch.hub", "torch.utils.model_zoo", "urllib.request",
    "xmlrpc",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
#: Of a module or an object, with what begins with them.
METHODS = re.compile(
    r"os\.(system|popen|exec|spawn|posix_spawn|fork)|torch\.(load|hub)|(numpy|np)\.load|(pickle|marshal|yaml)\.loads?"
    r"|torch\.(jit|export|package)\.load|importlib\.import_module"
)
#: Where a module is meant. The doctor asks git, compilers and nvidia-smi for their versions.
MEANT = {("__main__.py", "subprocess")}


def risks(text: str) -> Iterator[str]:
    """What a source imports or calls that may run what somebody else wrote."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and METHODS.match(ast.unparse(node)):
            yield ast.unparse(node)
        for name in names:
            if name in MODULES or name.partition(".")[0] in MODULES or METHODS.match(name):
                yield name


def test_no_source_runs_what_somebody_else_wrote() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = {(str(file.relative_to(PACKAGE)), risk) for file in files for risk in risks(file.read_text("utf-8"))}
    assert found == MEANT


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')", "exec(text)", "x = compile(text, 'a', 'exec')", "__import__(name)", "import pickle",
        "from marshal import loads", "import urllib.request", "from urllib import request", "import http.client",
        "torch.load(file)", "load = torch.load", "from torch import load", "os.system('ls')", "from os import execv",
        "torch.hub.load('a')", "from torch import hub", "np.load(file)", "def f():\n    import subprocess",
        "torch.jit.load(f)", "importlib.import_module(name)",
    ],
)  # fmt: skip
def test_risks_are_found(line: str) -> None:
    assert list(risks(line))


def test_harmless_lines_are_no_risks() -> None:
    text = "model.eval()\nfrom urllib.parse import unquote\njson.loads(t)\ntorch.ops.load_library(p)\nre.compile('a')"
    assert list(risks(text)) == []


# What a process does --------------------------------------------------------------------------------------------------

#: Keeps what the process does to the machine, once ``watch`` is among the interpreter's audit hooks.
WATCH = """
import json, os, sys
seen = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile")
def watch(event, args):
    if event.startswith(("socket.", "urllib.", "ftplib.", "http.", "smtplib.")) or event in STARTS:
        seen.append(event)
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITES and str(args[0]) != os.devnull:
        seen.append(f"{event} {args[0]}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "pickle.find_class", "os.symlink", "os.link", "os.chmod"):
        seen.append(event)
"""
IMPORT = (
    WATCH
    + """
import time
import torch.utils.flop_counter
before, began = set(sys.modules), time.process_time()
sys.addaudithook(watch)
import mbn_kernels
seconds, brought = time.process_time() - began, sorted(set(sys.modules) - before)
"""
)
STEP = """
from mbn_kernels import models
net = models.mobilenet_v3_small(num_classes=4)
x = torch.randn(2, 3, 32, 32)
net(x).square().sum().backward()
stock = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU6())
mbn_kernels.fuse(stock)
stock(x).square().sum().backward()
with torch.inference_mode():
    mbn_kernels.freeze(net.eval(), x)(x)
mbn_kernels.available_backends()
"""
DOCTOR = """
import contextlib, io
from mbn_kernels.__main__ import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main([]) == 0
"""


@cache
def process(program: str) -> tuple[float, list[str], list[str]]:
    """Of a process that runs it where nothing can be written: seconds of the import, the modules that it brought, and
    what was done to the machine.
    """
    nowhere = {"HOME": os.devnull, "MBN_CACHE_DIR": f"{os.devnull}/cache"}
    return tuple(json.loads(run(f"{IMPORT}{program}\nprint(json.dumps([seconds, brought, seen]))", **nowhere)))


def test_training_and_evaluation_leave_the_machine_alone() -> None:
    """No network, no process, no file. Nor is Triton loaded, unless PyTorch's counter of operations does it, nor what
    torch.compile or many GPUs need.
    """
    _, brought, seen = process(STEP)
    assert seen == []
    late = ("triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "torch.export")
    assert "mbn_kernels.ops" in brought and [name for name in brought if name.startswith(late)] == []


def test_the_doctor_asks_no_network() -> None:
    """It starts compilers for their versions, and writes no file."""
    _, _, seen = process(DOCTOR)
    assert set(seen) <= {"subprocess.Popen", "os.posix_spawn"}


def test_an_import_is_quick() -> None:
    """Beyond PyTorch's own; of processor time, as a machine may have more to do."""
    assert statistics.median(process(program)[0] for program in (STEP, DOCTOR, "")) < 0.3


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("import socket; socket.socket(socket.AF_UNIX).close()", "socket.__new__"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("os.system('true')", "os.system"),
        ("open('a', 'a').close()", "open a"),
        ("os.mkdir('b')", "os.mkdir"),
    ],
)
def test_what_a_process_does_is_seen(line: str, event: str, tmp_path: Path) -> None:
    program = f"{WATCH}\nsys.addaudithook(watch)\n{line}\nprint(json.dumps(seen))"
    assert event in json.loads(run(program, cwd=tmp_path))
