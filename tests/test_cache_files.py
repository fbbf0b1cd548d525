"""The file of measured tile sizes, whatever it holds, whatever lies in its place, and whatever ends who writes it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mbn_kernels import __main__ as doctor
from mbn_kernels.backends.triton import cache

ENTRY = {"blocks": {"ROWS": 64, "ONE_BLOCK": True}, "warps": 4, "stages": 3, "strip": 8}
OTHER = ENTRY | {"warps": 8}


class StillWaiting(Exception):
    """No OSError, which the code under test may catch."""


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Ends a test that waits for what never comes."""

    def stop(*_: object) -> None:
        raise StillWaiting

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "triton-gpu.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What it holds --------------------------------------------------------------------------------------------------------


def without(name: str) -> str:
    return json.dumps({"key": {n: v for n, v in ENTRY.items() if n != name}})


DAMAGED = {
    "nothing": "",
    "cut off": json.dumps({"key": ENTRY})[:-9],
    "not UTF-8": b'{"\xff": 1}',
    "a null byte": b"\x00",
    "null": "null",
    "a number": "3",
    "a text": '"blocks"',
    "a list": "[1, 2]",
    "deep lists": "[" * 100_000,
    "deep dicts": '{"a":' * 100_000,
    "a deep entry": json.dumps({"key": ENTRY})[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a long number": '{"key": ' + "9" * 10_000 + "}",
    "entries that are numbers": '{"key": 3}',
    "entries that are lists": '{"key": [1, 2]}',
    "entries that are texts": '{"key": "blocks"}',
    "blocks that are a list": json.dumps({"key": ENTRY | {"blocks": [["ROWS", 64]]}}),
    "blocks that are numbers": json.dumps({"key": ENTRY | {"blocks": 64}}),
    "a block that is a text": json.dumps({"key": ENTRY | {"blocks": {"ROWS": "64"}}}),
    "a block that is a fraction": json.dumps({"key": ENTRY | {"blocks": {"ROWS": 64.0}}}),
    "blocks in blocks": json.dumps({"key": ENTRY | {"blocks": {"ROWS": {"ROWS": 64}}}}),
    "warps that are a fraction": json.dumps({"key": ENTRY | {"warps": 4.0}}),
    "warps that are no number": '{"key": {"blocks": {}, "warps": NaN, "stages": 1, "strip": 0}}',
    "warps without end": '{"key": {"blocks": {}, "warps": Infinity, "stages": 1, "strip": 0}}',
    "stages that are null": json.dumps({"key": ENTRY | {"stages": None}}),
    **{f"no {name}": without(name) for name in ENTRY},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_has_no_entries(file: Path, content: str | bytes) -> None:
    cache.write(file, "other", OTHER)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert cache.read(file) == {}
    cache.write(file, "key", ENTRY)
    assert cache.read(file) == {"key": ENTRY}


def test_a_huge_file_is_not_read(file: Path) -> None:
    cache.write(file, "key", ENTRY)
    text = file.read_bytes()
    file.write_bytes(text.ljust(cache.LARGEST))  # spaces, which JSON allows
    assert cache.read(file) == {"key": ENTRY}
    file.write_bytes(text.ljust(cache.LARGEST + 1))
    assert cache.read(file) == {}


def test_what_an_entry_has_besides_is_left_out(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"key": ENTRY | {"command": "rm"}}))
    assert cache.read(file) == {"key": ENTRY}


# What lies in its place -----------------------------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("missing")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "place", (a_folder, a_pipe, a_socket, a_link_to_nothing, a_link_to_itself), ids=lambda f: f.__name__
)
def test_no_file_in_its_place(file: Path, place: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    place(file)
    assert cache.read(file) == {}
    monkeypatch.setenv("MBN_CACHE_DIR", str(file.parent))
    assert doctor._cache()["entries"] == 0
    if place is a_folder:
        with pytest.raises(IsADirectoryError):
            cache.write(file, "key", ENTRY)
        assert file.is_dir()
    else:
        cache.write(file, "key", ENTRY)
        assert file.is_file() and not file.is_symlink() and cache.read(file) == {"key": ENTRY}
    assert names(file.parent) == [file.name, file.with_suffix(".lock").name]


def test_a_link_is_read_and_what_it_leads_to_is_not_written(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere.json"
    cache.write(elsewhere, "key", ENTRY)
    content = elsewhere.read_bytes()
    file.parent.mkdir()
    file.symlink_to(elsewhere)
    assert cache.read(file) == {"key": ENTRY}
    cache.write(file, "other", OTHER)
    assert cache.read(file) == {"key": ENTRY, "other": OTHER}
    assert elsewhere.read_bytes() == content


@pytest.mark.parametrize("suffix", (".lock", ".new"))
def test_links_that_lead_out_of_the_folder(file: Path, suffix: str) -> None:
    """In place of what is only there while somebody writes."""
    precious = file.parent.parent / "precious"
    precious.write_text("precious")
    file.parent.mkdir()
    file.with_suffix(suffix).symlink_to(precious)
    if suffix == ".lock":
        with pytest.raises(OSError, match="symbolic links"):
            cache.write(file, "key", ENTRY)
    else:
        cache.write(file, "key", ENTRY)
        assert cache.read(file) == {"key": ENTRY}
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("suffix", (".lock", ".new"))
def test_pipes_are_not_waited_for(file: Path, suffix: str) -> None:
    file.parent.mkdir()
    os.mkfifo(file.with_suffix(suffix))
    cache.write(file, "key", ENTRY)
    assert cache.read(file) == {"key": ENTRY}


# Who writes it --------------------------------------------------------------------------------------------------------


def test_only_the_user_may_read_it(file: Path) -> None:
    former = os.umask(0)
    try:
        cache.write(file, "key", ENTRY)
        cache.write(file, "other", OTHER)
    finally:
        os.umask(former)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (file.parent, *file.parent.iterdir())}
    assert modes == {"cache": 0o700, file.name: 0o600, file.with_suffix(".lock").name: 0o600}


def test_a_lock_that_another_keeps(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.05)
    cache.write(file, "key", ENTRY)
    with cache._locked(file.with_suffix(".lock")), pytest.raises(TimeoutError, match=r"\.lock: another process"):
        cache.write(file, "other", OTHER)
    assert cache.read(file) == {"key": ENTRY}
    cache.write(file, "other", OTHER)
    assert cache.read(file) == {"key": ENTRY, "other": OTHER}


# The module alone, which needs neither PyTorch nor Triton; then what a process does with it.
CHILD = """
import importlib.util, json, os, resource, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
file, other = Path(sys.argv[2]), json.loads(sys.argv[3])
os.chdir(file.parent)
file = Path(file.name)
"""


def child(file: Path, program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-c", CHILD + program, cache.__file__, str(file), json.dumps(OTHER)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_a_device_without_end(file: Path) -> None:
    """No more of it than of a file is read: this process could not hold much more."""
    file.parent.mkdir()
    file.symlink_to("/dev/zero")
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({(1 << 28) + 4 * cache.LARGEST},) * 2)"
    ended = child(file, f"{limit}\nprint(cache.read(file))")
    assert (ended.returncode, ended.stdout) == (0, "{}\n"), ended.stderr


ENDED = {
    "before it is renamed": "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "while it is written": "os.write(os.open(file.with_suffix('.new'), os.O_WRONLY | os.O_CREAT), b'{\"key\": {');"
    "cache.read = lambda file: os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("way", ENDED.values(), ids=ENDED)
def test_a_process_that_is_ended(file: Path, way: str) -> None:
    """The file is as it was, the lock is free, and the next who writes takes away what was left."""
    cache.write(file, "key", ENTRY)
    content = file.read_bytes()
    for _ in range(2):
        assert child(file, f"{way}\ncache.write(file, 'other', other)").returncode == -signal.SIGKILL
        assert file.read_bytes() == content
    assert len(names(file.parent)) == 3  # what was left does not become more
    cache.write(file, "other", OTHER)
    assert cache.read(file) == {"key": ENTRY, "other": OTHER}
    assert names(file.parent) == [file.name, file.with_suffix(".lock").name]


def test_a_disk_that_is_full(file: Path) -> None:
    """Not one byte more than the file has."""
    cache.write(file, "key", ENTRY)
    content = file.read_bytes()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(content)},) * 2)"
    ended = child(file, f"{limit}\ncache.write(file, 'other', other)")
    assert ended.returncode == 1 and "OSError: [Errno 27]" in ended.stderr
    assert file.read_bytes() == content
    assert names(file.parent) == [file.name, file.with_suffix(".lock").name]


@pytest.mark.parametrize("lock", (True, False), ids=("with a lock", "without"))
def test_a_folder_that_may_not_be_written(file: Path, lock: bool) -> None:
    """Modes say nothing to root, so that the process becomes another user."""
    cache.write(file, "key", ENTRY)
    file.chmod(0o644)
    file.with_suffix(".lock").chmod(0o666)
    if not lock:
        file.with_suffix(".lock").unlink()
    file.parent.chmod(0o555)
    become = "os.getuid() or os.setuid(65534)"
    ended = child(file, f"{become}\nprint(list(cache.read(file)))\ncache.write(file, 'other', other)")
    assert ended.stdout == "['key']\n" and "PermissionError" in ended.stderr
    file.parent.chmod(0o755)
    assert cache.read(file) == {"key": ENTRY}
