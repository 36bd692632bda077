"""Edits of schedules: phases, transfers and tasks replaced or dropped, waits and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from sparsering.planner.schedule.schedule import (
    ALL_RANKS,
    GroupCall,
    Phase,
    Schedule,
    Task,
    Transfer,
    with_programs,
)

Mutant = Callable[[], Schedule]
Program = tuple[Phase, ...]


def programs(schedule: Schedule) -> dict[int, Program]:
    return {rank: schedule.phases(rank) for rank in range(schedule.world_size)}


def with_phase(schedule: Schedule, rank: int, phase: Phase) -> Schedule:
    """Replace (or append) one phase of one rank."""
    phases = schedule.phases(rank)
    return with_programs(schedule, {rank: (*phases[: phase.index], phase, *phases[phase.index + 1 :])})


def with_transfers(
    schedule: Schedule, name: str, change: Callable[[Transfer], Transfer | None], *, ranks: set[int]
) -> Schedule:
    """Change (None: drop) the transfer of that name on some ranks, waits and all."""
    return with_programs(schedule, {rank: _changed(schedule.phases(rank), name, change) for rank in ranks})


def _changed(phases: Program, name: str, change: Callable[[Transfer], Transfer | None]) -> Program:
    renamed: dict[str, str | None] = {}

    def changed_call(call: GroupCall) -> GroupCall:
        kept = []
        for transfer in call.transfers:
            new = change(transfer) if transfer.id == name else transfer
            renamed[transfer.id] = new.id if new else None
            kept += [new] if new else []
        return replace(call, transfers=tuple(kept))

    calls = [tuple(call for call in map(changed_call, phase.group_calls) if call.transfers) for phase in phases]
    waits = [tuple(new for new in (renamed[old] for old in phase.waits) if new) for phase in phases]
    return tuple(
        replace(phase, group_calls=its_calls, waits=its_waits)
        for phase, its_calls, its_waits in zip(phases, calls, waits, strict=True)
    )


def ends(schedule: Schedule) -> Iterator[tuple[int, Phase, Transfer]]:
    """Every (rank, phase, transfer) launched."""
    for rank, phases in programs(schedule).items():
        for phase in phases:
            for call in phase.group_calls:
                yield from ((rank, phase, transfer) for transfer in call.transfers)


def sides(schedule: Schedule, transfer: Transfer) -> list[set[int]]:
    """The ranks at which a transfer can be changed: one end, the other, or all of them."""
    if transfer.source == ALL_RANKS:
        everyone = set(range(schedule.world_size))
        return [{rank} for rank in everyone] + [everyone]
    return [{transfer.source}, {transfer.destination}, {transfer.source, transfer.destination}]


def every_transfer(schedule: Schedule) -> list[Transfer]:
    return list({transfer.id: transfer for _, _, transfer in ends(schedule)}.values())


def every_task(schedule: Schedule) -> Iterator[tuple[int, Phase, int]]:
    for rank, phases in programs(schedule).items():
        for phase in phases:
            yield from ((rank, phase, index) for index in range(len(phase.tasks)))


def edited(transfer: Transfer, **changes: object) -> Transfer:
    return replace(transfer, **changes)  # type: ignore[arg-type]


def identity(schedule: Schedule) -> Schedule:
    return schedule


def without_waits(schedule: Schedule, rank: int, dropped: set[str]) -> Schedule:
    phases = schedule.phases(rank)
    waits = [tuple(name for name in phase.waits if name not in dropped) for phase in phases]
    kept = [replace(phase, waits=its_waits) for phase, its_waits in zip(phases, waits, strict=True)]
    return with_programs(schedule, {rank: kept})


def edit(schedule: Schedule, transfer: Transfer, ranks: set[int], **changes: object) -> Schedule:
    return with_transfers(schedule, transfer.id, lambda old: edited(old, **changes), ranks=ranks)


def with_tasks(schedule: Schedule, rank: int, phase: Phase, tasks: tuple[Task, ...]) -> Schedule:
    return with_phase(schedule, rank, replace(phase, tasks=tasks))


def edit_task(schedule: Schedule, rank: int, phase: Phase, index: int, **changes: object) -> Schedule:
    task = replace(phase.tasks[index], **changes)  # type: ignore[arg-type]
    return with_tasks(schedule, rank, phase, (*phase.tasks[:index], task, *phase.tasks[index + 1 :]))


def every_call(schedule: Schedule) -> Iterator[GroupCall]:
    for phases in programs(schedule).values():
        for phase in phases:
            yield from phase.group_calls
