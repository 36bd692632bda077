"""Ranks that live as long as the soak: started once for every number of ranks, and asked again and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from ....runtime.comm.start import LOCAL, PACKAGE, TIED, free_port, rank_environment
from .draws import Values

RANK = f"{PACKAGE}.benchmarks.lib.soak.rank"
# What rises for hours, ends by itself, and would hide what somebody holds:
# - Gloo's flight recorder keeps the last 2000 collectives of a process, a kilobyte each and more. 0 records none.
# - Threads share heaps, eight for each core. `malloc_trim` gives back the end of the first heap alone: the others keep
#   the most that any thread ever needed. Where there is one heap, all that is free at rest is given back.
SETTLED = {"TORCH_FR_BUFFER_SIZE": "0", "MALLOC_ARENA_MAX": "1"}
ANSWER_TIMEOUT_S = 900.0  # more than a rank waits for others, also on a machine that is busy otherwise
END_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a configuration. refused: by the product, in one line, the same on all ranks.

    in_step: whether all ranks came to their end, so that they can play another one.
    """

    problems: list[str] = field(default_factory=list)
    refused: str | None = None
    in_step: bool = True


class Pool:
    """`world_size` processes that wait for configurations. environment: what they start with."""

    def __init__(self, world_size: int, *, environment: Mapping[str, str]) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="soak-pool-")
        address = str(Path(self._folder.name) / "socket")
        listener, port = Listener(address, family="AF_UNIX"), free_port()
        alone = {name: value for name, value in LOCAL.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
        fixed = {**environment, "OMP_NUM_THREADS": "1", **SETTLED, **alone}
        command = [sys.executable, "-m", TIED, str(os.getpid()), RANK, address]
        self.processes = [
            subprocess.Popen(command, env=fixed | rank_environment(rank, world_size, port))
            for rank in range(world_size)
        ]
        self._connections: dict[int, Connection] = {}
        while len(self._connections) < world_size:
            connection = listener.accept()
            self._connections[json.loads(connection.recv_bytes())] = connection
        listener.close()

    def play(self, values: Values) -> Answer:
        """Have all ranks play a configuration."""
        asked = json.dumps(values).encode()
        for connection in self._connections.values():
            connection.send_bytes(asked)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        problems: list[str] = []
        refused: set[str | None] = set()
        in_step = True
        for rank in range(self.world_size):
            connection = self._connections[rank]
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    problems.append(f"rank {rank}: no answer in {ANSWER_TIMEOUT_S:g} s")
                    in_step = False
                    continue
                answer = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                problems.append(f"rank {rank}: died, exit code {self.processes[rank].poll()}")
                in_step = False
                continue
            problems += [f"rank {rank}: {one}" for one in answer["problems"]]
            refused.add(answer["refused"])
            in_step &= not answer["raised"]
        if not problems and len(refused) > 1:
            problems.append(f"ranks refuse differently: {refused}")
            in_step = False
        return Answer(problems=problems, refused=None if problems else next(iter(refused)), in_step=in_step)

    def end(self) -> list[str]:
        """End the ranks; return what did not end by itself, or ended with an error."""
        problems = []
        for connection in self._connections.values():
            try:
                connection.send_bytes(b"null")
            except OSError:
                continue  # it is gone: its exit code says so
        for rank, process in enumerate(self.processes):
            try:
                code = process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = "none: had to be killed"
            if code:
                problems.append(f"rank {rank} of {self.world_size} ended with exit code {code}")
        for connection in self._connections.values():
            connection.close()
        self._folder.cleanup()
        return problems
