"""The errors that say which rank failed: the others must end with one that names it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class CommunicationError(RuntimeError):
    """A group of messages failed: names the communicator and the peers."""


class RankLost(RuntimeError):
    """Ranks that stopped answering, by number, as the survivors agree.

    ranks: these, where the store can still tell the others.
    """

    ranks: Sequence[int] = ()


# What a rank's death looks like to those who talked to it. Other errors are a rank's own.
SYMPTOMS = (CommunicationError, dist.DistError, torch.AcceleratorError)


def ranks_lost(ranks: Sequence[int], world_size: int, *, seen_by: str, because: object) -> RankLost:
    """Return the error for ranks that are gone."""
    names = ", ".join(f"rank {rank}" for rank in ranks)
    error = RankLost(f"{names} of {world_size} stopped answering (seen by {seen_by}); {because}")
    error.ranks = ranks
    return error


def host_lost(store_host: str, world_size: int, *, seen_by: str, because: object) -> RankLost:
    """Return the error for a store that cannot be reached: nobody can be asked who else is gone."""
    host = f"{store_host} of {world_size}" if store_host.startswith("rank") else store_host
    return RankLost(f"{host}, which hosts the store, stopped answering (seen by {seen_by}); {because}")


def nobody_lost(rank: int, *, because: object) -> RankLost:
    """Return the error for a failed transfer among ranks that all live."""
    return RankLost(f"rank {rank}: all ranks are alive, but a transfer failed: {because}")
