"""One long-lived rank of the soak: joins its process group once, then plays configurations until there are no more.

    python -m sparsering.runtime.comm.tied <parent> sparsering.benchmarks.lib.soak.rank <address>

Configurations come, and verdicts go, as JSON over a local socket. A problem is an answer, not an end.
"""

from __future__ import annotations

import json
import sys
import traceback
from multiprocessing.connection import Client

import torch

from ....runtime.comm.mesh import join, leave
from ....traces.errors import InputError
from .jobs import play

TIMEOUT_S = 600.0


def main() -> None:
    """Serve until told to end, or until who asks is gone."""
    torch.set_num_threads(1)
    mesh = join(device="cpu", timeout_s=TIMEOUT_S)
    connection = Client(sys.argv[1], family="AF_UNIX")
    connection.send_bytes(json.dumps(mesh.rank).encode())
    while (values := json.loads(connection.recv_bytes())) is not None:
        answer = {"problems": [], "refused": None, "raised": False}
        try:
            answer["problems"] = play(mesh, values)
        except InputError as error:
            answer["refused"] = str(error)
        except Exception:
            answer |= {"problems": [traceback.format_exc(limit=-6)], "raised": True}
        connection.send_bytes(json.dumps(answer).encode())
    leave()
    connection.close()


if __name__ == "__main__":
    main()
