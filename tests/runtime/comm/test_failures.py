"""Ranks that die, lag or disagree: everybody else ends with an error that names the rank, and nobody hangs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rank_pool import RankFailure, RankPool
from ring_cases import PATTERNS, Case, make_case_plan
from sparsering.planner.layouts.registry import make_layout

WORLD_SIZE = 3


def _plan(layout: str = "ring"):
    sizes = {"world_size": WORLD_SIZE, "placement": "striped", "granularity_tokens": 64}
    return make_case_plan(Case(layout=make_layout(layout), pattern="gqa", **sizes))


@pytest.mark.parametrize(
    ("layout", "direction", "victim"),
    [("ring", "forward", 1), ("gather", "backward", 2), ("ring", "backward", 0), ("gather", "forward", 0)],
)
def test_a_rank_that_dies_is_named_by_all_others(layout: str, direction: str, victim: int) -> None:
    pool = RankPool(WORLD_SIZE)
    try:
        answers = pool.answers(
            "attention_and_die",
            plan=_plan(layout),
            pattern=PATTERNS["gqa"].pattern,
            direction=direction,
            victim=victim,
        )
        assert answers[victim] is None
        for rank in set(range(WORLD_SIZE)) - {victim}:
            answer = answers[rank]
            assert answer is not None
            ok, text = answer
            assert not ok
            host = "" if victim else ", which hosts the store,"  # nobody can be asked then
            assert re.search(rf"RankLost: rank {victim} of {WORLD_SIZE}{host} stopped answering", text), text
            assert "timed out waiting" not in text.lower()  # they saw it go, and did not sit out the time-out
    finally:
        pool.close()


def test_another_pattern_on_one_rank_is_named(rank_pools: Callable[[int], RankPool]) -> None:
    arguments = [
        {"plan": _plan(), "pattern": PATTERNS["gqa"].pattern, "check_patterns": True} for _ in range(WORLD_SIZE)
    ]
    rank_pools(WORLD_SIZE).run_each("attention", [one | {"seed": 1} for one in arguments])
    arguments[2]["pattern"] = PATTERNS["gqa"].mutated()
    with pytest.raises(RankFailure, match=r"patterns \d+: rank 2 has"):
        rank_pools(WORLD_SIZE).run_each("attention", [one | {"seed": 1} for one in arguments])


def test_fifty_runs_with_injected_delays_do_not_hang(rank_pools: Callable[[int], RankPool]) -> None:
    """Delays before launches and tasks shuffle who is early; results must not depend on it."""
    plan, pattern = _plan("ring"), PATTERNS["gqa"].pattern
    digests = rank_pools(WORLD_SIZE).run("delayed_runs", plan=plan, pattern=pattern, runs=50)
    for rank_digests in digests:
        assert len(rank_digests) == 50
        assert len(set(rank_digests)) == 1
