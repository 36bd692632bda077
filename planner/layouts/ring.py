"""The flat ring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from ..schedule.pairs import Pairs
from ..schedule.schedule import DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule
from ..schedule.shape import AttentionShape
from .draft import Builder, Draft, Route, slots
from .layout import Entering, Layout, Offers
from .registry import register
from .tour import Tour


@register
@dataclass(frozen=True, kw_only=True)
class Ring(Layout):
    """A flat ring: in phase p rank r computes shard r - p while the next `prefetch` shards are on their way.

    A shard travels as far as the last rank that needs it. Needs prefetch + 1 K/V slots. Backward: dK/dV of a shard
    travel one phase behind it, gathering contributions, and go home from the last rank that has one.
    The search looks at a prefetch of 1 and 2: simulated on 4 x 8 A100s, a third shard gained at most 1.4 % over two.
    """

    name: ClassVar[str] = "ring"
    words: ClassVar[str] = "a flat ring"
    plainness: ClassVar[int] = 1

    prefetch: int = 1

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        return _Ring(shape=shape, direction=direction, pairs=pairs, prefetch=self.prefetch).schedule(self.name)

    def entering(self, pairs: Pairs, *, ranks_per_node: int) -> Entering:
        """The ring comes into a node at its first rank; which way gradients go home from there is left open."""
        first = np.arange(pairs.world_size) % ranks_per_node == 0
        kv = np.where(first, np.repeat(pairs.of_nodes(ranks_per_node).sum(axis=1), ranks_per_node), 0)
        return replace(Entering.nothing(pairs.world_size), kv=kv)

    @classmethod
    def candidates(cls, offers: Offers) -> list[Self]:
        return [cls(prefetch=depth) for depth in offers.counts(1, 2)]

    @classmethod
    def baselines(cls, offers: Offers) -> list[tuple[str, Self]]:
        return [(placement, cls(prefetch=1)) for placement in ("striped", "zigzag", "contiguous")]


@dataclass(frozen=True, kw_only=True)
class _Ring(Builder):
    prefetch: int

    @cached_property
    def tour(self) -> Tour:
        return Tour.of(self.pairs.distances)

    @property
    def alike(self) -> int:
        return 1

    @property
    def depth(self) -> int:
        return min(self.prefetch, max(self.world - 1, 1))

    def communicators(self) -> list[Communicator]:
        return self.everyone("ring", *(["ring_grad"] if self.backward and self.world > 1 else []))

    def buffers(self) -> list[Buffer]:
        buffers = slots("kv", "kv", min(self.depth + 1, self.tour.longest), self.shape.kv_bytes)
        if self.backward and self.tour.longest:
            buffers += slots("dkv", "dkv", self.tour.grad_slots, self.shape.dkv_bytes)
            buffers += slots("landing", "dkv", 1 + self.tour.crowded, self.shape.dkv_bytes)
        return buffers

    def kv_buffer(self, phase: int) -> str:
        return KV_HOME if phase == 0 else f"kv:{(phase - 1) % (self.depth + 1)}"

    def grad_buffer(self, phase: int) -> str:
        return DKV_HOME if phase == 0 else f"dkv:{phase % self.tour.grad_slots}"

    def draft(self, rank: int, parts: Draft) -> None:
        for step in range(1, self.world):
            self._fetch(parts, rank, step)
        for phase in range(self.world):
            key = (rank - phase) % self.world
            if self.tour.needed[key, phase]:
                parts.compute(phase, self.block_task(rank, key, self.kv_buffer(phase), self.grad_buffer(phase)))
        if self.backward:
            for phase in range(2, self.world + 1):
                self._add_up(parts, rank, phase)

    def _fetch(self, parts: Draft, rank: int, step: int) -> None:
        """Deliver what phase `step` computes, here and at the next rank."""
        kv = Route(kind="kv", communicator="ring", capacity_bytes=self.shape.kv_bytes)
        ends = self.kv_buffer(step - 1), self.kv_buffer(step)
        moves = [kv.move(*passed, step, *ends) for passed in self.tour.passed_on(rank, step)]
        parts.launch(max(step - self.depth, 0), moves, wait=step)

    def _add_up(self, parts: Draft, rank: int, phase: int) -> None:
        """The hop after phase - 1 was computed: on to the next rank that may add to it, or home."""
        dkv = Route(kind="dkv", communicator="ring_grad", capacity_bytes=self.shape.dkv_bytes)
        moves = []
        for shard, source, destination, home in self.tour.hops(rank, phase):
            landing, into = f"landing:{int(home and self.tour.crowded)}", self.grad_buffer(0 if home else phase)
            moves.append(dkv.move(shard, source, destination, phase, self.grad_buffer(phase - 1), landing, into))
        parts.launch(phase, moves, wait=phase + 1)
