"""`check` on schedules made by hand: what no layout does, and what its refusals say.

That every mutation of a built schedule is rejected is in `test_check_mutations`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsering.planner.check import check
from sparsering.planner.layout_draft import AttentionShape
from sparsering.planner.layouts import build
from sparsering.planner.schedule import (
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
    with_programs,
)
from sparsering.traces.errors import ScheduleError

BUFFERS = (
    Buffer(name="kv:home", kind="kv", capacity_bytes=8),
    Buffer(name="q:home", kind="q", capacity_bytes=8),
    Buffer(name="out:home", kind="out", capacity_bytes=8),
    *(Buffer(name=f"{kind}:0", kind=kind, capacity_bytes=8) for kind in ("kv", "q", "out")),
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


def exchange(*, b_first_on_rank_1: bool) -> Schedule:
    """Two ranks give each other their K/V, one way on communicator a, the other on b, in phases 0 and 1."""
    there, back = move("kv", 0, 0, 1, "a"), move("kv", 1, 1, 0, "b")
    order = (back, there) if b_first_on_rank_1 else (there, back)

    def program(rank: int, calls: tuple[Transfer, Transfer]) -> list[Phase]:
        return [
            Phase(index=0, group_calls=(call(calls[0]),), tasks=(compute(rank, rank, rank),)),
            Phase(index=0, group_calls=(call(calls[1]),)),
            Phase(index=0, waits=(there.id, back.id), tasks=(compute(rank, rank, 1 - rank),)),
        ]

    return by_hand(program(0, (there, back)), program(1, order))


def test_two_communicators_in_another_order_over_phases_deadlock() -> None:
    check(exchange(b_first_on_rank_1=False))
    with pytest.raises(ScheduleError, match=r"rank \d, phase \d, call [ab] .*: deadlock: call . kv/.*"):
        check(exchange(b_first_on_rank_1=True))


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


def test_a_rank_may_compute_the_queries_of_another() -> None:
    report = check(helped())
    assert (report.tasks, report.transfers, report.phases) == (4, 3, 4)
    assert report.sent_bytes == {"a": (8, 8), "b": (8, 0)}
    with pytest.raises(ScheduleError, match=r"rank 1, phase 1, task 0.0x1.0 .*: reads q:0 before q/0.0/0>1/0"):
        check(helped(wait_for_query=False))
    with pytest.raises(ScheduleError, match=r"rank 0, phase 2, buffer out:landing: 0.0 never arrives home"):
        check(helped(added=False))


def relay(*, communicator: str = "a", transport: Transport = "p2p") -> Schedule:
    """Rank 0's K/V go to rank 1 and on to rank 2, launched at once without a wait in between."""
    first, second = move("kv", 0, 0, 1), replace(move("kv", 0, 1, 2, communicator), transport=transport)
    return by_hand(
        [Phase(index=0, group_calls=(call(first),)), Phase(index=0, waits=(first.id,))],
        [
            Phase(index=0, group_calls=(call(first), call(second))),
            Phase(index=0, waits=(first.id, second.id), tasks=(compute(1, 1, 0),)),
        ],
        [
            Phase(index=0, group_calls=(call(second),)),
            Phase(index=0, waits=(second.id,), tasks=(compute(2, 2, 0),)),
        ],
    )


ALL_BUT_THE_RELAYED = {(q, k) for q in range(3) for k in range(3)} - {(1, 0), (2, 0)}


def test_what_arrives_may_be_sent_on_by_the_same_communicator_only() -> None:
    check(relay(), inactive=ALL_BUT_THE_RELAYED)
    for schedule in (relay(communicator="b"), relay(transport="pull")):
        with pytest.raises(
            ScheduleError, match=r"rank 1, phase 0, transfer kv/0.0/1>2/0: sends kv:0 before kv/0.0/0>1/0"
        ):
            check(schedule, inactive=ALL_BUT_THE_RELAYED)


def ring(world_size: int, direction: Direction, columns: int = 0) -> Schedule:
    shape = AttentionShape(
        world_size=world_size, tokens_per_rank=64, heads=4, kv_heads=2, head_dim=16, columns_capacity=columns
    )
    return build("ring", {"prefetch": 1}, shape=shape, direction=direction)


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


def test_inactive_tasks_may_be_left_out_but_not_computed_twice() -> None:
    schedule = ring(3, "forward")
    last = schedule.phases(0)[-1]
    without = with_tasks(schedule, 0, last, ())
    twice = with_tasks(schedule, 0, last, last.tasks * 2)
    check(schedule, inactive={(0, 1)})
    check(without, inactive={(0, 1)})
    with pytest.raises(ScheduleError, match="rank 0, query part 0, key part 1: head 0 is never computed"):
        check(without, inactive={(1, 0)})
    with pytest.raises(ScheduleError, match=r"rank 0, phase 2, task 0.0x1.0 heads 0:4: head 0 is computed 2 times"):
        check(twice, inactive={(0, 1)})


def test_heads_may_be_computed_in_pieces() -> None:
    schedule = ring(2, "backward", columns=32)
    phase = schedule.phases(1)[0]
    pieces = [replace(task, heads=heads) for task in phase.tasks for heads in ((0, 1), (1, 4))]
    check(with_tasks(schedule, 1, phase, tuple(pieces)))
    with pytest.raises(ScheduleError, match="rank 1, query part 1, columns: head 0 is never computed"):
        check(with_tasks(schedule, 1, phase, tuple(pieces[1:])))  # columns come first


def test_a_slot_is_not_overwritten_while_it_is_sent() -> None:
    """A ring with one K/V slot fewer than it needs: what arrives would overwrite what is being sent on."""
    schedule = with_slot(ring(3, "forward"), "kv:1", "kv:0")
    with pytest.raises(ScheduleError, match=r"rank 0, phase 1, transfer kv/1.0/2>0/2: writes kv:0 while kv/2.0/0>1/2"):
        check(schedule)
