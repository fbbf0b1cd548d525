"""Measurements in processes of their own: every thread pool has the size asked for, and a crash costs one row.

A measurement is a generator named "package.module:function"; it takes what JSON can hold and yields (kind, value).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: What a measurement yields: what it is doing now ("step", text), or a part of the result ("row", dict).
Message = tuple[str, object]


class Died(RuntimeError):
    """A process ended before its measurement did."""


def limited(threads: int) -> dict[str, str]:
    """The environment of a process whose thread pools have so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def answers(
    measurement: str, arguments: dict, *, threads: int, environment: dict[str, str] | None = None
) -> Iterator[Message]:
    """What the measurement yields in a fresh process that has so many threads."""
    command = [sys.executable, "-m", "benchmarks.cpu_processes"]
    env = {**limited(threads), **(environment or {})}
    request = json.dumps({"measurement": measurement, "arguments": arguments, "threads": threads})
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            process.stdin.write(request)
            process.stdin.close()
            for line in process.stdout:
                yield tuple(json.loads(line))
            if process.wait():
                log.seek(0)
                last = [line.strip() for line in log if line.strip()][-1:]
                raise Died(": ".join([f"the process ended with exit code {process.returncode}", *last]))
        finally:
            process.kill()  # does nothing to one that has ended


def main() -> None:
    """In the process: a request from the standard input, messages to the standard output, one a line."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the messages
    import torch

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    module, _, function = request["measurement"].partition(":")
    for message in getattr(importlib.import_module(module), function)(request["arguments"]):
        print(json.dumps(message), file=channel)


if __name__ == "__main__":
    main()
