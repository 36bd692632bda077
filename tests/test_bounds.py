"""Lower bounds of a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsering.planner.bounds import communication_bound_us, compute_bound_us
from sparsering.planner.candidates import (
    PlacementChoice,
)
from sparsering.planner.compiled import CompiledRecurrence
from sparsering.planner.layout_draft import AttentionShape
from sparsering.planner.schedule import DIRECTIONS
from sparsering.planner.selection import select
from sparsering.planner.workload import workload
from sparsering.tests import tiny
from sparsering.tests.search_cases import BLOCK, problem


def test_bounds_by_hand():
    cluster = tiny.cluster(nodes=2, gpus=4, bandwidth=1000.0, nic_bandwidth=500.0, nics=2)
    shape = AttentionShape(world_size=8, tokens_per_rank=10, heads=4, kv_heads=1, head_dim=5, columns_capacity=64)
    assert (shape.kv_bytes, shape.dkv_bytes) == (200, 400)
    # 4 shards enter each node through 2 cards; 7 shards reach each rank over its port and a card together.
    assert communication_bound_us(cluster, shape, "forward") == max(4 * 200 / 1000, 7 * 200 / 1500)
    assert communication_bound_us(cluster, shape, "backward") == max(4 * 600 / 1000, 7 * 600 / 1500)
    assert communication_bound_us(cluster, shape, "backward", keep_kv=True) == max(4 * 400 / 1000, 7 * 400 / 1500)
    narrow = communication_bound_us(cluster, shape, "backward", keep_kv=True, narrow_gradients=True)
    assert narrow == max(4 * 200 / 1000, 7 * 200 / 1500)
    one_node = tiny.cluster(nodes=1, gpus=8, bandwidth=1000.0)
    assert communication_bound_us(one_node, shape, "forward") == 7 * 200 / 1000
    given_problem = problem(kind="dense", gpus=4, blocks=16)
    found = workload(
        given_problem.samples[0].pattern,
        PlacementChoice(name="striped", granularity_tokens=BLOCK).build(
            seq_len_tokens=given_problem.seq_len_tokens,
            world_size=4,
            block_size=BLOCK,
            block_load=given_problem.summary.block_load,
        ),
    )
    # 4 heads of 136 block pairs over 4 ranks, three microseconds each; there are no columns.
    assert compute_bound_us(found, tiny.PairCost(us_per_pair=3.0), "forward") == 136 * 3
    # With columns: one launch where they are fused, two else; a launch of one pair of columns is given back.
    with_columns = replace(found, columns=np.ones((4, 4), dtype=np.int64))
    for backend, launches in (("triton", 1), ("flash4", 2), ("blockwise", 2)):
        cost = tiny.PairCost(us_per_pair=3.0, us_per_launch=5.0, backend=backend)
        assert compute_bound_us(with_columns, cost, "forward") == launches * 5 + (136 + 4) * 3 - (5 + 3)


def test_the_bound_knows_pulls():
    """4 ranks, 3 shards each: K/V, then K/V and dK/dV twice as large, at the rate of pulls where ranks may pull."""
    shape = AttentionShape(
        world_size=4, tokens_per_rank=256, heads=4, kv_heads=2, head_dim=64, element_bytes=2, accumulator_bytes=4,
        columns_capacity=0,
    )  # fmt: skip
    for cluster, pulls, rate in (
        (tiny.cluster(pull_bandwidth=2000.0), True, 2000.0),
        (tiny.cluster(pull_bandwidth=2000.0), False, 1000.0),
        (tiny.cluster(pull_bandwidth=500.0), True, 1000.0),
        (tiny.cluster(), True, 1000.0),
    ):
        bounds = [communication_bound_us(cluster, shape, direction, pulls=pulls) for direction in DIRECTIONS]
        assert bounds == [3 * shape.kv_bytes / rate, 9 * shape.kv_bytes / rate]
    slow = problem(kind="dense", bandwidth=100.0, pull_bandwidth=200.0)
    found = select(slow, quick=CompiledRecurrence())
    assert ("pull", 1) in found.pick.backward_layout.parameters
    assert found.bound_us <= found.pick.step_time_us
