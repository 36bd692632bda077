"""Every placement × layout on real gloo processes, in float64, against the reference: 1e-8 on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rank_pool import RankFailure, RankPool
from ring_cases import CASES, PATTERNS, TOLERANCE, Case, expected, largest_difference, make_case_plan
from sparsering.planner.check.check import check
from sparsering.planner.plan import Plan
from sparsering.planner.schedule.schedule import DIRECTIONS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_agrees_with_the_reference(case: Case, rank_pools: Callable[[int], RankPool]) -> None:
    plan = make_case_plan(case)
    pattern = PATTERNS[case.pattern].pattern
    results = rank_pools(case.world_size).run("attention", plan=plan, pattern=pattern, seed=7)
    _check_all(case, plan, results)


def _check_all(case: Case, plan: Plan, results: list[dict[str, Any]]) -> None:
    pattern, placement = PATTERNS[case.pattern].pattern, plan.make_placement()
    wanted = expected(case.pattern, placement.padded_tokens, seed=7)
    for rank, result in enumerate(results):
        rows = placement.positions(rank)
        valid = rows < pattern.seq_len_tokens
        for name, whole in wanted.items():
            mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
            difference = largest_difference(result[name], mine)
            assert difference <= TOLERANCE, f"rank {rank}, {name}: off by {difference}"
        assert not np.isnan(result["out"]).any()
        assert (result["out"][:, ~valid] == 0).all() and np.isneginf(result["lse"][:, :, ~valid]).all()


LEAVING_OUT = [
    ("ring", {"prefetch": 1}),
    ("ring", {"prefetch": 2}),
    ("gather", {"chunks": 2}),
    ("gather", {"chunks": 2, "pull": 1}),
    ("hierarchical", {"inner_size": 2}),
]


@pytest.mark.parametrize(
    ("layout", "parameters", "pattern_name", "most"),
    [
        *((*layout, pattern, 0.6) for layout in LEAVING_OUT for pattern in ("documents", "gqa")),
        ("ulysses", {"degree": 2, "chunks": 2}, "gqa", 0.9),  # queries and results travel in any case
    ],
)
def test_what_is_never_needed_is_never_sent(
    layout: str,
    parameters: dict[str, int],
    pattern_name: str,
    most: float,
    rank_pools: Callable[[int], RankPool],
) -> None:
    """Contiguous stretches: right to 1e-8, with fewer messages and bytes, and as many as the proof counts."""
    case = Case(world_size=4, placement="contiguous", granularity_tokens=64, layout=layout, parameters=parameters,
                pattern=pattern_name)  # fmt: skip
    pattern, sent = PATTERNS[pattern_name].pattern, {}
    for leave_out in (False, True):
        plan = make_case_plan(case, leave_out=leave_out)
        answers = rank_pools(4).run("counted_attention", plan=plan, pattern=pattern, seed=7)
        placement = plan.make_placement()
        wanted = expected(pattern_name, placement.padded_tokens, seed=7)
        for rank, (result, _) in enumerate(answers):
            rows = placement.positions(rank)
            for name, whole in wanted.items():
                mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
                assert largest_difference(result[name], mine) <= TOLERANCE, (rank, name)
        reports = [check(plan.schedule(way), inactive=plan.active_pairs().left_out()) for way in DIRECTIONS]
        for rank, (_, counts) in enumerate(answers):
            proved = [values[rank] for one in reports for name, values in one.sent_bytes.items() if name != "columns"]
            assert counts["bytes"] == sum(proved)
        sent[leave_out] = sum((counts for _, counts in answers), Counter())
    assert sent[True]["messages"] <= most * sent[False]["messages"]
    assert sent[True]["bytes"] <= most * sent[False]["bytes"]


@pytest.mark.parametrize(
    ("layout", "parameters", "crossing"),
    [
        ("two_level", {"inner_size": 2}, 1),
        ("two_level", {"inner_size": 2, "chunks": 2}, 1),
        ("two_level", {"inner_size": 2, "halves": 1}, 1),
        ("gather", {"chunks": 1}, 3),
        ("gather", {"chunks": 2, "keep_kv": 1, "pull": 1}, 3),
    ],
)
def test_narrow_gradients_are_rounded_once_and_halve_what_crosses(
    rank_pools: Callable[[int], RankPool], layout: str, parameters: dict[str, int], crossing: int
) -> None:
    """bfloat16, two "nodes" of two or four ranks: dK/dV of `crossing` shards are rounded once, all else is the same."""
    pattern, answers, plans = PATTERNS["gqa"].pattern, {}, {}
    for narrow in (0, 1):
        case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=layout,
                    parameters=parameters | {"narrow_grads": narrow}, pattern="gqa")  # fmt: skip
        plans[narrow] = make_case_plan(case, dtype="bfloat16")
        answers[narrow] = rank_pools(4).run("counted_attention", plan=plans[narrow], pattern=pattern, seed=7)
    shape, differences = plans[0].attention_shape(), 0
    for (wide, wide_sent), (narrow, narrow_sent) in zip(answers[0], answers[1], strict=True):
        assert wide_sent["bytes"] - narrow_sent["bytes"] == crossing * (shape.dkv_bytes - shape.kv_bytes)
        for name in ("out", "lse", "dq"):
            assert largest_difference(wide[name], narrow[name]) == 0
        for name in ("dk", "dv"):
            largest = float(np.abs(wide[name]).max())
            assert largest_difference(wide[name], narrow[name]) <= largest / 64  # 2 of 128 steps of bfloat16
            differences += int((wide[name] != narrow[name]).sum())
    assert differences, "nothing was rounded"


def test_a_mask_that_needs_what_is_left_out_is_refused(rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=4, placement="contiguous", granularity_tokens=64, layout="ring", parameters={},
                pattern="documents")  # fmt: skip
    other = replace(PATTERNS["documents"].pattern, documents=None)
    with pytest.raises(RankFailure, match="pairs: the mask activates the queries of rank 2 against the keys of rank 0"):
        rank_pools(4).run("attention", plan=make_case_plan(case, leave_out=True), pattern=other, seed=7)


@pytest.mark.parametrize("parameters", [{}, {"keep_kv": 1}], ids=str)
def test_a_graph_of_the_gradients_is_refused_and_gradients_may_be_asked_for_again(
    parameters: dict[str, int], rank_pools: Callable[[int], RankPool]
) -> None:
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout="gather", parameters=parameters,
                pattern="gqa")  # fmt: skip
    results = rank_pools(2).run("second_gradients", plan=make_case_plan(case), pattern=PATTERNS["gqa"].pattern)
    refusal = "create_graph: gradients of gradients of planned attention are not supported"
    assert results == [(refusal, 0.0)] * 2


@pytest.mark.parametrize("every", [1, 2], ids=["every rank", "every second rank"])
@pytest.mark.parametrize(
    ("layout", "parameters"),
    [("ring", {"prefetch": 1}), ("gather", {"chunks": 1}), ("hierarchical", {"inner_size": 2})],
)
def test_first_tasks_may_be_issued_before_first_transfers(
    layout: str, parameters: dict[str, int], every: int, rank_pools: Callable[[int], RankPool]
) -> None:
    """What GPUs do, with the same results; and launches of one backward share their scratch."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=layout, parameters=parameters,
                pattern="gqa")  # fmt: skip
    plan = make_case_plan(case)
    pattern = PATTERNS[case.pattern].pattern
    job = {"plan": plan, "pattern": pattern, "seed": 7, "every": every}
    results = rank_pools(4).run("attention_computing_first", **job)
    for rank, result in enumerate(results):
        assert result.pop("posts") == 2 * (rank % every == 0)
        assert result.pop("launches") > 1 == result.pop("scratches")
    _check_all(case, plan, results)


def test_launches_of_a_single_shard_get_no_scratch(rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=1, placement="striped", granularity_tokens=64, layout="ring", parameters={}, pattern="gqa")
    job = {"plan": make_case_plan(case), "pattern": PATTERNS["gqa"].pattern, "seed": 7, "every": 1}
    (result,) = rank_pools(1).run("attention_computing_first", **job)
    assert (result["launches"], result["scratches"]) == (1, 0)


def test_a_wrong_pattern_is_seen(rank_pools: Callable[[int], RankPool]) -> None:
    """The oracle can fail: another pattern gives results far from the reference's."""
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout="ring", parameters={}, pattern="gqa")
    plan = make_case_plan(case)
    results = rank_pools(2).run("attention", plan=plan, pattern=PATTERNS["gqa"].mutated(), seed=7)
    placement = plan.make_placement()
    wanted = expected("gqa", placement.padded_tokens, seed=7)
    rows = placement.positions(1)
    assert largest_difference(results[1]["out"], wanted["out"][:, rows]) > 1e-3


def test_batches_share_the_pattern(rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=3, placement="zigzag", granularity_tokens=64, layout="gather", parameters={"chunks": 2},
                pattern="gqa")  # fmt: skip
    plan = make_case_plan(case)
    placement = plan.make_placement()
    results = rank_pools(3).run("attention", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=3, batch=2)
    wanted = expected("gqa", placement.padded_tokens, seed=3, batch=2)
    for rank, result in enumerate(results):
        rows = placement.positions(rank)
        for name in ("out", "dq", "dk", "dv"):
            assert largest_difference(result[name], wanted[name][:, rows]) <= TOLERANCE


@pytest.mark.parametrize(
    ("placement", "layout", "parameters"),
    [("striped", "gather", {"chunks": 1}), ("zigzag", "gather", {"chunks": 1}), ("striped", "ring", {})],
)
def test_triton_kernels_play_the_same_schedules(
    placement: str, layout: str, parameters: dict[str, int], rank_pools: Callable[[int], RankPool]
) -> None:
    """The Triton backend in its interpreter, over gloo: what GPUs will run, checked without one."""
    case = Case(world_size=3, placement=placement, granularity_tokens=64, layout=layout, parameters=parameters,
                pattern="gqa")  # fmt: skip
    plan = make_case_plan(case, backend="triton", dtype="float32")
    results = rank_pools(3).run("attention", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=7)
    placed = plan.make_placement()
    wanted = expected("gqa", placed.padded_tokens, seed=7)
    for rank, result in enumerate(results):
        rows = placed.positions(rank)
        for name in ("out", "dq", "dk", "dv"):
            assert largest_difference(result[name], wanted[name][:, rows]) <= 1e-4, name


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_ranks_verify_themselves(dtype: str, rank_pools: Callable[[int], RankPool]) -> None:
    """The verification that `sparsering run --verify` offers passes on every rank, in every type."""
    case = Case(world_size=2, placement="zigzag", granularity_tokens=64, layout="ring", parameters={}, pattern="gqa")
    for verdicts in rank_pools(2).run(
        "verified", plan=make_case_plan(case, dtype=dtype), pattern=PATTERNS["gqa"].pattern, seed=5
    ):
        assert [verdict.name for verdict in verdicts] == ["out", "lse", "dq", "dk", "dv"]
        assert all(verdict.ok for verdict in verdicts), verdicts


def test_a_plan_for_another_world_size_is_refused(rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=3, placement="striped", granularity_tokens=64, layout="ring", parameters={}, pattern="gqa")
    with pytest.raises(RankFailure, match="world_size: the plan is for 3, not for 2"):
        rank_pools(2).run("attention", plan=make_case_plan(case), pattern=PATTERNS["gqa"].pattern, seed=0)


def test_different_plans_on_two_ranks_are_refused_by_all(rank_pools: Callable[[int], RankPool]) -> None:
    common = {"world_size": 2, "placement": "striped", "granularity_tokens": 64, "pattern": "gqa"}
    plans = [make_case_plan(Case(layout=layout, parameters={}, **common)) for layout in ("ring", "gather")]
    arguments = [{"plan": plan, "pattern": PATTERNS["gqa"].pattern, "seed": 0} for plan in plans]
    with pytest.raises(RankFailure, match=r"plan \d+ digest: rank 1 has"):
        rank_pools(2).run_each("attention", arguments)


@pytest.mark.parametrize("degree", [2, 4])
def test_head_groups_with_the_kernels_of_gpus(degree: int, rank_pools: Callable[[int], RankPool]) -> None:
    """Triton's kernels, interpreted: what they are given of heads and slots is laid out as they want it."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout="ulysses",
                parameters={"degree": degree}, pattern="gqa")  # fmt: skip
    plan = make_case_plan(case, backend="triton")
    _check_all(case, plan, rank_pools(4).run("attention", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=7))


@pytest.mark.parametrize("order", [(3, 2, 0, 1), (1, 0, 2, 3)])
def test_heads_in_another_order(order: tuple[int, ...], rank_pools: Callable[[int], RankPool]) -> None:
    """Results are those of the model's heads, whichever group computed them; other layers have their own order."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout="ulysses", parameters={"degree": 4},
                pattern="gqa")  # fmt: skip
    plan, pattern = make_case_plan(case, head_orders=((0, 1, 2, 3), order)), PATTERNS["gqa"].pattern
    for layer in (0, 1):
        results = rank_pools(4).run("attention", plan=plan, pattern=pattern, seed=7, layer=layer, check_patterns=True)
        _check_all(case, plan, results)
    with pytest.raises(RankFailure, match="layer: is 2; the plan has orders of heads for 2 layers"):
        rank_pools(4).run("attention", plan=plan, pattern=pattern, seed=7, layer=2)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (("ulysses", {"degree": 2}), ("gather", {"chunks": 2})),
        (("ring", {"prefetch": 1}), ("ulysses", {"degree": 4, "chunks": 2})),
        (("collective", {"chunks": 2}), ("ulysses", {"degree": 2})),
        (("ulysses", {"degree": 4}), ("ulysses", {"degree": 2})),
    ],
)
def test_heads_split_in_one_direction(
    forward: tuple[str, dict[str, int]], backward: tuple[str, dict[str, int]], rank_pools: Callable[[int], RankPool]
) -> None:
    """Two sequences at a time, the first tasks before the first transfers as on GPUs."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=forward[0], parameters=forward[1],
                pattern="gqa")  # fmt: skip
    plan, pattern = make_case_plan(case, backward=backward), PATTERNS["gqa"].pattern
    _check_all(case, plan, rank_pools(4).run("attention_computing_first", plan=plan, pattern=pattern, seed=7, every=2))
    results = rank_pools(4).run("attention", plan=plan, pattern=pattern, seed=7, batch=2)
    wanted = expected("gqa", plan.make_placement().padded_tokens, seed=7, batch=2)
    for rank, result in enumerate(results):
        rows = plan.make_placement().positions(rank)
        for name, whole in wanted.items():
            mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
            assert largest_difference(result[name], mine) <= TOLERANCE, (rank, name)


def test_columns_gradients_may_be_summed_last(rank_pools: Callable[[int], RankPool]) -> None:
    """After results have gone home: those of the parts that were sent are part of the sum."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout="ulysses", parameters={"degree": 2},
                pattern="gqa")  # fmt: skip
    plan = make_case_plan(case)
    results = rank_pools(4).run("attention_summing_columns_last", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=7)
    _check_all(case, plan, results)
