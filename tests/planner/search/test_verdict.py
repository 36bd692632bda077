"""What a search says of its pick: the verdict in one sentence, and the figures beside it."""

from __future__ import annotations

import pytest

from search_cases import allowing, problem, senseless
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.search.selection import select
from sparsering.planner.search.verdict import predictions, verdict
from sparsering.simulator.engine import simulate


def test_directions_may_have_different_layouts():
    def contrary(schedule, workload, cluster, cost) -> Evaluation:
        wanted = {"forward": "gather", "backward": "ring"}[schedule.direction]
        return senseless(1.0 if schedule.layout == wanted else 100.0, schedule.world_size)

    found = select(problem(), quick=contrary)
    assert (found.pick.forward_layout.name, found.pick.backward_layout.name) == ("gather", "ring")
    assert found.pick.step_time_us == 2.0
    assert verdict(found) == (
        "Planning gains 50.50× over the best plain layout (striped (64 tokens), gather (chunks 1))."
    )


def test_verdict_says_when_plain_striping_and_all_gather_is_best():
    def gathers(schedule, workload, cluster, cost) -> Evaluation:
        return senseless(99.5 if schedule.layout == "ring" else 100.0, schedule.world_size)

    assert verdict(select(problem(), quick=gathers)) == (
        "Plain block striping with an all-gather is already best; planning would gain less than 1 %: "
        "use it (striped (64 tokens), gather (chunks 1))."
    )


def test_verdict_says_when_another_plain_layout_is_best():
    def rings(schedule, workload, cluster, cost) -> Evaluation:
        return senseless(50.0 if schedule.layout == "ring" else 100.0, schedule.world_size)

    given_problem = problem()
    found = select(given_problem, quick=rings)
    assert verdict(found) == (
        "A plain layout is already best; planning would gain less than 1 %: use striped (64 tokens), ring (prefetch 1)."
    )
    restricted = select(allowing(given_problem, layouts=("gather",)), quick=rings)
    assert verdict(restricted, restricted=True) == (
        "The plain layout striped (64 tokens), ring (prefetch 1) would be 2.00× quicker than this restricted plan."
    )


def test_predictions_agree_with_their_table():
    given_problem = problem(kind="packed-documents", gpus=4, blocks=48, seed=3, bandwidth=1e7)
    found = select(given_problem, quick=CompiledRecurrence(), final=simulate)
    told = predictions(given_problem, found)
    best = min(row["step_time_us"] for row in told["candidates"] if row["baseline"])
    assert told["best_baseline_us"] == best
    assert told["step_time_us"] <= best
    assert told["gap"] == pytest.approx(told["step_time_us"] / told["bound_us"] - 1, abs=1e-5)
    assert told["gap"] >= 0
    rounded = 1e-3 + 1e-6 * told["step_time_us"]  # how the two are written down
    assert told["exposed_us"] == pytest.approx(told["exposed_fraction"] * told["step_time_us"], abs=rounded)
    assert told["worker_imbalance"] >= 1
    assert told["step_imbalance"] >= told["worker_imbalance"] - 1e-6
    assert told["sampled_layers"] == [[0, 0]]
    assert told["unvalidated"] is True
