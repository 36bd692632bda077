"""`check` on buffers that hold gradients in 16 bits: who may write them, and how what lies there travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sparsering.planner.check.check import check
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.schedule.schedule import Buffer, Phase, Schedule, Task, with_programs
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.traces.errors import ScheduleError


def narrow_gather() -> Schedule:
    """Backward of two ranks that round what they add to the other's dK/dV where they compute it."""
    shape = AttentionShape(world_size=2, tokens_per_rank=64, heads=4, kv_heads=2, head_dim=16)
    return Gather(chunks=1, narrow_gradients=True).build(shape=shape, direction="backward")


def with_each_task(schedule: Schedule, change: Callable[[Task], tuple[Task, ...]]) -> Schedule:
    """The schedule with every task replaced."""
    programs = {
        rank: [replace(phase, tasks=tuple(new for task in phase.tasks for new in change(task))) for phase in phases]
        for rank, phases in ((rank, schedule.phases(rank)) for rank in range(schedule.world_size))
    }
    return with_programs(schedule, programs)


def with_buffers(schedule: Schedule, change: Callable[[Buffer], Buffer]) -> Schedule:
    """The schedule with every buffer replaced."""
    return replace(schedule, buffers=tuple(change(buffer) for buffer in schedule.buffers), _expanded={})


def test_a_narrow_buffer_takes_one_contribution() -> None:
    """Heads in two tasks would be rounded, added and rounded again."""
    halves = with_each_task(narrow_gather(), lambda task: (replace(task, heads=(0, 2)), replace(task, heads=(2, 4))))
    with pytest.raises(ScheduleError, match="adds to dkv:0, which holds rounded sums"):
        check(halves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: replace(b, narrow=b.narrow or b.kind == "kv"), "kv:home: is narrow, which only slots for gradients"),
        (lambda b: replace(b, narrow=b.name == "dkv:home" or b.narrow), "dkv:home: is narrow, which only slots"),
    ],
)
def test_only_slots_for_gradients_are_narrow(change: Callable[[Buffer], Buffer], message: str) -> None:
    check(narrow_gather())
    with pytest.raises(ScheduleError, match=message):
        check(with_buffers(narrow_gather(), change))


def test_what_lies_rounded_travels_rounded() -> None:
    schedule = narrow_gather()

    def wide(phase: Phase) -> Phase:
        calls = [
            replace(call, transfers=tuple(replace(transfer, narrow=False) for transfer in call.transfers))
            for call in phase.group_calls
        ]
        return replace(phase, group_calls=tuple(calls))

    programs = {rank: [wide(phase) for phase in schedule.phases(rank)] for rank in range(2)}
    with pytest.raises(ScheduleError, match="leaves or enters a narrow buffer, but travels wide"):
        check(with_programs(schedule, programs))


def test_nobody_pulls_rounded_what_lies_wide() -> None:
    shape = AttentionShape(world_size=2, tokens_per_rank=64, heads=4, kv_heads=2, head_dim=16)
    schedule = Gather(chunks=1, narrow_gradients=True, pull=True).build(shape=shape, direction="backward")
    with pytest.raises(ScheduleError, match="pulls rounded what dkv:0 holds wide"):
        check(with_buffers(schedule, lambda buffer: replace(buffer, narrow=False)))
