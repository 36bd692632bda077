"""Real command lines in processes of their own, and signals that reach them while they work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.05
PATIENCE_S = 120.0
MARK = "SPARSERING_TEST_MARK"


class Command:
    """`sparsering …` in a session of its own, as a terminal starts it; its processes are found by a mark."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            arguments, cwd=folder, env=environment | {MARK: self.mark}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=_heeds_signals,
        )  # fmt: skip

    def processes(self) -> list[int]:
        """The numbers of all living processes of the command."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's
        return found

    def wait_for(self, sign: Callable[[Command], bool]) -> None:
        """Wait for a sign that the command is at work."""
        deadline = time.monotonic() + PATIENCE_S
        while not sign(self):
            assert self.process.poll() is None, f"it ended by itself: {self.process.communicate()}"
            assert time.monotonic() < deadline, "no sign of work"
            time.sleep(POLL_S)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Return (exit code, stdout, stderr) once it has ended, and all its processes."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE_S)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return self.process.returncode, stdout, stderr


@contextmanager
def started(arguments: str, folder: Path, *, program: str = "-m sparsering") -> Iterator[Command]:
    """Start a command line; nothing of it is left when the block ends, whatever happened."""
    command = Command([sys.executable, *program.split(), *arguments.split()], folder)
    try:
        yield command
    finally:
        for number in command.processes():
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue


def wrote(folder: Path, pattern: str) -> Callable[[Command], bool]:
    """A sign: the command has made such a file or folder."""
    return lambda _: any(folder.glob(pattern))


def loaded(library: str) -> Callable[[Command], bool]:
    """A sign: the command has loaded this library."""
    return lambda command: library in Path(f"/proc/{command.process.pid}/maps").read_text()


def counts(processes: int) -> Callable[[Command], bool]:
    """A sign: the command runs as so many processes."""
    return lambda command: len(command.processes()) >= processes


def _heeds_signals() -> None:
    """Undo what a shell does to commands in the background, whose children inherit it: there Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
