"""What the report's figures show is what the patterns, plans and timelines say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.schedule.workload import workload
from sparsering.simulator.report.baseline import MOST_ROWS, best_baseline, gain_of, layout_bars
from sparsering.simulator.report.demo import worst_errors
from sparsering.simulator.report.figures.fidelity import round_numbers
from sparsering.simulator.report.figures.load import load_figure
from sparsering.simulator.report.figures.masks import block_map, chosen_heads, mask_figure
from sparsering.simulator.report.figures.theme import PALETTE, Figure
from sparsering.simulator.report.figures.timelines import kinds_of, shown_ranks, streams_of, timeline_figure
from sparsering.simulator.report.spread import spread_loads
from sparsering.simulator.report.words import duration, percent
from sparsering.simulator.simulate_plan import simulate_plan
from sparsering.traces.dataset.store import Trace
from sparsering.traces.pattern import LayerPattern, VerticalSlash, element_mask
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace

TOKENS, BLOCK, WORLD = 512, 64, 4


def drawn(figure: Figure) -> list[dict[str, Any]]:
    return figure.to_dict()["data"]


def traces(figure: Figure) -> list[Any]:
    return list(figure.select_traces())


def pattern() -> LayerPattern:
    heads = (
        VerticalSlash(columns=np.array([3, 5, 70], np.int32), diagonals=np.array([0, 2], np.int32)),
        VerticalSlash(columns=np.array([], np.int32), diagonals=np.array([0, 1, 5], np.int32)),
    )
    return LayerPattern(seq_len_tokens=TOKENS, block_size=BLOCK, heads=heads)


def plan(predictions: dict | None = None) -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=2, kv_heads=1, head_dim=64),
            seq_len_tokens=TOKENS,
            block_size=BLOCK,
            dtype="float64",
            columns_capacity=64,
        ),
        placement=striped(seq_len_tokens=TOKENS, world_size=WORLD, granularity_tokens=BLOCK),
        forward=Gather(chunks=1),
        backward=Ring(prefetch=1),
        pattern=PatternSpec(source="trace", trace_sha256="0" * 64),
        kernels=KernelSpec(backend="blockwise"),
    ).with_record(predictions=predictions)


def test_a_block_map_agrees_with_the_definition() -> None:
    for head in range(2):
        active, columns = block_map(pattern(), pattern().heads[head])
        tiles = element_mask(pattern(), head).reshape(TOKENS // BLOCK, BLOCK, TOKENS // BLOCK, BLOCK)
        whole = tiles.all(axis=(1, 3))
        touched = tiles.any(axis=(1, 3))
        below = np.tril(np.ones_like(active), -1)
        assert (active & below == whole & below).all()
        assert ((active | (columns > 0)) & below == touched & below).all()
        last_row = tiles[-1].any(axis=0).mean(axis=1)  # share of each key block that the last block of queries attends
        assert columns[-1][~active[-1]] == pytest.approx(last_row[~active[-1]])


def test_a_coarse_map_holds_the_largest_of_every_square() -> None:
    for head in range(2):
        fine, columns = block_map(pattern(), pattern().heads[head])
        active, shares = block_map(pattern(), pattern().heads[head], 3)  # 8 blocks: the last square is smaller
        for row in range(3):
            for column in range(3):
                square = slice(3 * row, 3 * row + 3), slice(3 * column, 3 * column + 3)
                assert active[row, column] == fine[square].any()
                assert shares[row, column] == columns[square].max()


def test_shown_heads_run_from_the_sparsest_to_the_densest(tmp_path: Path) -> None:
    settings = SyntheticSettings(seq_len_tokens=2048, heads=6, block_size=64, density=0.2, columns=32)
    write_synthetic_trace(tmp_path / "trace", "skewed", settings, layers=3, seed=1)
    trace = Trace.open(tmp_path / "trace")
    shown = chosen_heads(trace, 8)
    densities = [one.density for one in shown]
    everyone = [row.density for row in trace.heads(0)]
    assert densities == sorted(densities)
    assert (densities[0], densities[-1]) == (min(everyone), max(everyone))
    (percent,) = traces(mask_figure(shown[0]))
    active, columns = block_map(shown[0].of, shown[0].pattern)
    assert percent.z.dtype == np.uint8
    assert ((percent.z == 100) == active).all()
    assert ((percent.z > 0) == (active | (columns > 0))).all()


def test_loads_hold_all_the_work_once() -> None:
    loads = spread_loads(plan(), pattern())
    assert [one.role for one in loads] == ["before", "before", "plan"]
    counted = workload(pattern(), plan().make_placement())
    assert loads[-1].pairs.sum() == counted.pairs_per_rank().sum()
    assert loads[-1].pairs.sum(axis=1).tolist() == counted.pairs_per_rank().tolist()
    contiguous = loads[0]
    assert contiguous.worker_imbalance > loads[-1].worker_imbalance
    assert contiguous.step_imbalance >= contiguous.worker_imbalance - 1e-9
    (map_of_work,) = traces(load_figure(contiguous, 99))
    assert map_of_work.z.tolist() == contiguous.pairs.tolist()


def test_cluster_loads_are_simulated() -> None:
    made, cluster = plan(predictions()), load_cluster("a100-nvlink-8")
    loads = spread_loads(made, pattern(), cluster=cluster)
    simulated = simulate_plan(made, pattern(), cluster).makespan_us
    assert [one.role for one in loads] == ["before", "before", "baseline", "plan"]
    assert loads[-1].step_time_us == pytest.approx(simulated)
    assert all(one.step_time_us and one.step_time_us > 0 for one in loads)
    assert loads[2].title == "striped 64, ring (prefetch 2)"


def test_timelines_show_every_span_on_one_axis() -> None:
    timeline = simulate_plan(plan(), pattern(), load_cluster("local-cpu-4")).timeline
    assert timeline is not None
    ranks, streams = shown_ranks([timeline]), streams_of([timeline])
    until_us = 2 * timeline.makespan_us
    figure = timeline_figure(timeline, ranks=ranks, streams=streams, until_us=until_us)
    bars = drawn(figure)
    assert ranks == [0, 1, 2, 3]
    assert sum(len(one["x"]) for one in bars) == len(timeline.spans)
    ends = [start + length for one in bars for start, length in zip(one["base"], one["x"], strict=True)]
    axis = figure.to_dict()["layout"]["xaxis"]["range"]
    assert max(ends) * 2 == pytest.approx(axis[1] / 1.01, rel=1e-3)
    assert [one["name"] for one in bars] == [kind.name for kind in kinds_of([timeline])]


def test_of_many_ranks_and_spans_some_are_drawn() -> None:
    timeline = simulate_plan(plan(), pattern(), load_cluster("local-cpu-4")).timeline
    assert timeline is not None
    assert shown_ranks([replace(timeline, world_size=64)]) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert shown_ranks([replace(timeline, spans=timeline.spans * 2000)]) == [0]


def candidate(number: int, *, baseline: bool, evaluator: str = "simulator", why_not: str | None = None) -> dict:
    times = {"forward_us": 10.0 + number, "backward_us": 20.0, "step_time_us": 30.0 + number}
    return {
        "placement": "striped",
        "granularity_tokens": 64,
        "layout": "ring",
        "parameters": {"prefetch": 2},
        "in_words": f"ring (prefetch {number})",
        "baseline": baseline,
        "why_not": why_not,
        "fits_memory": True,
        "evaluator": evaluator,
        **times,
    }


def predictions() -> dict[str, Any]:
    rows = [candidate(number, baseline=number % 5 == 4) for number in range(40)]
    rows.append(candidate(50, baseline=False, evaluator="recurrence", why_not="simulated only"))
    baseline = {"best_baseline": "striped (64 tokens), ring (prefetch 4)", "best_baseline_us": 34.0}
    return {"candidates": rows, "evaluator": "simulator", "bound_us": 12.0, "gap": 1.3, **baseline,
            "forward_us": 9.0, "backward_us": 19.0, "step_time_us": 28.0}  # fmt: skip


def test_all_plain_layouts_and_the_plan_are_shown() -> None:
    made = plan(predictions())
    shown = layout_bars(made)
    assert len(shown) == MOST_ROWS
    assert shown[0].role == "plan"
    assert [bar.role for bar in shown].count("plain") == 7
    assert [bar.name for bar in shown if bar.role == "baseline"] == ["striped 64, ring (prefetch 4)"]
    assert [bar.step_time_us for bar in shown] == sorted(bar.step_time_us for bar in shown)
    gain = gain_of(made)
    assert gain is not None and gain.helps and gain.saved_share == pytest.approx(1 - 28 / 34)


def test_a_plan_made_by_hand_has_no_baseline() -> None:
    assert best_baseline(plan()) is None and gain_of(plan()) is None


def test_no_colour_stands_for_two_roles() -> None:
    light = [one for one, _ in PALETTE.values()]
    assert len(set(light)) == len(light)


def test_logarithmic_axes_have_round_numbers() -> None:
    assert round_numbers(0.008, 0.45) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert round_numbers(0.5, 20_000) == [1, 10, 100, 1000, 10_000]


def test_one_failing_rank_fails_a_tensor() -> None:
    verdicts = [
        {"name": name, "rank": rank, "error": error, "tolerance": 1e-8, "ok": error <= 1e-8}
        for name, errors in {"out": [1e-15, 2e-15], "dk": [1e-15, 1e-3]}.items()
        for rank, error in enumerate(errors)
    ]
    out, dk = worst_errors(verdicts)
    assert (out["name"], out["ok"], out["rank"], out["ranks"]) == ("out", True, 1, 2)
    assert (dk["name"], dk["ok"], dk["rank"]) == ("dk", False, 1)


def test_words() -> None:
    times = [duration(us) for us in (12.0, 1234.0, 123_456.0, 1_234_567.0)]
    assert times == ["12 µs", "1.2 ms", "123 ms", "1.23 s"]
    assert [percent(share) for share in (0.012, 0.2)] == ["1.2 %", "20 %"]
