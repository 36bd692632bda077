"""All K/V by all-gathers, all dK/dV by reduce-scatters, of all heads at once or of a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...traces.errors import InputError, UnsupportedError
from ..schedule.pairs import Pairs
from ..schedule.schedule import (
    ALL_RANKS,
    DKV_HOME,
    KV_HOME,
    Buffer,
    Communicator,
    Direction,
    Schedule,
    ShardId,
    Task,
    Transfer,
)
from ..schedule.shape import AttentionShape
from .draft import Draft, close_schedule, columns_task, columns_transfer, slots


def collective(*, shape: AttentionShape, direction: Direction, pairs: Pairs | None = None, chunks: int = 1) -> Schedule:
    """An all-gather of K/V while a rank computes its own shard, then all others together.

    Needs W K/V slots, in the order of ranks. Backward gathers again; the gradients of all shards are summed in W slots
    and go home by a reduce-scatter. chunks: so many collectives of equally many K/V heads each, one after the other: a
    chunk's heads are computed while the next one's K/V arrive, and its gradients travel meanwhile. Everything travels
    and is computed whatever `pairs` leaves out. Raises UnsupportedError where the K/V heads cannot be cut so.
    """
    if chunks < 1:
        raise InputError(f"must be at least 1, not {chunks}", field="chunks")
    if shape.kv_heads % chunks:
        raise UnsupportedError(f"{shape.kv_heads} K/V heads cannot be cut into {chunks} chunks", field="chunks")
    layout = _Collective(shape=shape, direction=direction, chunks=chunks)
    parts = layout.communicators(), layout.buffers(), layout.draft
    return close_schedule("collective", direction, shape, *parts, columns_by_draft=chunks > 1)


@dataclass(frozen=True, kw_only=True)
class _Collective:
    """The layout of `collective`. A chunk is a head group; of one chunk, all heads."""

    shape: AttentionShape
    direction: Direction
    chunks: int

    @property
    def world(self) -> int:
        return self.shape.world_size

    @property
    def kv_bytes(self) -> int:
        """K and V of one shard and chunk."""
        return self.shape.kv_bytes // self.chunks

    @property
    def dkv_bytes(self) -> int:
        """dK and dV of one shard and chunk."""
        return self.shape.dkv_bytes // self.chunks

    def communicators(self) -> list[Communicator]:
        names = ["all_gather", *(["reduce_scatter"] if self.direction == "backward" else [])]
        return [Communicator(name=name, groups=(tuple(range(self.world)),)) for name in names]

    def buffers(self) -> list[Buffer]:
        if self.world == 1:
            return []
        buffers = slots("kv", "kv", self.chunks * self.world, self.kv_bytes)
        if self.direction == "backward":
            buffers += slots("dkv", "dkv", self.chunks * self.world, self.dkv_bytes)
            buffers += slots("landing", "dkv", self.chunks, self.dkv_bytes)
        return buffers

    def draft(self, rank: int, parts: Draft) -> None:
        """Own shard first, then chunk after chunk; where heads are cut, columns too, with a chunk's other keys."""
        alone, backward = self.world == 1, self.direction == "backward"
        for chunk in range(self.chunks):
            own_grad = (DKV_HOME if alone else f"dkv:{self._slot(chunk, rank)}") if backward else None
            parts.compute(0, self._task(rank, rank, chunk, KV_HOME, own_grad))
        for chunk in range(self.chunks):
            if not alone:
                parts.launch(0, [self._gather(chunk)], wait=chunk + 1)
            if self.chunks > 1 and self.shape.columns_capacity:
                parts.compute(chunk + 1, columns_task(self.direction, **self._queries(rank, chunk)))
            for key in (key for key in range(self.world) if key != rank):
                slot = self._slot(chunk, key)
                parts.compute(
                    chunk + 1, self._task(rank, key, chunk, f"kv:{slot}", f"dkv:{slot}" if backward else None)
                )
            if backward and not alone:
                parts.launch(chunk + 2, [self._scatter(chunk)], wait=self.chunks + 2)
        if self.chunks > 1 and self.shape.columns_capacity:
            launched = (self.chunks + 1, self.chunks + 2) if backward else (0, 1)
            parts.launch(launched[0], [columns_transfer(self.direction, self.shape)], wait=launched[1])

    def _slot(self, chunk: int, part: int) -> int:
        return chunk * self.world + part

    def _queries(self, rank: int, chunk: int) -> dict[str, Any]:
        heads = self.shape.heads // self.chunks
        query = ShardId(sequence_part=rank, head_group=chunk)
        return {"query": query, "heads": (chunk * heads, (chunk + 1) * heads)}

    def _task(self, rank: int, key: int, chunk: int, key_buffer: str, grad_buffer: str | None) -> Task:
        shard = ShardId(sequence_part=key, head_group=chunk)
        return Task(**self._queries(rank, chunk), key=shard, key_buffer=key_buffer, grad_buffer=grad_buffer)

    def _shard(self, chunk: int) -> ShardId | None:
        return ShardId(sequence_part=ALL_RANKS, head_group=chunk) if self.chunks > 1 else None

    def _gather(self, chunk: int) -> Transfer:
        return Transfer(
            kind="kv", shard=self._shard(chunk), source=ALL_RANKS, destination=ALL_RANKS, sequence=0,
            communicator="all_gather", transport="all_gather", source_buffer=KV_HOME,
            buffer=f"kv:{self._slot(chunk, 0)}", capacity_bytes=self.kv_bytes,
        )  # fmt: skip

    def _scatter(self, chunk: int) -> Transfer:
        return Transfer(
            kind="dkv", shard=self._shard(chunk), source=ALL_RANKS, destination=ALL_RANKS, sequence=0,
            communicator="reduce_scatter", transport="reduce_scatter", source_buffer=f"dkv:{self._slot(chunk, 0)}",
            buffer=f"landing:{chunk}", capacity_bytes=self.dkv_bytes, accumulate_into=DKV_HOME,
        )  # fmt: skip
