"""A gather in two levels: across nodes by rails, then within each node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...traces.errors import InputError
from ..schedule.pairs import Pairs
from ..schedule.schedule import DKV_HOME, KEPT, KV_HOME, Buffer, Communicator, Direction, Schedule, ShardId, Transfer
from ..schedule.shape import AttentionShape
from .draft import Draft, Route, block_task, close_schedule, slots

MAX_GRAD_SETS = 3  # of dK/dV: being computed, being summed within the node, on the way to another node


def two_level(
    *,
    shape: AttentionShape,
    direction: Direction,
    inner_size: int,
    narrow_grads: int = 0,
    chunks: int = 1,
    halves: int = 0,
    pairs: Pairs | None = None,
) -> Schedule:
    """A gather where links between groups of `inner_size` ranks are slow: every shard crosses to a group once.

    Rank r is place l of node n (r = n * inner_size + l). In step o it fetches the shard of (n - o, l), and passes it
    on to all places of its node. Forward keeps all K/V for backward, which fetches nothing: other nodes' shards are
    computed first, their dK/dV summed within the node while columns are computed (or the own shard, where there are
    none), and sent home while the rest is computed.
    Everything travels and is computed whatever `pairs` leaves out.

    narrow_grads: 1 rounds a node's sums to the type of q, k and v before they cross to another node, and halves what
    crosses; 0 sends them as they are summed.
    chunks: so many groups of a node's places cross one after the other, where they share a way that one group can fill:
    what the first brought in is computed, and what was computed for it goes home, while the next one crosses.
    halves: 1 cuts the own node's shards in two, a launch more in each direction. Forward begins with the first half
    sooner, and has the second to compute while the next node's shards are passed on; backward sums in the node under
    the halves and ends with the own shard. It pays where crossing is about as quick as computing.
    """
    world = shape.world_size
    if inner_size < 1 or world % inner_size:
        raise InputError(f"{inner_size} does not divide {world} ranks", field="inner_size")
    for name, value in (("narrow_grads", narrow_grads), ("halves", halves)):
        if value not in (0, 1):
            raise InputError(f"is 0 or 1, not {value}", field=name)
    if chunks < 1 or inner_size % chunks:
        raise InputError(f"{chunks} does not divide {inner_size} places of a node", field="chunks")
    if halves and chunks > 1:
        raise InputError(f"is for one chunk, not for {chunks}", field="halves")
    layout = _TwoLevel(
        shape=shape,
        inner=inner_size,
        outer=world // inner_size,
        direction=direction,
        narrow_grads=bool(narrow_grads),
        chunks=chunks,
        halves=bool(halves),
    )
    parts = layout.communicators(), layout.buffers(), layout.draft
    return close_schedule("two_level", direction, shape, *parts, kept=layout.kept, columns_phase=layout.columns_phase)


@dataclass(frozen=True, kw_only=True)
class _TwoLevel:
    """The layout of `two_level`. Step 0 is the own node; steps count nodes backwards, offsets count places so.

    A crossing is what a group of places brings in in a step: (step, group).
    """

    shape: AttentionShape
    inner: int
    outer: int
    direction: Direction
    narrow_grads: bool
    chunks: int
    halves: bool

    @property
    def everyone(self) -> range:
        """All places of a node."""
        return range(self.inner)

    @property
    def others(self) -> range:
        """The offsets of a place's neighbours in its node."""
        return range(1, self.inner)

    @property
    def own_node_offsets(self) -> list[range]:
        """The neighbours whose shards are computed together: all, or in halves."""
        middle = 1 + self.inner // 2
        return [range(1, middle), range(middle, self.inner)] if self.halves else [self.others]

    def places(self, group: int) -> range:
        size = self.inner // self.chunks
        return range(group * size, (group + 1) * size)

    def crossings(self, steps: Iterable[int]) -> list[tuple[int, int]]:
        return [(step, group) for step in steps for group in range(self.chunks)]

    def rank(self, node: int, place: int) -> int:
        return (node % self.outer) * self.inner + place % self.inner

    def kept(self, rank: int) -> dict[str, ShardId]:
        """Return all others' shards by their slots."""
        node, place = divmod(rank, self.inner)
        steps = [(step, offset) for step in range(self.outer) for offset in range(self.inner) if step or offset]
        return {
            self.kv_slot(place, step, offset): ShardId(sequence_part=self.rank(node - step, place - offset))
            for step, offset in steps
        }

    def kv_slot(self, place: int, step: int, offset: int) -> str:
        """Slots of one crossing are neighbours, and the own shard has none."""
        if self.chunks == 1:
            return f"{KEPT}{step * self.inner + offset - 1}"
        number = (place - offset) % self.inner
        return f"{KEPT}{step * self.inner + number - (step > 0 or number > place)}"

    @property
    def grad_sets(self) -> int:
        return max(1, min(MAX_GRAD_SETS, self.outer))

    @property
    def filling_phase(self) -> int:
        """The phase of backward in which the last crossing's gradients are summed: for something short to compute."""
        return self.home_phase((self.outer - 1) * self.chunks)

    @property
    def columns_first(self) -> bool:
        """Whether backward computes columns after the first crossing, whose sums then need not wait for the second."""
        return self.chunks > 1 and self.outer > 1 and self.shape.columns_capacity > 0

    @property
    def columns_phase(self) -> int:
        return 1 if self.columns_first else self.filling_phase

    def home_phase(self, number: int) -> int:
        """The phase of backward in which the shards of a crossing are computed."""
        return number + (self.columns_first and number > 0)

    def grad_slot(self, place: int, step: int, offset: int) -> str:
        number = offset if self.chunks == 1 else (place - offset) % self.inner
        return f"dkv:{step % self.grad_sets * self.inner + number}"

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
        """Phase 0: the own shard. Phase 1: the own node's. Then, as they arrive, those of other nodes."""
        me = self.rank(node, place)
        parts.compute(0, block_task(me, me, KV_HOME, self.shape, None))
        for phase, offsets in enumerate(self.own_node_offsets, start=1):
            parts.launch(0, self._spread(node, place, 0, self.everyone, offsets), wait=phase)
            self._compute(parts, node, place, 0, self.everyone, offsets, phase=phase)
        for number, (step, group) in enumerate(self.crossings(range(1, self.outer))):
            # One group alone sends all at once. Of several, each crosses once all know that the one before it has.
            begins, arrives = (0, 2 + number) if self.chunks == 1 else (2 * number + (number > 0), 2 + 2 * number)
            if place in self.places(group):
                parts.launch(begins, self._cross(node, place, step), wait=arrives)
            arrived = self.places(group), self.others
            parts.launch(arrives, self._spread(node, place, step, *arrived), wait=arrives + 1)
            self._compute(parts, node, place, step, *arrived, phase=arrives + 1)

    def _draft_backward(self, parts: Draft, node: int, place: int) -> None:
        """Other nodes' shards, farthest first, what fills, then the own node's."""
        me = self.rank(node, place)
        crossings = self.crossings(range(self.outer - 1, 0, -1))
        for number, (step, group) in enumerate(crossings):
            phase, places = self.home_phase(number), self.places(group)
            self._compute(parts, node, place, step, places, self.others, phase=phase)
            parts.launch(phase + 1, self._sum_in_node(node, place, step, places, self.others), wait=phase + 2)
            if place in places:
                end = self.filling_phase + 3 if step == 1 else self.home_phase(number + self.chunks) + 2
                parts.launch(phase + 2, self._cross_home(node, place, step), wait=end)
        if self.halves:
            self._draft_home_in_halves(parts, node, place)
            return
        phase = self.filling_phase + 1 if self.outer > 1 else 0
        whole = self.everyone, self.others
        self._compute(parts, node, place, 0, *whole, phase=phase)
        parts.launch(phase + 1, self._sum_in_node(node, place, 0, *whole), wait=phase + 2)
        own_phase = phase + 1 if self.outer == 1 and self.inner > 1 else self.filling_phase
        if self.outer > 1 and self.shape.columns_capacity and not self.columns_first:
            own_phase = phase
        parts.compute(own_phase, block_task(me, me, KV_HOME, self.shape, DKV_HOME), first=True)

    def _draft_home_in_halves(self, parts: Draft, node: int, place: int) -> None:
        """The own node's other shards in two phases, then the own one, while the second half's gradients are summed."""
        me, last = self.rank(node, place), self.filling_phase + 2
        for phase, offsets in enumerate(self.own_node_offsets, start=self.filling_phase):
            self._compute(parts, node, place, 0, self.everyone, offsets, phase=phase)
            parts.launch(phase + 1, self._sum_in_node(node, place, 0, self.everyone, offsets), wait=last + 1)
        parts.compute(last, block_task(me, me, KV_HOME, self.shape, DKV_HOME))

    def _compute(
        self, parts: Draft, node: int, place: int, step: int, places: range, offsets: range, *, phase: int
    ) -> None:
        """The shards of these places of the node `step` back: of the same place (step 0: not) and at these offsets."""
        taken = [offset for offset in (*([0] if step else []), *offsets) if (place - offset) % self.inner in places]
        if self.chunks > 1:  # in the order of their slots
            taken.sort(key=lambda offset: (place - offset) % self.inner)
        for offset in taken:
            key = self.rank(node - step, place - offset)
            grad = self.grad_slot(place, step, offset) if self.direction == "backward" else None
            slot = self.kv_slot(place, step, offset)
            parts.compute(phase, block_task(self.rank(node, place), key, slot, self.shape, grad))

    def _cross(self, node: int, place: int, step: int) -> list[Transfer]:
        """K/V of the own shard to the node `step` further on, and those of the node `step` back to here."""
        route = Route(kind="kv", communicator="rails", capacity_bytes=self.shape.kv_bytes)
        ends = [(node, node + step), (node - step, node)]
        return [
            route.move(
                self.rank(source, place), self.rank(source, place), self.rank(target, place), step, KV_HOME,
                self.kv_slot(place, step, 0),
            )
            for source, target in ends
        ]  # fmt: skip

    def _spread(self, node: int, place: int, step: int, places: range, offsets: range) -> list[Transfer]:
        """What came in `step` to these places, to the places at these offsets: what goes from and comes to here."""
        route = Route(kind="kv", communicator="nodes", capacity_bytes=self.shape.kv_bytes)
        moves = []
        for offset in offsets:
            for source in (place, (place - offset) % self.inner):
                if source in places:
                    target = (source + offset) % self.inner
                    held = self.kv_slot(source, step, 0) if step else KV_HOME
                    shard = self.rank(node - step, source)
                    ends = self.rank(node, source), self.rank(node, target)
                    moves.append(route.move(shard, *ends, step, held, self.kv_slot(target, step, offset)))
        return moves

    def _sum_in_node(self, node: int, place: int, step: int, places: range, offsets: range) -> list[Transfer]:
        """dK/dV to these places, which brought the shards in (step 0: own them), from those at these offsets."""
        route = Route(kind="dkv", communicator="nodes_grad", capacity_bytes=self.shape.dkv_bytes)
        moves = []
        for offset in offsets:
            for target in ((place - offset) % self.inner, place):
                if target in places:
                    helper = (target + offset) % self.inner
                    into = self.grad_slot(target, step, 0) if step else DKV_HOME
                    shard = self.rank(node - step, target)
                    ends = self.rank(node, helper), self.rank(node, target)
                    source = self.grad_slot(helper, step, offset)
                    moves.append(route.move(shard, *ends, step, source, f"landing:{offset - 1}", into))
        return moves

    def _cross_home(self, node: int, place: int, step: int) -> Iterable[Transfer]:
        """Sums of this node to their owner in the node `step` back, and the own shard's from the node further on."""
        size = self.shape.kv_bytes if self.narrow_grads else self.shape.dkv_bytes
        route = Route(kind="dkv", communicator="rails_grad", capacity_bytes=size, narrow=self.narrow_grads)
        for owner, helper in ((node - step, node), (node, node + step)):
            home, away = self.rank(owner, place), self.rank(helper, place)
            yield route.move(home, away, home, step, self.grad_slot(place, step, 0), "landing_rail:0", DKV_HOME)
