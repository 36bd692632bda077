"""Mutations of how gradients come home: each lists its sites, each site makes one mutated schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from schedule_edits import Mutant, edit, edited, ends, every_task, every_transfer, sides, with_tasks, with_transfers
from sparsering.planner.schedule.schedule import (
    ALL_RANKS,
    DKV_HOME,
    GroupCall,
    Phase,
    Schedule,
    Transfer,
    with_programs,
)


def gradients(schedule: Schedule) -> list[Transfer]:
    """The sums of dK/dV that go from rank to rank."""
    return [each for each in every_transfer(schedule) if each.kind == "dkv" and each.source != ALL_RANKS]


def gradients_stay_where_they_land(schedule: Schedule) -> Iterator[Mutant]:
    """Not added anywhere, or to a slot that has no part in their way home; rounded or not."""
    unused = replace(schedule.buffers[0], name="dkv_nowhere:0", kind="dkv", capacity_bytes=1 << 40)
    stated = replace(schedule, buffers=(*schedule.buffers, unused))
    for transfer in gradients(schedule):
        if transfer.accumulate_into is not None:
            both = sides(schedule, transfer)[-1]
            for into in (None, unused.name):
                yield partial(edit, stated, transfer, both, accumulate_into=into)
                yield partial(edit, stated, transfer, both, accumulate_into=into, narrow=True)


def gradients_land_where_nothing_takes_them(schedule: Schedule) -> Iterator[Mutant]:
    """In the slot that they are to be added to, or in another, where they are left."""
    unused = replace(schedule.buffers[0], name="dkv_nowhere:0", kind="dkv", capacity_bytes=1 << 40)
    stated = replace(schedule, buffers=(*schedule.buffers, unused))
    for transfer in gradients(schedule):
        both = sides(schedule, transfer)[-1]
        if transfer.accumulate_into == DKV_HOME:
            yield partial(edit, stated, transfer, both, buffer=DKV_HOME, accumulate_into=None)
        yield partial(edit, stated, transfer, both, buffer=unused.name, accumulate_into=None)


def gradients_sent_twice(schedule: Schedule) -> Iterator[Mutant]:
    """The same sum once more: in the same call, or when everything else is done."""
    for transfer in gradients(schedule):
        again = edited(transfer, sequence=transfer.sequence + 1000)
        yield partial(_again_at_the_end, schedule, again)
        yield partial(_again_in_the_call, schedule, transfer, again)


def _again_at_the_end(schedule: Schedule, again: Transfer) -> Schedule:
    changed = {}
    for rank in (again.source, again.destination):
        phases = schedule.phases(rank)
        call = GroupCall(communicator=again.communicator, transfers=(again,))
        launch = Phase(index=len(phases), group_calls=(call,))
        changed[rank] = (*phases, launch, Phase(index=len(phases) + 1, waits=(again.id,)))
    return with_programs(schedule, changed)


def _again_in_the_call(schedule: Schedule, transfer: Transfer, again: Transfer) -> Schedule:
    def doubled(call: GroupCall) -> GroupCall:
        return replace(call, transfers=(*call.transfers, again)) if transfer in call.transfers else call

    changed = {
        rank: [
            replace(
                phase,
                group_calls=tuple(map(doubled, phase.group_calls)),
                waits=(*phase.waits, again.id) if transfer.id in phase.waits else phase.waits,
            )
            for phase in schedule.phases(rank)
        ]
        for rank in (transfer.source, transfer.destination)
    }
    return with_programs(schedule, changed)


def column_gradients_lost(schedule: Schedule) -> Iterator[Mutant]:
    """Summed and left; not summed at all; computed on one rank when the sum is under way."""
    if schedule.direction == "forward":
        return
    for transfer in every_transfer(schedule):
        if transfer.kind == "columns":
            everyone = sides(schedule, transfer)[-1]
            yield partial(with_transfers, schedule, transfer.id, lambda _: None, ranks=everyone)
            for into in {None, *(buffer.name for buffer in schedule.buffers)} - {transfer.accumulate_into}:
                yield partial(edit, schedule, transfer, everyone, accumulate_into=into)
            yield from _late_columns(schedule, transfer)


def _late_columns(schedule: Schedule, transfer: Transfer) -> Iterator[Mutant]:
    launched = {rank: phase.index for rank, phase, each in ends(schedule) if each == transfer}
    for rank, phase, index in every_task(schedule):
        if phase.tasks[index].key is None:
            without = with_tasks(schedule, rank, phase, phase.tasks[:index] + phase.tasks[index + 1 :])
            for later in without.phases(rank)[launched[rank] :]:
                yield partial(with_tasks, without, rank, later, (*later.tasks, phase.tasks[index]))
