"""Processes of one group (gloo, on the CPU) for tests. Each waits for the others no longer than COLLECTIVE, and a test
for its processes no longer than PATIENCE.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

COLLECTIVE = timedelta(seconds=60)
PATIENCE = 150  # seconds


def _serve(rank: int, world: int, folder: Path, connection: Connection) -> None:
    """Does the work that arrives until there is None; answers (True, result) or (False, traceback)."""
    torch.set_num_threads(1)
    init = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=COLLECTIVE)
    while (message := pickle.loads(connection.recv_bytes())) is not None:
        work, args = message
        try:
            answer = True, work(rank, *args)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    gc.collect()  # a wrapped module that outlives its process group may wait for the group's threads forever
    dist.destroy_process_group()


class Processes:
    """Processes of one group that do the same work; started when there is some, and again after a failure."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world, self.members = folder, world, []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        (self.folder / "group").unlink(missing_ok=True)
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, self.folder, there), daemon=True)
            with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
                process.start()
            there.close()  # so that the end of the process is the end of the connection
            self.members.append((process, here))

    def answers(self, work: Callable, *args) -> list[tuple[bool, Any]]:
        """(True, what ``work(rank, *args)`` returns) of each process, or (False, its error)."""
        if not self.members:
            self._start()
        for _, connection in self.members:
            connection.send_bytes(pickle.dumps((work, args)))
        deadline, found = time.monotonic() + PATIENCE, []
        for process, connection in self.members:
            try:
                ready = connection.poll(max(deadline - time.monotonic(), 0))
                found.append(pickle.loads(connection.recv_bytes()) if ready else (False, f"silent for {PATIENCE} s"))
            except (EOFError, ConnectionResetError):
                process.join()
                found.append((False, f"ended with exit code {process.exitcode}"))
        if not all(done for done, _ in found):
            self.kill()
        return found

    def __call__(self, work: Callable, *args) -> list[Any]:
        """What ``work(rank, *args)`` returns in each process."""
        answers = self.answers(work, *args)
        errors = [f"process {rank}: {what}" for rank, (done, what) in enumerate(answers) if not done]
        assert not errors, "\n".join(errors)
        return [what for _, what in answers]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type | None, *_exc: object) -> None:
        try:
            if kind is None:
                self.end()
        finally:
            self.kill()

    def kill(self) -> None:
        for process, _ in self.members:
            process.kill()
            process.join()
        self.members = []

    def end(self) -> None:
        """Lets the processes end by themselves."""
        for _, connection in self.members:
            connection.send_bytes(pickle.dumps(None))
        for process, _ in self.members:
            process.join(PATIENCE)
        codes = [process.exitcode for process, _ in self.members]
        self.kill()
        assert codes == [0] * len(codes)
