"""What the layouts share: a builder of one direction's schedule, and a rank's phases under construction.

Notation in the layouts: W ranks, r this rank, p a phase; n nodes ("outer"), l the rank within its node ("inner").
A shard's number is the rank that owns it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..schedule.pairs import Pairs
from ..schedule.schedule import (
    ALL_RANKS,
    COLUMNS_HOME,
    DCOLUMNS_HOME,
    DKV_HOME,
    KV_HOME,
    OUT_HOME,
    Q_HOME,
    Buffer,
    Communicator,
    Direction,
    GroupCall,
    Phase,
    Schedule,
    ShardId,
    Task,
    Transfer,
    TransferKind,
    Transport,
)
from ..schedule.shape import AttentionShape

COLUMNS = "columns"


@dataclass
class Draft:
    """One rank's phases under construction: parts are dropped into numbered phases, in launch order."""

    waits: dict[int, list[str]] = field(default_factory=dict)
    calls: dict[int, list[GroupCall]] = field(default_factory=dict)
    tasks: dict[int, list[Task]] = field(default_factory=dict)

    def launch(self, phase: int, transfers: Iterable[Transfer], *, wait: int) -> None:
        """Launch transfers together in `phase` and wait for them in phase `wait`."""
        together = tuple(transfers)
        if together:
            self.calls.setdefault(phase, []).append(
                GroupCall(communicator=together[0].communicator, transfers=together)
            )
            self.waits.setdefault(wait, []).extend(transfer.id for transfer in together)

    def compute(self, phase: int, task: Task, *, first: bool = False) -> None:
        """Add a task to `phase`."""
        tasks = self.tasks.setdefault(phase, [])
        tasks.insert(0 if first else len(tasks), task)

    def phases(self, order: tuple[str, ...]) -> tuple[Phase, ...]:
        """Return the phases, each with its group calls in the order of the communicators."""
        count = 1 + max([0, *self.waits, *self.calls, *self.tasks])
        return tuple(
            Phase(
                index=index,
                waits=tuple(self.waits.get(index, ())),
                group_calls=tuple(sorted(self.calls.get(index, ()), key=lambda call: order.index(call.communicator))),
                tasks=tuple(self.tasks.get(index, ())),
            )
            for index in range(count)
        )


@dataclass(frozen=True, kw_only=True)
class Builder(ABC):
    """Builds the schedule of a layout: a subclass says what it sends over, into what, and drafts a rank's program.

    The rank's own buffers are added to those of `buffers`, and so are the columns' transfer and task, unless
    `drafts_columns` says that `draft` adds these itself. leaves_out: whether the pairs make a difference to it.
    """

    drafts_columns: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = True

    shape: AttentionShape
    direction: Direction
    pairs: Pairs

    @property
    def world(self) -> int:
        """W."""
        return self.shape.world_size

    @property
    def backward(self) -> bool:
        """Whether this is the backward direction."""
        return self.direction == "backward"

    @property
    def alike(self) -> int:
        """The distance of ranks that do alike where no pairs are left out; see `Schedule.period`. Here: no two do."""
        return self.world

    @property
    def columns_phase(self) -> int:
        """The phase in which backward computes the columns."""
        return 0

    def columns_gathered(self, parts: Draft) -> int:
        """Return the phase in which forward computes the columns, given all else: as soon as they have time to come."""
        return 1

    @abstractmethod
    def communicators(self) -> list[Communicator]:
        """Return the communicators, in launch order."""

    @abstractmethod
    def buffers(self) -> list[Buffer]:
        """Return the slots for what comes from other ranks."""

    @abstractmethod
    def draft(self, rank: int, parts: Draft) -> None:
        """Drop a rank's transfers and tasks into their phases."""

    def kept(self, rank: int) -> dict[str, ShardId]:
        """Return what a rank keeps from forward to backward: shards by their slots."""
        return {}

    def shared(self) -> frozenset[str]:
        """Return the names of buffers that other ranks pull from."""
        return frozenset()

    def everyone(self, *names: str) -> list[Communicator]:
        """Return communicators that join all ranks."""
        return [Communicator(name=name, groups=(tuple(range(self.world)),)) for name in names]

    def schedule(self, layout: str) -> Schedule:
        """Return the schedule, its phases made when they are asked for. layout: the name that it goes by."""
        communicators = [*self.communicators(), *(self.everyone(COLUMNS) if self.shape.columns_capacity else [])]
        order = tuple(communicator.name for communicator in communicators)
        shared = self.shared()

        def program(rank: int) -> tuple[Phase, ...]:
            parts = Draft()
            self.draft(rank, parts)
            if self.shape.columns_capacity and not self.drafts_columns:
                self._add_columns(rank, parts)
            return parts.phases(order)

        return Schedule(
            direction=self.direction,
            layout=layout,
            world_size=self.world,
            num_heads=self.shape.heads,
            communicators=tuple(communicators),
            buffers=tuple(replace(one, shared=one.name in shared) for one in self._homes() + self.buffers()),
            program=program,
            kept=self.kept,
            period=self.pairs.period(self.alike) if self.leaves_out else self.alike,
        )

    def _homes(self) -> list[Buffer]:
        homes = [Buffer(name=KV_HOME, kind="kv", capacity_bytes=self.shape.kv_bytes)]
        if self.backward:
            homes.append(Buffer(name=DKV_HOME, kind="dkv", capacity_bytes=self.shape.dkv_bytes))
        if self.shape.columns_capacity:
            size = self.shape.columns_bytes("forward")
            homes.append(Buffer(name=COLUMNS_HOME, kind="columns", capacity_bytes=size))
            if self.backward:
                size = self.shape.columns_bytes("backward")
                homes.append(Buffer(name=DCOLUMNS_HOME, kind="columns", capacity_bytes=size))
        return homes

    def _add_columns(self, rank: int, parts: Draft) -> None:
        """Columns are summed over all ranks once. Forward: in flight from phase 0 on, computed first in their phase.

        Backward keeps the gathered K and V: computed first in its phase, gradients summed while the rest goes on.
        """
        task = self.columns_task(query=ShardId(sequence_part=rank), heads=(0, self.shape.heads))
        last = max([1, *parts.waits, *parts.tasks])
        if self.backward:
            parts.compute(self.columns_phase, task, first=True)
            phase = self.columns_phase + 1
            parts.launch(phase, [self.columns_transfer()], wait=max(phase + 1, last))
        else:
            phase = self.columns_gathered(parts)
            parts.launch(0, [self.columns_transfer()], wait=phase)
            parts.compute(phase, task, first=True)

    def columns_transfer(self) -> Transfer:
        """Return the sum of all ranks' columns (forward), or of their gradients, which then go to the owners' rows."""
        size = self.shape.columns_bytes(self.direction)
        route = Route(kind="columns", communicator=COLUMNS, capacity_bytes=size, transport="all_reduce")
        if self.backward:
            return route.of_all(DCOLUMNS_HOME, DCOLUMNS_HOME, DKV_HOME)
        return route.of_all(COLUMNS_HOME, COLUMNS_HOME)

    def columns_task(
        self, *, query: ShardId, heads: tuple[int, int], query_buffer: str = Q_HOME, out_buffer: str = OUT_HOME
    ) -> Task:
        """Return the task of some queries against all gathered columns."""
        return Task(
            query=query,
            key=None,
            heads=heads,
            key_buffer=COLUMNS_HOME,
            kind="columns",
            query_buffer=query_buffer,
            out_buffer=out_buffer,
            grad_buffer=DCOLUMNS_HOME if self.backward else None,
        )

    def block_task(self, rank: int, key: int, key_buffer: str, grad_buffer: str | None) -> Task:
        """Return the task of a rank's own queries, all heads, against a key shard; grad_buffer: backward's alone."""
        return Task(
            query=ShardId(sequence_part=rank),
            key=ShardId(sequence_part=key),
            heads=(0, self.shape.heads),
            key_buffer=key_buffer,
            grad_buffer=grad_buffer if self.backward else None,
        )


@dataclass(frozen=True, kw_only=True)
class NodesBuilder(Builder):
    """A builder for ranks in nodes of `inner` places: rank r is place l of node n (r = n * inner + l)."""

    inner: int

    @property
    def alike(self) -> int:
        return self.inner

    @property
    def outer(self) -> int:
        """Number of nodes."""
        return self.world // self.inner

    def rank(self, node: int, place: int) -> int:
        """Return the rank at a place of a node, both counted around."""
        return (node % self.outer) * self.inner + place % self.inner

    def rails_and_nodes(self, rails: str, nodes: str) -> list[Communicator]:
        """Return communicators of these names: of each place on all nodes, and of each node's places."""
        ranks = [tuple(range(self.rank(node, 0), self.rank(node, 0) + self.inner)) for node in range(self.outer)]
        return [
            Communicator(name=rails, groups=tuple(zip(*ranks, strict=True))),
            Communicator(name=nodes, groups=tuple(ranks)),
        ]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Makes the transfers of one kind on one communicator."""

    kind: TransferKind
    communicator: str
    capacity_bytes: int
    narrow: bool = False
    transport: Transport = "p2p"

    def move(
        self, shard: int, source: int, destination: int, sequence: int, source_buffer: str, buffer: str,
        accumulate_into: str | None = None, head_group: int = 0,
    ) -> Transfer:  # fmt: skip
        """Return the transfer of a rank's shard from rank to rank."""
        return Transfer(
            shard=ShardId(sequence_part=shard, head_group=head_group), source=source, destination=destination,
            sequence=sequence, source_buffer=source_buffer, buffer=buffer, accumulate_into=accumulate_into,
            **vars(self),
        )  # fmt: skip

    def of_all(self, source_buffer: str, buffer: str, accumulate_into: str | None = None) -> Transfer:
        """Return the collective of all ranks."""
        moved = self.move(0, ALL_RANKS, ALL_RANKS, 0, source_buffer, buffer, accumulate_into)
        return replace(moved, shard=None)


def slots(prefix: str, kind: TransferKind, count: int, capacity_bytes: int, *, narrow: bool = False) -> list[Buffer]:
    """Return `count` slots of one size, numbered from 0."""
    return [
        Buffer(name=f"{prefix}:{slot}", kind=kind, capacity_bytes=capacity_bytes, narrow=narrow)
        for slot in range(count)
    ]
