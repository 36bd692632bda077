"""Command lines that end at a chosen moment: before their n-th step in the file system, by kill -9 or Ctrl-C.

One process imports the command line; each run is a fork of it, so that a moment costs a tenth of a second.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"}
KILL, CTRL_C = "kill -9", "Ctrl-C"
MODULES = "\0modules"


@dataclass(frozen=True)
class Ended:
    """How a command line ended. code: the exit code, negative for a signal."""

    code: int
    stderr: str


class Moments:
    """Runs command lines in a folder, up to a moment or to their end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, arguments: str, folder: Path, *, end: str = "", before: int = 0) -> Ended:
        """Run `sparsering ARGUMENTS`; end: KILL or CTRL_C, before the step of this number, from 1."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": arguments.split(), "folder": str(folder), "end": end, "before": before}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


@contextmanager
def moments() -> Iterator[Moments]:
    """Start the process that forks."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Moments(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    importlib.import_module("sparsering.cli")
    for line in sys.stdin:
        print(json.dumps(_forked(**json.loads(line))), flush=True)


def _forked(*, arguments: Sequence[str], folder: str, end: str, before: int) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(arguments, folder, end, before, writing)
    os.close(writing)
    with open(reading) as pipe:
        stderr, _, modules = pipe.read().partition(MODULES)
    status = os.waitpid(child, 0)[1]
    for name in modules.split():  # what this run had to import, later ones have
        with suppress(Exception):
            importlib.import_module(name)
    return {"code": os.waitstatus_to_exitcode(status), "stderr": stderr}


def _run(arguments: Sequence[str], folder: str, end: str, before: int, stderr: int) -> None:
    """Be the command line, in a fork; never returns."""
    from sparsering.__main__ import main

    code, had = 99, set(sys.modules)
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(stderr, 2)
        sys.argv = ["sparsering", *arguments]
        if end:
            _arm(folder, end, before)
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 98
    finally:
        if not end:
            print(MODULES, *sorted(set(sys.modules) - had), file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)


def _arm(folder: str, end: str, before: int) -> None:
    left = before

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in STEPS or not (event == "fcntl.flock" or _inside(values[0], folder)):
            return
        left -= 1
        if left == 0 and end == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0:
            raise KeyboardInterrupt

    sys.addaudithook(hook)


def _inside(path: object, folder: str) -> bool:
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder + os.sep)


if __name__ == "__main__":
    _serve()
