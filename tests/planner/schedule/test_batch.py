"""Launches priced together cost what each costs alone, by either kind of costs, and count what `task_work` counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.cost.counts import BatchCounts, LaunchCounts
from sparsering.planner.cost.kernels import datasheet_cost, task_work
from sparsering.planner.cost.timing import launches_ns
from sparsering.planner.schedule.batch import BatchWork, LaunchBatch
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import striped
from sparsering.planner.schedule.schedule import DIRECTIONS, Direction, ShardId, Task
from sparsering.planner.schedule.workload import Workload, workload
from sparsering.planner.specs import ModelShape
from sparsering.traces.pattern import LayerPattern, VerticalSlash

WORLD, HEADS, BLOCK, TOKENS = 4, 4, 64, 4096
MODEL = ModelShape(layers=1, heads=HEADS, kv_heads=2, head_dim=96)  # no kernel's own size: computed as 128
RANGES = ((0, 4), (0, 2), (2, 4), (3, 4))


def drawn(seed: int) -> Workload:
    """A layer of four unlike heads with columns."""
    random = np.random.default_rng(seed)
    heads = [
        VerticalSlash(
            columns=np.unique(random.integers(0, TOKENS, 40)).astype(np.int32),
            diagonals=np.unique(np.append(random.integers(0, TOKENS // BLOCK, 1 + 6 * head), 0)).astype(np.int32),
        )
        for head in range(HEADS)
    ]
    pattern = LayerPattern(seq_len_tokens=TOKENS, block_size=BLOCK, heads=tuple(heads))
    return workload(pattern, striped(seq_len_tokens=TOKENS, world_size=WORLD, granularity_tokens=BLOCK))


@st.composite
def launches(draw: st.DrawFn) -> Launch:
    """Columns, then keys, of one query shard and some heads; either may be missing."""
    query, heads = ShardId(sequence_part=draw(st.integers(0, WORLD - 1))), draw(st.sampled_from(RANGES))
    keys = draw(st.lists(st.integers(0, WORLD - 1), max_size=3))
    columns = draw(st.booleans()) or not keys
    tasks = [Task(query=query, key=None, heads=heads, key_buffer="", kind="columns")] * columns
    tasks += [Task(query=query, key=ShardId(sequence_part=key), heads=heads, key_buffer="") for key in keys]
    return Launch(tasks=tuple(tasks), begins=draw(st.booleans()), ends=draw(st.booleans()))


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=40, deadline=None)
@given(batch=st.lists(launches(), min_size=1, max_size=9), seed=st.integers(0, 5))
def test_a_batch_is_its_launches(direction: Direction, batch: list[Launch], seed: int) -> None:
    work = drawn(seed)
    together = LaunchBatch.of(batch)
    counted = BatchWork.under(work, together)
    alone = [[task_work(task, work) for task in launch.tasks] for launch in batch]
    assert [[vars(one) for one in its] for its in counted.of_launches(together)] == [
        [vars(one) for one in its] for its in alone
    ]
    counts = BatchCounts.of(together, counted)
    for number, (launch, its) in enumerate(zip(batch, alone, strict=True)):
        for name, value in vars(LaunchCounts.of(launch, its)).items():
            assert getattr(counts, name)[number] == value, name
    for backend in ("triton", "flash4"):
        cost = datasheet_cost(load_cluster("h100-nvlink-8").gpu, MODEL, block_size=BLOCK, backend=backend)
        found = cost.launches_us(together, counted, direction)
        one_by_one = [cost.launch_us(launch, its, direction) for launch, its in zip(batch, alone, strict=True)]
        assert found == pytest.approx(one_by_one, rel=1e-12)


def test_costs_that_know_single_launches_alone_are_asked_one_by_one() -> None:
    work, own = tiny.dense_workload(2), ShardId(sequence_part=1)
    task = Task(query=own, key=ShardId(sequence_part=0), heads=(0, 1), key_buffer="")
    given: Any = {"us_per_pair": 2.0, "us_per_launch": 5.0}
    took_ns, host_ns = launches_ns(LaunchBatch.of([Launch(tasks=(task,))]), work, tiny.PairCost(**given), "forward")
    assert took_ns.tolist() == [1000 * (5 + 2 * task_work(task, work).tile_pairs)] and host_ns.tolist() == [0]
    assert launches_ns(LaunchBatch.of([]), work, tiny.PairCost(), "forward")[0].size == 0
