"""Saying which rank failed: the others must end with an error that names it, not hang and not guess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from .lost import SYMPTOMS, CommunicationError, RankLost, host_lost, nobody_lost, ranks_lost
from .mesh import Mesh

GRACE = timedelta(seconds=5)


def name_lost_ranks(mesh: Mesh, topic: str, error: CommunicationError) -> RankLost:
    """Return an error that names the ranks that are gone, after a failed communication.

    Every survivor signs in at the store and gives the others GRACE to do so: whoever does not is lost. When all sign
    in, nobody died: a rank was late beyond the time-out, or a link failed, and the error says what was being sent.
    When the store itself cannot be reached, whoever hosts it is lost. `topic` is the same on all ranks.
    """
    prefix = f"sparsering/survivors/{topic}"
    seen_by = f"rank {mesh.rank}"
    lost: list[int] = []
    try:
        mesh.store.set(f"{prefix}/{mesh.rank}", "here")
        for rank in range(mesh.world_size):
            if not _signed_in(mesh.store, f"{prefix}/{rank}", timedelta(0) if lost else GRACE):
                lost.append(rank)
    except (dist.DistError, RuntimeError):
        return host_lost(mesh.store_host, mesh.world_size, seen_by=seen_by, because=error)
    if not lost:
        return nobody_lost(mesh.rank, because=error)
    return ranks_lost(lost, mesh.world_size, seen_by=seen_by, because=error)


@contextmanager
def naming_lost_ranks(mesh: Mesh) -> Iterator[None]:
    """Raise RankLost where a lost rank makes what is inside fail, or end with what nobody sent.

    For errors that a rank's death may look like, waits until the sentinel can tell; others pass at once, and so does
    everything where no sentinel watches.
    """
    sentinel = mesh.sentinel
    if sentinel is None:
        yield
        return
    sentinel.check()
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        lost = sentinel.verdict(wait=isinstance(error, SYMPTOMS))
        if lost is None:
            raise
        raise lost from error
    sentinel.check()


def _signed_in(store: Store, key: str, patience: timedelta) -> bool:
    if patience == timedelta(0):
        return store.check([key])
    try:
        store.wait([key], patience)
    except (dist.DistStoreError, RuntimeError):
        return store.check([key])  # raises when the store itself is gone
    return True
