"""Runs a module as a rank that ends with its launcher, whatever ends that one: even SIGKILL leaves nothing running.

    python -m sparsering.runtime.comm.tied <process number of the launcher> <module> [arguments of the module]

It imports nothing of weight, so that the rank is tied before it does anything.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
POLL_S = 1.0


def end_with(parent: int) -> None:
    """Have this process killed when the process that started it, whose number this is, has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="sparsering-tied", daemon=True).start()
    if os.getppid() != parent:  # it ended before this process was tied to it
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def main() -> None:
    """Tie this process to its launcher, then be the module."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    end_with(parent)
    sys.argv[1:] = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
