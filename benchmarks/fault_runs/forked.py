"""Processes of a run that are forked from one that has imported torch, in seconds less than programs that begin anew.

What runs in them is the command line and the launcher as they are. Only how the launcher makes a process is replaced: a
helper that was forked before it had threads forks each rank, and the rank becomes the launcher's own child, as one that
it had started would be: Linux gives orphans to the next process above that asked for them.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from . import plant

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PRELOADED = (
    "torch", "transformers.models.qwen2.modeling_qwen2", "torch.distributed.fsdp._fully_shard._fsdp_param_group",
    "torch.distributed.checkpoint.state_dict", "sparsering.__main__", "sparsering.cli",
    "sparsering.runtime.train.command", "sparsering.runtime.train.loop", "sparsering.runtime.train.setup",
    "sparsering.runtime.train.export", "sparsering.runtime.run.command", "sparsering.runtime.run.rank",
    "sparsering.runtime.comm.start", "sparsering.runtime.comm.place", "sparsering.runtime.comm.mesh",
    "torch.optim.adamw", "torch.distributed.checkpoint.filesystem",
)  # fmt: skip
MAX_REQUEST = 1 << 18


def preload() -> None:
    """Import what every process of a run needs. The process must not have had threads, nor get any by it."""
    for name in PRELOADED:
        importlib.import_module(name)


def fork_program(arguments: Sequence[str], environment: Mapping[str, str], output: int, *, launches: bool) -> int:
    """Fork a process in a session of its own that runs the command line, and return its number.

    output: where stdout and stderr go. launches: whether it starts ranks.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    _become(environment, [output, output])
    if launches:
        _replace_popen()

    def run() -> None:
        from ...__main__ import main

        main()

    _run(run, ["sparsering", *arguments])


def _become(environment: Mapping[str, str], outputs: Sequence[int]) -> None:
    """Take over what a new program would begin with."""
    atexit._clear()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, source in enumerate([nothing, *outputs]):
        os.dup2(source, number)
    os.closerange(3, 4096)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _run(main: Callable[[], object], arguments: list[str]) -> NoReturn:
    """Run as the interpreter runs a program, and end as it does."""
    sys.argv[:] = arguments
    code: Any = 0
    try:
        plant.install()
        main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        end_with_code(told_uncaught(error))
    end_with_code(code)


def told_uncaught(error: BaseException) -> int:
    """Print an error that nobody caught, and remember it, as the interpreter does; return the exit code."""
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if isinstance(error, KeyboardInterrupt):
        traceback.print_exc()
        return 130
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


def end_with_code(code: Any) -> NoReturn:
    """End this process as the interpreter does at SystemExit: threads first, then what is registered for the exit.

    code: of the SystemExit; a text is printed, and stands for 1.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


# The launcher's part --------------------------------------------------------------------------------------------------


def _replace_popen() -> None:
    """Fork the helper, and let the launcher start processes through it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher, libc = os.getpid(), ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.fork() == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ours.close()
        _serve(theirs, launcher)
    theirs.close()
    start = importlib.import_module("sparsering.runtime.comm.start")
    names = vars(subprocess) | {"Popen": lambda *given, **named: _Forked(ours, *given, **named)}
    start.__dict__["subprocess"] = SimpleNamespace(**names)


class _Forked:
    """What the launcher needs of a `subprocess.Popen`."""

    def __init__(self, helper: socket.socket, command: Sequence[str], *, env: Mapping[str, str], stdout: Any,
                 stderr: Any) -> None:  # fmt: skip
        blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        outputs = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno()]
        request = json.dumps({"command": command, "environment": dict(env), "blocked": blocked}).encode()
        socket.send_fds(helper, [request], outputs)
        self.pid = int(helper.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Wait for its end."""
        while self.poll() is None:
            time.sleep(plant.POLL_S)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _serve(requests: socket.socket, launcher: int) -> NoReturn:
    """Fork a rank for every request; its parent ends at once, so the launcher gets it."""
    while True:
        request, outputs, _, _ = socket.recv_fds(requests, MAX_REQUEST, 2)
        if not request:
            os._exit(0)
        told, tells = os.pipe()
        middle = os.fork()
        if middle == 0:
            rank = os.fork()
            if rank == 0:
                _be_rank(json.loads(request), outputs, launcher)
            os.write(tells, str(rank).encode())
            os._exit(0)
        os.waitpid(middle, 0)  # now the rank is the launcher's child
        requests.send(os.read(told, 64))
        for output in (*outputs, told, tells):
            os.close(output)


def _be_rank(request: dict[str, Any], outputs: array.array[int] | list[int], launcher: int) -> NoReturn:
    while os.getppid() != launcher:
        time.sleep(0.001)
    _become(request["environment"], list(outputs))
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    _, _, module, *arguments = request["command"]
    sys.modules.pop(module, None)
    _run(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), ["rank", *arguments])
