"""Two nested rings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from ..schedule.pairs import Pairs
from ..schedule.schedule import DKV_HOME, KV_HOME, Buffer, Communicator, Direction, Schedule
from ..schedule.shape import AttentionShape
from .draft import Draft, NodesBuilder, Route, slots
from .layout import Entering, Layout, Offers
from .registry import register
from .tour import Tour


@register
@dataclass(frozen=True, kw_only=True)
class Hierarchical(Layout):
    """Inner rings within groups of `inner_size` ranks, an outer ring between them (MTraining, arXiv 2510.18830).

    Rank r is place l of node n (r = n * inner_size + l). In outer step o and inner step i it computes shard
    (n - o, l - i). While the inner ring turns, the node's shards for the next outer step arrive over the outer ring.
    Shards travel as far as they are needed, over the outer ring and within each node. Backward: dK/dV are summed
    around the inner ring, then sent straight to their owners in node n - o.
    """

    name: ClassVar[str] = "hierarchical"
    words: ClassVar[str] = "a hierarchical ring"
    plainness: ClassVar[int] = 2

    inner_size: int

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        built = _Hierarchy(shape=shape, direction=direction, pairs=pairs, inner=self.inner_size)
        return built.schedule(self.name)

    def why_not(self, shape: AttentionShape) -> str | None:
        return shape.why_not_groups_of(self.inner_size)

    def entering(self, pairs: Pairs, *, ranks_per_node: int) -> Entering:
        """Where groups are nodes: a shard comes to its owner's place in each that needs it, and a sum goes back."""
        if self.inner_size != ranks_per_node:
            return Entering.nothing(pairs.world_size)
        needed = pairs.of_nodes(ranks_per_node)
        by_place = needed.reshape(len(needed), -1, ranks_per_node).sum(axis=1)
        return Entering(kv=by_place.reshape(-1), dkv=needed.sum(axis=0))

    @classmethod
    def candidates(cls, offers: Offers) -> list[Self]:
        return [cls(inner_size=size) for size in offers.inner_sizes]

    @classmethod
    def baselines(cls, offers: Offers) -> list[tuple[str, Self]]:
        size = offers.gpus_per_node
        return [("striped", cls(inner_size=size))] if size in offers.inner_sizes else []


@dataclass(frozen=True, kw_only=True)
class _Hierarchy(NodesBuilder):
    @cached_property
    def tours(self) -> list[list[Tour]]:
        """[node][outer step]: the inner ring over the shards that came in that step, numbered by their place."""
        place, distance = np.indices((self.inner, self.inner))
        matrix = self.pairs.matrix.reshape(self.outer, self.inner, self.outer, self.inner)
        return [
            [
                Tour.of(matrix[node, (place + distance) % self.inner, (node - step) % self.outer, place])
                for step in range(self.outer)
            ]
            for node in range(self.outer)
        ]

    @cached_property
    def rails(self) -> list[Tour]:
        """[place]: the outer ring over the shards of that place, numbered by their node."""
        node, step = np.indices((self.outer, self.outer))
        matrix = np.any(self.pairs.matrix.reshape(self.outer, self.inner, self.outer, self.inner), axis=1)
        return [Tour.of(matrix[(node + step) % self.outer, node, place]) for place in range(self.inner)]

    @cached_property
    def all_tours(self) -> list[Tour]:
        return [tour for tours in self.tours for tour in tours]

    @cached_property
    def grad_slots(self) -> int:
        return max(tour.grad_slots for tour in self.all_tours)

    @cached_property
    def outer_grad_slots(self) -> int:
        return max(rail.grad_slots for rail in self.rails)

    @cached_property
    def crowded(self) -> bool:
        return any(tour.crowded for tour in self.all_tours)

    def communicators(self) -> list[Communicator]:
        homeward = self.rails_and_nodes("outer_grad", "inner_grad") if self.backward else []
        return self.rails_and_nodes("outer", "inner") + homeward

    def buffers(self) -> list[Buffer]:
        kv_bytes, dkv_bytes = self.shape.kv_bytes, self.shape.dkv_bytes
        longest_inner = max(tour.longest for tour in self.all_tours)
        longest_outer = max(rail.longest for rail in self.rails)
        buffers = slots("kv", "kv", min(2, longest_inner), kv_bytes)
        buffers += slots("kv_outer", "kv", min(2, longest_outer), kv_bytes)
        if self.backward and longest_inner:
            buffers += slots("dkv", "dkv", self.grad_slots, dkv_bytes)
            buffers += slots("landing", "dkv", 1 + self.crowded, dkv_bytes)
        if self.backward and longest_outer:
            buffers += slots("dkv_outer", "dkv", self.outer_grad_slots, dkv_bytes)
            buffers += slots("landing_outer", "dkv", 1, dkv_bytes)
        return buffers

    def kv_buffer(self, outer_step: int, inner_step: int) -> str:
        if inner_step:
            return f"kv:{(inner_step - 1) % 2}"
        return KV_HOME if outer_step == 0 else f"kv_outer:{(outer_step - 1) % 2}"

    def base_grad(self, outer_step: int) -> str:
        """Where the contributions to the shard that this rank brought into its node are summed."""
        return DKV_HOME if outer_step == 0 else f"dkv_outer:{outer_step % self.outer_grad_slots}"

    def grad_slot(self, phase: int) -> str:
        return f"dkv:{phase % self.grad_slots}"

    def draft(self, rank: int, parts: Draft) -> None:
        node, place = divmod(rank, self.inner)
        for outer_step in range(self.outer):
            self._fetch_outer(parts, node, place, outer_step)
            for inner_step in range(self.inner):
                self._fetch_inner(parts, node, place, outer_step, inner_step)
                self._compute(parts, node, place, outer_step, inner_step)
        if self.backward:
            for outer_step in range(self.outer):
                self._sum_inner(parts, node, place, outer_step)
                self._send_home(parts, node, place, outer_step)

    def _fetch_outer(self, parts: Draft, node: int, place: int, outer_step: int) -> None:
        if outer_step == self.outer - 1:
            return
        route = Route(kind="kv", communicator="outer", capacity_bytes=self.shape.kv_bytes)
        buffers, sequence = (self.kv_buffer(outer_step, 0), self.kv_buffer(outer_step + 1, 0)), outer_step * self.inner
        moves = [
            route.move(
                self.rank(owner, place), self.rank(source, place), self.rank(destination, place), sequence, *buffers
            )
            for owner, source, destination in self.rails[place].passed_on(node, outer_step + 1)
        ]
        parts.launch(sequence, moves, wait=sequence + self.inner)

    def _fetch_inner(self, parts: Draft, node: int, place: int, outer_step: int, inner_step: int) -> None:
        if inner_step == self.inner - 1:
            return
        route = Route(kind="kv", communicator="inner", capacity_bytes=self.shape.kv_bytes)
        buffers = self.kv_buffer(outer_step, inner_step), self.kv_buffer(outer_step, inner_step + 1)
        sequence, moves = outer_step * self.inner + inner_step, []
        for owner, *ends in self.tours[node][outer_step].passed_on(place, inner_step + 1):
            source, destination = (self.rank(node, end) for end in ends)
            moves.append(route.move(self.rank(node - outer_step, owner), source, destination, sequence, *buffers))
        parts.launch(sequence, moves, wait=sequence + 1)

    def _compute(self, parts: Draft, node: int, place: int, outer_step: int, inner_step: int) -> None:
        owner, phase = (place - inner_step) % self.inner, outer_step * self.inner + inner_step
        if self.tours[node][outer_step].needed[owner, inner_step]:
            key, me = self.rank(node - outer_step, owner), self.rank(node, place)
            grad = self.grad_slot(phase) if inner_step else self.base_grad(outer_step)
            parts.compute(phase, self.block_task(me, key, self.kv_buffer(outer_step, inner_step), grad))

    def _sum_inner(self, parts: Draft, node: int, place: int, outer_step: int) -> None:
        """Around the inner ring, from the first place that adds to a shard's gradients; from the last one straight on.

        The last hop goes to the place that brought the shard into the node.
        """
        route = Route(kind="dkv", communicator="inner_grad", capacity_bytes=self.shape.dkv_bytes)
        for inner_step in range(2, self.inner + 1):
            phase, moves = outer_step * self.inner + inner_step, []
            for owner, *ends, home in self.tours[node][outer_step].hops(place, inner_step):
                shard = self.rank(node - outer_step, owner)
                source, destination = (self.rank(node, end) for end in ends)
                landing = f"landing:{int(home and self.crowded)}"
                into = self.base_grad(outer_step) if home else self.grad_slot(phase)
                moves.append(route.move(shard, source, destination, phase, self.grad_slot(phase - 1), landing, into))
            parts.launch(phase, moves, wait=phase + 1)

    def _send_home(self, parts: Draft, node: int, place: int, outer_step: int) -> None:
        if outer_step == 0:
            return
        route = Route(kind="dkv", communicator="outer_grad", capacity_bytes=self.shape.dkv_bytes)
        phase = (outer_step + 1) * self.inner + (self.inner > 1)
        buffer, moves = self.base_grad(outer_step), []
        for owner, helper in ((node - outer_step, node), (node, node + outer_step)):
            if self.rails[place].needed[owner % self.outer, outer_step]:
                ends = self.rank(helper, place), self.rank(owner, place)
                moves.append(route.move(ends[1], *ends, phase, buffer, "landing_outer:0", DKV_HOME))
        last = outer_step == self.outer - 1
        parts.launch(phase, moves, wait=phase + 1 if last else (outer_step + 2) * self.inner)
