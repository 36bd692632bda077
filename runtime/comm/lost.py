"""The errors that say which rank failed: the others must end with one that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist


class CommunicationError(RuntimeError):
    """A group of messages failed: names the communicator and the peers."""


class RankLost(RuntimeError):
    """Ranks that stopped answering, by number, as the survivors agree.

    ranks: these, where the store can still tell the others. alive: they are late, and will want to hear why all end.
    """

    ranks: Sequence[int] = ()
    alive: bool = False


# What a rank's death looks like to those who talked to it. Other errors are a rank's own.
SYMPTOMS = (CommunicationError, dist.DistError, torch.AcceleratorError)
_OF_GLOO = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)


def is_symptom(error: BaseException) -> bool:
    """Whether a rank's death may look like this error, or like what caused it. gloo raises plain RuntimeErrors."""
    if isinstance(error, SYMPTOMS) or (isinstance(error, RuntimeError) and _OF_GLOO.search(str(error))):
        return True
    return error.__cause__ is not None and is_symptom(error.__cause__)


def ranks_lost(ranks: Sequence[int], world_size: int, *, seen_by: str, because: object) -> RankLost:
    """Return the error for ranks that are gone."""
    names = ", ".join(f"rank {rank}" for rank in ranks)
    error = RankLost(f"{names} of {world_size} stopped answering (seen by {seen_by}); {because}")
    error.ranks = ranks
    return error


def rank_ended(rank: int, world_size: int, *, said: str) -> RankLost:
    """Return the error for a rank that said why before it ended."""
    error = RankLost(f"rank {rank} of {world_size} ended; it said: {said}")
    error.ranks = [rank]
    return error


def never_joined(ranks: Sequence[int], world_size: int, *, seen_by: str, waited_s: float) -> RankLost:
    """Return the error for ranks that were not there when all were to be."""
    names = ", ".join(f"rank {rank}" for rank in ranks)
    error = RankLost(f"{names} of {world_size} did not join within {waited_s:g} s (seen by {seen_by})")
    error.ranks = ranks
    return error


def not_opened(address: str, port: int, *, rank: int, world_size: int, because: str) -> RankLost:
    """Return the error for a store that nobody serves: who hosts it never started, or is somewhere else."""
    where = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)"
    return RankLost(f"rank 0 of {world_size} never opened the store at {where}, seen by rank {rank}: {because}")


def host_lost(store_host: str, world_size: int, *, seen_by: str, because: object) -> RankLost:
    """Return the error for a store that cannot be reached: nobody can be asked who else is gone."""
    host = f"{store_host} of {world_size}" if store_host.startswith("rank") else store_host
    return RankLost(f"{host}, which hosts the store, stopped answering (seen by {seen_by}); {because}")


def late(ranks: Mapping[int, str], world_size: int, *, seen_by: str, because: object) -> RankLost:
    """Return the error for ranks that live and did not come in time; ranks: where each of them was, "" if unknown."""
    names = ", ".join(f"rank {rank}" for rank in ranks)
    places = "; ".join(f"rank {rank} was in {place}" for rank, place in ranks.items() if place)
    where = f"; {places}" if places else ""
    error = RankLost(f"{names} of {world_size} did not come in time (seen by {seen_by}){where}; {because}")
    error.ranks, error.alive = list(ranks), True
    return error


def nobody_lost(rank: int, *, because: object) -> RankLost:
    """Return the error for a failed transfer among ranks that all live."""
    return RankLost(f"rank {rank}: all ranks are alive, but a transfer failed: {because}")
