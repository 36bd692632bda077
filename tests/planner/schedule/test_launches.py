"""Which tasks are one kernel launch: by hand, as the kernels say, and for every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny
from layout_cases import layouts_for
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.schedule.launches import (
    launch_name,
    launches_of,
    neighbours,
    rank_launches,
)
from sparsering.planner.schedule.schedule import (
    COLUMNS_HOME,
    DIRECTIONS,
    DKV_HOME,
    KV_HOME,
    Direction,
    Phase,
    ShardId,
    Task,
)

COLUMNS = Task(query=ShardId(sequence_part=0), key=None, heads=(0, 2), key_buffer=COLUMNS_HOME, kind="columns")


def keys(part: int, buffer: str, grad: str | None = None, *, query: int = 0, heads: tuple[int, int] = (0, 2)) -> Task:
    shards = ShardId(sequence_part=query), ShardId(sequence_part=part)
    return Task(query=shards[0], key=shards[1], heads=heads, key_buffer=buffer, grad_buffer=grad)


def names(tasks: list[Task], backend: str = "triton", batch: int = 1) -> list[str]:
    return [launch_name(together) for together in launches_of(tasks, backend=backend, batch=batch)]


def test_neighbouring_slots_and_columns_before_them_are_one_launch() -> None:
    tasks = [COLUMNS, keys(3, "kv:0"), keys(2, "kv:1"), keys(1, "kv:2")]
    assert names(tasks) == ["q0.0 columns k3.0 k2.0 k1.0"]
    assert names(tasks, "flash4") == ["q0.0 columns", "q0.0 k3.0 k2.0 k1.0"]
    alone = ["q0.0 columns", "q0.0 k3.0", "q0.0 k2.0", "q0.0 k1.0"]
    assert names(tasks, "blockwise") == names(tasks, "reference") == alone
    # several sequences: keys of one slot each, the columns still with the first
    assert names(tasks, batch=2) == ["q0.0 columns k3.0", *alone[2:]]
    assert names(tasks, "flash4", batch=2) == alone


@pytest.mark.parametrize(
    "tasks",
    [
        [keys(1, "kv:0"), keys(2, "kv:2")],  # a gap
        [keys(1, "kv:1"), keys(2, "kv:0")],  # backwards
        [keys(1, "kv:0"), keys(2, "kv_outer:1")],  # another pool
        [keys(0, KV_HOME), keys(1, "kv:0")],  # the rank's own shard is no slot
        [keys(1, "kv:0"), keys(0, KV_HOME)],
        [keys(1, "kv:0", "dkv:0"), keys(2, "kv:1", "dkv:2")],  # gradients apart
        [keys(1, "kv:0", "dkv:0"), keys(2, "kv:1", DKV_HOME)],
        [keys(1, "kv:0"), keys(2, "kv:1", heads=(0, 1))],  # other heads
        [keys(1, "kv:0"), keys(2, "kv:1", query=1)],  # other queries
        [keys(1, "kv:0"), COLUMNS],  # columns come first, or alone
        [COLUMNS, COLUMNS],
    ],
)
def test_what_does_not_lie_side_by_side_is_launched_apart(tasks: list[Task]) -> None:
    assert launches_of(tasks, backend="triton") == [(task,) for task in tasks]


def test_the_own_shard_takes_columns_but_no_slots() -> None:
    tasks = [COLUMNS, keys(0, KV_HOME, DKV_HOME), keys(1, "kv:0", "dkv:0"), keys(2, "kv:1", "dkv:1")]
    assert names(tasks) == ["q0.0 columns k0.0", "q0.0 k1.0 k2.0"]


def test_neighbours() -> None:
    assert neighbours(["kv:3"]) and neighbours(["kv:3", "kv:4", "kv:5"])
    assert not neighbours(["kv:3", "kv:4", "kv:4"])
    assert not neighbours([KV_HOME])


def test_the_first_launch_begins_and_the_last_one_ends_a_sum() -> None:
    phases = [
        Phase(index=0, tasks=(keys(0, KV_HOME),)),
        Phase(index=1),
        Phase(index=2, tasks=(keys(1, "kv:0"), keys(2, "kv:1"), keys(0, "kv:2", query=1))),
        Phase(index=3, tasks=(keys(3, "kv:0"),)),
    ]
    found = rank_launches(phases, backend="triton")
    assert [[(launch_name(one.tasks), one.begins, one.ends) for one in launches] for launches in found] == [
        [("q0.0 k0.0", True, False)],
        [],
        [("q0.0 k1.0 k2.0", False, False), ("q1.0 k0.0", True, True)],
        [("q0.0 k3.0", False, True)],
    ]


WIDE = replace(tiny.shape(4, columns=8), heads=4)


@pytest.mark.parametrize("backend", ["triton", "flash4", "reference"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", layouts_for(WIDE, counts=(2,)), ids=str)
def test_every_task_of_every_layout_is_launched_once_in_order(
    layout: Layout, direction: Direction, backend: str
) -> None:
    schedule = layout.build(shape=WIDE, direction=direction)
    for rank in range(4):
        phases = schedule.phases(rank)
        launches = rank_launches(phases, backend=backend)
        assert [[task for one in each for task in one.tasks] for each in launches] == [
            list(phase.tasks) for phase in phases
        ]
        sums = [one.tasks[0].query for each in launches for one in each if one.begins]
        assert len(sums) == len(set(sums)) == sum(one.ends for each in launches for one in each)
