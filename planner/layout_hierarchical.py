"""Two nested rings."""

from __future__ import annotations

from dataclasses import dataclass

from ..traces.errors import InputError
from .layout_draft import AttentionShape, Draft, Route, block_task, close_schedule, slots
from .schedule import DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule


def hierarchical(*, shape: AttentionShape, direction: Direction, inner_size: int) -> Schedule:
    """Inner rings within groups of `inner_size` ranks, an outer ring between them (MTraining, arXiv 2510.18830).

    Rank r is place l of node n (r = n * inner_size + l). In outer step o and inner step i it computes shard
    (n - o, l - i). While the inner ring turns, the node's shards for the next outer step arrive over the outer ring.
    Backward: dK/dV are summed around the inner ring, then sent straight to their owners in node n - o.
    """
    world = shape.world_size
    if inner_size < 1 or world % inner_size:
        raise InputError(f"{inner_size} does not divide {world} ranks", field="inner_size")
    layout = _Hierarchy(shape=shape, inner=inner_size, outer=world // inner_size, direction=direction)
    return close_schedule("hierarchical", direction, shape, layout.communicators(), layout.buffers(), layout.draft)


@dataclass(frozen=True, kw_only=True)
class _Hierarchy:
    """The two nested rings of `hierarchical`."""

    shape: AttentionShape
    inner: int
    outer: int
    direction: Direction

    def rank(self, node: int, place: int) -> int:
        return (node % self.outer) * self.inner + place % self.inner

    def communicators(self) -> list[Communicator]:
        nodes = tuple(tuple(self.rank(n, place) for place in range(self.inner)) for n in range(self.outer))
        rails = tuple(tuple(self.rank(n, place) for n in range(self.outer)) for place in range(self.inner))
        names = [("outer", rails), ("inner", nodes)]
        if self.direction == "backward":
            names += [("outer_grad", rails), ("inner_grad", nodes)]
        return [Communicator(name=name, groups=groups) for name, groups in names]

    def buffers(self) -> list[Buffer]:
        kv_bytes, dkv_bytes = self.shape.kv_bytes, self.shape.dkv_bytes
        buffers = slots("kv", "kv", min(2, self.inner - 1), kv_bytes)
        buffers += slots("kv_outer", "kv", min(2, self.outer - 1), kv_bytes)
        if self.direction == "backward":
            if self.inner > 1:
                buffers += slots("dkv", "dkv", 2, dkv_bytes) + slots("landing", "dkv", 1, dkv_bytes)
            if self.outer > 1:
                buffers += slots("dkv_outer", "dkv", 2, dkv_bytes) + slots("landing_outer", "dkv", 1, dkv_bytes)
        return buffers

    def kv_buffer(self, outer_step: int, inner_step: int) -> str:
        if inner_step:
            return f"kv:{(inner_step - 1) % 2}"
        return KV_HOME if outer_step == 0 else f"kv_outer:{(outer_step - 1) % 2}"

    def base_grad(self, outer_step: int) -> str:
        """Where the contributions to the shard that this rank brought into its node are summed."""
        return DKV_HOME if outer_step == 0 else f"dkv_outer:{outer_step % 2}"

    def draft(self, rank: int, parts: Draft) -> None:
        node, place = divmod(rank, self.inner)
        for outer_step in range(self.outer):
            self._fetch_outer(parts, node, place, outer_step)
            for inner_step in range(self.inner):
                self._fetch_inner(parts, node, place, outer_step, inner_step)
                self._compute(parts, node, place, outer_step, inner_step)
        if self.direction == "backward":
            for outer_step in range(self.outer):
                self._sum_inner(parts, node, place, outer_step)
                self._send_home(parts, node, place, outer_step)

    def _fetch_outer(self, parts: Draft, node: int, place: int, outer_step: int) -> None:
        if outer_step == self.outer - 1:
            return
        route = Route(kind="kv", communicator="outer", capacity_bytes=self.shape.kv_bytes)
        source_buffer, buffer = self.kv_buffer(outer_step, 0), self.kv_buffer(outer_step + 1, 0)
        me, sequence = self.rank(node, place), outer_step * self.inner
        sent, received = self.rank(node - outer_step, place), self.rank(node - outer_step - 1, place)
        calls = [
            route.move(sent, me, self.rank(node + 1, place), sequence, source_buffer, buffer),
            route.move(received, self.rank(node - 1, place), me, sequence, source_buffer, buffer),
        ]
        parts.launch(sequence, calls, wait=sequence + self.inner)

    def _fetch_inner(self, parts: Draft, node: int, place: int, outer_step: int, inner_step: int) -> None:
        if inner_step == self.inner - 1:
            return
        route = Route(kind="kv", communicator="inner", capacity_bytes=self.shape.kv_bytes)
        source_buffer = self.kv_buffer(outer_step, inner_step)
        buffer = self.kv_buffer(outer_step, inner_step + 1)
        me, sequence = self.rank(node, place), outer_step * self.inner + inner_step
        sent = self.rank(node - outer_step, place - inner_step)
        received = self.rank(node - outer_step, place - inner_step - 1)
        calls = [
            route.move(sent, me, self.rank(node, place + 1), sequence, source_buffer, buffer),
            route.move(received, self.rank(node, place - 1), me, sequence, source_buffer, buffer),
        ]
        parts.launch(sequence, calls, wait=sequence + 1)

    def _compute(self, parts: Draft, node: int, place: int, outer_step: int, inner_step: int) -> None:
        phase = outer_step * self.inner + inner_step
        key = self.rank(node - outer_step, place - inner_step)
        grad = None
        if self.direction == "backward":
            grad = self.base_grad(outer_step) if inner_step == 0 else f"dkv:{phase % 2}"
        me, buffer = self.rank(node, place), self.kv_buffer(outer_step, inner_step)
        parts.compute(phase, block_task(me, key, buffer, self.shape, grad))

    def _sum_inner(self, parts: Draft, node: int, place: int, outer_step: int) -> None:
        route = Route(kind="dkv", communicator="inner_grad", capacity_bytes=self.shape.dkv_bytes)
        me, first = self.rank(node, place), outer_step * self.inner
        for inner_step in range(2, self.inner + 1):
            phase = first + inner_step
            source_buffer = f"dkv:{(phase - 1) % 2}"
            into = self.base_grad(outer_step) if inner_step == self.inner else f"dkv:{phase % 2}"
            sent = self.rank(node - outer_step, place - inner_step + 1)
            received = self.rank(node - outer_step, place - inner_step)
            hop = [
                route.move(sent, me, self.rank(node, place + 1), phase, source_buffer, "landing:0", into),
                route.move(received, self.rank(node, place - 1), me, phase, source_buffer, "landing:0", into),
            ]
            parts.launch(phase, hop, wait=phase + 1)

    def _send_home(self, parts: Draft, node: int, place: int, outer_step: int) -> None:
        if outer_step == 0:
            return
        route = Route(kind="dkv", communicator="outer_grad", capacity_bytes=self.shape.dkv_bytes)
        me, buffer = self.rank(node, place), self.base_grad(outer_step)
        owner, helper = self.rank(node - outer_step, place), self.rank(node + outer_step, place)
        phase = (outer_step + 1) * self.inner + (self.inner > 1)
        calls = [
            route.move(owner, me, owner, phase, buffer, "landing_outer:0", DKV_HOME),
            route.move(me, helper, me, phase, buffer, "landing_outer:0", DKV_HOME),
        ]
        last = outer_step == self.outer - 1
        parts.launch(phase, calls, wait=phase + 1 if last else (outer_step + 2) * self.inner)
