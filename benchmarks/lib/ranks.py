"""Starting a benchmark's ranks on this host: all end with the first that fails, and with the process that waits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from ...runtime.comm.launch import exit_on_signals

POLL_S = 0.2


def start_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    count: int,
    shared: dict[str, str],
    own: Sequence[dict[str, str]] = (),
) -> int:
    """Run `python -m module arguments` as `count` ranks and return the exit code of the first that failed, or 0.

    shared, own: environment variables of all ranks, and of each. A signal that ends this process ends the ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks: list[subprocess.Popen[bytes]] = []
    with exit_on_signals():
        try:
            for rank in range(count):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment = os.environ | address | shared | (own[rank] if own else {}) | place
                ranks.append(subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment))
            while all(rank.poll() in (None, 0) for rank in ranks) and any(rank.poll() is None for rank in ranks):
                time.sleep(POLL_S)
            return next((rank.poll() or 1 for rank in ranks if rank.poll()), 0)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
