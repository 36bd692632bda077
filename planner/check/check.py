"""Proof that a schedule computes one layer's attention: of any schedule, whoever built it.

What is proved, and where:

1. every (query shard, key shard, head) is computed exactly once, and the columns once per query shard (here);
2. every contribution to dK, dV and out arrives home exactly once (`check_contents`);
3. nothing is used before it arrives, or overwritten while in use or still to be sent (`check_contents`);
4. only stated buffers are used, of the right kind and large enough; both ends of a transfer agree, and each end is
   waited for exactly once (`check_rules`, `check_order`);
5. it cannot deadlock (`check_order`).

Sums are not started by sending: a `dkv` or `out` transfer from an empty buffer is refused, so that no interpreter has
to know when to send zeros.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ..schedule.schedule import ALL_RANKS, Schedule, Transfer
from .contents import check_contents
from .order import all_launches, check_order
from .rules import Rules, broken, describe, every_phase


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Figures of a schedule that was proved.

    tasks and transfers count over all ranks, a transfer once. peak_bytes: the most that any rank has in use at once in
    its buffers, its own data excluded; never more than `Schedule.buffer_bytes`. sent_bytes: communicator -> per rank,
    the bytes of the transfers it sends (an all_reduce counted once on every rank).
    """

    tasks: int
    transfers: int
    phases: int
    peak_bytes: int
    sent_bytes: dict[str, tuple[int, ...]]


def check(schedule: Schedule, *, inactive: Collection[tuple[int, int]] = frozenset()) -> CheckReport:
    """Prove a schedule and return its figures; ScheduleError, naming rank, phase and object, when a rule is broken.

    inactive: (query part, key part) pairs without any work (`Pairs.left_out`): their tasks may be left out.
    """
    rules = Rules(schedule)
    rules.check()
    check_order(schedule)
    peak_bytes = max(check_contents(rules, rank) for rank in range(schedule.world_size))
    transfers: dict[str, Transfer] = {}
    sent = {communicator.name: [0] * schedule.world_size for communicator in schedule.communicators}
    for launch in all_launches(schedule):
        for transfer in launch.call.transfers:
            transfers[transfer.id] = transfer
            if transfer.source in (launch.rank, ALL_RANKS):
                times = schedule.world_size - 1 if transfer.transport in ("all_gather", "reduce_scatter") else 1
                sent[launch.call.communicator][launch.rank] += times * transfer.capacity_bytes
    has_columns = any(transfer.kind == "columns" for transfer in transfers.values())
    _check_coverage(schedule, frozenset(inactive), has_columns=has_columns)
    return CheckReport(
        tasks=sum(len(phase.tasks) for _, phase in every_phase(schedule)),
        transfers=len(transfers),
        phases=max(len(schedule.phases(rank)) for rank in range(schedule.world_size)),
        peak_bytes=peak_bytes,
        sent_bytes={name: tuple(values) for name, values in sent.items()},
    )


def check_step(forward: Schedule, backward: Schedule) -> None:
    """Prove of two proved schedules that one is the other's backward; ScheduleError says what does not fit.

    Backward begins with the K/V that forward keeps, and computes the columns where forward attends them.
    """
    # Rank 0 stands for all: a proved schedule has columns on every rank, or on none.
    attended, computed = (
        any(task.key is None for phase in schedule.phases(0) for task in phase.tasks)
        for schedule in (forward, backward)
    )
    if attended and not computed:
        raise broken("forward attends them, backward computes no gradients of them", about="columns")
    if computed and not attended:
        raise broken("backward computes gradients of them, forward does not attend them", about="columns")
    for rank in range(forward.world_size):
        kept, expected = forward.kept(rank), backward.kept(rank)
        if kept != expected:
            shown = [", ".join(f"{shard} in {name}" for name, shard in held.items()) for held in (kept, expected)]
            told = f"forward keeps {shown[0] or 'nothing'}, backward begins with {shown[1] or 'nothing'}"
            raise broken(told, rank=rank, about="kept K/V")


def _check_coverage(schedule: Schedule, inactive: frozenset[tuple[int, int]], *, has_columns: bool) -> None:
    """Count how often each [query part, key part, head] is computed; the last key part stands for the columns."""
    world = schedule.world_size
    found = [(rank, phase.index, task) for rank, phase in every_phase(schedule) for task in phase.tasks]
    cells = [(task.query.sequence_part, world if task.key is None else task.key.sequence_part) for *_, task in found]
    counts = np.zeros((world, world + 1, schedule.num_heads), dtype=np.int32)
    for cell, (*_, task) in zip(cells, found, strict=True):
        counts[cell][slice(*task.heads)] += 1
    expected = np.ones_like(counts)
    expected[:, -1] = has_columns or bool(counts[:, -1].any())
    wrong = counts != expected
    for query, key in inactive:
        wrong[query, key] = counts[query, key] > 1
    if not wrong.any():
        return
    query, key, head = (int(index) for index in np.argwhere(wrong)[0])
    if not counts[query, key, head]:
        about = f"query part {query}, " + ("columns" if key == world else f"key part {key}")
        raise broken(f"head {head} is never computed", rank=query, about=about)
    rank, phase, task = [
        one
        for cell, one in zip(cells, found, strict=True)
        if cell == (query, key) and one[2].heads[0] <= head < one[2].heads[1]
    ][-1]
    problem = f"head {head} is computed {counts[query, key, head]} times"
    raise broken(problem, rank=rank, phase=phase, about=describe(task))
