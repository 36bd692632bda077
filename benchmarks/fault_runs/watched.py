"""The processes of one run: started, read, awaited, found again, and ended when they do not end by themselves."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import forked

MARK = "SPARSERING_FAULT_RUN"
LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp
LEAVING_S = 3.0  # in which what was killed with its parent is gone


@dataclass(kw_only=True)
class _Process:
    name: str
    pid: int
    output: int
    said: bytes = b""
    code: int | None = None
    ended_at: float = 0.0


class Watched:
    """All processes that a run was started with, each in a session of its own. Their stdout and stderr are read."""

    def __init__(self, mark: str, folder: Path) -> None:
        self._mark, self._folder = f"{MARK}={mark}".encode(), folder
        self._processes: list[_Process] = []
        self._sessions: set[int] = set()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a program."""
        ours, theirs = os.pipe()
        process = subprocess.Popen(
            command, env=dict(environment), cwd=self._folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=_heed_signals,
        )  # fmt: skip
        self._add(name, process.pid, ours, theirs)

    def fork(self, name: str, arguments: Sequence[str], environment: Mapping[str, str], *, launches: bool) -> None:
        """Fork a process that runs the command line."""
        ours, theirs = os.pipe()
        before = Path.cwd()
        os.chdir(self._folder)
        try:
            pid = forked.fork_program(arguments, environment, theirs, launches=launches)
        finally:
            os.chdir(before)
        self._add(name, pid, ours, theirs)

    def _add(self, name: str, pid: int, ours: int, theirs: int) -> None:
        os.close(theirs)
        os.set_blocking(ours, False)
        self._processes.append(_Process(name=name, pid=pid, output=ours))
        self._sessions.add(pid)

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to what was started; group: to all processes of its sessions, as a terminal does."""
        for process in self._processes:
            if process.code is None:
                (os.killpg if group else os.kill)(process.pid, number)

    def poll(self) -> bool:
        """Read what was said; return whether all have ended."""
        with suppress(OSError):
            select.select([process.output for process in self._processes], [], [], 0)
        for process in self._processes:
            self._read(process)
            if process.code is None:
                found, status = os.waitpid(process.pid, os.WNOHANG)
                if found:
                    process.code, process.ended_at = os.waitstatus_to_exitcode(status), time.time()
                    self._read(process)
        return all(process.code is not None for process in self._processes)

    def wait(self, until: float, sign: Callable[[], bool] = lambda: False) -> bool:
        """Wait for their end, or a sign, until this time of the clock; return whether all have ended."""
        while not self.poll():
            if time.time() > until or sign():
                return False
            time.sleep(0.02)
        return True

    def end(self) -> list[str]:
        """Kill whatever is left; return what that was, a moment after all should have ended."""
        deadline = time.monotonic() + LEAVING_S
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.05)
            self.poll()
        left = self.living()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            if process.code is None:
                os.waitpid(process.pid, 0)
            self._read(process)
            os.close(process.output)
        return list(left.values())

    def codes(self) -> dict[str, int | None]:
        """Return each process's exit code; None where it did not end."""
        return {process.name: process.code for process in self._processes}

    def said(self) -> str:
        """Return what all said, one after the other."""
        return "".join(process.said.decode(errors="replace") for process in self._processes)

    def ended_at(self) -> float:
        """Return when the last one ended."""
        return max(process.ended_at or time.time() for process in self._processes)

    def living(self) -> dict[int, str]:
        """Return all living processes of the run, by number, with what they run."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with suppress(OSError):  # it has ended, or is another user's
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                mine = int(fields[3]) in self._sessions or self._mark in (entry / "environ").read_bytes()
                if mine and fields[0] != "Z" and int(entry.name) != os.getpid():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[-60:]
        return found

    def _read(self, process: _Process) -> None:
        with suppress(BlockingIOError):
            while part := os.read(process.output, 1 << 16):
                process.said += part


def _heed_signals() -> None:
    """Undo what `nohup`, or a shell's background, does to the signals of all that it starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def listens(port: int) -> bool:
    """Whether anybody on this host listens at a port."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return any(row[3] == LISTENS and int(row[1].rpartition(":")[2], 16) == port for row in rows)
