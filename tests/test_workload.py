"""Workload counts against counting by brute force, from the definition of a tile pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsering.planner.cost import DatasheetCost, task_work
from sparsering.planner.placement import REGULAR_PLACEMENTS, Placement
from sparsering.planner.schedule import KV_HOME, ShardId, Task
from sparsering.planner.workload import TaskWork, Workload, unit_load, workload
from sparsering.tests import tiny
from sparsering.traces.pattern import BlockMask, HeadPattern, LayerPattern, VerticalSlash

SIZE = 4


@st.composite
def patterns(draw: st.DrawFn) -> LayerPattern:
    tokens = draw(st.integers(1, 70))
    blocks = -(-tokens // SIZE)
    heads: list[HeadPattern] = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            columns = draw(st.sets(st.integers(0, tokens - 1), max_size=12))
            diagonals = draw(st.sets(st.integers(0, blocks - 1), max_size=6))
            heads.append(
                VerticalSlash(columns=np.array(sorted(columns), int), diagonals=np.array(sorted(diagonals), int))
            )
        else:
            bits = np.random.default_rng(draw(st.integers(0, 99))).random((blocks, blocks)) < 0.3
            heads.append(BlockMask(bits=np.tril(bits)))
    documents = (
        np.sort(draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))) if draw(st.booleans()) else None
    )
    return LayerPattern(seq_len_tokens=tokens, block_size=SIZE, heads=tuple(heads), documents=documents)


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerPattern, Placement]:
    pattern = draw(patterns())
    place = REGULAR_PLACEMENTS[draw(st.sampled_from(sorted(REGULAR_PLACEMENTS)))]
    granularity = draw(st.sampled_from([1, 2, 3, SIZE, 2 * SIZE]))
    world = draw(st.integers(1, 4))
    return pattern, place(seq_len_tokens=pattern.seq_len_tokens, world_size=world, granularity_tokens=granularity)


def tiles_of(placement: Placement, rank: int) -> list[NDArray[np.int64]]:
    positions = placement.positions(rank)
    return [positions[start : start + SIZE] for start in range(0, positions.size, SIZE)]


def pair_is_active(pattern: LayerPattern, bits: NDArray[np.bool_], query: NDArray, key: NDArray) -> bool:
    """Whether any mask blocks that two tiles touch are an active pair with a document in common."""
    tokens, documents = pattern.seq_len_tokens, pattern.documents
    for block in {int(p) // SIZE for p in query if p < tokens}:
        for other in {int(p) // SIZE for p in key if p < tokens}:
            shared = documents is None or bool(
                set(documents[block * SIZE : (block + 1) * SIZE]) & set(documents[other * SIZE : (other + 1) * SIZE])
            )
            if bits[block, other] and shared:
                return True
    return False


@given(cases())
def test_block_counts_are_those_of_brute_force(case: tuple[LayerPattern, Placement]) -> None:
    pattern, placement = case
    work = workload(pattern, placement)
    world = placement.world_size
    tiles = [tiles_of(placement, rank) for rank in range(world)]
    for number, head in enumerate(pattern.heads):
        bits = head.block_bits(pattern.num_blocks)
        for query in range(world):
            for key in range(world):
                rows = [sum(pair_is_active(pattern, bits, q, k) for k in tiles[key]) for q in tiles[query]]
                found = [int(counts[query, key, number]) for counts in (work.active, work.rows, work.longest)]
                assert found == [sum(rows), sum(row > 0 for row in rows), max(rows)]


@given(cases())
def test_column_counts_are_those_of_brute_force(case: tuple[LayerPattern, Placement]) -> None:
    """Columns are gathered in order and cut into tiles; a query tile needs those that begin before its last query."""
    pattern, placement = case
    work = workload(pattern, placement)
    for number, head in enumerate(pattern.heads):
        firsts = [int(head.columns[start]) for start in range(0, head.columns.size, SIZE)]
        for rank in range(placement.world_size):
            rows = [
                sum(first <= tile[-1] for first in firsts) if tile[0] < pattern.seq_len_tokens else 0
                for tile in tiles_of(placement, rank)
            ]
            found = [int(counts[rank, number]) for counts in (work.columns, work.column_rows, work.longest_column_row)]
            assert found == [sum(rows), sum(row > 0 for row in rows), max(rows)]


@given(patterns(), st.sampled_from(sorted(REGULAR_PLACEMENTS)), st.integers(1, 4))
def test_aligned_placements_share_out_all_active_blocks(pattern: LayerPattern, name: str, world: int) -> None:
    if pattern.documents is None:
        work = tiny.counted(pattern, world, name)
        active = sum(head.count_active_blocks(pattern.num_blocks) for head in pattern.heads)
        assert int(work.active.sum()) == active
        assert int(work.pairs_per_rank().sum()) == active + int(work.columns.sum())


@given(patterns(), st.sampled_from([1, 2, SIZE, 2 * SIZE]))
def test_unit_loads_add_up_to_the_same_work_whatever_the_unit(pattern: LayerPattern, granularity: int) -> None:
    padded = -(-pattern.seq_len_tokens // (2 * SIZE)) * 2 * SIZE
    loads = [unit_load([pattern], granularity_tokens=units, padded_tokens=padded) for units in (granularity, 2 * SIZE)]
    assert loads[0].reshape(-1, 2 * SIZE // granularity).sum(axis=1) == pytest.approx(loads[1])


def test_tasks_ask_for_their_heads() -> None:
    heads = tuple(
        VerticalSlash(columns=numbers, diagonals=numbers)
        for numbers in (np.arange(count, dtype=np.int32) for count in (1, 2, 3))
    )
    work = tiny.counted(LayerPattern(seq_len_tokens=16, block_size=SIZE, heads=heads), 2)
    shard = ShardId(sequence_part=1)
    block = Task(query=shard, key=ShardId(sequence_part=0), heads=(1, 3), key_buffer=KV_HOME)
    # rank 1 has query blocks 1 and 3, rank 0 key blocks 0 and 2: pairs at distance 1 (two) and 3 (one, not active)
    assert as_tuple(task_work(block, work)) == (4, 4, 1)
    columns = Task(query=shard, key=None, heads=(0, 3), key_buffer="columns:home", kind="columns")
    assert as_tuple(task_work(columns, work)) == (6, 6, 1)


def as_tuple(work: TaskWork) -> tuple[int, int, int]:
    return work.tile_pairs, work.rows_with_work, work.longest_row


def test_datasheet_times_follow_waves() -> None:
    gpu = tiny.cluster().gpu  # 4 programs, 1e6 flops a us at half efficiency, 1 us a launch
    cost = DatasheetCost(gpu=gpu, head_dim=8, block_size=SIZE)
    pair_us = 4 * SIZE**2 * 8 / 0.5e6
    task = Task(query=ShardId(sequence_part=0), key=ShardId(sequence_part=0), heads=(0, 1), key_buffer=KV_HOME)

    def us(pairs: int, rows: int, longest: int, direction: str = "forward") -> float:
        return cost.task_us(
            TaskWork(tile_pairs=pairs, rows_with_work=rows, longest_row=longest),
            task,
            direction,  # type: ignore[arg-type]
        )

    assert us(0, 0, 0) == 0.0
    assert us(8, 8, 1) == pytest.approx(1 + 2 * 4 * pair_us)  # two waves of four programs
    assert us(8, 8, 5) == pytest.approx(1 + 5 * 4 * pair_us)  # the longest row
    assert us(8, 2, 4) == pytest.approx(1 + 4 * 4 * pair_us)  # two rows keep two programs busy
    assert us(8, 8, 1, "backward") == pytest.approx(1 + 2 * 4 * pair_us * 2.5)


def test_an_empty_sequence_part_has_no_work() -> None:
    work: Workload = tiny.counted(
        LayerPattern(seq_len_tokens=1, block_size=SIZE, heads=(BlockMask(bits=np.ones((1, 1), bool)),)), 3
    )
    assert work.active.sum(axis=(1, 2)).tolist() == [1, 0, 0]
