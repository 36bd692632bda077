"""What the layouts share: the shape that sizes follow from, and a rank's phases under construction.

Notation in the layouts: W ranks, r this rank, p a phase; n nodes ("outer"), l the rank within its node ("inner").
A shard's number is the rank that owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

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
    keeps_nothing,
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


def close_schedule(
    layout: str,
    direction: Direction,
    shape: AttentionShape,
    communicators: list[Communicator],
    buffers: list[Buffer],
    draft: Callable[[int, Draft], None],
    kept: Callable[[int], dict[str, ShardId]] = keeps_nothing,
    columns_phase: int = 0,
    shared: frozenset[str] = frozenset(),
    columns_by_draft: bool = False,
) -> Schedule:
    """Close a layout: add home buffers and the columns' part, and make the program.

    columns_phase: in which backward computes the columns. shared: names of buffers that others pull from.
    columns_by_draft: whether `draft` adds the columns' transfers and tasks itself.
    """
    if shape.columns_capacity:
        communicators = [*communicators, Communicator(name=COLUMNS, groups=(tuple(range(shape.world_size)),))]
    home = [Buffer(name=KV_HOME, kind="kv", capacity_bytes=shape.kv_bytes)]
    if direction == "backward":
        home.append(Buffer(name=DKV_HOME, kind="dkv", capacity_bytes=shape.dkv_bytes))
    home += _columns_buffers(direction, shape)
    order = tuple(communicator.name for communicator in communicators)

    def program(rank: int) -> tuple[Phase, ...]:
        parts = Draft()
        draft(rank, parts)
        if shape.columns_capacity and not columns_by_draft:
            _add_columns(rank, parts, direction, shape, columns_phase)
        return parts.phases(order)

    return Schedule(
        direction=direction,
        layout=layout,
        world_size=shape.world_size,
        num_heads=shape.heads,
        communicators=tuple(communicators),
        buffers=tuple(replace(one, shared=one.name in shared) for one in home + buffers),
        program=program,
        kept=kept,
    )


def _columns_buffers(direction: Direction, shape: AttentionShape) -> list[Buffer]:
    if not shape.columns_capacity:
        return []
    buffers = [Buffer(name=COLUMNS_HOME, kind="columns", capacity_bytes=shape.columns_bytes("forward"))]
    if direction == "backward":
        size = shape.columns_bytes("backward")
        buffers.append(Buffer(name=DCOLUMNS_HOME, kind="columns", capacity_bytes=size))
    return buffers


def _add_columns(rank: int, draft: Draft, direction: Direction, shape: AttentionShape, backward_phase: int) -> None:
    """Columns are summed over all ranks once. Forward: in flight during phase 0, computed first in phase 1.

    Backward keeps the gathered K and V: computed first in its phase, gradients summed while the rest goes on.
    """
    transfer = columns_transfer(direction, shape)
    task = columns_task(direction, query=ShardId(sequence_part=rank), heads=(0, shape.heads))
    last = max([1, *draft.waits, *draft.tasks])
    if direction == "forward":
        draft.launch(0, [transfer], wait=1)
        draft.compute(1, task, first=True)
    else:
        draft.compute(backward_phase, task, first=True)
        draft.launch(backward_phase + 1, [transfer], wait=max(backward_phase + 2, last))


def columns_transfer(direction: Direction, shape: AttentionShape) -> Transfer:
    """Return the sum of all ranks' columns (forward), or of their gradients, which then go to the owners' rows."""
    buffer = COLUMNS_HOME if direction == "forward" else DCOLUMNS_HOME
    return Transfer(
        kind="columns",
        shard=None,
        source=ALL_RANKS,
        destination=ALL_RANKS,
        sequence=0,
        communicator=COLUMNS,
        transport="all_reduce",
        source_buffer=buffer,
        buffer=buffer,
        capacity_bytes=shape.columns_bytes(direction),
        accumulate_into=None if direction == "forward" else DKV_HOME,
    )


def columns_task(
    direction: Direction,
    *,
    query: ShardId,
    heads: tuple[int, int],
    query_buffer: str = Q_HOME,
    out_buffer: str = OUT_HOME,
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
        grad_buffer=None if direction == "forward" else DCOLUMNS_HOME,
    )


def block_task(rank: int, key: int, key_buffer: str, shape: AttentionShape, grad_buffer: str | None) -> Task:
    return Task(
        query=ShardId(sequence_part=rank),
        key=ShardId(sequence_part=key),
        heads=(0, shape.heads),
        key_buffer=key_buffer,
        grad_buffer=grad_buffer,
    )


@dataclass(frozen=True, kw_only=True)
class Route:
    """Makes the transfers of one kind on one communicator. transport: "p2p" or "pull"."""

    kind: TransferKind
    communicator: str
    capacity_bytes: int
    narrow: bool = False
    transport: Transport = "p2p"

    def move(
        self, shard: int, source: int, destination: int, sequence: int, source_buffer: str, buffer: str,
        accumulate_into: str | None = None,
    ) -> Transfer:  # fmt: skip
        """Return the transfer of a shard from rank to rank."""
        return Transfer(
            kind=self.kind,
            shard=ShardId(sequence_part=shard),
            source=source,
            destination=destination,
            sequence=sequence,
            communicator=self.communicator,
            transport=self.transport,
            source_buffer=source_buffer,
            buffer=buffer,
            capacity_bytes=self.capacity_bytes,
            accumulate_into=accumulate_into,
            narrow=self.narrow,
        )


def slots(prefix: str, kind: TransferKind, count: int, capacity_bytes: int, *, narrow: bool = False) -> list[Buffer]:
    return [
        Buffer(name=f"{prefix}:{slot}", kind=kind, capacity_bytes=capacity_bytes, narrow=narrow)
        for slot in range(count)
    ]
