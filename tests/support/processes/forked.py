"""Programs of tests as processes that a server forks: see fork_server.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
# What programs of ranks import; the jobs of ranks import all else that a rank works with.
PRELOADED = ("torch", "sparsering.runtime.comm.mesh", "rank_jobs", "channel_jobs", "model_jobs", "train_jobs")
POLL_S = 0.01


class Forked:
    """What tests need of a `subprocess.Popen`. streams: descriptors of stdin, stdout, stderr; None: ours."""

    def __init__(
        self, script: Path, arguments: Sequence[str], environment: Mapping[str, str],
        streams: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        request = {"script": str(script), "arguments": [*arguments], "environment": dict(environment)}
        with open(os.devnull) as nothing:
            socket.send_fds(_server(), [json.dumps(request).encode()], streams or (nothing.fileno(), 1, 2))
        self.pid = int(_server().recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            _server().send(json.dumps({"poll": self.pid}).encode())
            self.returncode = json.loads(_server().recv(64))
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Return the exit code once it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_S)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@cache
def _server() -> socket.socket:
    """The socket of this process's server, which ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # What libraries read as they are loaded: without threads, and without torch's warnings on stderr.
    fixed = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = os.environ | {"PYTHONSAFEPATH": "1"} | fixed
    subprocess.Popen(
        [sys.executable, str(SERVER), str(theirs.fileno()), *PRELOADED], pass_fds=[theirs.fileno()], env=environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    return ours
