"""Calls that could end the process, in one of their own."""

from __future__ import annotations

import faulthandler
import os
import signal
import warnings
from collections.abc import Callable

import torch


def apart(work: Callable[[], object]) -> str:
    """What the work returned, or what it raised, or by which signal its process ended. It has one thread: those of
    PyTorch do not outlive a fork.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads and fork
        process = os.fork()
    if process == 0:
        try:
            faulthandler.disable()
            signal.alarm(60)
            torch.set_num_threads(1)
            try:
                text = repr(work())
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode()[:60000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return text if status == 0 else f"ended by {signal.Signals(-status).name}"
