"""A layout in one file: every shard straight from its owner, one a phase. Importing it makes it known everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from sparsering.planner.layouts.draft import Builder, Draft, Route, slots
from sparsering.planner.layouts.layout import Layout, Offers
from sparsering.planner.layouts.registry import register
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule
from sparsering.planner.schedule.shape import AttentionShape


@register
@dataclass(frozen=True, kw_only=True)
class Direct(Layout):
    """In phase p rank r computes the shard of rank r - p: two K/V slots as a ring has, but nothing is passed on."""

    name: ClassVar[str] = "direct"
    words: ClassVar[str] = "direct fetches"
    leaves_out: ClassVar[bool] = False

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        return _Direct(shape=shape, direction=direction, pairs=pairs).schedule(self.name)

    @classmethod
    def candidates(cls, offers: Offers) -> Sequence[Self]:
        return [cls()] if cls.name in offers.named else []


class _Direct(Builder):
    def communicators(self) -> list[Communicator]:
        return self.everyone("fetch", *(["home"] if self.backward else []))

    def buffers(self) -> list[Buffer]:
        found = slots("kv", "kv", min(2, self.world - 1), self.shape.kv_bytes)
        if self.backward and self.world > 1:
            found += slots("dkv", "dkv", min(2, self.world - 1), self.shape.dkv_bytes)
            found += slots("landing", "dkv", 1, self.shape.dkv_bytes)
        return found

    def draft(self, rank: int, parts: Draft) -> None:
        kv = Route(kind="kv", communicator="fetch", capacity_bytes=self.shape.kv_bytes)
        dkv = Route(kind="dkv", communicator="home", capacity_bytes=self.shape.dkv_bytes)
        parts.compute(0, self.block_task(rank, rank, KV_HOME, DKV_HOME))
        for p in range(1, self.world):
            kv_slot, dkv_slot = f"kv:{(p - 1) % 2}", f"dkv:{(p - 1) % 2}"
            routes = [((rank - p) % self.world, rank), (rank, (rank + p) % self.world)]  # (owner, reader)
            parts.launch(p - 1, [kv.move(own, own, read, p, KV_HOME, kv_slot) for own, read in routes], wait=p)
            parts.compute(p, self.block_task(rank, routes[0][0], kv_slot, dkv_slot))
            if self.backward:
                homeward = [dkv.move(own, read, own, p, dkv_slot, "landing:0", DKV_HOME) for own, read in routes]
                parts.launch(p + 1, homeward, wait=p + 2)
