"""One rank of test_starts.py: joins, adds up with the others, and fails as it is told.

Called as `start_worker.py timeout_s victim how [patience_s]`; the victim fails after the first sum: "raises" outside
all transfers, "exits" without a word, is "killed", is "late" beyond the time-out, or raises while the others wait for
what it "says" at the store, or for it to make a group ("groups"). Or it "ends" with exit code 3 after all have left.
Or, once all sums are made, it is "killed leaving", "raises leaving", leaves after "slow" work, exits "unleft", or is
"killed closing".
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from sparsering.runtime.comm.lost import RankLost
from sparsering.runtime.comm.mesh import join, leave, naming_lost_ranks, speaks
from sparsering.traces.errors import InputError

LATER_S = 15.0  # when the others have found out, and named the rank
SLOW_S = 22.0  # longer than it takes to miss a rank that does not answer


def main() -> int:
    """Be the rank; end as the commands do."""
    try:
        mesh = join(device="cpu", timeout_s=float(sys.argv[1]), patience_s=float(sys.argv[4]) if sys.argv[4:] else 0.0)
        try:
            with naming_lost_ranks(mesh):
                dist.all_reduce(torch.ones(4))
                if mesh.rank == int(sys.argv[2]):
                    _fail(sys.argv[3], float(sys.argv[1]))
                if sys.argv[3] == "says":
                    mesh.broadcast("word", 1)
                    mesh.collect("words", 1)
                if sys.argv[3] == "groups":
                    dist.new_group(backend="gloo")
                dist.all_reduce(torch.ones(4))
                if mesh.rank == int(sys.argv[2]):
                    _fail_at_the_end(sys.argv[3])
                elif sys.argv[3] == "unleft":
                    time.sleep(LATER_S)  # the other one has long gone when these leave
        finally:
            if sys.argv[3] != "unleft" or mesh.rank != int(sys.argv[2]):
                leave()
    except InputError as error:
        if speaks(str(error)):
            print(f"sparsering: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"sparsering: {error}", file=sys.stderr)
        return 1
    return 3 if sys.argv[3] == "ends" and mesh.rank == int(sys.argv[2]) else 0


AT_THE_END = ("ends", "killed leaving", "killed closing", "raises leaving", "slow", "unleft")


def _fail_at_the_end(how: str) -> None:
    match how:
        case "killed leaving":
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed closing":
            dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGKILL)
        case "raises leaving":
            time.sleep(1.0)
            raise OSError("no data left")
        case "slow":
            time.sleep(SLOW_S)


def _fail(how: str, timeout_s: float) -> None:
    if how in AT_THE_END:
        return
    if how == "late":
        time.sleep(timeout_s + LATER_S)
        return
    if how == "exits":
        os._exit(3)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("no data left")


if __name__ == "__main__":
    sys.exit(main())
