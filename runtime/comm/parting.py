"""Leaving together: a rank that is lost while ranks leave is named, although nothing of its is needed any more.

Every rank says at the store that it leaves. Rank 0 waits until all have, asks those that do not whether they live, and
says that all have parted; the others wait for that. Who is slow answers, and is waited for as long as the time-out
says. Then the store's host stays until nobody reads in it any more, and watches those in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from .lost import RankLost, host_lost, ranks_lost
from .words import GRACE_S, PARTED, POLL_S, Words, ended_key

# Of so many questions one after the other a living rank answers one: it has GRACE_S for each, and no more than this
# process's interpreter, held by a library, keeps it from answering.
UNANSWERED = 3
CLOSING_S = 30.0  # in which a living rank closes its connections, once all have parted


def part(words: Words, *, timeout_s: float) -> RankLost | None:
    """Say that this rank leaves, and wait until all do; return who is lost, or late, None where all have come.

    None at once where ranks do not answer each other, and where this process knows already that some are lost.
    """
    if not words.is_answering or words.knows:
        return None
    deadline = time.monotonic() + timeout_s
    because = f"it did not leave within {timeout_s:g} s of others"
    try:
        words.store.set(_leaving_key(words.rank), "yes")
        if words.rank == 0:
            lost = _lost_before(words, lambda rank: _has_left(words, rank), deadline)
            absent = _absent(words)
            if lost is not None or absent:
                return lost or words.missed(absent[0], because)
            words.store.set(PARTED, "yes")
        elif not words.wait(words.store, PARTED, deadline):
            return words.missed(next(iter(_absent(words)), 0), because)
        return words.heard()
    except RankLost as lost:
        return None if words.saw_parting else lost  # the host ended in order, before this rank looked again
    except (dist.DistError, RuntimeError) as error:
        if words.saw_parting:
            return None
        because = str(error).partition("\n")[0]
        return host_lost(words.store_host, words.world_size, seen_by=f"rank {words.rank}", because=because)


def close(words: Words) -> RankLost | None:
    """Say that this rank reads nothing more. The store's host stays while others do; return who of them is lost."""
    if not (words.is_host and words.is_answering) or words.knows:
        words.end()
        return None
    try:
        words.store.set(ended_key(words.rank), "yes")
        deadline = time.monotonic() + CLOSING_S
        return _lost_before(words, lambda rank: words.store.check([ended_key(rank)]), deadline)
    except (dist.DistError, RuntimeError):
        return None


def _lost_before(words: Words, has_come: Callable[[int], bool], deadline: float) -> RankLost | None:
    """Wait for all other ranks; return who is lost as soon as that is clear; None when all came, or time is over."""
    pending = [rank for rank in range(words.world_size) if rank != words.rank]
    unanswered = dict.fromkeys(pending, 0)
    ask_at = time.monotonic() + GRACE_S
    while pending := [rank for rank in pending if not has_come(rank)]:
        if (lost := words.heard()) is not None:
            return words.find(lost)
        if time.monotonic() > deadline:
            return None
        if time.monotonic() < ask_at:
            time.sleep(POLL_S)
            continue
        mute = words.ask(pending)
        unanswered = {rank: unanswered.get(rank, 0) + 1 for rank in mute}
        gone = [rank for rank, times in unanswered.items() if times >= UNANSWERED and not has_come(rank)]
        if gone:
            seen_by = f"rank {words.rank}"
            return words.find(ranks_lost(gone, words.world_size, seen_by=seen_by, because="all others were leaving"))
        ask_at = time.monotonic() + (0.0 if mute else GRACE_S)
    return None


def _absent(words: Words) -> list[int]:
    return [rank for rank in range(words.world_size) if not _has_left(words, rank)]


def _has_left(words: Words, rank: int) -> bool:
    """Whether a rank leaves, or has ended without."""
    return words.store.check([_leaving_key(rank)]) or words.store.check([ended_key(rank)])


def _leaving_key(rank: int) -> str:
    return f"sparsering/leaving/{rank}"
