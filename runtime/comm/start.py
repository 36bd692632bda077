"""Starting ranks on this host: the same command again, once per rank, with the rank's environment."""

from __future__ import annotations

import os
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
TIED = f"{__package__}.tied"
POLL_S = 0.05
GRACE_S = 15.0
STORE_TIMEOUT_S = 600.0
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # of a lost connection ranks say one line; torch would add pages of its own
# The ranks of this host alone: the launcher serves their store, and gloo listens where nobody else can reach it.
LOCAL = {"TORCHELASTIC_USE_AGENT_STORE": "True"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
UNUSABLE_INPUT = 2  # the exit code of a rank that could not begin


def start_ranks(
    arguments: Sequence[str],
    *,
    world_size: int,
    environment: Mapping[str, str],
    module: str = f"{PACKAGE}.cli",
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    restarts: int = 0,
) -> int:
    """Run `python -m <module> <arguments>` as ranks 0 … world_size - 1 and return the first failure's exit code.

    This process serves the store, on the loopback address alone, so it outlives every rank. Rank 0 keeps this process's
    stdout; other ranks' goes to stderr. When a rank fails, the others get GRACE_S to end by themselves, then are
    stopped; at once where it refused its input, which it has said. Ctrl-C is this process's alone: it ends the ranks
    and raises KeyboardInterrupt. Ranks end with this process, whatever ends it (tied.py).
    environment: what every rank starts with. stdout, stderr: files to write to instead. restarts: how often all ranks
    are started again after one failed, but for refused input.
    InputError when there is no rank to start.
    """
    if world_size < 1:
        raise InputError(f"must be at least 1, not {world_size}", field="world_size")
    from .place import served_store  # torch, in which the ranks' store is

    store = served_store(timeout_s=STORE_TIMEOUT_S)
    command = [sys.executable, "-m", TIED, str(os.getpid()), module, *arguments]
    code = 0
    with _noted_signals() as check:
        for attempt in range(restarts + 1):
            ranks = _Ranks(world_size, attempt, store)
            try:
                place = {**QUIET, **environment, **LOCAL, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
                ranks.start(command, place, stdout, stderr)
                code = ranks.join(check)
            finally:
                ranks.kill()
            if code in (0, UNUSABLE_INPUT):
                break
    return code


class _Ranks:
    """The ranks of one attempt. store: where they meet, and where the others hear of those that a signal ended."""

    def __init__(self, world_size: int, attempt: int, store: Any) -> None:
        self._world_size, self._attempt, self._store = world_size, attempt, store
        self._processes: list[subprocess.Popen[bytes]] = []
        self._unsaid: Exception | None = None  # how a rank ended, where the others are to say it

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], stdout: IO[bytes] | None,
        stderr: IO[bytes] | None,
    ) -> None:  # fmt: skip
        """Start all."""
        for rank in range(self._world_size):
            output = stdout if rank == 0 else stderr or sys.stderr
            place = {**environment, **rank_environment(rank, self._world_size, self._store.port)}
            with _interrupts_kept():
                self._processes.append(subprocess.Popen(command, env=place, stdout=output, stderr=stderr))

    def join(self, check: Callable[[], None]) -> int:
        """Wait for all, or for GRACE_S after the first failure; return its exit code."""
        failed_at, code = None, 0
        while any(process.poll() is None for process in self._processes):
            check()
            if failed_at is None and (code := self._failure()):
                failed_at = time.monotonic()
                if code == UNUSABLE_INPUT:
                    return code
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                return code
            time.sleep(POLL_S)
        code = code or self._failure()
        others_are_well = sum(process.poll() == 0 for process in self._processes) == self._world_size - 1
        if self._unsaid is not None and others_are_well and code != UNUSABLE_INPUT:
            print(f"sparsering: {self._unsaid}", file=sys.stderr, flush=True)  # they had ended before
        return code

    def kill(self) -> None:
        """End those that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _failure(self) -> int:
        """Return the exit code of the first rank that failed, as a shell says it; 0 where none did. Others are told."""
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        failed = {rank: code for rank, code in codes.items() if code}
        killed = {rank: code for rank, code in failed.items() if code < 0}
        if not failed:
            return 0
        because = f"ended with exit code {min(failed.values())}"  # who raised has said why, which stands
        if killed:
            names = sorted({signal.Signals(-code).name for code in killed.values()})
            because = f"ended by {', '.join(names)}"
        lost = self._tell(list(killed or failed), because)
        if killed:
            print(f"sparsering: {lost}", file=sys.stderr, flush=True)
        else:
            self._unsaid = lost
        first = next(iter(failed.values()))
        return first if first > 0 else 128 - first

    def _tell(self, ranks: Sequence[int], because: str) -> Exception:
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

        from .lost import ranks_lost
        from .words import Words, attempt_prefix

        store = PrefixStore(attempt_prefix(self._attempt), self._store)
        words = Words(store, rank=-1, world_size=self._world_size, store_host="the launcher")
        return words.find(ranks_lost(ranks, self._world_size, seen_by="the launcher", because=because))


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


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what `join` reads on one of `world_size` ranks of this host that meet at a port."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "PYTHONSAFEPATH": "1"}


def free_port() -> int:
    """Return a TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
