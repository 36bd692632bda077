"""Samples are planned as their README says: where planning helps, and by how much, and where it does not."""

from __future__ import annotations

import re

import pytest

from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.search.problem import SearchSpace
from sparsering.planner.search.search import plan_trace
from sparsering.simulator.engine import simulate
from sparsering.traces.dataset.store import Trace
from sparsering.traces.samples.located import SAMPLES, sample_names

CLUSTER = "h100-nvlink-8"
NO_HELP = "A plain layout is already best|Plain block striping .* is already best"


def verdict(name: str) -> str:
    plan = plan_trace(Trace.open(f"sample:{name}"), load_cluster(CLUSTER), SearchSpace(), evaluator=simulate)
    assert plan.predictions["evaluator"] == "simulator"
    return plan.predictions["verdict"]


def told(name: str) -> str:
    """Return what the README expects of a sample."""
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", (SAMPLES / "README.md").read_text(), re.M | re.S)
    return section.partition("Expect: ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_names())
def test_the_verdict_is_the_one_told(name: str) -> None:
    found, expected = verdict(name), told(name)
    if factor := re.match(r"(\d\.\d\d) times", expected):
        assert found.startswith(f"Planning gains {factor[1]}×")
    else:
        assert re.match(f'"(?:{NO_HELP})"', expected)
        assert re.match(NO_HELP, found)


def test_the_pair_differs_in_whether_planning_helps() -> None:
    helps = [bool(re.match(r"\d\.\d\d times", told(f"planning-{kind}"))) for kind in ("helps", "does-not-help")]
    assert helps == [True, False]
