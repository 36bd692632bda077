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
