"""benchmarks/ladder.py on a short sequence: work counted by brute force, inputs honoured, rungs in order."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsering.benchmarks import ladder
from sparsering.benchmarks.ladder import RUNGS, Variant, climb, play, sparse_efficiency, sparse_pattern
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS
from sparsering.planner.schedule.workload import workload
from sparsering.traces.files import read_json

# Long enough that compute is not all launches, short enough to count in a second.
SHORT = replace(ladder.QWEN, seq_len_tokens=64 * 1024, heads=4, columns=128)


@pytest.fixture(scope="module")
def short() -> Variant:
    cluster = load_cluster(ladder.CLUSTER)
    quiet = cluster.model_copy(update={"gpu": cluster.gpu.model_copy(update={"communication_slowdown": 0.0})})
    return Variant(title="short", cluster=quiet, drawn=SHORT, layers=2, published_step_us=60.0)


@pytest.fixture(scope="module")
def rows(short: Variant) -> list[dict[str, Any]]:
    return climb(short)


def test_the_model_is_qwen() -> None:
    # per layer: q and o 2,048 x 2,048, k and v 2,048 x 256, three of 2,048 x 11,008
    assert Variant.layer_weights == 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008
    assert (Variant.layers, Variant.head_weights) == (36, 2048 * 151936)


@pytest.mark.parametrize("banded", [False, True])
def test_patterns_have_the_asked_density_and_columns(banded: bool) -> None:
    pattern = sparse_pattern(SHORT, banded=banded)
    assert pattern.density == pytest.approx(SHORT.density, rel=0.15)
    assert {head.columns.size for head in pattern.heads} == {SHORT.columns}
    assert (len({head.diagonals.tobytes() for head in pattern.heads}) == 1) == banded  # type: ignore[union-attr]
    again = sparse_pattern(SHORT, banded=banded)
    assert [head.columns.tolist() for head in again.heads] == [head.columns.tolist() for head in pattern.heads]


def test_columns_in_the_ring_are_those_of_brute_force() -> None:
    drawn = replace(SHORT, seq_len_tokens=4 * 4 * 64, columns=150)
    pattern = sparse_pattern(drawn, banded=False)
    for name in ("zigzag", "striped"):
        placement = REGULAR_PLACEMENTS[name](seq_len_tokens=drawn.seq_len_tokens, world_size=4, granularity_tokens=64)
        plain = workload(pattern, placement)
        moved = ladder.columns_in_ring(pattern, placement, plain)
        for number, head in enumerate(pattern.heads):
            for query in range(4):
                for key in range(4):
                    owned = np.intersect1d(head.columns, placement.positions(key))
                    tiles = placement.positions(query).reshape(-1, 64)
                    expected = sum(-(-int((owned <= tile[-1]).sum()) // 64) for tile in tiles)
                    assert moved.active[query, key, number] - plain.active[query, key, number] == expected
        assert moved.columns.sum() == 0


def test_the_mean_step_computes_for_the_published_time(short: Variant) -> None:
    forward, backward = sparse_efficiency(short)
    assert RUNGS[3].hierarchical
    played = play(short, RUNGS[3], (forward, backward))[0]
    assert played.phase_us.mean() == pytest.approx(short.published_step_us, rel=1e-3)
    assert backward == pytest.approx(forward * 180.15 / 382.10)


def test_rungs_stand_in_order_and_add_up(short: Variant, rows: list[dict[str, Any]]) -> None:
    times = [row["step_s"] for row in rows]
    assert times[1] > times[2] > times[3]
    assert [row["speed_up"] for row in rows] == [times[0] / time for time in times]
    for row in rows:
        layer_ms = 2 * (row["forward_ms"] + row["choosing_ms"]) + row["backward_ms"]
        assert row["step_s"] == pytest.approx(2 * layer_ms / 1e3 + row["other_s"])
        assert 0 <= row["exposed"] < 1
    assert rows[0]["choosing_ms"] == 0
    assert rows[3]["exposed"] < rows[2]["exposed"]
    # 8 FLOPs per weight and token in recomputed layers, 6 in the output projection, at half of the peak
    flops = 65536 * (8 * 2 * short.layer_weights + 6 * short.head_weights)
    assert times[0] - rows[0]["attention_s"] == pytest.approx(flops / (32 * 312e6 * 0.5) / 1e6)


def test_published_links_take_the_published_steps() -> None:
    cluster = load_cluster(ladder.CLUSTER)
    kv_bytes = Variant(title="", cluster=cluster).shape.kv_bytes
    assert kv_bytes == 16384 * 2 * 2 * 128 * 2  # tokens, K and V, KV heads, head dim, bytes
    slow = ladder.published_links(cluster, kv_bytes)
    assert slow.inter_node is not None
    for link, step_us in ((slow.intra_node, 130.0), (slow.inter_node, 980.0)):
        assert link.latency_us + kv_bytes / link.bandwidth_bytes_per_us == pytest.approx(step_us)


def test_default_variants_are_the_published_setting() -> None:
    variants = ladder.default_variants()
    assert {variant.cluster.world_size for variant in variants} == {32}
    assert {variant.drawn.seq_len_tokens for variant in variants} == {524288}
    assert [rung.published for rung in RUNGS] == [1.0, 2.9, 4.6, 6.0, None]


def test_the_result_says_that_it_is_simulated(
    short: Variant, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "default_variants", lambda: [short])
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--results", str(tmp_path)])
    ladder.main()
    (path,) = tmp_path.iterdir()
    document = read_json(path)
    assert {"benchmark", "command", "date", "hardware", "versions", "rows"} <= document.keys()
    assert document["hardware"] == {"device": "a100-hdr-4x8", "count": 32, "validity": "simulated, unvalidated"}
    assert document["rows"] == rows
