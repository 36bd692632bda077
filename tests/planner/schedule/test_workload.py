"""Workload counts against counting by brute force, from the definition of a tile pair; what launches of them cost."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import tiny
from sparsering.planner.cost.kernels import DatasheetCost, datasheet_cost, task_work
from sparsering.planner.plan import ModelShape
from sparsering.planner.schedule import workload as counting
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from sparsering.planner.schedule.schedule import DIRECTIONS, KV_HOME, Direction, ShardId, Task
from sparsering.planner.schedule.workload import TaskWork, Workload, unit_load, workload
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
                active = np.array(
                    [[pair_is_active(pattern, bits, q, k) for k in tiles[key]] for q in tiles[query]], dtype=int
                )
                rows, key_rows = active.sum(axis=1), active.sum(axis=0)
                counted = (work.active, work.rows, work.longest, work.key_rows, work.longest_key)
                found = [int(counts[query, key, number]) for counts in counted]
                assert found == [rows.sum(), (rows > 0).sum(), rows.max(), (key_rows > 0).sum(), key_rows.max()]


@pytest.mark.parametrize("share", [0.02, 1.0])
@pytest.mark.parametrize("name", sorted(REGULAR_PLACEMENTS))
def test_long_sequences_are_counted_to_the_pair(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts by transforms are whole numbers also where they are largest: those of listing every pair."""
    tokens = 4096 * SIZE - 1
    diagonals = np.flatnonzero(np.random.default_rng(0).random(4096) < share).astype(np.int32)
    head = VerticalSlash(columns=np.zeros(0, np.int32), diagonals=diagonals)
    pattern = LayerPattern(seq_len_tokens=tokens, block_size=SIZE, heads=(head,))
    placement = REGULAR_PLACEMENTS[name](seq_len_tokens=tokens, world_size=8, granularity_tokens=SIZE)
    found = workload(pattern, placement)
    monkeypatch.setattr(counting, "CONVOLVED_RANKS", 0)
    listed = workload(pattern, placement)
    for field in ("active", "rows", "longest", "key_rows", "longest_key"):
        assert np.array_equal(getattr(found, field), getattr(listed, field)), field
    assert int(found.active.sum()) == head.count_active_blocks(4096)


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
    assert as_tuple(task_work(block, work)) == (4, 4, 1, 4, 1, 4)
    columns = Task(query=shard, key=None, heads=(0, 3), key_buffer="columns:home", kind="columns")
    assert as_tuple(task_work(columns, work)) == (6, 6, 1, 0, 0, 6)


def as_tuple(work: TaskWork) -> tuple[int, ...]:
    return tuple(getattr(work, one.name) for one in fields(work) if one.name != "mask")


def work_of(pairs: int, rows: int, longest: int, key_rows: int = 8, longest_key: int = 0) -> TaskWork:
    return TaskWork(
        tile_pairs=pairs, rows_with_work=rows, longest_row=longest, key_rows_with_work=key_rows,
        longest_key_row=longest_key, rows=8,
    )  # fmt: skip


OWN = ShardId(sequence_part=0)
BLOCK = Task(query=OWN, key=OWN, heads=(0, 1), key_buffer=KV_HOME)
COLUMNS = Task(query=OWN, key=None, heads=(0, 1), key_buffer="columns:home", kind="columns")
PAIR_US = 4 * SIZE**2 * 8 / 0.5e6  # 4 programs, 1e6 flops a us at half efficiency, 1 us a launch


def cost_of(bandwidth: float | None = None, **settings: Any) -> DatasheetCost:
    gpu = tiny.cluster().gpu.model_copy(update={"memory_bandwidth_bytes_per_us": bandwidth})
    return DatasheetCost(gpu=gpu, head_dim=8, block_size=SIZE, **settings)


def us(direction: Direction, *parts: tuple[Task, TaskWork], cost: DatasheetCost | None = None, **where: bool) -> float:
    launch = Launch(tasks=tuple(task for task, _ in parts), **where)
    return (cost or cost_of()).launch_us(launch, [work for _, work in parts], direction)


def test_datasheet_times_follow_waves() -> None:
    assert us("forward", (BLOCK, work_of(0, 0, 0))) == 0.0
    assert us("forward", (BLOCK, work_of(8, 8, 1))) == pytest.approx(1 + 2 * 4 * PAIR_US)  # two waves of four programs
    assert us("forward", (BLOCK, work_of(8, 8, 5))) == pytest.approx(1 + 5 * 4 * PAIR_US)  # the longest row
    assert us("forward", (BLOCK, work_of(8, 2, 4))) == pytest.approx(1 + 4 * 4 * PAIR_US)  # two rows, two programs


def test_datasheet_times_of_backward_are_two_kernels() -> None:
    both = PAIR_US * 2.5
    assert us("backward", (BLOCK, work_of(8, 8, 1))) == pytest.approx(2 + 2 * 4 * both)
    # dQ as long as its longest query row, dK/dV as their longest key row
    apart = (BLOCK, work_of(8, 8, 5, longest_key=7))
    assert us("backward", apart) == pytest.approx(2 + (5 * 3 / 7 + 7 * 4 / 7) * 4 * both)
    # a program of dK/dV walks the query heads of its K/V head: 8 key rows are 2 programs
    grouped = cost_of(queries_per_kv_head=4)
    assert us("backward", (BLOCK, work_of(8, 8, 1)), cost=grouped) == pytest.approx(2 + (3 / 7 + 4 / 7 * 2) * 8 * both)
    # columns, at half efficiency, and keys: one dQ, dK/dV of each
    mixed = us("backward", (COLUMNS, work_of(4, 8, 1, 0)), (BLOCK, work_of(8, 8, 1)))
    assert mixed == pytest.approx(3 + (4 * 2 + 8) * both)


def test_rows_of_joined_tasks_are_as_long_as_their_parts_together() -> None:
    short, long = work_of(8, 8, 2, longest_key=6), work_of(4, 2, 2, longest_key=3)
    apart = [us("forward", (BLOCK, one)) for one in (short, long)]
    joined = us("forward", (BLOCK, short), (BLOCK, long))
    assert apart == pytest.approx([1 + 2 * 4 * PAIR_US] * 2)
    assert joined == pytest.approx(1 + 4 * 4 * PAIR_US)  # longest rows of 2 + 2
    # of key rows, which are not the same: the longest of any
    assert us("backward", (BLOCK, short), (BLOCK, long)) == pytest.approx(
        2 + (4 * 3 / 7 + 6 * 4 / 7) * 4 * PAIR_US * 2.5
    )


def test_accumulators_are_read_and_written() -> None:
    work, elements = work_of(8, 8, 1), 8 * SIZE * 8
    cost = cost_of(1.0, queries_per_kv_head=2)  # a byte a microsecond

    def bytes_of(direction: Direction, *parts: tuple[Task, TaskWork], **where: bool) -> float:
        free = us(direction, *parts, cost=cost_of(queries_per_kv_head=2))
        return us(direction, *parts, cost=cost, **where) - free

    alone, first, middle, last = {}, {"ends": False}, {"begins": False, "ends": False}, {"begins": False}
    found = [bytes_of("forward", (BLOCK, work), **where) for where in (alone, first, middle, last)]
    assert found == pytest.approx([elements * each for each in (2, 4, 8, 6)])
    keys = 2 * 4 * elements / 2  # dK and dV in float32, of half as many heads
    assert bytes_of("backward", (BLOCK, work), **last) == pytest.approx(6 * elements + keys)
    assert bytes_of("backward", (BLOCK, work), (BLOCK, work), **last) == pytest.approx(6 * elements + 2 * keys)
    assert bytes_of("backward", (COLUMNS, work), **first) == pytest.approx(4 * elements)


def test_head_groups_pay_for_copies_and_share_fewer_keys() -> None:
    """One of two heads: the first launch copies q in and out back (backward: q, dout; dq), read and written."""
    work, elements = work_of(8, 8, 1), 8 * SIZE * 8
    split, whole = cost_of(1.0, queries_per_kv_head=2, heads=2), cost_of(1.0, queries_per_kv_head=2)

    def more(direction: Direction, task: Task, **where: bool) -> float:
        return us(direction, (task, work), cost=split, **where) - us(direction, (task, work), cost=whole, **where)

    assert (BLOCK.heads, COLUMNS.heads) == ((0, 1), (0, 1))
    assert more("forward", BLOCK) == pytest.approx(2 * 2 * 2 * elements)
    assert more("forward", BLOCK, begins=False) == 0
    assert more("backward", COLUMNS, ends=False) == pytest.approx(3 * 2 * 2 * elements)
    # A single head has its K/V head to itself: twice as many dK and dV as where two share one.
    free = [us("backward", (BLOCK, work), cost=cost_of(queries_per_kv_head=2, **heads)) for heads in ({"heads": 2}, {})]
    keys = 2 * 4 * elements / 2
    assert more("backward", BLOCK, begins=False) - (free[0] - free[1]) == pytest.approx(keys)
    both = replace(BLOCK, heads=(0, 2))
    assert more("forward", both) == 0 and more("backward", both) == 0


parts_of_a_launch = st.lists(
    st.builds(
        lambda pairs, rows, longest, keys, longest_key: (
            BLOCK,
            work_of(max(pairs, rows, longest), rows, longest, keys, longest_key),
        ),
        *(st.integers(1, most) for most in (40, 8, 8, 8, 8)),
    ),
    min_size=2,
    max_size=4,
)


@given(parts_of_a_launch, st.sampled_from([None, 100.0]), st.sampled_from(DIRECTIONS))
def test_joining_tasks_is_never_dearer(
    parts: list[tuple[Task, TaskWork]], bandwidth: float | None, direction: Direction
) -> None:
    cost, last = cost_of(bandwidth), len(parts) - 1
    apart = sum(
        us(direction, part, cost=cost, begins=place == 0, ends=place == last) for place, part in enumerate(parts)
    )
    assert us(direction, *parts, cost=cost) < apart


def test_fastest_is_priced_as_triton() -> None:
    model = ModelShape(layers=1, heads=8, kv_heads=2, head_dim=16)
    made = {
        name: datasheet_cost(tiny.cluster().gpu, model, block_size=SIZE, dtype="float32", backend=name)
        for name in ("fastest", "triton", "flash4")
    }
    assert made["fastest"] == made["triton"] != made["flash4"]
    assert (made["flash4"].queries_per_kv_head, made["flash4"].element_bytes) == (4, 4)


def test_an_empty_sequence_part_has_no_work() -> None:
    work: Workload = tiny.counted(
        LayerPattern(seq_len_tokens=1, block_size=SIZE, heads=(BlockMask(bits=np.ones((1, 1), bool)),)), 3
    )
    assert work.active.sum(axis=(1, 2)).tolist() == [1, 0, 0]
