"""`check` on schedules made by hand: what no layout does, and what its refusals say.

That every mutation of a built schedule is rejected is in `test_check_mutations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sparsering.planner.check import check, check_step
from sparsering.planner.check_playable import check_playable
from sparsering.planner.layout_draft import AttentionShape
from sparsering.planner.layouts import build
from sparsering.planner.schedule import (
    DCOLUMNS_HOME,
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
    Transport,
    with_programs,
)
from sparsering.traces.errors import ScheduleError, UnsupportedError

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


def test_a_sum_may_land_be_added_to_and_go_on() -> None:
    assert check(backward(gradients_home()), inactive=ONLY_SHARD_0).transfers == 4
    added = gradients_home(first=replace(FIRST, buffer="landing:0", accumulate_into="dkv:0", narrow=True))
    check(backward(added), inactive=ONLY_SHARD_0)


def not_moved_on() -> Programs:
    programs = gradients_home()
    programs[0] = [programs[0][0], replace(programs[0][1], waits=(KV[0].id, KV[1].id))]
    programs[0][0] = replace(programs[0][0], group_calls=(call(*KV),))
    programs[2] = programs[2][:2]
    return programs


def sent_again() -> Programs:
    """Home gets the sum a second time, from a slot that is empty by then."""
    programs, again = gradients_home(), replace(SECOND, sequence=1)
    for rank in (0, 2):
        programs[rank] += [Phase(index=0, group_calls=(call(again),)), Phase(index=0, waits=(again.id,))]
    return programs


def sent_while_sent() -> Programs:
    programs, again = gradients_home(), replace(SECOND, sequence=1, buffer="dkv:1")
    for rank, phase in ((0, 0), (2, 2)):
        calls = (*programs[rank][phase].group_calls, call(again))
        programs[rank][phase] = replace(programs[rank][phase], group_calls=calls)
        programs[rank][-1] = replace(programs[rank][-1], waits=(*programs[rank][-1].waits, again.id))
    return programs


def landed_upon() -> Programs:
    """Rank 1's sum goes home too, where rank 2's waits in the same slot to be added."""
    first = replace(FIRST, destination=0, buffer="landing:0", accumulate_into=DKV_HOME)
    programs = gradients_home(first, replace(SECOND, accumulate_into=None))
    programs[0][-1] = replace(programs[0][-1], group_calls=(call(first),))
    programs[0].append(Phase(index=0, waits=(first.id,)))
    programs[2][0] = replace(programs[2][0], group_calls=(call(KV[1]),))
    programs[2][1] = replace(programs[2][1], waits=(KV[1].id,))
    return programs


def computed_while_sent() -> Programs:
    """What rank 2 adds comes after the sum was launched."""
    programs = gradients_home()
    programs[2][1], task = replace(programs[2][1], tasks=()), programs[2][1].tasks
    programs[2][2] = replace(programs[2][2], tasks=task)
    return programs


def rounded_before_it_is_here() -> Programs:
    """Rank 2 computes elsewhere and sends on what lands, rounded, in the communicator's queue."""
    narrow = replace(SECOND, narrow=True)
    programs = gradients_home(second=narrow)
    programs[2][0] = replace(programs[2][0], group_calls=(*programs[2][0].group_calls, call(narrow)))
    programs[2][1] = replace(programs[2][1], waits=(*programs[2][1].waits, narrow.id), tasks=(gradient_task(2),))
    programs[2] = programs[2][:2]
    return programs


@pytest.mark.parametrize(
    ("programs", "problem"),
    [
        (not_moved_on, "rank 2, phase 1, buffer dkv:0: 0.0 never arrives home"),
        (
            lambda: gradients_home(second=replace(SECOND, accumulate_into=None)),
            "rank 0, phase 1, buffer landing:0: 0.0 never arrives home",
        ),
        (
            lambda: gradients_home(second=replace(SECOND, accumulate_into="dkv:1")),
            "rank 0, phase 1, buffer dkv:1: 0.0 never arrives home",
        ),
        (
            lambda: gradients_home(second=replace(SECOND, accumulate_into="dkv:1", narrow=True)),
            "rank 0, phase 1, buffer dkv:1: 0.0 never arrives home",
        ),
        (
            lambda: gradients_home(first=replace(FIRST, buffer="landing:0", accumulate_into=DKV_HOME)),
            "rank 2, phase 1, transfer dkv/0.0/1>2/0: dkv:home is no home of 0.0",
        ),
        (
            lambda: gradients_home(first=replace(FIRST, narrow=True)),
            "only gradients sent from rank to rank that are added on arrival travel narrow",
        ),
        (landed_upon, "rank 0, phase 1, transfer dkv/0.0/1>0/0: overwrites 0.0 in landing:0, which was not sent on"),
        (sent_again, "rank 2, phase 4, transfer dkv/0.0/2>0/1: dkv:0 holds nothing, not 0.0"),
        (sent_while_sent, "rank 2, phase 2, transfer dkv/0.0/2>0/1: dkv:0 is already being sent by dkv/0.0/2>0/0"),
        (computed_while_sent, "rank 2, phase 2, task 2.0x0.0 heads 0:1: writes dkv:0 while dkv/0.0/2>0/0 is in flight"),
        (rounded_before_it_is_here, "transfer dkv/0.0/2>0/0: rounds dkv:0 before dkv/0.0/1>2/0 has arrived"),
    ],
)
def test_gradients_that_are_lost_or_counted_twice_are_named(programs: Callable[[], Programs], problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        check(backward(programs()), inactive=ONLY_SHARD_0)


def test_a_sum_is_added_to_a_sum_of_the_same_shard_alone() -> None:
    programs = gradients_home(first=replace(FIRST, buffer="landing:0", accumulate_into="dkv:1"))
    of_another = replace(compute(2, 2, 2), grad_buffer="dkv:1")
    programs[2][0] = replace(programs[2][0], tasks=(of_another,))
    with pytest.raises(ScheduleError, match=r"rank 2, phase 1, transfer dkv/0.0/1>2/0: dkv:1 holds 2.0, not 0.0"):
        check(backward(programs), inactive=ONLY_SHARD_0 - {(2, 2)})


def with_columns_sum(schedule: Schedule, change: Callable[[Transfer], Transfer | None]) -> Schedule:
    """Change the columns' all_reduce on all ranks, or leave it out."""

    def changed(phase: Phase) -> Phase:
        calls, waits = [], phase.waits
        for one in phase.group_calls:
            kept = [change(t) if t.kind == "columns" else t for t in one.transfers]
            calls.append(replace(one, transfers=tuple(t for t in kept if t is not None)))
        if change(columns) is None:
            waits = tuple(name for name in waits if name != columns.id)
        return replace(phase, group_calls=tuple(c for c in calls if c.transfers), waits=waits)

    columns = next(
        t for phase in schedule.phases(0) for c in phase.group_calls for t in c.transfers if t.kind == "columns"
    )
    ranks = range(schedule.world_size)
    return with_programs(schedule, {rank: [changed(phase) for phase in schedule.phases(rank)] for rank in ranks})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _: None, "rank 0, phase 3, buffer dcolumns:home: gradients of columns never arrives home"),
        (lambda t: replace(t, accumulate_into=None), "transfer columns/-/all/0: accumulates into None"),
        (lambda t: replace(t, accumulate_into="dkv:0"), "transfer columns/-/all/0: accumulates into dkv:0"),
        (lambda t: replace(t, narrow=True), "only gradients sent from rank to rank"),
        (
            lambda t: replace(t, source_buffer="columns:home", buffer="columns:home", capacity_bytes=8),
            "columns:home holds all columns, not gradients of columns",
        ),
    ],
)
def test_gradients_of_columns_that_are_lost_are_named(
    change: Callable[[Transfer], Transfer | None], problem: str
) -> None:
    with pytest.raises(ScheduleError, match=problem):
        check(with_columns_sum(ring(2, "backward", columns=32), change))


def test_columns_computed_after_their_sum_was_launched_are_named() -> None:
    schedule = ring(2, "backward", columns=32)
    launch = next(p for p in schedule.phases(1) if any(c.communicator == "columns" for c in p.group_calls))
    task = next(t for p in schedule.phases(1) for t in p.tasks if t.key is None)
    twice = with_tasks(schedule, 1, launch, (*launch.tasks, task))
    with pytest.raises(ScheduleError, match="writes dcolumns:home while columns/-/all/0 is in flight"):
        check(twice)


def test_a_backward_without_the_columns_of_its_forward_is_named() -> None:
    with_columns, without = (
        {direction: ring(2, direction, columns=columns) for direction in ("forward", "backward")} for columns in (32, 0)
    )
    check_step(with_columns["forward"], with_columns["backward"])
    with pytest.raises(ScheduleError, match="columns: forward attends them, backward computes no gradients of them"):
        check_step(with_columns["forward"], without["backward"])
    with pytest.raises(ScheduleError, match="columns: backward computes gradients of them, forward does not"):
        check_step(without["forward"], with_columns["backward"])


def test_kept_slots_hold_kv_and_backward_leaves_them_alone() -> None:
    kept = Buffer(name="kept:0", kind="kv", capacity_bytes=8)
    onto = [replace(transfer, buffer="kept:0") for transfer in KV]
    overwriting = by_hand(
        [Phase(index=0, group_calls=(call(*onto),)), Phase(index=0, waits=(onto[0].id, onto[1].id))],
        *([Phase(index=0, group_calls=(call(one),)), Phase(index=0, waits=(one.id,))] for one in onto),
    )
    schedule = replace(overwriting, direction="backward", buffers=(*BUFFERS, kept))
    with pytest.raises(ScheduleError, match=r"transfer kv/0.0/0>1/0: overwrites kept:0, which forward kept"):
        check(schedule)
    with pytest.raises(ScheduleError, match="buffer kept:0: keeps K/V for backward, not dkv"):
        check(backward(gradients_home(), replace(kept, kind="dkv")))


def test_slots_of_one_pool_hold_one_kind() -> None:
    wrong = Buffer(name="kv:1", kind="dkv", capacity_bytes=8)
    with pytest.raises(ScheduleError, match="buffer kv:1: is for dkv, kv:home of the same pool for kv"):
        check(backward(gradients_home(), wrong))


def test_a_collective_needs_numbered_slots() -> None:
    shape = AttentionShape(world_size=2, tokens_per_rank=64, heads=4, kv_heads=2, head_dim=16, columns_capacity=0)
    schedule = build("collective", {}, shape=shape, direction="forward")
    renamed = replace(schedule, buffers=(*schedule.buffers, replace(schedule.buffers[-1], name="kv:landing")))
    with pytest.raises(ScheduleError, match="has no slot per rank in kv:landing"):
        check(with_slot(renamed, "kv:0", "kv:landing"))


def test_the_runtime_refuses_what_it_would_play_otherwise() -> None:
    """All of these are proved, and may be simulated."""
    for rank in range(3):
        check_playable(backward(gradients_home()), rank)
    with pytest.raises(UnsupportedError, match=r"slots 0, landing are not numbered from 0"):
        check_playable(helped(), 1)
    numbered = replace(helped(), buffers=())
    with pytest.raises(UnsupportedError, match=r"rank 1, phase 0, transfer q/0.0/0>1/0: q stays with its rank"):
        check_playable(numbered, 1)
    schedule = ring(2, "backward", columns=32)
    phase = schedule.phases(1)[0]
    halves = [replace(task, heads=heads) for task in phase.tasks for heads in ((0, 2), (2, 4))]
    with pytest.raises(UnsupportedError, match=r"task 1.0xcolumns heads 0:2: all 4 heads are computed together"):
        check_playable(with_tasks(schedule, 1, phase, tuple(halves)), 1)
    for change, problem in (
        ({"query": ShardId(sequence_part=0)}, "a rank computes its own queries"),
        ({"out_buffer": "out:0"}, "reads q:home and adds to out:0, not q:home and out:home"),
        ({"grad_buffer": "columns:0"}, f"gradients of columns are added to {DCOLUMNS_HOME}, not columns:0"),
    ):
        changed = replace(phase.tasks[0], **change)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError, match=problem):
            check_playable(with_tasks(schedule, 1, phase, (changed,)), 1)
