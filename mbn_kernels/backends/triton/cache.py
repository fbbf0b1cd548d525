"""The file of measured tile sizes. It is read as something that anybody may have written: what is no such file has no
entries, and what lies in its place, a pipe or a link, is neither waited for nor written to. Several processes may read
and write it at once, and be ended while they do. Needs no Triton.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Constants of a kernel by name, and numbers: a :class:`config.Config` as a dict.
Entry = dict[str, "dict[str, int] | int"]
NUMBERS = ("warps", "stages", "strip")
#: Bytes of a file that is read; an entry takes some 200.
LARGEST = 1 << 24
#: Seconds that a process waits for those that write.
PATIENCE = 10.0


def folder() -> Path:
    """Where the files are; RuntimeError where there is no home directory."""
    return Path(os.environ.get("MBN_CACHE_DIR") or Path.home() / ".cache" / "mbn_kernels")


def read(file: Path) -> dict[str, Entry]:
    """The entries of a file by key; one that is missing or damaged has none, as they can be measured again."""
    try:
        found = json.loads(_content(file))
        return {key: _entry(each) for key, each in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _content(file: Path) -> bytes:
    """O_NONBLOCK, as opening a pipe would wait for who writes to it; a device may have no end."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{file}: expected at most {LARGEST} bytes")
    return content


def _entry(found: dict) -> Entry:
    blocks = found["blocks"].items()
    return {"blocks": {name: _int(n) for name, n in blocks}, **{name: _int(found[name]) for name in NUMBERS}}


def _int(found: object) -> int:
    """As it is: a bool is one, and 4.0, which compares as 4, is none."""
    if not isinstance(found, int):
        raise TypeError(f"expected an integer, got {found!r}")
    return found


def write(file: Path, key: str, entry: Entry) -> None:
    """Adds an entry to the file, which only its user may read: no other process's is lost, and no reader sees half a
    file. OSError where that cannot be done.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with _locked(file.with_suffix(".lock")):
        text = json.dumps(dict(sorted({**read(file), key: entry}.items())), indent=1)
        new.unlink(missing_ok=True)  # of a process that was ended
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as opened:
                opened.write(text)
            os.replace(new, file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among processes; the system unlocks for one that is ended. TimeoutError where another does not end."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    opened = os.open(file, flags, 0o600)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _taken(opened):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file}: another process has kept this lock for {PATIENCE:.0f} s")
            time.sleep(0.005)
        yield
    finally:
        os.close(opened)


def _taken(opened: int) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
