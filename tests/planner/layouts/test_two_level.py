"""Two-level gathers in simulated time: what their ways to cross hide."""

from __future__ import annotations

import pytest

import tiny
from search_cases import problem
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.schedule.schedule import DIRECTIONS
from sparsering.planner.search.selection import select
from sparsering.simulator.engine import simulate


def test_halves_hide_sums_within_a_node_where_crossing_is_quick():
    """Four nodes of four, each place with a card: backward waits for nothing that it could compute beside."""
    cluster, cost = tiny.cluster(nodes=4, gpus=4, nics=4), tiny.PairCost(us_per_pair=0.5)
    work = tiny.dense_workload(16, "striped", blocks_per_rank=16)
    for direction in DIRECTIONS:
        whole, halves = (
            simulate(
                tiny.schedule("two_level", 16, direction, blocks_per_rank=16, inner_size=4, halves=value),
                work,
                cluster,
                cost,
            )
            for value in (False, True)
        )
        assert halves.makespan_us < 0.97 * whole.makespan_us
        assert halves.compute_us.sum() == pytest.approx(whole.compute_us.sum())
    slow = problem(kind="dense", nodes=2, gpus=2, blocks=16, nic_bandwidth=10.0)
    assert "halves" not in str(select(slow, quick=CompiledRecurrence()).pick.backward_layout)


def test_late_columns_leave_the_links_to_shards():
    """Four nodes of four with a card each: the sum of the columns crosses while all shards are computed."""
    cluster, cost = tiny.cluster(nodes=4, gpus=4, nics=1), tiny.PairCost(us_per_pair=2.0)
    work = tiny.dense_workload(16, "striped", blocks_per_rank=16)
    early, late = (
        simulate(
            tiny.schedule(
                "two_level",
                16,
                "forward",
                blocks_per_rank=16,
                columns=64,
                inner_size=4,
                halves=True,
                late_columns=value,
            ),
            work,
            cluster,
            cost,
        )
        for value in (False, True)
    )
    assert late.makespan_us < early.makespan_us
    assert late.compute_us.sum() == pytest.approx(early.compute_us.sum())
    sparse, dense = problem(nodes=2, gpus=2), problem(kind="dense", nodes=2, gpus=2)
    for given, offered in ((sparse, True), (dense, False)):
        assert (given.attention.columns_capacity > 0, given.offers().columns) == (offered, offered)
