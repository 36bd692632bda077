"""Recordings are dropped before process groups end, whoever ends them, and whoever still holds them.

Real process groups of one gloo rank each, in processes of their own; what drops is written down in order.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from rank_pool import free_port, rank_environment

SCRIPT = """
from torch.distributed import destroy_process_group  # a name that was bound before anything was recorded
import threading
import torch
import torch.distributed as dist
from sparsering.runtime.attention.graphs.graphs import EAGER_CALLS, Graphs
from sparsering.runtime.comm.mesh import join, leave

class Recording:
    def __init__(self, compute, inputs):
        self.compute, self.inputs, self.outputs = compute, inputs, compute(inputs)
    def replay(self):
        self.outputs[0].copy_(self.compute(self.inputs)[0])
    def drop(self):
        print("dropped", dist.is_initialized(), flush=True)

def called(graphs):
    for number in range(EAGER_CALLS + 2):
        x, = graphs.call("key", lambda inputs: (inputs["x"] * 2,), {"x": torch.full((2,), float(number))})
        assert x.tolist() == [2.0 * number] * 2
graphs = Graphs(Recording)
"""
ENDINGS = {
    "a script ends the groups": "join(); called(graphs); destroy_process_group(); print('ended')",
    "a script ends one group": "join(); group = dist.new_group([0]); called(graphs); "
                               "destroy_process_group(group); print('ended')",
    "a script aborts the groups": "join(); called(graphs); "
                                  "dist.distributed_c10d._abort_process_group(); print('ended')",
    "leave": "join(); called(graphs); leave(); print('ended')",
    "an error that holds them": """
join()
try:
    called(graphs)
    raise OSError("no space left")
except OSError:
    leave()
print('ended')
""",
    "they are recorded anew": "join(); called(graphs); destroy_process_group(dist.new_group([0])); called(graphs); "
                              "leave(); print('ended')",
    "a thread of the sentinel aborts": """
join()
called(graphs)
thread = threading.Thread(target=dist.group.WORLD.abort)
thread.start()
thread.join()
print('aborted')
""",
    "nobody ends anything": "join(); called(graphs)",
}  # fmt: skip
SAID = {
    "they are recorded anew": "dropped True\ndropped True\nended\n", "nobody ends anything": "dropped True\n",
    "a thread of the sentinel aborts": "aborted\ndropped True\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_recordings_end_first(name: str) -> None:
    environment = rank_environment(0, 1, free_port())
    ended = subprocess.run([sys.executable, "-c", SCRIPT + ENDINGS[name]], env=environment, capture_output=True,
                           text=True, check=False, timeout=120)  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, SAID.get(name, "dropped True\nended\n")), ended.stderr
