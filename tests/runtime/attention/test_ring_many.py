"""Four nodes of eight ranks, as 32 real gloo processes: the hierarchical ring in float64 against the reference."""

from __future__ import annotations

import pytest

from rank_pool import RankPool
from ring_cases import PATTERNS, TOLERANCE, Case, expected, largest_difference, make_case_plan
from sparsering.planner.layouts.hierarchical import Hierarchical

WORLD_SIZE = 32


@pytest.mark.many_ranks
@pytest.mark.timeout(600)
def test_thirty_two_ranks_agree_with_the_reference() -> None:
    case = Case(
        world_size=WORLD_SIZE,
        placement="striped",
        granularity_tokens=16,
        layout=Hierarchical(inner_size=8),
        pattern="many",
    )
    plan = make_case_plan(case)
    placement = plan.make_placement()
    pool = RankPool(WORLD_SIZE)
    try:
        results = pool.run("attention", plan=plan, pattern=PATTERNS["many"].pattern, seed=3)
    finally:
        pool.close()
    wanted = expected("many", placement.padded_tokens, seed=3)
    for rank, result in enumerate(results):
        rows = placement.positions(rank)
        for name, whole in wanted.items():
            mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
            assert largest_difference(result[name], mine) <= TOLERANCE, f"rank {rank}, {name}"
