"""Every placement × layout on real gloo processes, in float64, against the reference: 1e-8 on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from rank_pool import RankFailure, RankPool
from ring_cases import CASES, IN_CASES, PATTERNS, TOLERANCE, Case, expected, largest_difference, make_case_plan
from schedule_rewrites import Rewrite, columns_summed_last, heads_one_by_one, keys_pulled
from sparsering.planner.check.check import check
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.registry import make_layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.two_level import TwoLevel
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import Plan
from sparsering.planner.schedule.schedule import DIRECTIONS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_agrees_with_the_reference(case: Case, rank_pools: Callable[[int], RankPool]) -> None:
    plan = make_case_plan(case)
    pattern = PATTERNS[case.pattern].pattern
    form = PATTERNS[case.pattern].form
    results = rank_pools(case.world_size).run("attention", plan=plan, pattern=pattern, seed=7, **form)
    _check_all(case, plan, results)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_two_of_layout_placement_and_pattern_meet_in_a_case(world_size: int) -> None:
    """But for head parallelism and patterns of other numbers of heads. All three together are drawn by `make soak`."""
    cases = [case for case in CASES if case.world_size == world_size]
    placements = {(case.placement, case.granularity_tokens) for case in cases}
    layouts = {case.layout for case in cases}
    assert len(placements) == 5 and {case.pattern for case in cases} == set(IN_CASES)
    pairs = {((case.placement, case.granularity_tokens), case.layout) for case in cases}
    assert pairs == set(product(placements, layouts))
    pairs = {((case.placement, case.granularity_tokens), case.pattern) for case in cases}
    assert pairs == set(product(placements, IN_CASES))
    for layout in layouts:
        met = {case.pattern for case in cases if case.layout == layout}
        assert met == set(IN_CASES) or isinstance(layout, Ulysses)


def _check_all(case: Case, plan: Plan, results: list[dict[str, Any]]) -> None:
    pattern, placement = PATTERNS[case.pattern].pattern, plan.make_placement()
    wanted = dict(expected(case.pattern, placement.padded_tokens, seed=7))
    if "dsinks" in wanted:  # each rank has the share of its own queries
        total = np.sum([result["dsinks"] for result in results], axis=0)
        assert largest_difference(total, wanted.pop("dsinks")) <= TOLERANCE
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
    Ring(prefetch=1),
    Ring(prefetch=2),
    Gather(chunks=2),
    Gather(chunks=2, pull=True),
    Hierarchical(inner_size=2),
]


@pytest.mark.parametrize(
    ("layout", "pattern_name", "most"),
    [
        *((layout, pattern, 0.6) for layout in LEAVING_OUT for pattern in ("documents", "gqa")),
        (Ulysses(degree=2, chunks=2), "gqa", 0.9),  # queries and results travel in any case
    ],
)
def test_what_is_never_needed_is_never_sent(
    layout: Layout, pattern_name: str, most: float, rank_pools: Callable[[int], RankPool]
) -> None:
    """Contiguous stretches: right to 1e-8, with fewer messages and bytes, and as many as the proof counts."""
    case = Case(world_size=4, placement="contiguous", granularity_tokens=64, layout=layout,
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
    ("layout", "crossing"),
    [
        (TwoLevel(inner_size=2), 1),
        (TwoLevel(inner_size=2, halves=True), 1),
        (Gather(chunks=1), 3),
        (Gather(chunks=2, keep_kv=True, pull=True), 3),
    ],
)
def test_narrow_gradients_are_rounded_once_and_halve_what_crosses(
    rank_pools: Callable[[int], RankPool], layout: Layout, crossing: int
) -> None:
    """bfloat16, two "nodes" of two or four ranks: dK/dV of `crossing` shards are rounded once, all else is the same."""
    pattern, answers, plans = PATTERNS["gqa"].pattern, {}, {}
    for narrow in (False, True):
        chosen = make_layout(layout.name, layout.parameters | {"narrow_gradients": narrow})
        case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=chosen, pattern="gqa")
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
    case = Case(world_size=4, placement="contiguous", granularity_tokens=64, layout=Ring(),
                pattern="documents")  # fmt: skip
    other = replace(PATTERNS["documents"].pattern, documents=None, anchor_tokens=0)
    with pytest.raises(RankFailure, match="pairs: the mask activates the queries of rank 2 against the keys of rank 0"):
        rank_pools(4).run("attention", plan=make_case_plan(case, leave_out=True), pattern=other, seed=7)


@pytest.mark.parametrize("keep_kv", [False, True])
def test_a_graph_of_the_gradients_is_refused_and_gradients_may_be_asked_for_again(
    keep_kv: bool, rank_pools: Callable[[int], RankPool]
) -> None:
    layout = Gather(keep_kv=keep_kv)
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout=layout, pattern="gqa")
    results = rank_pools(2).run("second_gradients", plan=make_case_plan(case), pattern=PATTERNS["gqa"].pattern)
    refusal = "create_graph: gradients of gradients of planned attention are not supported"
    assert results == [(refusal, 0.0)] * 2


@pytest.mark.parametrize("every", [1, 2], ids=["every rank", "every second rank"])
@pytest.mark.parametrize(
    "layout",
    [Ring(prefetch=1), Gather(chunks=1), Hierarchical(inner_size=2)],
)
def test_first_tasks_may_be_issued_before_first_transfers(
    layout: Layout, every: int, rank_pools: Callable[[int], RankPool]
) -> None:
    """What GPUs do, with the same results; and launches of one backward share their scratch."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=layout,
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
    case = Case(world_size=1, placement="striped", granularity_tokens=64, layout=Ring(), pattern="gqa")
    job = {"plan": make_case_plan(case), "pattern": PATTERNS["gqa"].pattern, "seed": 7, "every": 1}
    (result,) = rank_pools(1).run("attention_computing_first", **job)
    assert (result["launches"], result["scratches"]) == (1, 0)


def test_a_wrong_pattern_is_seen(rank_pools: Callable[[int], RankPool]) -> None:
    """The oracle can fail: another pattern gives results far from the reference's."""
    case = Case(world_size=2, placement="striped", granularity_tokens=64, layout=Ring(), pattern="gqa")
    plan = make_case_plan(case)
    results = rank_pools(2).run("attention", plan=plan, pattern=PATTERNS["gqa"].mutated(), seed=7)
    placement = plan.make_placement()
    wanted = expected("gqa", placement.padded_tokens, seed=7)
    rows = placement.positions(1)
    assert largest_difference(results[1]["out"], wanted["out"][:, rows]) > 1e-3


def test_batches_share_the_pattern(rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=3, placement="zigzag", granularity_tokens=64, layout=Gather(chunks=2),
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
    ("placement", "layout"),
    [("striped", Gather(chunks=1)), ("zigzag", Gather(chunks=1)), ("striped", Ring())],
)
def test_triton_kernels_play_the_same_schedules(
    placement: str, layout: Layout, rank_pools: Callable[[int], RankPool]
) -> None:
    """The Triton backend in its interpreter, over gloo: what GPUs will run, checked without one."""
    case = Case(world_size=3, placement=placement, granularity_tokens=64, layout=layout,
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
    case = Case(world_size=2, placement="zigzag", granularity_tokens=64, layout=Ring(), pattern="gqa")
    for verdicts in rank_pools(2).run(
        "verified", plan=make_case_plan(case, dtype=dtype), pattern=PATTERNS["gqa"].pattern, seed=5
    ):
        assert [verdict.name for verdict in verdicts] == ["out", "lse", "dq", "dk", "dv"]
        assert all(verdict.ok for verdict in verdicts), verdicts


def test_a_plan_for_another_world_size_is_refused(rank_pools: Callable[[int], RankPool]) -> None:
    case = Case(world_size=3, placement="striped", granularity_tokens=64, layout=Ring(), pattern="gqa")
    with pytest.raises(RankFailure, match="world_size: the plan is for 3, not for 2"):
        rank_pools(2).run("attention", plan=make_case_plan(case), pattern=PATTERNS["gqa"].pattern, seed=0)


def test_different_plans_on_two_ranks_are_refused_by_all(rank_pools: Callable[[int], RankPool]) -> None:
    common = {"world_size": 2, "placement": "striped", "granularity_tokens": 64, "pattern": "gqa"}
    plans = [make_case_plan(Case(layout=layout, **common)) for layout in (Ring(), Gather())]
    arguments = [{"plan": plan, "pattern": PATTERNS["gqa"].pattern, "seed": 0} for plan in plans]
    with pytest.raises(RankFailure, match=r"plan \d+ digest: rank 1 has"):
        rank_pools(2).run_each("attention", arguments)


@pytest.mark.parametrize("degree", [2, 4])
def test_head_groups_with_the_kernels_of_gpus(degree: int, rank_pools: Callable[[int], RankPool]) -> None:
    """Triton's kernels, interpreted: what they are given of heads and slots is laid out as they want it."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=Ulysses(degree=degree), pattern="gqa")
    plan = make_case_plan(case, backend="triton")
    _check_all(case, plan, rank_pools(4).run("attention", plan=plan, pattern=PATTERNS["gqa"].pattern, seed=7))


@pytest.mark.parametrize("order", [(3, 2, 0, 1), (1, 0, 2, 3)])
def test_heads_in_another_order(order: tuple[int, ...], rank_pools: Callable[[int], RankPool]) -> None:
    """Results are those of the model's heads, whichever group computed them; other layers have their own order."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=Ulysses(degree=4),
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
        (Ulysses(degree=2), Gather(chunks=2)),
        (Ring(prefetch=1), Ulysses(degree=4, chunks=2)),
        (Collective(), Ulysses(degree=2)),
        (Ulysses(degree=4), Ulysses(degree=2)),
    ],
)
def test_heads_split_in_one_direction(forward: Layout, backward: Layout, rank_pools: Callable[[int], RankPool]) -> None:
    """Two sequences at a time, the first tasks before the first transfers as on GPUs."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=forward, pattern="gqa")
    plan, pattern = make_case_plan(case, backward=backward), PATTERNS["gqa"].pattern
    _check_all(case, plan, rank_pools(4).run("attention_computing_first", plan=plan, pattern=pattern, seed=7, every=2))
    results = rank_pools(4).run("attention", plan=plan, pattern=pattern, seed=7, batch=2)
    wanted = expected("gqa", plan.make_placement().padded_tokens, seed=7, batch=2)
    for rank, result in enumerate(results):
        rows = plan.make_placement().positions(rank)
        for name, whole in wanted.items():
            mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
            assert largest_difference(result[name], mine) <= TOLERANCE, (rank, name)


@pytest.mark.parametrize(
    ("layout", "rewrites"),
    [
        (Ulysses(degree=2), {"backward": columns_summed_last}),
        (Ulysses(degree=2), {"forward": keys_pulled, "backward": keys_pulled}),
        (Ulysses(degree=2), {"forward": heads_one_by_one, "backward": heads_one_by_one}),
        (Gather(chunks=2), {"forward": heads_one_by_one, "backward": heads_one_by_one}),
        (Ring(prefetch=1), {"backward": heads_one_by_one}),
    ],
    ids=["columns last", "pulled by groups", "group by heads", "gather by heads", "ring by heads"],
)
def test_what_no_layout_says_is_played(
    layout: Layout, rewrites: dict[str, Rewrite], rank_pools: Callable[[int], RankPool]
) -> None:
    """Columns' gradients may be summed last: those of parts that were sent are part of the sum."""
    case = Case(world_size=4, placement="striped", granularity_tokens=64, layout=layout,
                pattern="gqa")  # fmt: skip
    plan, pattern = make_case_plan(case), PATTERNS["gqa"].pattern
    results = rank_pools(4).run("attention_rewritten", plan=plan, pattern=pattern, seed=7, rewrites=rewrites)
    _check_all(case, plan, results)
