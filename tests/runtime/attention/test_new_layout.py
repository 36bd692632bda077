"""A layout that one file adds: found by the registry alone, it is planned, checked, simulated, and run on gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from layout_cases import layout_shape, layouts_for
from new_layout import Direct
from rank_pool import RankPool
from ring_cases import PATTERNS, TOLERANCE, Case, expected, largest_difference, make_case_plan
from sparsering.planner.check.check import check, check_step
from sparsering.planner.layouts.registry import layout_names, parse_layout
from sparsering.planner.plan import load_plan
from sparsering.planner.schedule.schedule import DIRECTIONS
from sparsering.planner.search.problem import SearchSpace
from sparsering.planner.search.search import plan_trace
from sparsering.runtime.train.config import PlanSection
from sparsering.simulator.engine import simulate
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace


def test_it_is_known_where_layouts_are_named() -> None:
    assert "direct" in layout_names()
    assert parse_layout("direct") == PlanSection(layout="direct").make_layout() == Direct()
    assert Direct() in layouts_for(layout_shape(4))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_it_is_proved(world_size: int) -> None:
    schedules = [Direct().build(shape=layout_shape(world_size, 64), direction=direction) for direction in DIRECTIONS]
    reports = [check(schedule) for schedule in schedules]
    check_step(*schedules)
    assert [report.tasks for report in reports] == [world_size**2 + world_size] * 2


def test_the_search_rates_and_picks_it_when_it_is_named(tmp_path: Path) -> None:
    settings = SyntheticSettings(seq_len_tokens=32 * 64, block_size=64, heads=4, columns=20, density=0.3)
    trace = write_synthetic_trace(tmp_path / "trace", "vertical-slash", settings, layers=1, steps=1, kv_heads=2,
                                  head_dim=64)  # fmt: skip
    plan = plan_trace(trace, tiny.cluster(gpus=4), SearchSpace(layouts=("direct",)), evaluator=simulate)
    assert plan.forward.value == plan.backward.value == Direct()
    rated = [row for row in plan.predictions["candidates"] if row["layout"] == "direct"]
    assert {row["evaluator"] for row in rated} == {"simulator", "recurrence"}
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").schedule("backward").layout == "direct"


@pytest.mark.parametrize("pattern", ["gqa", "documents"])
def test_every_rank_agrees_with_the_reference(pattern: str, rank_pools: Callable[[int], RankPool]) -> None:
    plan = make_case_plan(
        Case(world_size=4, placement="striped", granularity_tokens=64, layout=Direct(), pattern=pattern)
    )
    results = rank_pools(4).run("layout_jobs.attention", plan=plan, pattern=PATTERNS[pattern].pattern, seed=7)
    wanted = expected(pattern, plan.make_placement().padded_tokens, seed=7)
    for rank, result in enumerate(results):
        rows = plan.make_placement().positions(rank)
        for name, whole in wanted.items():
            mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
            assert largest_difference(result[name], mine) <= TOLERANCE, (rank, name)
