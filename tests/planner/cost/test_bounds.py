"""Lower bounds of a step, by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import tiny
from search_cases import BLOCK, problem
from sparsering.planner.cost.bounds import Allowed, communication_bound_us, compute_bound_us, exchange_bound_us
from sparsering.planner.cost.kernels import DatasheetCost
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.schedule.batch import BatchWork, LaunchBatch
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, Direction, ShardId, Task
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import TaskWork, workload
from sparsering.planner.search.candidates import PlacementChoice
from sparsering.planner.search.selection import select


def test_bounds_by_hand():
    cluster = tiny.cluster(nodes=2, gpus=4, bandwidth=1000.0, nic_bandwidth=500.0, nics=2)
    shape = AttentionShape(world_size=8, tokens_per_rank=10, heads=4, kv_heads=1, head_dim=5, columns_capacity=64)
    assert (shape.kv_bytes, shape.dkv_bytes) == (200, 400)
    # 4 shards enter each node through 2 cards; 7 shards reach each rank over its port and a card together.
    assert communication_bound_us(cluster, shape, "forward") == max(4 * 200 / 1000, 7 * 200 / 1500)
    assert communication_bound_us(cluster, shape, "backward") == max(4 * 600 / 1000, 7 * 600 / 1500)
    assert communication_bound_us(cluster, shape, "backward", Allowed(keep_kv=True)) == max(
        4 * 400 / 1000, 7 * 400 / 1500
    )
    narrow = communication_bound_us(cluster, shape, "backward", Allowed(keep_kv=True, narrow_gradients=True))
    assert narrow == max(4 * 200 / 1000, 7 * 200 / 1500)
    one_node = tiny.cluster(nodes=1, gpus=8, bandwidth=1000.0)
    assert communication_bound_us(one_node, shape, "forward") == 7 * 200 / 1000
    given_problem = problem(kind="dense", gpus=4, blocks=16)
    found = workload(
        given_problem.samples[0].pattern,
        PlacementChoice(name="striped", granularity_tokens=BLOCK).build(
            seq_len_tokens=given_problem.attention.seq_len_tokens,
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


def test_the_busiest_rank_and_node_bound_a_layer():
    """Contiguous parts of dense attention: the last rank has most queries, the last node most shards to fetch."""
    cluster = tiny.cluster(nodes=2, gpus=2, bandwidth=1000.0, nic_bandwidth=10.0, nics=1)
    shape, cost = tiny.shape(4, blocks_per_rank=4), tiny.PairCost(us_per_pair=3.0)
    work = tiny.dense_workload(4, "contiguous", blocks_per_rank=4)
    causal = Allowed(pairs=Pairs.of(np.tri(4, dtype=bool)), keep_kv=True)
    # Of 136 block pairs the last rank has 16 + 15 + 14 + 13; two ranks together have that and 42, a half each.
    assert compute_bound_us(work, cost, "forward", degree=1) == 58 * 3
    assert compute_bound_us(work, cost, "forward", degree=2) == 50 * 3
    assert compute_bound_us(work, cost, "forward") == 34 * 3
    # Both shards of the first node cross to the second, and two sums of gradients back.
    assert communication_bound_us(cluster, shape, "forward", causal) == 2 * shape.kv_bytes / 10
    assert communication_bound_us(cluster, shape, "backward", causal) == 2 * shape.dkv_bytes / 10


def test_bounds_of_head_parallelism_by_hand():
    """Groups of two of eight ranks: a half of the heads, so one of two K/V heads."""
    cluster = tiny.cluster(nodes=2, gpus=4, bandwidth=1000.0, nic_bandwidth=500.0, nics=2)
    shape = AttentionShape(world_size=8, tokens_per_rank=10, heads=4, kv_heads=2, head_dim=5, columns_capacity=64)
    # q 10 x 2 x 5 x 2 = 200, log-sum-exp of 20 rows 80; K/V of one head 200, their gradients 400.
    one_node = tiny.cluster(nodes=1, gpus=8, bandwidth=1000.0)
    assert exchange_bound_us(one_node, shape, "forward", degree=2) == (200 + 280 + 7 * 200) / 1000
    assert exchange_bound_us(one_node, shape, "backward", degree=2) == (2 * 280 + 200 + 7 * 600) / 1000
    # 4 parts of the other node enter for two head groups; one port and a card receive what a rank needs.
    forward = exchange_bound_us(cluster, shape, "forward", degree=2)
    assert forward == max(4 * 200 * 2 / 1000, (480 + 1400) / 1500)
    # Eight groups, four of them on a node, share two K/V heads: their four need one; a quarter of the q per rank.
    whole = replace(shape, heads=8)
    wide = exchange_bound_us(cluster, whole, "forward", degree=8)
    assert wide == max((4 * 200 + 4 * 4 * (100 + 140)) / 1000, (7 * 240 + 7 * 200) / 1500)
    # Groups of six do not fit nodes of four: only what a rank receives is counted.
    odd = replace(shape, world_size=12, heads=12)
    three = tiny.cluster(nodes=3, gpus=4, bandwidth=1000.0, nic_bandwidth=500.0, nics=1)
    assert exchange_bound_us(three, odd, "forward", degree=6) == (5 * (200 + 280) + 11 * 200) / 1500


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
        bounds = [communication_bound_us(cluster, shape, direction, Allowed(pulls=pulls)) for direction in DIRECTIONS]
        assert bounds == [3 * shape.kv_bytes / rate, 9 * shape.kv_bytes / rate]
    slow = problem(kind="dense", bandwidth=100.0, pull_bandwidth=200.0)
    found = select(slow, quick=CompiledRecurrence())
    assert found.pick.backward_layout.transfers.pull
    assert found.bound_us <= found.pick.step_time_us


@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("seed", range(20))
def test_no_cut_of_a_launch_takes_less_than_the_least(seed: int, direction: Direction, sharing: int):
    """Three key shards of three tiles and four heads, some without work: cut by shards, by heads, by both, or whole."""
    random, tiles, heads, shards, query = np.random.default_rng(seed), 3, 4, 3, ShardId(sequence_part=0)
    share = random.choice([0.0, 0.1, 0.5, 1.0], size=(shards, heads, 1, 1))
    active = random.random((shards, heads, tiles, tiles)) < share
    gpu = tiny.cluster().gpu.model_copy(update={"memory_bandwidth_bytes_per_us": 1e3})
    cost = DatasheetCost(gpu=gpu, head_dim=8, block_size=4, queries_per_kv_head=sharing, heads=heads)

    def launch(keys: range, of_heads: range, *, begins: bool, ends: bool) -> tuple[Launch, list[TaskWork]]:
        tasks = [
            Task(query=query, key=ShardId(sequence_part=key), heads=(of_heads[0], of_heads[-1] + 1), key_buffer="")
            for key in keys
        ]
        bits = [active[key, of_heads[0] : of_heads[-1] + 1] for key in keys]
        works = [
            TaskWork(
                tile_pairs=int(one.sum()), rows_with_work=int(one.any(axis=2).sum()),
                longest_row=int(one.sum(axis=2).max()), key_rows_with_work=int(one.any(axis=1).sum()),
                longest_key_row=int(one.sum(axis=1).max()), rows=tiles * len(of_heads),
            )
            for one in bits
        ]  # fmt: skip
        return Launch(tasks=tuple(tasks), begins=begins, ends=ends), works

    whole, works = launch(range(shards), range(heads), begins=True, ends=True)
    (least_us,) = cost.least_us(LaunchBatch.of([whole]), BatchWork.of(works), direction)
    assert least_us or not active.any()
    for by_shard, group in product((False, True), (1, 2, 4)):
        cuts = [range(key, key + 1) for key in range(shards)] if by_shard else [range(shards)]
        took_us = 0.0
        for first, (number, keys) in product(range(0, heads, group), enumerate(cuts)):
            of_heads = range(first, first + group)
            one = launch(keys, of_heads, begins=number == 0, ends=number == len(cuts) - 1)
            took_us += cost.launch_us(*one, direction)
        assert took_us >= least_us - 1e-9
