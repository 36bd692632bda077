"""Saying which rank failed: the others must end with an error that names it, not hang and not guess."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from .comm import CommunicationError
from .mesh import Mesh

GRACE = timedelta(seconds=5)


class RankLost(RuntimeError):
    """Ranks that stopped answering, by number, as the survivors agree."""


def name_lost_ranks(mesh: Mesh, topic: str, error: CommunicationError) -> RankLost:
    """Return an error that names the ranks that are gone, after a failed communication.

    Every survivor signs in at the store and gives the others GRACE to do so: whoever does not is lost. When all sign
    in, nobody died: a rank was late beyond the time-out, or a link failed, and the error says what was being sent.
    When the store itself cannot be reached, whoever hosts it is lost. `topic` is the same on all ranks.
    """
    prefix = f"sparsering/survivors/{topic}"
    lost: list[int] = []
    try:
        mesh.store.set(f"{prefix}/{mesh.rank}", "here")
        for rank in range(mesh.world_size):
            if not _signed_in(mesh.store, f"{prefix}/{rank}", timedelta(0) if lost else GRACE):
                lost.append(rank)
    except (dist.DistError, RuntimeError):
        host = f"{mesh.store_host} of {mesh.world_size}" if mesh.hosted_by_rank else mesh.store_host
        return RankLost(f"{host}, which hosts the store, stopped answering (seen by rank {mesh.rank}); {error}")
    if not lost:
        return RankLost(f"rank {mesh.rank}: all ranks are alive, but a transfer failed: {error}")
    names = ", ".join(f"rank {rank}" for rank in lost)
    return RankLost(f"{names} of {mesh.world_size} stopped answering (seen by rank {mesh.rank}); {error}")


def _signed_in(store: Store, key: str, patience: timedelta) -> bool:
    if patience == timedelta(0):
        return store.check([key])
    try:
        store.wait([key], patience)
    except (dist.DistStoreError, RuntimeError):
        return store.check([key])  # raises when the store itself is gone
    return True
