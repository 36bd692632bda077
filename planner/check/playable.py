"""What the runtime plays of what a schedule can say: a rank's own queries in any way, others' in whole head groups.

Schedules may say more (partial results of a query from several ranks, queries that are sent on), which the simulator
plays and `check` proves.
"""

from __future__ import annotations

from ...traces.errors import UnsupportedError
from ..schedule.schedule import COLUMNS_HOME, DCOLUMNS_HOME, OUT_HOME, Q_HOME, Schedule, ShardId, Task, Transfer
from .rules import Rules, Site, is_own


def check_playable(schedule: Schedule) -> None:
    """Raise UnsupportedError, naming rank, phase and object, where the runtime cannot play a proved program.

    Of any rank: one that refuses would leave the others waiting for it.
    """
    _check_slots(schedule)
    group_heads = schedule.num_heads // Rules(schedule).head_groups
    for rank in range(schedule.world_size):
        phases = schedule.phases(rank)
        tasks = [(Site(rank, phase.index, task), task) for phase in phases for task in phase.tasks]
        _check_tasks(tasks, group_heads)
        # Results of a head group are whole where they come from: they are not merged at home.
        at_home = {task.query.head_group for _, task in tasks if task.out_buffer == OUT_HOME}
        for phase in phases:
            for transfer in (transfer for call in phase.group_calls for transfer in call.transfers):
                _check_transfer(schedule, Site(rank, phase.index, transfer), transfer, at_home)


def _check_slots(schedule: Schedule) -> None:
    """Slots for K/V and gradients are numbered from 0 in their pool: they lie in one tensor."""
    pools: dict[str, set[str]] = {}
    for buffer in schedule.buffers:
        if buffer.kind in ("kv", "dkv") and not is_own(buffer.name):
            pool, _, number = buffer.name.partition(":")
            pools.setdefault(pool, set()).add(number)
    for pool, numbers in pools.items():
        if numbers != {str(number) for number in range(len(numbers))}:
            raise UnsupportedError(f"slots {', '.join(sorted(numbers))} are not numbered from 0", field=f"pool {pool}")


def _check_tasks(tasks: list[tuple[Site, Task]], group_heads: int) -> None:
    """Own queries and their results are at home; of others' queries, all heads of a group are summed in one buffer."""
    buffers: dict[ShardId, str] = {}
    for site, task in tasks:
        if task.key is None and task.grad_buffer not in (None, DCOLUMNS_HOME):
            _refuse(site, f"gradients of columns are added to {DCOLUMNS_HOME}, not {task.grad_buffer}")
        own = task.query.sequence_part == site.rank
        if (task.query_buffer == Q_HOME, task.out_buffer == OUT_HOME) != (own, own):
            told = "own queries are at home, no others"
            _refuse(site, f"reads {task.query_buffer} and adds to {task.out_buffer}: {told}")
        if not own and task.heads[1] - task.heads[0] != group_heads:
            _refuse(site, f"all {group_heads} heads of a group of others' queries are computed together")
        if buffers.setdefault(task.query, task.out_buffer) != task.out_buffer:
            _refuse(site, f"adds to {task.out_buffer}, which sums up queries that {buffers[task.query]} sums up")


def _check_transfer(schedule: Schedule, site: Site, transfer: Transfer, at_home: set[int]) -> None:
    """Columns are summed at home; queries come from their owner, and results go straight there.

    at_home: head groups whose results are there already; those that arrive are added.
    """
    if transfer.kind == "out" and transfer.destination == site.rank:
        assert transfer.shard is not None
        if transfer.shard.head_group in at_home:
            _refuse(site, "results of a head group come from one rank")
        at_home.add(transfer.shard.head_group)
    summed = COLUMNS_HOME if schedule.direction == "forward" else DCOLUMNS_HOME
    if transfer.kind == "columns" and transfer.buffer != summed:
        _refuse(site, f"columns are summed in {summed}, not {transfer.buffer}")
    if transfer.kind in ("q", "out") and transfer.transport != "p2p":
        _refuse(site, "queries and results are sent, not pulled")
    if transfer.kind == "q" and transfer.source_buffer != Q_HOME:
        _refuse(site, f"is sent on from {transfer.source_buffer}, not from {Q_HOME}")
    if transfer.kind == "out" and transfer.accumulate_into != OUT_HOME:
        _refuse(site, f"is added into {transfer.accumulate_into}, not {OUT_HOME}")


def _refuse(site: Site, problem: str) -> None:
    raise UnsupportedError(str(site.broken(problem)))
