"""Mutations of tasks, waits and the order of launches: each lists its sites, each site makes one mutated schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

from schedule_edits import (
    Mutant,
    edit_task,
    ends,
    every_call,
    every_task,
    programs,
    with_phase,
    with_tasks,
    without_waits,
)
from sparsering.planner.schedule.schedule import GroupCall, Phase, Schedule, Transfer, with_programs


def drop_task(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        yield partial(with_tasks, schedule, rank, phase, phase.tasks[:index] + phase.tasks[index + 1 :])


def duplicate_task(schedule: Schedule) -> Iterator[Mutant]:
    """In the same phase, or in any other phase of the rank."""
    for rank, phase, index in every_task(schedule):
        for other in schedule.phases(rank):
            yield partial(with_tasks, schedule, rank, other, (*other.tasks, phase.tasks[index]))


def move_task_to_another_rank(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        without = with_tasks(schedule, rank, phase, phase.tasks[:index] + phase.tasks[index + 1 :])
        for other in set(range(schedule.world_size)) - {rank}:
            end = without.phases(other)[-1]
            yield partial(with_tasks, without, other, end, (*end.tasks, phase.tasks[index]))


def swap_task_buffer(schedule: Schedule) -> Iterator[Mutant]:
    """Another key, query, out or gradient buffer, of any kind, or none."""
    names = [buffer.name for buffer in schedule.buffers] + ["nowhere"]
    for rank, phase, index in every_task(schedule):
        task = phase.tasks[index]
        for name in names:
            for part in ("key_buffer", "query_buffer", "out_buffer", "grad_buffer"):
                if getattr(task, part) != name:
                    yield partial(edit_task, schedule, rank, phase, index, **{part: name})
        if task.grad_buffer is not None:
            yield partial(edit_task, schedule, rank, phase, index, grad_buffer=None)


def wrong_task_shard(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        task = phase.tasks[index]
        for part in range(schedule.world_size + 1):
            shard = replace(task.query, sequence_part=part)
            if shard != task.query:
                yield partial(edit_task, schedule, rank, phase, index, query=shard)
            if shard != task.key:
                yield partial(edit_task, schedule, rank, phase, index, key=shard)
        if task.key is not None:
            yield partial(edit_task, schedule, rank, phase, index, key=None)


def wrong_heads(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        first, last = phase.tasks[index].heads
        for heads in ((first, last - 1), (first + 1, last), (first, last + 1), (first - 1, last), (last, first)):
            yield partial(edit_task, schedule, rank, phase, index, heads=heads)


def every_wait(schedule: Schedule) -> Iterator[tuple[int, Phase, Phase, Transfer]]:
    """Every (rank, phase that launches, phase that waits, transfer)."""
    launched = {(rank, transfer.id): (phase, transfer) for rank, phase, transfer in ends(schedule)}
    for rank, phases in programs(schedule).items():
        for phase in phases:
            for name in phase.waits:
                yield rank, launched[rank, name][0], phase, launched[rank, name][1]


def remove_wait(schedule: Schedule) -> Iterator[Mutant]:
    for rank, _, phase, transfer in every_wait(schedule):
        yield partial(without_waits, schedule, rank, {transfer.id} & set(phase.waits))


def repeat_wait(schedule: Schedule) -> Iterator[Mutant]:
    for rank, _, phase, transfer in every_wait(schedule):
        for other in schedule.phases(rank)[phase.index :]:
            yield partial(with_phase, schedule, rank, replace(other, waits=(*other.waits, transfer.id)))


def wait_before_launch(schedule: Schedule) -> Iterator[Mutant]:
    for rank, launch, _, transfer in every_wait(schedule):
        without = without_waits(schedule, rank, {transfer.id})
        for phase in without.phases(rank)[: launch.index + 1]:
            yield partial(with_phase, without, rank, replace(phase, waits=(*phase.waits, transfer.id)))


def wait_after_first_use(schedule: Schedule) -> Iterator[Mutant]:
    """To any phase after that in which the wait stands now, where something in this very phase relies on it."""
    for rank, _, phase, transfer in every_wait(schedule):
        if relies_on(phase, rank, transfer):
            without = without_waits(schedule, rank, {transfer.id})
            phases = without.phases(rank)
            for later in (*phases[phase.index + 1 :], Phase(index=len(phases))):
                waited = replace(later, waits=(*later.waits, transfer.id))
                yield partial(with_phase, without, rank, waited)
                yield partial(with_phase, without, rank, replace(later, waits=(transfer.id, *later.waits)))


def relies_on(phase: Phase, rank: int, transfer: Transfer) -> bool:
    """Whether a phase computes with what was received, sends a sum it is part of, or reuses its slot."""
    launched = [each for call in phase.group_calls for each in call.transfers]
    refilled = {each.buffer for each in launched if each.destination == rank}
    sent = {each.source_buffer for each in launched if each.source == rank}
    read = {name for task in phase.tasks for name in (task.key_buffer, task.query_buffer)}
    written = {name for task in phase.tasks for name in (task.out_buffer, task.grad_buffer)}
    if transfer.source == rank:
        return transfer.source_buffer in refilled | written
    if transfer.accumulate_into is not None:
        return transfer.buffer in refilled or transfer.accumulate_into in sent
    return transfer.buffer in read | refilled


def swap_communicators(schedule: Schedule) -> Iterator[Mutant]:
    """Two communicators launched in the other order on one rank."""
    for rank, phases in programs(schedule).items():
        for phase in phases:
            calls = phase.group_calls
            for index, (one, two) in enumerate(pairwise(calls)):
                if one.communicator != two.communicator:
                    swapped = (*calls[:index], two, one, *calls[index + 2 :])
                    yield partial(with_phase, schedule, rank, replace(phase, group_calls=swapped))


def swap_calls(schedule: Schedule) -> Iterator[Mutant]:
    """Two calls of one communicator launched in each other's place on one rank."""
    yield from _swapped_calls(schedule, one_route=False)


def swap_calls_of_one_route(schedule: Schedule) -> Iterator[Mutant]:
    """The same, but only where both calls move something between the same two ranks: others may be independent."""
    yield from _swapped_calls(schedule, one_route=True)


def _swapped_calls(schedule: Schedule, *, one_route: bool) -> Iterator[Mutant]:
    for rank, phases in programs(schedule).items():
        places = [(phase.index, index) for phase in phases for index in range(len(phase.group_calls))]
        for start, one in enumerate(places):
            for two in places[start + 1 :]:
                first, second = (phases[phase].group_calls[index] for phase, index in (one, two))
                shared = {(t.source, t.destination) for t in first.transfers} & {
                    (t.source, t.destination) for t in second.transfers
                }
                if first.communicator == second.communicator and (shared or not one_route):
                    yield partial(_exchange, schedule, rank, {one: second, two: first})


def _exchange(schedule: Schedule, rank: int, calls: dict[tuple[int, int], GroupCall]) -> Schedule:
    phases = [
        replace(
            phase,
            group_calls=tuple(calls.get((phase.index, index), call) for index, call in enumerate(phase.group_calls)),
        )
        for phase in schedule.phases(rank)
    ]
    return with_programs(schedule, {rank: phases})


def launch_on_foreign_ranks(schedule: Schedule) -> Iterator[Mutant]:
    """A communicator whose groups leave out one rank, or that is not listed."""
    for index, communicator in enumerate(schedule.communicators):
        if any(call.communicator == communicator.name for call in every_call(schedule)):
            others = schedule.communicators[:index] + schedule.communicators[index + 1 :]
            yield partial(replace, schedule, communicators=others)
            single = replace(communicator, groups=tuple((rank,) for rank in range(1, schedule.world_size)))
            yield partial(replace, schedule, communicators=(*others[:index], single, *others[index:]))
