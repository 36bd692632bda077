"""What `check` proves and the runtime does not play is refused, by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule_cases import (
    backward,
    gradients_home,
    helped,
    ring,
    with_tasks,
)
from sparsering.planner.check.playable import check_playable
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.schedule.schedule import (
    DCOLUMNS_HOME,
    Buffer,
    Direction,
    Phase,
    Schedule,
    ShardId,
    with_programs,
)
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.traces.errors import UnsupportedError


def test_the_runtime_refuses_what_it_would_play_otherwise() -> None:
    """All of these are proved, and may be simulated."""
    check_playable(backward(gradients_home()))
    with pytest.raises(
        UnsupportedError, match=r"rank 0, phase 1, transfer out/0.0/1>0/0: results of a head group come"
    ):
        check_playable(helped())
    landing = Buffer(name="kv:landing", kind="kv", capacity_bytes=8)
    with pytest.raises(UnsupportedError, match=r"pool kv: slots 0, landing are not numbered from 0"):
        check_playable(replace(helped(), buffers=(*helped().buffers, landing)))
    schedule = ring(2, "backward", columns=32)
    phase = schedule.phases(1)[0]
    task = phase.tasks[0]
    for changed, problem in (
        (replace(task, query=ShardId(sequence_part=0)), "own queries are at home, no others"),
        (replace(task, out_buffer="out:0"), "reads q:home and adds to out:0: own queries are at home"),
        (replace(task, grad_buffer="columns:0"), f"gradients of columns are added to {DCOLUMNS_HOME}, not columns:0"),
    ):
        with pytest.raises(UnsupportedError, match=problem):
            check_playable(with_tasks(schedule, 1, phase, (changed,)))


def test_own_queries_are_computed_in_any_pieces_of_heads() -> None:
    schedule = ring(2, "backward", columns=32)
    phase = schedule.phases(1)[0]
    pieces = tuple(replace(task, heads=heads) for task in phase.tasks for heads in ((0, 1), (1, 2), (2, 4)))
    check_playable(with_tasks(schedule, 1, phase, pieces))


def _heads_by_two(direction: Direction = "forward") -> Schedule:
    shape = AttentionShape(world_size=4, tokens_per_rank=64, heads=8, kv_heads=2, head_dim=16, columns_capacity=32)
    schedule = Ulysses(degree=2).build(shape=shape, direction=direction)
    check_playable(schedule)
    return schedule


def _with_phase(schedule: Schedule, rank: int, phase: Phase) -> Schedule:
    phases = [phase if one.index == phase.index else one for one in schedule.phases(rank)]
    return with_programs(schedule, {rank: phases})


def _with_transfers(schedule: Schedule, kind: str, change: dict[str, object]) -> Schedule:
    """The first call of rank 1 with transfers of that kind, all of which are changed."""
    for phase in schedule.phases(1):
        for number, call in enumerate(phase.group_calls):
            if call.transfers[0].kind == kind:
                changed = tuple(replace(transfer, **change) for transfer in call.transfers)
                calls = list(phase.group_calls)
                calls[number] = replace(call, transfers=changed)
                return _with_phase(schedule, 1, replace(phase, group_calls=tuple(calls)))
    raise AssertionError(kind)


def test_what_head_groups_are_not_played_otherwise() -> None:
    schedule = _heads_by_two()
    phase = schedule.phases(1)[1]
    task = phase.tasks[0]
    assert (task.query, task.out_buffer) == (ShardId(sequence_part=0, head_group=1), "out:0")
    for changed, problem in (
        (replace(task, heads=(4, 6)), "all 4 heads of a group of others' queries"),
        (replace(task, query_buffer="q:home"), "own queries are at home, no others"),
        (replace(task, out_buffer="out:home"), "own queries are at home, no others"),
        (replace(task, out_buffer="out_landing:0"), "adds to out:0, which sums up queries that out_landing:0 sums up"),
    ):
        tasks = (changed, *phase.tasks[1:])
        with pytest.raises(UnsupportedError, match=f"rank 1, phase 1, task .*{problem}"):
            check_playable(_with_phase(schedule, 1, replace(phase, tasks=tasks)))


@pytest.mark.parametrize(
    ("direction", "kind", "change", "problem"),
    [
        ("forward", "q", {"source_buffer": "q:0"}, "is sent on from q:0, not from q:home"),
        ("forward", "q", {"transport": "pull"}, "queries and results are sent, not pulled"),
        ("forward", "out", {"accumulate_into": None}, "is added into None, not out:home"),
        ("forward", "out", {"shard": ShardId(sequence_part=1, head_group=1)}, "results of a head group come from one"),
    ],
)
def test_what_is_not_sent_otherwise(direction: Direction, kind: str, change: dict[str, object], problem: str) -> None:
    with pytest.raises(UnsupportedError, match=f"rank 1, phase ., transfer .*{problem}"):
        check_playable(_with_transfers(_heads_by_two(direction), kind, change))


@pytest.mark.parametrize(
    ("direction", "kind", "change"),
    [
        ("forward", "kv", {"source_buffer": "kv:0"}),
        ("forward", "kv", {"transport": "pull"}),
        ("backward", "dkv", {"narrow": True}),
        ("backward", "dkv", {"accumulate_into": "dkv:0"}),
    ],
)
def test_keys_and_their_gradients_take_any_way(direction: Direction, kind: str, change: dict[str, object]) -> None:
    check_playable(_with_transfers(_heads_by_two(direction), kind, change))
