"""Forks programs that need torch from one process that has imported it, seconds cheaper than starting each anew.

Called as `fork_server.py socket module…`: imports the modules, then serves a line of requests at the socket that it
inherits under that number. Each request is JSON: {"script", "arguments", "environment"} with three file descriptors
forks a program and is answered by its number; {"poll": number} by its exit code, or null while it runs. It must not
have threads, nor may what it imports start any.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsering.benchmarks.fault_runs.forked import end_with_code, told_uncaught

MAX_REQUEST = 1 << 18
SUPPORT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Serve until the other side closes the socket."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:0] = [str(folder) for folder in (SUPPORT, *SUPPORT.iterdir()) if folder.is_dir()]
    for name in sys.argv[2:]:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    gc.collect()
    gc.freeze()
    ended: dict[int, int] = {}
    while True:
        text, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST, 3)
        if not text:
            return
        request = json.loads(text)
        if "poll" in request:
            answer = _exit_code(request["poll"], ended)
        else:
            answer = os.fork()
            if answer == 0:
                _be(request, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
        requests.send(json.dumps(answer).encode())


def _exit_code(number: int, ended: dict[int, int]) -> int | None:
    if number not in ended:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            ended[number] = os.waitstatus_to_exitcode(status)
    return ended.get(number)


def _be(request: dict[str, Any], descriptors: array.array[int] | Sequence[int]) -> NoReturn:
    """Run as the interpreter runs a script, and end as it does."""
    code: Any = 0
    try:
        atexit._clear()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.closerange(3, 4096)
        os.environ.clear()
        os.environ.update(request["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv[:] = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = told_uncaught(error)
    end_with_code(code)


if __name__ == "__main__":
    main()
