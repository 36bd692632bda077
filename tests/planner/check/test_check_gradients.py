"""`check` on sums of gradients: none is lost, counted twice, or added to another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from schedule_cases import (
    FIRST,
    KV,
    ONLY_SHARD_0,
    SECOND,
    Programs,
    backward,
    call,
    compute,
    gradient_task,
    gradients_home,
    ring,
    with_tasks,
)
from sparsering.planner.check.check import check, check_step
from sparsering.planner.schedule.schedule import DKV_HOME, Phase, Schedule, Transfer, with_programs
from sparsering.traces.errors import ScheduleError


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
