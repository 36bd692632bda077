"""Processes that are started anew, take messages, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import NamedTuple


class Spawned(NamedTuple):
    """A process, and what it is spoken to through. Either side notices when the other is no more: EOFError, OSError."""

    process: SpawnProcess
    connection: Connection

    def end(self) -> None:
        """End it at once: all is done, or nothing counts."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spawned(work: Callable[[Connection], None]) -> Spawned:
    """Start a process that does `work`, a function of a module, with its side of a connection.

    It inherits that Ctrl-C is not for it: this one ends it.
    """
    context = multiprocessing.get_context("spawn")  # a copy of this process would have threads and locks of libraries
    ours, its = context.Pipe()
    process = context.Process(target=work, args=(its,), daemon=True)
    resource_tracker.ensure_running()  # starting it, as the first process would, lets Ctrl-C through again
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        its.close()
    return Spawned(process, ours)
