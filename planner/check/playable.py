"""What the runtime plays of what a schedule can say: all heads of a rank's own queries, or heads by groups.

Schedules may say more (all heads of others' queries, heads in pieces), which the simulator plays and `check` proves.
Where heads are in one group the runtime reads neither `query_buffer`, `out_buffer` nor `heads`: what they say must be
what it does.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...traces.errors import UnsupportedError
from ..schedule.schedule import (
    COLUMNS_HOME,
    DCOLUMNS_HOME,
    DKV_HOME,
    KV_HOME,
    OUT_HOME,
    Q_HOME,
    Schedule,
    ShardId,
    Task,
    Transfer,
)
from .rules import Rules, Site, is_own


def check_playable(schedule: Schedule) -> None:
    """Raise UnsupportedError, naming rank, phase and object, where the runtime cannot play a program.

    Of any rank: one that refuses would leave the others waiting for it.
    """
    _check_slots(schedule)
    groups = Rules(schedule).head_groups
    for rank in range(schedule.world_size):
        _check_rank(schedule, rank, groups)


def _check_rank(schedule: Schedule, rank: int, groups: int) -> None:
    if groups > 1:
        _check_group(schedule, rank, groups)
        return
    for site, one in _statements(schedule, rank):
        if isinstance(one, Transfer):
            _check_transfer(schedule, site, one)
        else:
            _check_task(schedule, site, one)


def _check_group(schedule: Schedule, rank: int, groups: int) -> None:
    """The same where heads are in several groups: a rank computes whole ones, of its own queries or of others'."""
    if schedule.kept(rank):
        raise UnsupportedError("K/V of a head group cannot be kept", field="kept K/V")
    tasks = [(site, one) for site, one in _statements(schedule, rank) if isinstance(one, Task)]
    buffers: dict[ShardId, str] = {}
    for site, task in tasks:
        _check_group_task(site, task, schedule.num_heads // groups)
        if buffers.setdefault(task.query, task.out_buffer) != task.out_buffer:
            _refuse(site, f"adds to {task.out_buffer}, which sums up queries that {buffers[task.query]} sums up")
    at_home = {task.query.head_group for _, task in tasks if task.query.sequence_part == rank}
    for site, one in _statements(schedule, rank):
        if isinstance(one, Transfer):
            _check_group_transfer(schedule, site, one)
            if one.kind == "out" and one.destination == rank:
                assert one.shard is not None
                if one.shard.head_group in at_home:
                    _refuse(site, "results of a head group come from one rank")
                at_home.add(one.shard.head_group)


def _check_group_task(site: Site, task: Task, heads: int) -> None:
    _check_columns_task(site, task)
    first = task.query.head_group * heads
    if task.heads != (first, first + heads):
        _refuse(site, f"all {heads} heads of a group are computed together")
    own = task.query.sequence_part == site.rank
    if (task.query_buffer == Q_HOME, task.out_buffer == OUT_HOME) != (own, own):
        _refuse(site, f"reads {task.query_buffer} and adds to {task.out_buffer}: own queries are at home, no others")


def _statements(schedule: Schedule, rank: int) -> Iterator[tuple[Site, Transfer | Task]]:
    """Yield a rank's transfers and tasks, phase by phase."""
    for phase in schedule.phases(rank):
        for call in phase.group_calls:
            for transfer in call.transfers:
                yield Site(rank, phase.index, transfer), transfer
        for task in phase.tasks:
            yield Site(rank, phase.index, task), task


def _check_slots(schedule: Schedule) -> None:
    """Slots of a pool are numbered from 0 and of one kind: they lie in one tensor."""
    pools: dict[str, set[str]] = {}
    kinds: dict[str, str] = {}
    for buffer in schedule.buffers:
        if not is_own(buffer.name):
            pool, _, number = buffer.name.partition(":")
            pools.setdefault(pool, set()).add(number)
            if kinds.setdefault(pool, buffer.kind) != buffer.kind:
                raise UnsupportedError(f"has slots for {kinds[pool]} and {buffer.kind}", field=f"pool {pool}")
    for pool, numbers in pools.items():
        if numbers != {str(number) for number in range(len(numbers))}:
            raise UnsupportedError(f"slots {', '.join(sorted(numbers))} are not numbered from 0", field=f"pool {pool}")


def _check_transfer(schedule: Schedule, site: Site, transfer: Transfer) -> None:
    if transfer.kind in ("q", "out"):
        _refuse(site, f"{transfer.kind} stays with its rank")
    _check_columns_transfer(schedule, site, transfer)


def _check_columns_transfer(schedule: Schedule, site: Site, transfer: Transfer) -> None:
    summed = COLUMNS_HOME if schedule.direction == "forward" else DCOLUMNS_HOME
    if transfer.kind == "columns" and transfer.buffer != summed:
        _refuse(site, f"columns are summed in {summed}, not {transfer.buffer}")


def _check_group_transfer(schedule: Schedule, site: Site, transfer: Transfer) -> None:
    """What a group needs comes from its owner, and what it computed goes straight home."""
    _check_columns_transfer(schedule, site, transfer)
    if transfer.kind == "columns":
        return
    if transfer.transport == "pull" or transfer.narrow:
        _refuse(site, "of head groups everything is sent, and as it is")
    home = {"q": Q_HOME, "kv": KV_HOME}.get(transfer.kind)
    if home is not None and transfer.source_buffer != home:
        _refuse(site, f"is sent on from {transfer.source_buffer}, not from {home}")
    into = {"out": OUT_HOME, "dkv": DKV_HOME}.get(transfer.kind)
    if transfer.accumulate_into != into:
        _refuse(site, f"is added into {transfer.accumulate_into}, not {into}")


def _check_task(schedule: Schedule, site: Site, task: Task) -> None:
    if task.query != ShardId(sequence_part=site.rank):
        _refuse(site, "a rank computes its own queries")
    if (task.query_buffer, task.out_buffer) != (Q_HOME, OUT_HOME):
        _refuse(site, f"reads {task.query_buffer} and adds to {task.out_buffer}, not {Q_HOME} and {OUT_HOME}")
    if task.heads != (0, schedule.num_heads):
        _refuse(site, f"all {schedule.num_heads} heads are computed together")
    _check_columns_task(site, task)


def _check_columns_task(site: Site, task: Task) -> None:
    if task.key is None and task.grad_buffer not in (None, DCOLUMNS_HOME):
        _refuse(site, f"gradients of columns are added to {DCOLUMNS_HOME}, not {task.grad_buffer}")


def _refuse(site: Site, problem: str) -> None:
    raise UnsupportedError(str(site.broken(problem)))
