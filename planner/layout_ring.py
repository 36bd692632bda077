"""The flat ring."""

from __future__ import annotations

from ..traces.errors import InputError
from .layout_draft import AttentionShape, Draft, Route, block_task, close_schedule, slots
from .schedule import DKV_HOME, KV_HOME, Communicator, Direction, Schedule


def ring(*, shape: AttentionShape, direction: Direction, prefetch: int = 1) -> Schedule:
    """A flat ring: in phase p rank r computes shard r - p while the next `prefetch` shards are on their way.

    Needs prefetch + 1 K/V slots. Backward: dK/dV of a shard travel one phase behind it, gathering contributions, and
    take one more hop home.
    """
    world = shape.world_size
    if prefetch < 1:
        raise InputError(f"must be at least 1, not {prefetch}", field="prefetch")
    depth = min(prefetch, max(world - 1, 1))
    kv = Route(kind="kv", communicator="ring", capacity_bytes=shape.kv_bytes)
    dkv = Route(kind="dkv", communicator="ring_grad", capacity_bytes=shape.dkv_bytes)
    everyone = (tuple(range(world)),)
    communicators = [Communicator(name="ring", groups=everyone)]
    buffers = slots("kv", "kv", min(depth + 1, world - 1), shape.kv_bytes)
    if direction == "backward" and world > 1:
        communicators.append(Communicator(name="ring_grad", groups=everyone))
        buffers += slots("dkv", "dkv", 2, shape.dkv_bytes) + slots("landing", "dkv", 1, shape.dkv_bytes)

    def kv_buffer(phase: int) -> str:
        return KV_HOME if phase == 0 else f"kv:{(phase - 1) % (depth + 1)}"

    def draft(rank: int, parts: Draft) -> None:
        following, previous = (rank + 1) % world, (rank - 1) % world
        for step in range(1, world):  # delivers what phase `step` computes
            sent, received = (rank - step + 1) % world, (rank - step) % world
            source_buffer, buffer = kv_buffer(step - 1), kv_buffer(step)
            calls = [
                kv.move(sent, rank, following, step, source_buffer, buffer),
                kv.move(received, previous, rank, step, source_buffer, buffer),
            ]
            parts.launch(max(step - depth, 0), calls, wait=step)
        for phase in range(world):
            key = (rank - phase) % world
            grad = None if direction == "forward" else DKV_HOME if phase == 0 else f"dkv:{phase % 2}"
            parts.compute(phase, block_task(rank, key, kv_buffer(phase), shape, grad))
        if direction == "backward":
            for phase in range(2, world + 1):  # the hop after phase - 1 was computed; the last one goes home
                sent, received = (rank - phase + 1) % world, (rank - phase) % world
                into = DKV_HOME if phase == world else f"dkv:{phase % 2}"
                hop = [
                    dkv.move(sent, rank, following, phase, f"dkv:{(phase - 1) % 2}", "landing:0", into),
                    dkv.move(received, previous, rank, phase, f"dkv:{(phase - 1) % 2}", "landing:0", into),
                ]
                parts.launch(phase, hop, wait=phase + 1)

    return close_schedule("ring", direction, shape, communicators, buffers, draft)
