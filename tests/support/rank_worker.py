"""One rank of a pool of tests/support/rank_pool.py: joins the process group, then runs jobs until told to stop."""

from __future__ import annotations

import importlib
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path


def _jobs():
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    return importlib.import_module("rank_jobs")


def main() -> None:
    """Serve jobs."""
    import torch

    torch.set_num_threads(1)
    from sparsering.runtime.comm.mesh import join, leave

    patience_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    mesh = join(device=sys.argv[2], timeout_s=120, patience_s=patience_s)
    jobs = _jobs()
    connection = Client(sys.argv[1], family="AF_UNIX")
    connection.send(mesh.rank)
    while (job := connection.recv()) is not None:
        name, arguments = job
        try:
            module, _, function = name.rpartition(".")  # "train_jobs.run", or a job of rank_jobs.py
            house = importlib.import_module(module) if module else jobs
            connection.send((True, getattr(house, function)(mesh, **arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    leave()


if __name__ == "__main__":
    main()
