"""The ladder on a short sequence: its work counted by brute force, its inputs honoured, its rungs in order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS
from sparsering.planner.schedule.workload import workload
from sparsering.simulator.ladder import (
    CLUSTER,
    PUBLISHED_INTER_STEP_US,
    PUBLISHED_INTRA_STEP_US,
    RUNGS,
    Ladder,
    Variant,
    climb,
    default_variants,
    published_links,
)
from sparsering.simulator.ladder_page import markdown, result_document, result_path
from sparsering.simulator.ladder_work import QWEN25_3B, Setting, columns_in_ring, shape_of, sparse_pattern
from sparsering.traces.files import read_json, write_json

# Long enough that compute is not all launches, short enough to count in a second.
SHORT = Setting(
    model=replace(QWEN25_3B, heads=4, kv_heads=2, layers=2),
    seq_len_tokens=64 * 1024,
    columns=128,
    published_step_us=60.0,
)


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    cluster = load_cluster(CLUSTER)
    quiet = cluster.model_copy(update={"gpu": cluster.gpu.model_copy(update={"communication_slowdown": 0.0})})
    (found,) = climb([Variant(title="short", cluster=quiet, setting=SHORT)])
    return found


def test_the_model_is_qwen() -> None:
    # per layer: q and o 2,048 x 2,048, k and v 2,048 x 256, three of 2,048 x 11,008
    assert QWEN25_3B.layer_parameters == 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008)
    assert QWEN25_3B.head_parameters == 2048 * 151936


@pytest.mark.parametrize("slashes", ["spread", "banded"])
def test_patterns_have_the_asked_density_and_columns(slashes: str) -> None:
    pattern = sparse_pattern(replace(SHORT, slashes=slashes))  # type: ignore[arg-type]
    assert pattern.density == pytest.approx(SHORT.density, rel=0.15)
    assert {head.columns.size for head in pattern.heads} == {SHORT.columns}
    assert (len({head.diagonals.tobytes() for head in pattern.heads}) == 1) == (slashes == "banded")  # type: ignore[union-attr]
    again = sparse_pattern(replace(SHORT, slashes=slashes))  # type: ignore[arg-type]
    assert [head.columns.tolist() for head in again.heads] == [head.columns.tolist() for head in pattern.heads]


def test_columns_in_the_ring_are_those_of_brute_force() -> None:
    setting = replace(SHORT, seq_len_tokens=4 * 4 * 64, columns=150)
    pattern = sparse_pattern(setting)
    for name in ("zigzag", "striped"):
        placement = REGULAR_PLACEMENTS[name](seq_len_tokens=setting.seq_len_tokens, world_size=4, granularity_tokens=64)
        plain = workload(pattern, placement)
        moved = columns_in_ring(pattern, placement, plain)
        for number, head in enumerate(pattern.heads):
            for query in range(4):
                for key in range(4):
                    owned = np.intersect1d(head.columns, placement.positions(key))
                    tiles = placement.positions(query).reshape(-1, 64)
                    expected = sum(-(-int((owned <= tile[-1]).sum()) // 64) for tile in tiles)
                    assert moved.active[query, key, number] - plain.active[query, key, number] == expected
        assert moved.columns.sum() == 0


def test_the_mean_step_computes_for_the_published_time(ladder: Ladder) -> None:
    hierarchical = ladder.outcomes[3]
    assert hierarchical.rung.layout == "hierarchical"
    assert hierarchical.forward.phase_us.mean() == pytest.approx(SHORT.published_step_us, rel=1e-3)
    assert ladder.sparse_backward_efficiency == pytest.approx(ladder.sparse_forward_efficiency * 180.15 / 382.10)


def test_rungs_stand_in_order_and_add_up(ladder: Ladder) -> None:
    times = [outcome.step_us for outcome in ladder.outcomes]
    assert times[1] > times[2] > times[3]
    assert ladder.speed_up(ladder.outcomes[0]) == 1.0
    for outcome in ladder.outcomes:
        layer_us = 2 * (outcome.forward.makespan_us + outcome.choosing_us) + outcome.backward.makespan_us
        assert outcome.step_us == pytest.approx(2 * layer_us + outcome.other_us)
        assert 0 <= outcome.exposed < 1
    assert ladder.outcomes[0].choosing_us == 0
    assert ladder.outcomes[3].exposed < ladder.outcomes[2].exposed
    # 8 FLOPs per weight and token in recomputed layers, 6 in the output projection, at half of the peak
    flops = 65536 * (8 * SHORT.model.layer_parameters + 6 * SHORT.model.head_parameters)
    assert times[0] - ladder.outcomes[0].attention_us == pytest.approx(flops / (32 * 312e6 * 0.5))


def test_published_links_take_the_published_steps() -> None:
    cluster = load_cluster(CLUSTER)
    kv_bytes = shape_of(Setting(), 32).kv_bytes
    assert kv_bytes == 16384 * 2 * 2 * 128 * 2  # tokens, K and V, KV heads, head dim, bytes
    slow = published_links(cluster, kv_bytes)
    assert slow.inter_node is not None
    for link, step_us in ((slow.intra_node, PUBLISHED_INTRA_STEP_US), (slow.inter_node, PUBLISHED_INTER_STEP_US)):
        assert link.latency_us + kv_bytes / link.bandwidth_bytes_per_us == pytest.approx(step_us)


def test_default_variants_are_the_issue_s_setting() -> None:
    variants = default_variants()
    assert {variant.cluster.world_size for variant in variants} == {32}
    assert {variant.setting.seq_len_tokens for variant in variants} == {524288}
    assert [rung.published for rung in RUNGS] == [1.0, 2.9, 4.6, 6.0, None]


def test_page_and_result_say_the_same(ladder: Ladder, tmp_path: Path) -> None:
    document = result_document([ladder], command="sparsering ladder")
    path = result_path(tmp_path, document)
    write_json(path, document)
    assert read_json(path) == json.loads(json.dumps(document))
    assert {"benchmark", "command", "date", "hardware", "versions", "rows"} <= document.keys()
    page = markdown([ladder], command="sparsering ladder")
    assert "unvalidated" in page
    for row in document["rows"]:
        assert row["validity"] == "unvalidated"
        assert f"| {row['rung']} | {row['forward_ms']:.1f} | {row['backward_ms']:.1f} | {row['step_s']:.2f} |" in page
