"""The flat ring."""

from __future__ import annotations

from dataclasses import dataclass

from ...traces.errors import InputError
from ..schedule.pairs import Pairs
from ..schedule.schedule import DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule
from ..schedule.shape import AttentionShape
from .draft import Draft, Route, block_task, close_schedule, slots
from .tour import Tour


def ring(*, shape: AttentionShape, direction: Direction, pairs: Pairs | None = None, prefetch: int = 1) -> Schedule:
    """A flat ring: in phase p rank r computes shard r - p while the next `prefetch` shards are on their way.

    A shard travels as far as the last rank that needs it. Needs prefetch + 1 K/V slots. Backward: dK/dV of a shard
    travel one phase behind it, gathering contributions, and go home from the last rank that has one.
    """
    if prefetch < 1:
        raise InputError(f"must be at least 1, not {prefetch}", field="prefetch")
    needed = (pairs or Pairs.all_of(shape.world_size)).distances
    layout = _Ring(shape=shape, direction=direction, tour=Tour.of(needed), prefetch=prefetch)
    return close_schedule("ring", direction, shape, layout.communicators(), layout.buffers(), layout.draft)


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """The ring of `ring`."""

    shape: AttentionShape
    direction: Direction
    tour: Tour
    prefetch: int

    @property
    def world(self) -> int:
        return self.shape.world_size

    @property
    def depth(self) -> int:
        return min(self.prefetch, max(self.world - 1, 1))

    @property
    def grad_slots(self) -> int:
        return max(1, min(2, self.tour.longest))

    def communicators(self) -> list[Communicator]:
        names = ["ring", "ring_grad"] if self.direction == "backward" and self.world > 1 else ["ring"]
        return [Communicator(name=name, groups=(tuple(range(self.world)),)) for name in names]

    def buffers(self) -> list[Buffer]:
        buffers = slots("kv", "kv", min(self.depth + 1, self.tour.longest), self.shape.kv_bytes)
        if self.direction == "backward" and self.tour.longest:
            buffers += slots("dkv", "dkv", self.grad_slots, self.shape.dkv_bytes)
            buffers += slots("landing", "dkv", 1 + self.tour.crowded, self.shape.dkv_bytes)
        return buffers

    def kv_buffer(self, phase: int) -> str:
        return KV_HOME if phase == 0 else f"kv:{(phase - 1) % (self.depth + 1)}"

    def grad_buffer(self, phase: int) -> str | None:
        if self.direction == "forward":
            return None
        return DKV_HOME if phase == 0 else f"dkv:{phase % self.grad_slots}"

    def draft(self, rank: int, parts: Draft) -> None:
        for step in range(1, self.world):
            self._fetch(parts, rank, step)
        for phase in range(self.world):
            key = (rank - phase) % self.world
            if self.tour.needs(key, phase):
                grad = self.grad_buffer(phase)
                parts.compute(phase, block_task(rank, key, self.kv_buffer(phase), self.shape, grad))
        if self.direction == "backward":
            for phase in range(2, self.world + 1):
                self._add_up(parts, rank, phase)

    def _fetch(self, parts: Draft, rank: int, step: int) -> None:
        """Deliver what phase `step` computes, here and at the next rank."""
        kv = Route(kind="kv", communicator="ring", capacity_bytes=self.shape.kv_bytes)
        following, previous = (rank + 1) % self.world, (rank - 1) % self.world
        sent, received = (rank - step + 1) % self.world, (rank - step) % self.world
        source_buffer, buffer = self.kv_buffer(step - 1), self.kv_buffer(step)
        moves = []
        if self.tour.reaches(sent, step):
            moves.append(kv.move(sent, rank, following, step, source_buffer, buffer))
        if self.tour.reaches(received, step):
            moves.append(kv.move(received, previous, rank, step, source_buffer, buffer))
        parts.launch(max(step - self.depth, 0), moves, wait=step)

    def _add_up(self, parts: Draft, rank: int, phase: int) -> None:
        """The hop after phase - 1 was computed: on to the next rank that may add to it, or home."""
        dkv = Route(kind="dkv", communicator="ring_grad", capacity_bytes=self.shape.dkv_bytes)
        source_buffer, moves = f"dkv:{(phase - 1) % self.grad_slots}", []
        for hop in self.tour.hops(rank, phase):
            buffer, into = "landing:0", f"dkv:{phase % self.grad_slots}"
            if hop.home:
                buffer, into = f"landing:{int(self.tour.crowded)}", DKV_HOME
            moves.append(dkv.move(hop.shard, hop.source, hop.destination, phase, source_buffer, buffer, into))
        parts.launch(phase, moves, wait=phase + 1)
