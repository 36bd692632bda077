"""Exposed communication: the meter sees who waits for a late rank, for how long, and nothing when it is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rank_pool import RankPool
from ring_cases import PATTERNS, Case, make_case_plan
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.runtime.timing.spans import Exposure
from train_runs import write_run

Pools = Callable[[int], RankPool]
LATE_S = 0.25
LATE_RANK = 1


@pytest.mark.parametrize("layout", [Ring(), Gather(), Collective()], ids=str)
def test_a_late_rank_shows_on_the_one_that_waits(layout: Layout, rank_pools: Pools) -> None:
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout=layout, pattern="gqa")
    job = {"plan": make_case_plan(case), "pattern": PATTERNS["gqa"].pattern, "late_rank": LATE_RANK}
    on_time, late = rank_pools(2).run("exposed_communication", **job, late_s=LATE_S, on=True)
    # The late rank finds what it needs already there. The other waits for every post, but for what it computes itself.
    slept_ms = late["posts"] * LATE_S * 1e3
    assert 0.5 * slept_ms < on_time["exposed_ms"] < on_time["whole_ms"]
    assert late["exposed_ms"] < 0.5 * on_time["exposed_ms"]
    assert on_time["posts"] == on_time["waits"] == late["waits"] >= 2
    assert on_time["after_ms"] == 0.0
    for one in rank_pools(2).run("exposed_communication", **job, late_s=0.0, on=False):
        assert one["exposed_ms"] == one["waits"] == 0


def test_only_time_between_marks_counts() -> None:
    exposure = Exposure(torch.device("cpu"))
    with exposure.waiting():
        time.sleep(0.01)
    assert exposure.waits == []
    exposure.on = True
    with exposure.waiting():
        time.sleep(0.05)
    time.sleep(0.5)
    assert 50 <= exposure.take_ms() < 500


@pytest.mark.parametrize("attention", ["planned", "dense-zigzag"])
def test_trainers_say_what_each_rank_waited(attention: str, tmp_path: Path, rank_pools: Pools) -> None:
    config = write_run(tmp_path, attention=attention)
    job = {"config": config, "late_rank": LATE_RANK, "late_s": LATE_S}
    (on_time, layers), (late, _) = rank_pools(2).run("train_jobs.late_attention", **job)
    assert on_time["exposed_communication_ms"] > 0.5 * layers * LATE_S * 1e3 > late["exposed_communication_ms"]
    for line in (on_time, late):
        assert 0 < line["exposed_communication_ms"] < line["attention_forward_ms"] + line["attention_backward_ms"]
