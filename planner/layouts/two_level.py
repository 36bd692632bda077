"""A gather in two levels: across nodes by rails, then within each node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from ..schedule.pairs import Pairs
from ..schedule.schedule import DKV_HOME, KEPT, KV_HOME, Buffer, Communicator, Direction, Schedule, ShardId, Transfer
from ..schedule.shape import AttentionShape
from .draft import Draft, NodesBuilder, Route, slots
from .layout import Entering, Layout, Offers, Transfers
from .registry import register

MAX_GRAD_SETS = 3  # of dK/dV: being computed, being summed within the node, on the way to another node
MAX_CANDIDATE_SIZES = 2


@register
@dataclass(frozen=True, kw_only=True)
class TwoLevel(Layout):
    """A gather where links between groups of `inner_size` ranks are slow: every shard crosses to a group once.

    Rank r is place l of node n (r = n * inner_size + l). In step o it fetches the shard of (n - o, l), and passes it
    on to all places of its node. Forward keeps all K/V for backward, which fetches nothing: other nodes' shards are
    computed first, their dK/dV summed within the node while columns are computed (or the own shard, where there are
    none), and sent home while the rest is computed.
    Everything travels and is computed whatever pairs are left out.

    late_columns: forward computes the columns with what comes last, not with the own node's shards: their sum over all
    ranks crosses the same links as shards do, and has until then to come. Simulated on 8 x 8 A100s at 512K tokens and
    2 % density, a forward of 5.9 ms takes 5.1.
    narrow_gradients: a node's sums are rounded to the type of q, k and v before they cross to another node, which
    halves what crosses; else they are sent as they are summed.
    halves: the own node's shards are cut in two, a launch more in each direction. Forward begins with the first half
    sooner, and has the second to compute while the next node's shards are passed on; backward sums in the node under
    the halves and ends with the own shard. It pays where crossing is about as quick as computing: simulated on 4 x 8
    H100s at 512K tokens and 2.6 % density, a step of 13.0 ms takes 10.8.
    """

    name: ClassVar[str] = "two_level"
    words: ClassVar[str] = "a gather in two levels"
    plainness: ClassVar[int] = 3
    leaves_out: ClassVar[bool] = False

    inner_size: int
    halves: bool = False
    narrow_gradients: bool = False
    late_columns: bool = False

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        built = _TwoLevel(shape=shape, direction=direction, pairs=pairs, layout=self, inner=self.inner_size)
        return built.schedule(self.name)

    def why_not(self, shape: AttentionShape) -> str | None:
        return shape.why_not_groups_of(self.inner_size)

    @classmethod
    def candidates(cls, offers: Offers) -> list[Self]:
        """Where there are several nodes, or this layout was named."""
        if offers.nodes == 1 and cls.name not in offers.named:
            return []
        ways = [(False, False), (True, False), *[(True, True)] * offers.columns]
        return [
            cls(inner_size=size, halves=halves, narrow_gradients=offers.rounds_sums, late_columns=late)
            for halves, late in ways
            for size in offers.inner_sizes[:MAX_CANDIDATE_SIZES]
        ]

    def played_as(self, direction: Direction) -> Layout:
        return replace(self, late_columns=False) if direction == "backward" else self

    def entering(self, pairs: Pairs, *, ranks_per_node: int) -> Entering:
        """Where groups are nodes: from every other node the shard of the same place, and a sum of the own one."""
        if self.inner_size != ranks_per_node:
            return Entering.nothing(pairs.world_size)
        others = np.full(pairs.world_size, pairs.world_size // ranks_per_node - 1)
        return Entering(kv=others, dkv=others)

    @property
    def kept_slots(self) -> object | None:
        return self.name, self.inner_size

    @property
    def transfers(self) -> Transfers:
        return Transfers(narrow=self.narrow_gradients)


@dataclass(frozen=True, kw_only=True)
class _TwoLevel(NodesBuilder):
    """Step 0 is the own node; steps count nodes backwards, offsets count places so."""

    leaves_out: ClassVar[bool] = False

    layout: TwoLevel

    @property
    def others(self) -> range:
        """The offsets of a place's neighbours in its node."""
        return range(1, self.inner)

    @property
    def own_node_offsets(self) -> list[range]:
        """The neighbours whose shards are computed together: all, or in halves."""
        middle = 1 + self.inner // 2
        return [range(1, middle), range(middle, self.inner)] if self.layout.halves else [self.others]

    def kept(self, rank: int) -> dict[str, ShardId]:
        """Return all others' shards by their slots."""
        node, place = divmod(rank, self.inner)
        return {
            self.kv_slot(step, offset): ShardId(sequence_part=self.rank(node - step, place - offset))
            for step in range(self.outer)
            for offset in range(self.inner)
            if step or offset
        }

    def kv_slot(self, step: int, offset: int) -> str:
        """Slots of one step are neighbours, and the own shard has none."""
        return f"{KEPT}{step * self.inner + offset - 1}"

    @property
    def grad_sets(self) -> int:
        return max(1, min(MAX_GRAD_SETS, self.outer))

    @property
    def columns_phase(self) -> int:
        """The phase in which the last step's gradients are summed: there is time for something short to compute."""
        return self.outer - 1

    def columns_gathered(self, parts: Draft) -> int:
        return max(1, *parts.tasks) if self.layout.late_columns else 1

    def grad_slot(self, step: int, offset: int) -> str:
        return f"dkv:{step % self.grad_sets * self.inner + offset}"

    def communicators(self) -> list[Communicator]:
        suffix = "_grad" if self.backward else ""
        return self.rails_and_nodes(f"rails{suffix}", f"nodes{suffix}")

    def buffers(self) -> list[Buffer]:
        others, kv_bytes, dkv_bytes = self.world - 1, self.shape.kv_bytes, self.shape.dkv_bytes
        buffers = slots(KEPT.removesuffix(":"), "kv", others, kv_bytes)
        if self.backward and others:
            buffers += slots("dkv", "dkv", self.grad_sets * self.inner, dkv_bytes)
            buffers += slots("landing", "dkv", self.inner - 1, dkv_bytes)
            buffers += slots("landing_rail", "dkv", int(self.outer > 1), dkv_bytes)
        return buffers

    def draft(self, rank: int, parts: Draft) -> None:
        node, place = divmod(rank, self.inner)
        if self.backward:
            self._draft_backward(parts, node, place)
        else:
            self._draft_forward(parts, node, place)

    def _draft_forward(self, parts: Draft, node: int, place: int) -> None:
        """Phase 0: the own shard. Phase 1: the own node's. Then, as they arrive, those of other nodes."""
        me = self.rank(node, place)
        parts.compute(0, self.block_task(me, me, KV_HOME, None))
        for phase, offsets in enumerate(self.own_node_offsets, start=1):
            parts.launch(0, self._spread(node, place, 0, offsets), wait=phase)
            self._compute(parts, node, place, 0, offsets, phase=phase)
        for step in range(1, self.outer):
            parts.launch(0, self._cross(node, place, step), wait=step + 1)
            parts.launch(step + 1, self._spread(node, place, step, self.others), wait=step + 2)
            self._compute(parts, node, place, step, self.others, phase=step + 2)

    def _draft_backward(self, parts: Draft, node: int, place: int) -> None:
        """Other nodes' shards, farthest first, what fills, then the own node's."""
        me, filling = self.rank(node, place), self.columns_phase
        for phase, step in enumerate(range(self.outer - 1, 0, -1)):
            self._compute(parts, node, place, step, self.others, phase=phase)
            parts.launch(phase + 1, self._sum_in_node(node, place, step, self.others), wait=phase + 2)
            parts.launch(phase + 2, self._cross_home(node, place, step), wait=phase + (4 if step == 1 else 3))
        if self.layout.halves:
            self._draft_home_in_halves(parts, node, place)
            return
        phase = filling + 1 if self.outer > 1 else 0
        self._compute(parts, node, place, 0, self.others, phase=phase)
        parts.launch(phase + 1, self._sum_in_node(node, place, 0, self.others), wait=phase + 2)
        own_phase = phase + 1 if self.outer == 1 and self.inner > 1 else filling
        if self.outer > 1 and self.shape.columns_capacity:
            own_phase = phase
        parts.compute(own_phase, self.block_task(me, me, KV_HOME, DKV_HOME), first=True)

    def _draft_home_in_halves(self, parts: Draft, node: int, place: int) -> None:
        """The own node's other shards in two phases, then the own one, while the second half's gradients are summed."""
        me, last = self.rank(node, place), self.columns_phase + 2
        for phase, offsets in enumerate(self.own_node_offsets, start=self.columns_phase):
            self._compute(parts, node, place, 0, offsets, phase=phase)
            parts.launch(phase + 1, self._sum_in_node(node, place, 0, offsets), wait=last + 1)
        parts.compute(last, self.block_task(me, me, KV_HOME, DKV_HOME))

    def _compute(self, parts: Draft, node: int, place: int, step: int, offsets: range, *, phase: int) -> None:
        """The shards of the node `step` back: of the same place (step 0: not) and at these offsets."""
        for offset in (*([0] if step else []), *offsets):
            key, slot = self.rank(node - step, place - offset), self.kv_slot(step, offset)
            parts.compute(phase, self.block_task(self.rank(node, place), key, slot, self.grad_slot(step, offset)))

    def _cross(self, node: int, place: int, step: int) -> Iterable[Transfer]:
        """K/V of the own shard to the node `step` further on, and those of the node `step` back to here."""
        route = Route(kind="kv", communicator="rails", capacity_bytes=self.shape.kv_bytes)
        for source, target in ((node, node + step), (node - step, node)):
            owner = self.rank(source, place)
            yield route.move(owner, owner, self.rank(target, place), step, KV_HOME, self.kv_slot(step, 0))

    def _spread(self, node: int, place: int, step: int, offsets: range) -> Iterable[Transfer]:
        """What came in `step`, to the places at these offsets: what goes from and comes to here."""
        route = Route(kind="kv", communicator="nodes", capacity_bytes=self.shape.kv_bytes)
        held = self.kv_slot(step, 0) if step else KV_HOME
        for offset in offsets:
            for source in (place, (place - offset) % self.inner):
                ends = self.rank(node, source), self.rank(node, source + offset)
                yield route.move(self.rank(node - step, source), *ends, step, held, self.kv_slot(step, offset))

    def _sum_in_node(self, node: int, place: int, step: int, offsets: range) -> Iterable[Transfer]:
        """dK/dV to the places that brought the shards in (step 0: own them), from those at these offsets."""
        route = Route(kind="dkv", communicator="nodes_grad", capacity_bytes=self.shape.dkv_bytes)
        into = self.grad_slot(step, 0) if step else DKV_HOME
        for offset in offsets:
            for target in ((place - offset) % self.inner, place):
                ends = self.rank(node, target + offset), self.rank(node, target)
                shard, source = self.rank(node - step, target), self.grad_slot(step, offset)
                yield route.move(shard, *ends, step, source, f"landing:{offset - 1}", into)

    def _cross_home(self, node: int, place: int, step: int) -> Iterable[Transfer]:
        """Sums of this node to their owner in the node `step` back, and the own shard's from the node further on."""
        narrow = self.layout.narrow_gradients
        size = self.shape.kv_bytes if narrow else self.shape.dkv_bytes
        route = Route(kind="dkv", communicator="rails_grad", capacity_bytes=size, narrow=narrow)
        for owner, helper in ((node - step, node), (node, node + step)):
            home, away = self.rank(owner, place), self.rank(helper, place)
            yield route.move(home, away, home, step, self.grad_slot(step, 0), "landing_rail:0", DKV_HOME)
