"""All K/V by one all-gather, all dK/dV by one reduce-scatter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from ..schedule.pairs import Pairs
from ..schedule.schedule import DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule
from ..schedule.shape import AttentionShape
from .draft import Builder, Draft, Route, slots
from .layout import Entering, Layout, Offers
from .registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Collective(Layout):
    """An all-gather of K/V while a rank computes its own shard, then all others together.

    Needs W K/V slots, in the order of ranks. Backward gathers again; the gradients of all shards are summed in W slots
    and go home by a reduce-scatter. Everything travels and is computed whatever pairs are left out. It is here for
    networks on which a library's collectives are quicker than as many sends.
    """

    name: ClassVar[str] = "collective"
    words: ClassVar[str] = "one collective"
    plainness: ClassVar[int] = 4
    leaves_out: ClassVar[bool] = False

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        return _Collective(shape=shape, direction=direction, pairs=pairs).schedule(self.name)

    def entering(self, pairs: Pairs, *, ranks_per_node: int) -> Entering:
        """Collectives are rings: all shards but one come into a node at its first rank, and as many sums."""
        world = pairs.world_size
        first = (np.arange(world) % ranks_per_node == 0) & (world > ranks_per_node)
        through = np.where(first, world - 1, 0)
        return Entering(kv=through, dkv=through)

    @classmethod
    def candidates(cls, offers: Offers) -> list[Self]:
        """On very many ranks none: all K/V pass every node through one of its cards, and no two ranks are alike."""
        return [] if offers.very_many and cls.name not in offers.named else [cls()]


@dataclass(frozen=True, kw_only=True)
class _Collective(Builder):
    def communicators(self) -> list[Communicator]:
        return self.everyone("all_gather", *(["reduce_scatter"] if self.backward else []))

    def buffers(self) -> list[Buffer]:
        if self.world == 1:
            return []
        buffers = slots("kv", "kv", self.world, self.shape.kv_bytes)
        if self.backward:
            buffers += slots("dkv", "dkv", self.world, self.shape.dkv_bytes)
            buffers += slots("landing", "dkv", 1, self.shape.dkv_bytes)
        return buffers

    def draft(self, rank: int, parts: Draft) -> None:
        """The own shard first; backward sums its gradients in a slot, as all others'."""
        alone = self.world == 1
        parts.compute(0, self.block_task(rank, rank, KV_HOME, DKV_HOME if alone else f"dkv:{rank}"))
        for key in (key for key in range(self.world) if key != rank):
            parts.compute(1, self.block_task(rank, key, f"kv:{key}", f"dkv:{key}"))
        if alone:
            return
        kv = Route(
            kind="kv", communicator="all_gather", transport="all_gather", capacity_bytes=self.shape.kv_bytes
        )  # fmt: skip
        parts.launch(0, [kv.of_all(KV_HOME, "kv:0")], wait=1)
        if self.backward:
            dkv = Route(
                kind="dkv", communicator="reduce_scatter", transport="reduce_scatter",
                capacity_bytes=self.shape.dkv_bytes,
            )  # fmt: skip
            parts.launch(2, [dkv.of_all("dkv:0", "landing:0", DKV_HOME)], wait=3)
