"""Two ranks on two GPUs whose CUDA graphs hold NCCL transfers end, however they do, while the graphs are still held.

Where a graph outlives its communicator NCCL never returns from ending it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rank_pool import free_port, rank_environment

pytestmark = pytest.mark.gpu
LIMIT_S = 120.0
SCRIPT = """
import os
import torch
import torch.distributed as dist
from sparsering.runtime.attention.graphs.graphs import EAGER_CALLS, CudaGraphs, Graphs
from sparsering.runtime.comm.mesh import join, leave

mesh = join(timeout_s=60.0)
torch.cuda.set_device(mesh.device)

def summed(inputs):
    x = inputs["x"] + 0.0
    dist.all_reduce(x)
    return (x,)

def called(graphs):
    for number in range(EAGER_CALLS + 3):
        x, = graphs.call("key", summed, {"x": torch.full((1024,), float(number), device=mesh.device)})
        assert x.tolist() == [2.0 * number] * 1024
graphs = Graphs(CudaGraphs())
called(graphs)
"""
ENDINGS = {
    "leave": "leave()",
    "a script ends the groups": "dist.destroy_process_group()",
    "an error": "try:\n    raise OSError('no space left')\nexcept OSError:\n    leave()",
    "nobody ends anything": "",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_processes_end(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT + ENDINGS[name]], env=rank_environment(rank, 2, port),
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], told
