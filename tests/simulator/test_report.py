"""What the report's figures show is what the patterns, plans and timelines say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.schedule.workload import workload
from sparsering.simulator.report.figures import Figure
from sparsering.simulator.report.layouts import MOST_ROWS, layouts_figure, shown_rows
from sparsering.simulator.report.load import load_figure, spread_loads
from sparsering.simulator.report.masks import block_map, chosen_heads, masks_figure
from sparsering.simulator.report.page import duration, sentence, worst_errors
from sparsering.simulator.report.timelines import timelines_figure
from sparsering.simulator.simulate_plan import simulate_plan
from sparsering.traces.dataset.store import Trace
from sparsering.traces.pattern import LayerPattern, VerticalSlash, element_mask
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace

TOKENS, BLOCK, WORLD = 512, 64, 4


def drawn(figure: Figure) -> list[dict[str, Any]]:
    return figure.to_dict()["data"]


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


def test_a_block_map_agrees_with_the_definition():
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


def test_shown_heads_run_from_the_sparsest_to_the_densest(tmp_path):
    settings = SyntheticSettings(seq_len_tokens=2048, heads=6, block_size=64, density=0.2, columns=32)
    write_synthetic_trace(tmp_path / "trace", "skewed", settings, layers=3, seed=1)
    trace = Trace.open(tmp_path / "trace")
    shown = chosen_heads(trace, 8)
    densities = [one.density for one in shown]
    everyone = [row.density for row in trace.heads(0)]
    assert densities == sorted(densities)
    assert (densities[0], densities[-1]) == (min(everyone), max(everyone))
    assert len(drawn(masks_figure(trace))) == 2 * 8


def test_loads_hold_all_the_work_once():
    loads = spread_loads(plan(), pattern())
    assert [one.title.partition(":")[0] for one in loads] == ["before", "before", "planned"]
    counted = workload(pattern(), plan().make_placement())
    assert loads[-1].pairs.sum() == counted.pairs_per_rank().sum()
    assert loads[-1].pairs.sum(axis=1).tolist() == counted.pairs_per_rank().tolist()
    contiguous = loads[0]
    assert contiguous.worker_imbalance > loads[-1].worker_imbalance
    assert contiguous.step_imbalance >= contiguous.worker_imbalance - 1e-9
    assert len(drawn(load_figure(loads))) == 3


def test_cluster_loads_are_simulated():
    made, cluster = plan(), load_cluster("a100-nvlink-8")
    loads = spread_loads(made, pattern(), cluster)
    simulated = simulate_plan(made, pattern(), cluster).makespan_us
    assert loads[-1].step_time_us == pytest.approx(simulated)
    assert all(one.step_time_us and one.step_time_us > 0 for one in loads)


def test_timelines_show_every_span_on_one_axis():
    cluster = load_cluster("local-cpu-4")
    timeline = simulate_plan(plan(), pattern(), cluster).timeline
    assert timeline is not None
    figure = timelines_figure(timeline, timeline)
    assert sum(len(bars["x"]) for bars in drawn(figure)) == 2 * len(timeline.spans)
    ends = [start + length for bars in drawn(figure) for start, length in zip(bars["base"], bars["x"], strict=True)]
    assert max(ends) == pytest.approx(max(span.end_us for span in timeline.spans) / 1e3, abs=1e-3)
    assert figure.to_dict()["layout"]["xaxis"]["matches"] == "x2"


def candidate(number: int, *, baseline: bool, evaluator: str = "simulator", why_not: str | None = None) -> dict:
    times = {"forward_us": 10.0 + number, "backward_us": 20.0, "step_time_us": 30.0 + number}
    return {
        "placement": "striped",
        "granularity_tokens": 64,
        "layout": "ring",
        "parameters": {"prefetch": number},
        "in_words": f"ring (prefetch {number})",
        "baseline": baseline,
        "why_not": why_not,
        "fits_memory": True,
        "evaluator": evaluator,
        **times,
    }


def test_all_plain_layouts_and_the_plan_are_shown():
    rows = [candidate(number, baseline=number % 5 == 4) for number in range(40)]
    rows.append(candidate(50, baseline=False, evaluator="recurrence", why_not="simulated only"))
    told = {"candidates": rows, "evaluator": "simulator", "bound_us": 12.0,
            "forward_us": 9.0, "backward_us": 19.0, "step_time_us": 28.0}  # fmt: skip
    shown = shown_rows(plan(told))
    assert len(shown) == MOST_ROWS
    assert shown[0]["name"] == "<b>the plan</b>"
    assert sum(row["note"] == "plain" for row in shown) == 8
    assert [row["step_time_us"] for row in shown] == sorted(row["step_time_us"] for row in shown)
    assert len(drawn(layouts_figure(plan(told)))[0]["x"]) == MOST_ROWS


def test_the_sentence_is_the_plans_own():
    verdict = "Planning gains 1.20× over the best plain layout (striped (64 tokens), ring (prefetch 1))."
    assert sentence(plan({"verdict": verdict})) == f"On 4 A100s: p{verdict[1:]}"


def test_one_failing_rank_fails_a_tensor():
    verdicts = [
        {"name": name, "rank": rank, "error": error, "tolerance": 1e-8, "ok": error <= 1e-8}
        for name, errors in {"out": [1e-15, 2e-15], "dk": [1e-15, 1e-3]}.items()
        for rank, error in enumerate(errors)
    ]
    out, dk = worst_errors(verdicts)
    assert (out["name"], out["ok"], out["rank"], out["ranks"]) == ("out", True, 1, 2)
    assert (dk["name"], dk["ok"], dk["rank"]) == ("dk", False, 1)


def test_words():
    assert [duration(us) for us in (1234.0, 123_456.0, 1_234_567.0)] == ["1.2 ms", "123 ms", "1.23 s"]
