"""Schedules made by hand, their parts, and edits of built ones, for the tests of `check` and of the stages."""

from __future__ import annotations

from dataclasses import replace

from sparsering.planner.layouts.ring import Ring
from sparsering.planner.schedule.schedule import (
    DKV_HOME,
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
    with_programs,
)
from sparsering.planner.schedule.shape import AttentionShape

BUFFERS = (
    Buffer(name="kv:home", kind="kv", capacity_bytes=8, shared=True),
    Buffer(name="q:home", kind="q", capacity_bytes=8),
    Buffer(name="out:home", kind="out", capacity_bytes=8),
    *(Buffer(name=f"{kind}:0", kind=kind, capacity_bytes=8, shared=True) for kind in ("kv", "q", "out")),
    Buffer(name="out:landing", kind="out", capacity_bytes=8),
)


def by_hand(*ranks: list[Phase], communicators: str = "ab") -> Schedule:
    """A forward schedule with one head whose communicators all join all ranks."""
    world = tuple(range(len(ranks)))
    return Schedule(
        direction="forward",
        layout="hand-made",
        world_size=len(ranks),
        num_heads=1,
        communicators=tuple(Communicator(name=name, groups=(world,)) for name in communicators),
        buffers=BUFFERS,
        program=lambda rank: tuple(replace(phase, index=index) for index, phase in enumerate(ranks[rank])),
    )


def move(kind: TransferKind, shard: int, source: int, destination: int, communicator: str = "a") -> Transfer:
    """From home to slot 0, or out of slot 0 by the landing slot to home."""
    homeward = kind == "out"
    return Transfer(
        kind=kind,
        shard=ShardId(sequence_part=shard),
        source=source,
        destination=destination,
        sequence=0,
        communicator=communicator,
        transport="p2p",
        source_buffer="out:0" if homeward else f"{kind}:home" if shard == source else f"{kind}:0",
        buffer="out:landing" if homeward else f"{kind}:0",
        capacity_bytes=8,
        accumulate_into="out:home" if homeward else None,
    )


def call(*transfers: Transfer) -> GroupCall:
    return GroupCall(communicator=transfers[0].communicator, transfers=transfers)


def compute(rank: int, query: int, key: int) -> Task:
    return Task(
        query=ShardId(sequence_part=query),
        key=ShardId(sequence_part=key),
        heads=(0, 1),
        key_buffer="kv:home" if key == rank else "kv:0",
        query_buffer="q:home" if query == rank else "q:0",
        out_buffer="out:home" if query == rank else "out:0",
    )


def helped(*, wait_for_query: bool = True, added: bool = True) -> Schedule:
    """Rank 1 computes everything of rank 0's queries against its own keys, and sends the output home."""
    query, out = move("q", 0, 0, 1), replace(move("out", 0, 1, 0), accumulate_into="out:home" if added else None)
    kv = move("kv", 0, 0, 1, "b")
    waits = (query.id, kv.id) if wait_for_query else (kv.id,)
    late = () if wait_for_query else (query.id,)
    return by_hand(
        [
            Phase(index=0, group_calls=(call(query), call(kv)), tasks=(compute(0, 0, 0),)),
            Phase(index=0, waits=(query.id, kv.id), group_calls=(call(out),)),
            Phase(index=0, waits=(out.id,)),
        ],
        [
            Phase(index=0, group_calls=(call(query), call(kv)), tasks=(compute(1, 1, 1),)),
            Phase(index=0, waits=waits, tasks=(compute(1, 0, 1), compute(1, 1, 0))),
            Phase(index=0, waits=late, group_calls=(call(out),)),
            Phase(index=0, waits=(out.id,)),
        ],
    )


def ring(world_size: int, direction: Direction, columns: int = 0) -> Schedule:
    shape = AttentionShape(
        world_size=world_size, tokens_per_rank=64, heads=4, kv_heads=2, head_dim=16, columns_capacity=columns
    )
    return Ring(prefetch=1).build(shape=shape, direction=direction)


def with_tasks(schedule: Schedule, rank: int, phase: Phase, tasks: tuple[Task, ...]) -> Schedule:
    phases = schedule.phases(rank)
    changed = replace(phase, tasks=tasks)
    return with_programs(schedule, {rank: (*phases[: phase.index], changed, *phases[phase.index + 1 :])})


def with_slot(schedule: Schedule, old: str, new: str) -> Schedule:
    """Exchange a slot for another wherever a transfer or task names it."""

    def changed(transfer: Transfer) -> Transfer:
        source_buffer = new if transfer.source_buffer == old else transfer.source_buffer
        return replace(transfer, source_buffer=source_buffer, buffer=new if transfer.buffer == old else transfer.buffer)

    def program(rank: int) -> list[Phase]:
        return [
            replace(
                phase,
                group_calls=tuple(replace(c, transfers=tuple(map(changed, c.transfers))) for c in phase.group_calls),
                tasks=tuple(replace(t, key_buffer=new) if t.key_buffer == old else t for t in phase.tasks),
            )
            for phase in schedule.phases(rank)
        ]

    return with_programs(schedule, {rank: program(rank) for rank in range(schedule.world_size)})


# Gradients. Rank 0's shard is computed by all three ranks: the sum of rank 1 goes to rank 2, which adds its own to the
# slot where it landed and sends it home. Of other shards nothing is computed.

KV = [move("kv", 0, 0, 1), move("kv", 0, 0, 2)]
FIRST = Transfer(
    kind="dkv",
    shard=ShardId(sequence_part=0),
    source=1,
    destination=2,
    sequence=0,
    communicator="b",
    transport="p2p",
    source_buffer="dkv:0",
    buffer="dkv:0",
    capacity_bytes=8,
)
SECOND = replace(FIRST, source=2, destination=0, buffer="landing:0", accumulate_into=DKV_HOME)
ONLY_SHARD_0 = {(query, key) for query in range(3) for key in (1, 2)}
Programs = list[list[Phase]]


def gradient_task(rank: int, buffer: str | None = None) -> Task:
    task = compute(rank, rank, 0)
    return replace(task, grad_buffer=buffer or ("dkv:0" if rank else DKV_HOME))


def gradients_home(first: Transfer = FIRST, second: Transfer = SECOND) -> Programs:
    return [
        [
            Phase(index=0, group_calls=(call(*KV), call(second)), tasks=(gradient_task(0),)),
            Phase(index=0, waits=(KV[0].id, KV[1].id, second.id)),
        ],
        [
            Phase(index=0, group_calls=(call(KV[0]),)),
            Phase(index=0, waits=(KV[0].id,), tasks=(gradient_task(1),)),
            Phase(index=0, group_calls=(call(first),)),
            Phase(index=0, waits=(first.id,)),
        ],
        [
            Phase(index=0, group_calls=(call(KV[1]), call(first))),
            Phase(index=0, waits=(KV[1].id, first.id), tasks=(gradient_task(2),)),
            Phase(index=0, group_calls=(call(second),)),
            Phase(index=0, waits=(second.id,)),
        ],
    ]


def backward(programs: Programs, *more: Buffer) -> Schedule:
    names: dict[TransferKind, tuple[str, ...]] = {"kv": ("kv:home", "kv:0")}
    names["dkv"] = (DKV_HOME, "dkv:0", "dkv:1", "landing:0")
    buffers = tuple(Buffer(name=name, kind=kind, capacity_bytes=8) for kind in names for name in names[kind])
    return replace(by_hand(*programs), direction="backward", buffers=(*buffers, *more))
