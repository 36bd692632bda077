"""Real processes in a real process group, started once per world size and reused by all tests.

A job is a function of rank_jobs.py, channel_jobs.py or model_jobs.py, or of another module as "train_jobs.run", called
on every rank as `function(mesh, **arguments)`; the pool returns what each rank returned, or raises what the first
failing rank raised, with its traceback as text.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

from forked import Forked

WORKER = Path(__file__).with_name("rank_worker.py")
START_TIMEOUT_S = 120.0


class RankFailure(AssertionError):
    """A job raised on a rank; the message holds the rank's traceback."""


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int, **extra: str) -> dict[str, str]:
    """Return the environment of one rank on this host."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | fixed | {name: str(value) for name, value in own.items()} | extra


class RankPool:
    """`world_size` worker processes that wait for jobs."""

    def __init__(
        self,
        world_size: int,
        *,
        device: str = "cpu",
        environment: dict[int, dict[str, str]] | None = None,
        patience_s: float | None = None,
    ):
        self.world_size = world_size
        patience = [] if patience_s is None else [str(patience_s)]
        port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        address = str(Path(self._folder.name) / "socket")
        self._listener = Listener(address, family="AF_UNIX")
        given, extra = [address, device, *patience], environment or {}
        environments = [rank_environment(rank, world_size, port, **extra.get(rank, {})) for rank in range(world_size)]
        self._processes = [
            Forked(WORKER, given, own) if device == "cpu" and sys.platform == "linux" else
            subprocess.Popen([sys.executable, str(WORKER), *given], env=own)
            for own in environments
        ]  # fmt: skip
        self._connections: dict[int, Connection] = {}
        while len(self._connections) < world_size:
            connection = self._listener.accept()
            self._connections[connection.recv()] = connection

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Call a job on all ranks and return their results in rank order."""
        return self.run_each(function, [arguments] * self.world_size)

    def run_each(self, function: str, arguments: list[dict[str, Any]]) -> list[Any]:
        """Call a job with arguments of each rank's own."""
        self._send(function, arguments)
        results = []
        for rank, answer in enumerate(self._receive()):
            if answer is None or not answer[0]:
                told = "died" if answer is None else answer[1]
                raise RankFailure(f"rank {rank} of {self.world_size} in {function}:\n{told}")
            results.append(answer[1])
        return results

    def answers(self, function: str, **arguments: Any) -> list[tuple[bool, Any] | None]:
        """Call a job on all ranks; return (succeeded, result or traceback) of each, None of ranks that died."""
        self._send(function, [arguments] * self.world_size)
        return self._receive()

    def _send(self, function: str, arguments: list[dict[str, Any]]) -> None:
        for rank, connection in self._connections.items():
            connection.send((function, arguments[rank]))

    def _receive(self) -> list[tuple[bool, Any] | None]:
        answers: list[tuple[bool, Any] | None] = []
        for rank in range(self.world_size):
            try:
                answers.append(self._connections[rank].recv())
            except EOFError:
                answers.append(None)
        return answers

    def close(self) -> None:
        """End the workers."""
        for connection in self._connections.values():
            with contextlib.suppress(BrokenPipeError):  # a rank that died is not waiting
                connection.send(None)
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        self._listener.close()
        self._folder.cleanup()


@contextlib.contextmanager
def gpu_ranks(world_size: int) -> Iterator[RankPool]:
    """Yield a pool of one rank a GPU; skips the test where there are too few."""
    import torch

    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    with contextlib.closing(RankPool(world_size, device="cuda")) as pool:
        yield pool


def processes_of(folder: Path) -> list[int]:
    """Processes that run and were started for this test, by a variable of their environment."""
    mark, found = f"SPARSERING_TEST_RUN={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # gone meanwhile, or another user's
    return found
