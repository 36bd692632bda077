"""The pipelined all-gather."""

from __future__ import annotations

from itertools import pairwise

from ..traces.errors import InputError
from .layout_draft import AttentionShape, Draft, Route, block_task, close_schedule, slots
from .schedule import DKV_HOME, KV_HOME, Communicator, Direction, Schedule


def gather(*, shape: AttentionShape, direction: Direction, chunks: int = 4) -> Schedule:
    """A pipelined all-gather: every shard goes straight from its owner to all, in `chunks` launches made up front.

    Phase c computes the shards of chunk c together. Needs W - 1 K/V slots. Backward: dK/dV go straight home.
    """
    world = shape.world_size
    if chunks < 1:
        raise InputError(f"must be at least 1, not {chunks}", field="chunks")
    pieces = _split(range(1, world), min(chunks, max(world - 1, 1)))  # offsets of the owners, nearest first
    largest = max((len(piece) for piece in pieces), default=0)
    kv = Route(kind="kv", communicator="gather", capacity_bytes=shape.kv_bytes)
    dkv = Route(kind="dkv", communicator="gather_grad", capacity_bytes=shape.dkv_bytes)
    everyone = (tuple(range(world)),)
    communicators = [Communicator(name="gather", groups=everyone)]
    buffers = slots("kv", "kv", world - 1, shape.kv_bytes)
    if direction == "backward" and world > 1:
        communicators.append(Communicator(name="gather_grad", groups=everyone))
        buffers += slots("dkv", "dkv", largest * min(2, len(pieces)), shape.dkv_bytes)
        buffers += slots("landing", "dkv", largest, shape.dkv_bytes)

    def draft(rank: int, parts: Draft) -> None:
        parts.compute(0, block_task(rank, rank, KV_HOME, shape, None if direction == "forward" else DKV_HOME))
        for chunk, piece in enumerate(pieces, start=1):
            fetch, homeward = [], []
            for place, offset in enumerate(piece):
                owner, reader = (rank - offset) % world, (rank + offset) % world
                slot, grad = f"kv:{offset - 1}", f"dkv:{place + largest * (chunk % 2 if len(pieces) > 1 else 0)}"
                fetch.append(kv.move(rank, rank, reader, offset, KV_HOME, slot))
                fetch.append(kv.move(owner, owner, rank, offset, KV_HOME, slot))
                homeward.append(dkv.move(owner, rank, owner, offset, grad, f"landing:{place}", DKV_HOME))
                homeward.append(dkv.move(rank, reader, rank, offset, grad, f"landing:{place}", DKV_HOME))
                parts.compute(chunk, block_task(rank, owner, slot, shape, None if direction == "forward" else grad))
            parts.launch(0, fetch, wait=chunk)
            if direction == "backward":
                parts.launch(chunk + 1, homeward, wait=chunk + 2)

    return close_schedule("gather", direction, shape, communicators, buffers, draft)


def _split(items: range, pieces: int) -> list[range]:
    """Cut a range into nearly equal pieces, the smaller ones first so that the first arrives soonest."""
    size, extra = divmod(len(items), pieces) if items else (0, 0)
    cuts = [0]
    for piece in range(pieces if items else 0):
        cuts.append(cuts[-1] + size + (piece >= pieces - extra))
    return [items[start:stop] for start, stop in pairwise(cuts)]
