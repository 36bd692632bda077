"""Starting ranks on this host: the same command again, once per rank, with the rank's environment."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, NoReturn

from ...traces.errors import InputError
from .lost import ranks_lost

POLL_S = 0.05
GRACE_S = 15.0


def launch_ranks(
    arguments: Sequence[str],
    *,
    world_size: int,
    environment: dict[str, str],
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> int:
    """Run `python -m sparsering.cli <arguments>` as ranks 0 … world_size - 1 and return the first failure's exit code.

    Rank 0 keeps this process's stdout; other ranks' goes to stderr. When a rank fails, the others get GRACE_S to end by
    themselves, then are stopped. environment: what every rank starts with. stdout, stderr: files to write to instead.
    """
    if world_size < 1:
        raise InputError(f"must be at least 1, not {world_size}", field="world_size")
    port = _free_port()
    module = f"{__package__.partition('.')[0]}.cli" if __package__ else "sparsering.cli"
    processes: list[subprocess.Popen[bytes]] = []
    with exit_on_signals():
        try:
            for rank in range(world_size):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env=environment | _rank_environment(rank, world_size, port),
                        stdout=stdout if rank == 0 else stderr or sys.stderr,
                        stderr=stderr,
                    )
                )
            return _join(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM (Slurm, docker, `timeout`) and SIGHUP into SystemExit, so that what a process started ends with it.

    Exit code 128 + the signal's number, as a shell says it. Signals that are ignored stay so.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_to_its_end(command: Sequence[str], *, environment: dict[str, str]) -> int:
    """Run a launcher of ranks and return its exit code; a signal that ends this process ends it, and so its ranks."""
    with exit_on_signals():
        process = subprocess.Popen(command, env=environment)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers on SIGTERM
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _join(processes: list[subprocess.Popen[bytes]]) -> int:
    failed_at, code = None, 0
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
            code = next(value for value in codes if value)
            _name_killed(codes)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            return code
        time.sleep(POLL_S)
    return code or next((process.returncode for process in processes if process.returncode), 0)


def _name_killed(codes: Sequence[int | None]) -> None:
    """Say which ranks a signal ended: they could not say so themselves, and the others may not live to see it."""
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed:
        names = sorted({signal.Signals(-code).name for code in codes if code is not None and code < 0})
        error = ranks_lost(killed, len(codes), seen_by="the launcher", because=f"ended by {', '.join(names)}")
        print(f"sparsering: {error}", file=sys.stderr, flush=True)


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONSAFEPATH": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
