"""All K/V by one all-gather, all dK/dV by one reduce-scatter."""

from __future__ import annotations

from dataclasses import dataclass

from .layout_draft import AttentionShape, Draft, block_task, close_schedule, slots
from .pairs import Pairs
from .schedule import ALL_RANKS, DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule, Transfer


def collective(*, shape: AttentionShape, direction: Direction, pairs: Pairs | None = None) -> Schedule:
    """One all-gather of K/V while a rank computes its own shard, then all others together.

    Needs W K/V slots, in the order of ranks. Backward gathers again; the gradients of all shards are summed in W slots
    and go home by one reduce-scatter. Everything travels and is computed whatever `pairs` leaves out.
    """
    layout = _Collective(shape=shape, direction=direction)
    return close_schedule("collective", direction, shape, layout.communicators(), layout.buffers(), layout.draft)


@dataclass(frozen=True, kw_only=True)
class _Collective:
    """The layout of `collective`."""

    shape: AttentionShape
    direction: Direction

    @property
    def world(self) -> int:
        return self.shape.world_size

    def communicators(self) -> list[Communicator]:
        names = ["all_gather", *(["reduce_scatter"] if self.direction == "backward" else [])]
        return [Communicator(name=name, groups=(tuple(range(self.world)),)) for name in names]

    def buffers(self) -> list[Buffer]:
        if self.world == 1:
            return []
        buffers = slots("kv", "kv", self.world, self.shape.kv_bytes)
        if self.direction == "backward":
            buffers += slots("dkv", "dkv", self.world, self.shape.dkv_bytes)
            buffers += slots("landing", "dkv", 1, self.shape.dkv_bytes)
        return buffers

    def draft(self, rank: int, parts: Draft) -> None:
        alone, backward = self.world == 1, self.direction == "backward"
        own_grad = (DKV_HOME if alone else f"dkv:{rank}") if backward else None
        parts.compute(0, block_task(rank, rank, KV_HOME, self.shape, own_grad))
        if alone:
            return
        parts.launch(0, [self._gather()], wait=1)
        for key in (key for key in range(self.world) if key != rank):
            parts.compute(1, block_task(rank, key, f"kv:{key}", self.shape, f"dkv:{key}" if backward else None))
        if backward:
            parts.launch(2, [self._scatter()], wait=3)

    def _gather(self) -> Transfer:
        return Transfer(
            kind="kv", shard=None, source=ALL_RANKS, destination=ALL_RANKS, sequence=0, communicator="all_gather",
            transport="all_gather", source_buffer=KV_HOME, buffer="kv:0", capacity_bytes=self.shape.kv_bytes,
        )  # fmt: skip

    def _scatter(self) -> Transfer:
        return Transfer(
            kind="dkv", shard=None, source=ALL_RANKS, destination=ALL_RANKS, sequence=0, communicator="reduce_scatter",
            transport="reduce_scatter", source_buffer="dkv:0", buffer="landing:0",
            capacity_bytes=self.shape.dkv_bytes, accumulate_into=DKV_HOME,
        )  # fmt: skip
