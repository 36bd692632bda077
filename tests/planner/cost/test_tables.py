"""Prices of launches: what is known is found again, more work is never quicker, and what was not measured is said."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsering.planner.cost.cluster import Cluster, load_cluster, parse_cluster
from sparsering.planner.cost.counts import LaunchCounts
from sparsering.planner.cost.measured import MeasuredCost, cluster_cost
from sparsering.planner.cost.tables import LaunchPoint, LaunchPrices, far_share, fit_prices
from sparsering.planner.schedule.batch import BatchWork, LaunchBatch
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.schedule import Direction, ShardId, Task
from sparsering.planner.schedule.workload import MaskKind, TaskWork
from sparsering.planner.specs import ModelShape

CACHE_BYTES = 1 << 20
KNOWN = LaunchPrices(
    launch=20.0, tile_pair=0.04, far_tile_pair=0.01, row=0.3, resumed_row=0.1, longest_row=2.0, key_row=0.2,
    longest_key_row=1.0, column_launch=50.0, column_tile_pair=0.02, index_launch=5.0, index_row=0.01,
    index_cell=1e-4, host=300.0, host_index=100.0,
)  # fmt: skip


def drawn_points(direction: Direction, count: int = 60) -> list[LaunchPoint]:
    random = np.random.default_rng(3)
    points = []
    for number in range(count):
        counts = LaunchCounts(
            tile_pairs=int(random.integers(100, 50_000)),
            column_tile_pairs=int(random.integers(1, 5000)) * (number % 3 == 0),
            rows=int(random.integers(64, 4096)),
            longest_row=int(random.integers(1, 300)),
            key_rows=int(random.integers(64, 20_000)),
            longest_key_row=int(random.integers(1, 500)),
            cells=int(random.integers(10_000, 10_000_000)),
        )
        key_bytes = int(random.integers(1 << 18, 1 << 23))
        prices = KNOWN if direction == "backward" else KNOWN.model_copy(update={"key_row": 0.0, "longest_key_row": 0.0})
        launch_us = prices.launch_us(counts, far=far_share(key_bytes, CACHE_BYTES), resumed=False)
        points.append(
            LaunchPoint(
                direction=direction, mask=MaskKind(), counts=counts, key_bytes=key_bytes, launch_us=launch_us,
                resumed_us=launch_us + KNOWN.resumed_row * counts.rows, fresh_us=launch_us + KNOWN.index_us(counts),
                host_us=300.0, fresh_host_us=400.0,
            )
        )  # fmt: skip
    return points


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_known_prices_are_found_again(direction: Direction) -> None:
    found, errors = fit_prices(drawn_points(direction), cache_bytes=CACHE_BYTES)
    expected = KNOWN.model_dump() | ({"key_row": 0.0, "longest_key_row": 0.0} if direction == "forward" else {})
    assert found.model_dump() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert max(map(abs, errors)) < 1e-9


def test_more_work_is_never_quicker_whatever_was_measured() -> None:
    random = np.random.default_rng(5)
    noisy = [
        LaunchPoint(**{**vars(point), "launch_us": point.launch_us * random.uniform(0.3, 3.0)})
        for point in drawn_points("backward")
    ]
    prices, _ = fit_prices(noisy, cache_bytes=CACHE_BYTES)
    assert min(prices.model_dump().values()) >= 0
    base = vars(noisy[0].counts)
    for name in base:
        more = LaunchCounts(**base | {name: base[name] * 2 + 1})
        times = [prices.launch_us(counts, far=0.5, resumed=True) + prices.index_us(counts)
                 for counts in (LaunchCounts(**base), more)]  # fmt: skip
        assert times[1] >= times[0], name


def _cluster() -> Cluster:
    document = load_cluster("h200-nvlink-8").model_dump(mode="json", exclude_none=True)
    tables = [
        {
            "backend": "triton", "direction": direction, "listed": listed, "documents": False, "head_dim": 128,
            "queries_per_kv_head": 8, "block_size": 128, "points": 9, "median_error": 0.01, "largest_error": 0.05,
            "tile_pairs": [1, 100],
            "prices": KNOWN.model_dump() | {"launch": 1000.0 if listed else 20.0},
        }
        for direction, listed in itertools.product(("forward", "backward"), (False, True))
    ]  # fmt: skip
    document["calibration"] = {
        "date": "2026-11-26", "versions": {}, "element_bytes": 2, "cache_bytes": CACHE_BYTES, "tables": tables,
        "host": {"forward_layer": 100.0, "backward_layer": 200.0, "call": 10.0},
    }  # fmt: skip
    return parse_cluster(document, source="test")


def test_a_launch_is_priced_by_the_kind_of_its_mask_and_its_index() -> None:
    model = ModelShape(layers=1, heads=16, kv_heads=2, head_dim=128)
    cost = cluster_cost(_cluster(), model, block_size=128)
    assert isinstance(cost, MeasuredCost)
    part = ShardId(sequence_part=0, head_group=0)
    task = Task(query=part, key=ShardId(sequence_part=1, head_group=0), heads=(0, 16), key_buffer="kv:0")
    given: dict[str, Any] = {"tile_pairs": 900, "rows_with_work": 60, "longest_row": 30, "key_rows_with_work": 60,
             "longest_key_row": 20, "rows": 64}  # fmt: skip

    def us(mask: MaskKind, *, begins: bool = True) -> float:
        return cost.launch_us(Launch(tasks=(task,), begins=begins), [TaskWork(**given, mask=mask)], "backward")

    # 64 rows are 4 tiles of 16 heads: their K and V, 2 x 4 x 128 tokens x 2 heads x 128 x 2 bytes, fit the cache
    by_hand = 20 + 900 * 0.04 + 64 * 0.3 + 30 * 2.0 + 64 * 0.2 + 20 * 1.0 + (5 + 64 * 0.01 + 64 * 4 * 1e-4)
    assert us(MaskKind()) == pytest.approx(by_hand)
    assert us(MaskKind(), begins=False) == pytest.approx(by_hand + 64 * 0.1)
    assert us(MaskKind(listed=True)) == pytest.approx(by_hand + 980)
    assert us(MaskKind(listed=True, documents=True)) == pytest.approx(by_hand + 980), "the nearest that was measured"
    nothing = replace(TaskWork(**given), tile_pairs=0)
    assert cost.launch_us(Launch(tasks=(task,)), [nothing], "forward") == 0.0
    batch, work = LaunchBatch.of([Launch(tasks=(task,))] * 2), BatchWork.of([TaskWork(**given), nothing])
    assert cost.hosts_us(batch, work, "forward").tolist() == [400.0, 0.0]


def test_what_was_not_measured_is_priced_by_the_data_sheet() -> None:
    cluster = _cluster()
    for update in ({"head_dim": 64}, {"kv_heads": 16}):
        model = ModelShape(layers=1, heads=16, kv_heads=2, head_dim=128).model_copy(update=update)
        assert not isinstance(cluster_cost(cluster, model, block_size=128), MeasuredCost)
    model = ModelShape(layers=1, heads=16, kv_heads=2, head_dim=128)
    assert not isinstance(cluster_cost(cluster, model, block_size=64), MeasuredCost)
    assert not isinstance(cluster_cost(cluster, model, block_size=128, backend="flash4"), MeasuredCost)
