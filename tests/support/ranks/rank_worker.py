"""One rank of a pool of rank_pool.py: joins the process group, then runs jobs until told to stop."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

JOBS = ("rank_jobs", "channel_jobs", "model_jobs")


def _job(name: str) -> Callable[..., Any]:
    """Return the job called "module.function", or "function" in one of JOBS: the first that has it."""
    module, _, function = name.rpartition(".")
    houses = map(importlib.import_module, [module] if module else JOBS)  # one by one: the last imports transformers
    return next(getattr(house, function) for house in houses if hasattr(house, function))


def main() -> None:
    """Serve jobs."""
    import torch

    torch.set_num_threads(1)
    from sparsering.runtime.comm.lost import RankLost
    from sparsering.runtime.comm.mesh import join, leave

    patience_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    mesh = join(device=sys.argv[2], timeout_s=120, patience_s=patience_s)
    support = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(folder) for folder in (support, *support.iterdir()) if folder.is_dir()]
    from quick_interpreter import quicken

    connection = Client(sys.argv[1], family="AF_UNIX")
    connection.send(mesh.rank)
    while (job := connection.recv()) is not None:
        name, arguments = job
        try:
            job = _job(name)
            if mesh.device.type == "cpu":
                quicken()
            connection.send((True, job(mesh, **arguments)))
        except BaseException as error:
            connection.send((False, traceback.format_exc()))
            if isinstance(error, RankLost):
                leave()  # as a run ends: peers that still wait for this rank must see its connections close
                os._exit(1)
    leave()


if __name__ == "__main__":
    main()
