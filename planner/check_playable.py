"""What the runtime plays of what a schedule can say: a rank's own queries, all heads at once, in slots by number.

Schedules may say more (queries of others, heads in pieces), which the simulator plays and `check` proves. The runtime
reads neither `query_buffer`, `out_buffer` nor `heads`: what they say must be what it does.
"""

from __future__ import annotations

from ..traces.errors import UnsupportedError
from .check_rules import Site, is_own
from .schedule import COLUMNS_HOME, DCOLUMNS_HOME, OUT_HOME, Q_HOME, Schedule, ShardId, Task, Transfer


def check_playable(schedule: Schedule, rank: int) -> None:
    """Raise UnsupportedError, naming rank, phase and object, where the runtime cannot play the program of `rank`."""
    _check_slots(schedule)
    for phase in schedule.phases(rank):
        for call in phase.group_calls:
            for transfer in call.transfers:
                _check_transfer(schedule, Site(rank, phase.index, transfer), transfer)
        for task in phase.tasks:
            _check_task(schedule, Site(rank, phase.index, task), task)


def _check_slots(schedule: Schedule) -> None:
    """Slots of a pool are numbered from 0: they lie in one tensor."""
    pools: dict[str, set[str]] = {}
    for buffer in schedule.buffers:
        if not is_own(buffer.name):
            pool, _, number = buffer.name.partition(":")
            pools.setdefault(pool, set()).add(number)
    for pool, numbers in pools.items():
        if numbers != {str(number) for number in range(len(numbers))}:
            raise UnsupportedError(f"slots {', '.join(sorted(numbers))} are not numbered from 0", field=f"pool {pool}")


def _check_transfer(schedule: Schedule, site: Site, transfer: Transfer) -> None:
    summed = COLUMNS_HOME if schedule.direction == "forward" else DCOLUMNS_HOME
    if transfer.kind in ("q", "out"):
        _refuse(site, f"{transfer.kind} stays with its rank")
    if transfer.kind == "columns" and transfer.buffer != summed:
        _refuse(site, f"columns are summed in {summed}, not {transfer.buffer}")


def _check_task(schedule: Schedule, site: Site, task: Task) -> None:
    if task.query != ShardId(sequence_part=site.rank):
        _refuse(site, "a rank computes its own queries")
    if (task.query_buffer, task.out_buffer) != (Q_HOME, OUT_HOME):
        _refuse(site, f"reads {task.query_buffer} and adds to {task.out_buffer}, not {Q_HOME} and {OUT_HOME}")
    if task.heads != (0, schedule.num_heads):
        _refuse(site, f"all {schedule.num_heads} heads are computed together")
    if task.key is None and task.grad_buffer not in (None, DCOLUMNS_HOME):
        _refuse(site, f"gradients of columns are added to {DCOLUMNS_HOME}, not {task.grad_buffer}")


def _refuse(site: Site, problem: str) -> None:
    raise UnsupportedError(str(site.broken(problem)))
