"""`check` on schedules made by hand: what no layout does, and what its refusals say.

Sums of gradients are in `test_check_gradients`; that every mutation of a built schedule is rejected, in
`test_check_mutations`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule_cases import (
    BUFFERS,
    KV,
    backward,
    by_hand,
    call,
    compute,
    gradients_home,
    helped,
    move,
    ring,
    with_slot,
    with_tasks,
)
from sparsering.planner.check.check import check
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.schedule.schedule import Buffer, Phase, Schedule, Transfer, Transport
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.traces.errors import ScheduleError


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
    schedule = Collective().build(shape=shape, direction="forward")
    renamed = replace(schedule, buffers=(*schedule.buffers, replace(schedule.buffers[-1], name="kv:landing")))
    with pytest.raises(ScheduleError, match="has no slot per rank in kv:landing"):
        check(with_slot(renamed, "kv:0", "kv:landing"))
