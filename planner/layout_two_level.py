"""A gather in two levels: across nodes by rails, then within each node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..traces.errors import InputError
from .layout_draft import AttentionShape, Draft, Route, block_task, close_schedule, slots
from .pairs import Pairs
from .schedule import DKV_HOME, KEPT, KV_HOME, Buffer, Communicator, Direction, Schedule, ShardId, Transfer

MAX_GRAD_SETS = 3  # of dK/dV: being computed, being summed within the node, on the way to another node


def two_level(
    *,
    shape: AttentionShape,
    direction: Direction,
    inner_size: int,
    narrow_grads: int = 0,
    pairs: Pairs | None = None,
) -> Schedule:
    """A gather where links between groups of `inner_size` ranks are slow: every shard crosses to a group once.

    Rank r is place l of node n (r = n * inner_size + l). In step o it fetches the shard of (n - o, l), and passes it
    on to all places of its node. Forward keeps all K/V for backward, which fetches nothing: other nodes' shards are
    computed first, their dK/dV summed within the node while columns are computed (or the own shard, where there are
    none), and sent home while the rest is computed.
    Everything travels and is computed whatever `pairs` leaves out. narrow_grads: 1 rounds a node's sums to the type of
    q, k and v before they cross to another node, and halves what crosses; 0 sends them as they are summed.
    """
    world = shape.world_size
    if inner_size < 1 or world % inner_size:
        raise InputError(f"{inner_size} does not divide {world} ranks", field="inner_size")
    if narrow_grads not in (0, 1):
        raise InputError(f"is 0 or 1, not {narrow_grads}", field="narrow_grads")
    layout = _TwoLevel(
        shape=shape, inner=inner_size, outer=world // inner_size, direction=direction, narrow_grads=bool(narrow_grads)
    )
    parts = layout.communicators(), layout.buffers(), layout.draft
    return close_schedule("two_level", direction, shape, *parts, kept=layout.kept, columns_phase=layout.filling_phase)


@dataclass(frozen=True, kw_only=True)
class _TwoLevel:
    """The layout of `two_level`. Step 0 is the own node; steps count nodes backwards, offsets count places so."""

    shape: AttentionShape
    inner: int
    outer: int
    direction: Direction
    narrow_grads: bool

    def rank(self, node: int, place: int) -> int:
        return (node % self.outer) * self.inner + place % self.inner

    def kept(self, rank: int) -> dict[str, ShardId]:
        """Return all others' shards by their slots."""
        node, place = divmod(rank, self.inner)
        steps = [(step, offset) for step in range(self.outer) for offset in range(self.inner) if step or offset]
        return {
            self.kv_slot(step, offset): ShardId(sequence_part=self.rank(node - step, place - offset))
            for step, offset in steps
        }

    def kv_slot(self, step: int, offset: int) -> str:
        """Slots of one step are neighbours, and the own shard has none."""
        return f"{KEPT}{step * self.inner + offset - 1}"

    @property
    def grad_sets(self) -> int:
        return max(1, min(MAX_GRAD_SETS, self.outer))

    @property
    def filling_phase(self) -> int:
        """The phase of backward in which the last node's gradients are summed: something short should be computed."""
        return self.outer - 1

    def grad_slot(self, step: int, offset: int) -> str:
        return f"dkv:{step % self.grad_sets * self.inner + offset}"

    def communicators(self) -> list[Communicator]:
        nodes = tuple(tuple(self.rank(n, place) for place in range(self.inner)) for n in range(self.outer))
        rails = tuple(tuple(self.rank(n, place) for n in range(self.outer)) for place in range(self.inner))
        suffix = "_grad" if self.direction == "backward" else ""
        return [
            Communicator(name=f"rails{suffix}", groups=rails),
            Communicator(name=f"nodes{suffix}", groups=nodes),
        ]

    def buffers(self) -> list[Buffer]:
        others, kv_bytes, dkv_bytes = self.shape.world_size - 1, self.shape.kv_bytes, self.shape.dkv_bytes
        buffers = slots(KEPT.removesuffix(":"), "kv", others, kv_bytes)
        if self.direction == "backward" and others:
            buffers += slots("dkv", "dkv", self.grad_sets * self.inner, dkv_bytes)
            buffers += slots("landing", "dkv", self.inner - 1, dkv_bytes)
            buffers += slots("landing_rail", "dkv", int(self.outer > 1), dkv_bytes)
        return buffers

    def draft(self, rank: int, parts: Draft) -> None:
        """Drop a rank's transfers and tasks into their phases."""
        node, place = divmod(rank, self.inner)
        if self.direction == "forward":
            self._draft_forward(parts, node, place)
        else:
            self._draft_backward(parts, node, place)

    def _draft_forward(self, parts: Draft, node: int, place: int) -> None:
        """Phase 0: the own shard. Step 0 in phase 1, step o > 0 in phase o + 2, as its shards come from the rails."""
        me = self.rank(node, place)
        parts.compute(0, block_task(me, me, KV_HOME, self.shape, None))
        for step in range(self.outer):
            if step:
                parts.launch(0, self._cross(node, place, step), wait=step + 1)
            spread = step + 1 if step else 0
            parts.launch(spread, self._spread(node, place, step), wait=spread + 1)
            self._compute_step(parts, node, place, step, phase=spread + 1)

    def _draft_backward(self, parts: Draft, node: int, place: int) -> None:
        """Other nodes' shards, farthest first, what fills, then the own node's."""
        me, last_step = self.rank(node, place), self.outer - 1
        for step in range(last_step, 0, -1):
            phase = last_step - step
            self._compute_step(parts, node, place, step, phase=phase)
            parts.launch(phase + 1, self._sum_in_node(node, place, step), wait=phase + 2)
            end = self.filling_phase + 3 if step == 1 else phase + 3
            parts.launch(phase + 2, self._cross_home(node, place, step), wait=end)
        phase = self.filling_phase + 1 if self.outer > 1 else 0
        self._compute_step(parts, node, place, 0, phase=phase)
        parts.launch(phase + 1, self._sum_in_node(node, place, 0), wait=phase + 2)
        own_phase = phase + 1 if self.outer == 1 and self.inner > 1 else self.filling_phase
        if self.outer > 1 and self.shape.columns_capacity:
            own_phase = phase
        parts.compute(own_phase, block_task(me, me, KV_HOME, self.shape, DKV_HOME), first=True)

    def _compute_step(self, parts: Draft, node: int, place: int, step: int, *, phase: int) -> None:
        for offset in range(0 if step else 1, self.inner):
            key = self.rank(node - step, place - offset)
            grad = self.grad_slot(step, offset) if self.direction == "backward" else None
            parts.compute(phase, block_task(self.rank(node, place), key, self.kv_slot(step, offset), self.shape, grad))

    def _cross(self, node: int, place: int, step: int) -> list[Transfer]:
        """K/V of the own shard to the node `step` further on, and those of the node `step` back to here."""
        route = Route(kind="kv", communicator="rails", capacity_bytes=self.shape.kv_bytes)
        ends = [(node, node + step), (node - step, node)]
        return [
            route.move(
                self.rank(source, place), self.rank(source, place), self.rank(target, place), step, KV_HOME,
                self.kv_slot(step, 0),
            )
            for source, target in ends
        ]  # fmt: skip

    def _spread(self, node: int, place: int, step: int) -> list[Transfer]:
        """What came in `step` from here to the node's other places, and theirs to here."""
        route = Route(kind="kv", communicator="nodes", capacity_bytes=self.shape.kv_bytes)
        source_buffer = self.kv_slot(step, 0) if step else KV_HOME
        moves = []
        for offset in range(1, self.inner):
            for source in (place, place - offset):
                shard, ends = (
                    self.rank(node - step, source),
                    (self.rank(node, source), self.rank(node, source + offset)),
                )
                moves.append(route.move(shard, *ends, step, source_buffer, self.kv_slot(step, offset)))
        return moves

    def _sum_in_node(self, node: int, place: int, step: int) -> list[Transfer]:
        """dK/dV of this node's places to the place that brought the shard in (step 0: that owns it)."""
        route = Route(kind="dkv", communicator="nodes_grad", capacity_bytes=self.shape.dkv_bytes)
        into = self.grad_slot(step, 0) if step else DKV_HOME
        moves = []
        for offset in range(1, self.inner):
            for target in (place - offset, place):
                shard, ends = (
                    self.rank(node - step, target),
                    (self.rank(node, target + offset), self.rank(node, target)),
                )
                moves.append(
                    route.move(shard, *ends, step, self.grad_slot(step, offset), f"landing:{offset - 1}", into)
                )
        return moves

    def _cross_home(self, node: int, place: int, step: int) -> Iterable[Transfer]:
        """Sums of this node to their owner in the node `step` back, and the own shard's from the node further on."""
        size = self.shape.kv_bytes if self.narrow_grads else self.shape.dkv_bytes
        route = Route(kind="dkv", communicator="rails_grad", capacity_bytes=size, narrow=self.narrow_grads)
        for owner, helper in ((node - step, node), (node, node + step)):
            home, away = self.rank(owner, place), self.rank(helper, place)
            yield route.move(home, away, home, step, self.grad_slot(step, 0), "landing_rail:0", DKV_HOME)
