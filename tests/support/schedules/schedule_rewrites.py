"""Built schedules written anew, to say what no layout says and the runtime plays all the same: Schedule -> Schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sparsering.planner.layouts.draft import COLUMNS
from sparsering.planner.schedule.schedule import KV_HOME, Phase, Schedule, with_programs

Rewrite = Callable[[Schedule], Schedule]


def columns_summed_last(schedule: Schedule) -> Schedule:
    """Columns' gradients are summed in phases of their own, after everything else."""
    return _rewritten(schedule, _columns_last)


def heads_one_by_one(schedule: Schedule) -> Schedule:
    """Every head of the own queries is computed alone: heads that share K/V heads add to the same gradients."""

    def phases_of(phases: list[Phase], rank: int) -> list[Phase]:
        return [
            replace(
                phase,
                tasks=tuple(
                    replace(task, heads=heads)
                    for task in phase.tasks
                    for heads in (
                        [(head, head + 1) for head in range(*task.heads)]
                        if task.query.sequence_part == rank
                        else [task.heads]
                    )
                ),
            )
            for phase in phases
        ]

    return _rewritten(schedule, phases_of)


def keys_pulled(schedule: Schedule) -> Schedule:
    """K/V are pulled from their owners, by head groups where there are several."""

    def phases_of(phases: list[Phase], rank: int) -> list[Phase]:
        return [
            replace(
                phase,
                group_calls=tuple(
                    replace(
                        call,
                        transfers=tuple(
                            replace(one, transport="pull") if one.kind == "kv" else one for one in call.transfers
                        ),
                    )
                    for call in phase.group_calls
                ),
            )
            for phase in phases
        ]

    shared = tuple(replace(one, shared=one.shared or one.name == KV_HOME) for one in schedule.buffers)
    return replace(_rewritten(schedule, phases_of), buffers=shared)


def _rewritten(schedule: Schedule, phases_of: Callable[[list[Phase], int], list[Phase]]) -> Schedule:
    programs = {rank: phases_of(list(schedule.phases(rank)), rank) for rank in range(schedule.world_size)}
    return with_programs(schedule, programs)


def _columns_last(phases: list[Phase], rank: int) -> list[Phase]:
    (call,) = [call for phase in phases for call in phase.group_calls if call.communicator == COLUMNS]
    (name,) = [transfer.id for transfer in call.transfers]
    kept = [
        replace(
            phase,
            waits=tuple(one for one in phase.waits if one != name),
            group_calls=tuple(one for one in phase.group_calls if one.communicator != COLUMNS),
        )
        for phase in phases
    ]
    last = len(kept)
    return [*kept, Phase(index=last, group_calls=(call,)), Phase(index=last + 1, waits=(name,))]
