"""Starting ranks on this host: the same command again, once per rank, with the rank's environment."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from ...traces.errors import InputError

PACKAGE = (__package__ or "sparsering").partition(".")[0]
QUIET_TORCHRUN = f"{__package__}.quiet_torchrun"
POLL_S = 0.05
GRACE_S = 15.0
UNUSABLE_INPUT = 2  # the exit code of a rank that could not begin


def start_ranks(
    arguments: Sequence[str],
    *,
    world_size: int,
    environment: Mapping[str, str],
    module: str = f"{PACKAGE}.cli",
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> int:
    """Run `python -m <module> <arguments>` as ranks 0 … world_size - 1 and return the first failure's exit code.

    Rank 0 keeps this process's stdout; other ranks' goes to stderr. When a rank fails, the others get GRACE_S to end by
    themselves, then are stopped; at once where it refused its input, which it has said. Ctrl-C is this process's alone:
    it ends the ranks and raises KeyboardInterrupt. environment: what every rank starts with. stdout, stderr: files to
    write to instead.
    InputError when there is no rank to start.
    """
    if world_size < 1:
        raise InputError(f"must be at least 1, not {world_size}", field="world_size")
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with _noted_signals() as check:
        try:
            for rank in range(world_size):
                output = stdout if rank == 0 else stderr or sys.stderr
                command = [sys.executable, "-m", module, *arguments]
                place = {**environment, **rank_environment(rank, world_size, port)}
                with _interrupts_kept():
                    processes.append(subprocess.Popen(command, env=place, stdout=output, stderr=stderr))
            return _join(processes, check)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for process in processes:
                process.wait()


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C, which goes to all, does not reach: this one gets it and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _noted_signals() -> Iterator[Callable[[], None]]:
    """Note Ctrl-C, SIGTERM (Slurm, docker, `timeout`) and SIGHUP; yield what raises SystemExit once one of them came.

    So none can come between the start of a process and the note that it has to end with this one. Exit code 128 + the
    signal's number, as a shell says it; KeyboardInterrupt for Ctrl-C. Signals that are ignored stay so.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def check() -> None:
        if came and came[0] == signal.SIGINT:
            raise KeyboardInterrupt
        if came:
            raise SystemExit(128 + came[0])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    check()


def run_to_its_end(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run a launcher of ranks and return its exit code; a signal that ends this process ends it, and so its ranks."""
    with _noted_signals() as check:
        with _interrupts_kept():
            process = subprocess.Popen(command, env=environment)
        try:
            while process.poll() is None:
                check()
                time.sleep(POLL_S)
            return process.returncode
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers on SIGTERM
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _join(processes: Sequence[subprocess.Popen[bytes]], check: Callable[[], None]) -> int:
    """Wait for all, or for GRACE_S after the first failure; return its exit code."""
    failed_at, code = None, 0
    while any(process.poll() is None for process in processes):
        check()
        codes = [process.poll() for process in processes]
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
            code = next(value for value in codes if value)
            _name_killed(codes)
            if code == UNUSABLE_INPUT:
                return code
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            return code
        time.sleep(POLL_S)
    return code or next((process.returncode for process in processes if process.returncode), 0)


def _name_killed(codes: Sequence[int | None]) -> None:
    if any(code is not None and code < 0 for code in codes):
        ended = {rank: code for rank, code in enumerate(codes) if code is not None}
        print(f"sparsering: {killed_ranks(ended, world_size=len(codes))}", file=sys.stderr, flush=True)


def killed_ranks(codes: Mapping[int, int], *, world_size: int) -> Exception:
    """Say which ranks a signal ended: they could not say so themselves, and the others may not live to see it.

    codes: by rank, of those that have ended; below 0 for a signal.
    """
    from .lost import ranks_lost  # torch, which the launcher itself does not need

    killed = {rank: signal.Signals(-code).name for rank, code in codes.items() if code < 0}
    because = f"ended by {', '.join(sorted(set(killed.values())))}"
    return ranks_lost(list(killed), world_size, seen_by="the launcher", because=because)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what `join` reads on one of `world_size` ranks of this host that meet at a port."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "PYTHONSAFEPATH": "1"}


def free_port() -> int:
    """Return a TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
