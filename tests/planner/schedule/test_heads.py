"""Heads dealt out to groups: evenly where that can be, whole K/V heads together, in plans and in the search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from ring_cases import PATTERNS, Case, make_case_plan, make_placement
from search_cases import allowing, problem
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import load_plan
from sparsering.planner.schedule.heads import balanced_order, head_load, heaviest, is_order, key_order
from sparsering.planner.schedule.workload import workload
from sparsering.planner.search.scores import ScoreBoard
from sparsering.planner.search.selection import select
from sparsering.traces.errors import InputError

CASE = Case(world_size=4, placement="striped", granularity_tokens=64, layout=Ulysses(degree=4),
            pattern="gqa")  # fmt: skip


def test_by_hand() -> None:
    load = np.array([8.0, 7.0, 1.0, 2.0, 5.0, 5.0, 5.0, 1.0])
    # Four K/V heads of 15, 3, 10 and 6: the heaviest goes with the lightest.
    assert balanced_order(load, kv_heads=4, degree=2) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert heaviest(load, tuple(range(8)), 2) == 18 and heaviest(load, (0, 1, 2, 3, 4, 5, 6, 7), 4) == 15
    uneven = np.array([8.0, 7.0, 5.0, 5.0, 1.0, 2.0, 5.0, 1.0])  # 15, 10, 3, 6
    order = balanced_order(uneven, kv_heads=4, degree=2)
    assert order == (0, 1, 4, 5, 2, 3, 6, 7) and heaviest(uneven, order, 2) == 18
    assert key_order(order, kv_heads=4) == (0, 2, 1, 3)
    # Four groups over two K/V heads: each K/V head's query heads are dealt out to two.
    assert balanced_order(load, kv_heads=2, degree=4) == (0, 2, 1, 3, 4, 6, 5, 7)
    assert balanced_order(np.ones(8), kv_heads=2, degree=4) == tuple(range(8))


@given(data=st.data())
def test_orders_are_permutations_and_never_worse(data: st.DataObject) -> None:
    kv_heads, per_key = data.draw(st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (6, 2)]))
    heads = kv_heads * per_key
    degrees = [one for one in range(2, heads + 1) if not heads % one and not max(one, kv_heads) % min(one, kv_heads)]
    degree = data.draw(st.sampled_from(degrees))
    load = np.array(data.draw(st.lists(st.floats(0, 1e6), min_size=heads, max_size=heads)))
    order = balanced_order(load, kv_heads=kv_heads, degree=degree)
    assert is_order(order, heads=heads, kv_heads=kv_heads)
    assert heaviest(load, order, degree) <= heaviest(load, tuple(range(heads)), degree)
    assert sorted(key_order(order, kv_heads=kv_heads)) == list(range(kv_heads))


def test_what_is_no_order() -> None:
    assert is_order((1, 0, 2, 3), heads=4, kv_heads=2) and is_order((2, 3, 1, 0), heads=4, kv_heads=2)
    for wrong in ((0, 2, 1, 3), (0, 1, 2), (0, 0, 2, 3), (1, 2, 3, 4)):
        assert not is_order(wrong, heads=4, kv_heads=2)


@pytest.mark.parametrize("name", ["gqa", "documents", "many"])
def test_load_is_what_the_ranks_compute(name: str) -> None:
    """Whole blocks: all ranks' tile pairs of a head, and its columns in parts of tiles."""
    case = replace(CASE, pattern=name, granularity_tokens=PATTERNS[name].pattern.block_size)
    pattern = PATTERNS[name].pattern
    counted = workload(pattern, make_placement(case, pattern)).active.sum(axis=(0, 1))
    load = head_load(pattern)
    for head, blocks, found in zip(pattern.heads, counted, load, strict=True):
        after = [pattern.num_blocks - column // pattern.block_size for column in head.columns]
        assert found == pytest.approx(blocks + sum(after) / pattern.block_size)


def test_a_plan_file_holds_orders_and_refuses_others(tmp_path: Path) -> None:
    plan = make_case_plan(CASE, head_orders=((1, 0, 3, 2), (0, 1, 2, 3)))
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.head_orders == plan.head_orders and loaded.digest == plan.digest
    assert plan.digest != make_case_plan(CASE, head_orders=((0, 1, 2, 3), (0, 1, 2, 3))).digest
    assert (loaded.head_order(0), loaded.head_order(1)) == ((1, 0, 3, 2), None)
    with pytest.raises(InputError, match="layer: is None; the plan has orders of heads for 2 layers"):
        loaded.head_order(None)
    for orders, problem_ in (
        (((0, 2, 1, 3), (0, 1, 2, 3)), r"head_orders.0: \[0, 2, 1, 3\] is no order of whole K/V heads"),
        (((0, 1, 2, 3),), "head_orders: are of 1 layers, not 2"),
    ):
        wrong = plan.model_copy(update={"head_orders": orders})
        wrong.model_copy(update={"digest": wrong.compute_digest()}).save(tmp_path / "wrong.json")
        with pytest.raises(InputError, match=problem_):
            load_plan(tmp_path / "wrong.json")
        if len(orders) == 2:
            with pytest.raises(InputError, match=problem_):
                make_case_plan(CASE, head_orders=orders)


def test_the_search_evaluates_heads_as_they_are_dealt_out() -> None:
    """Two heavy heads first and two light ones: four K/V heads, two groups. Dealt out, both have as much to do."""
    given_problem = problem(kind="dense", gpus=2, blocks=16)
    pattern = given_problem.samples[0].pattern
    light = PATTERNS["gqa"].pattern.heads[3]
    uneven = replace(pattern, heads=(*pattern.heads[:2], light, light))
    load = head_load(uneven)
    assert load[0] == load[1] > 3 * load[2]
    model = given_problem.attention.model.model_copy(update={"kv_heads": 4})
    samples = (replace(given_problem.samples[0], pattern=uneven),)
    apart = replace(
        given_problem,
        attention=given_problem.attention.model_copy(update={"model": model}),
        samples=samples,
        cluster=tiny.cluster(gpus=2, bandwidth=1e6),
    )
    apart = allowing(apart, layouts=("ulysses",))
    dealt = replace(apart, summary=replace(apart.summary, head_load={0: load}))
    found = [
        select(
            one,
            quick=CompiledRecurrence(),
        ).pick
        for one in (apart, dealt)
    ]
    assert [pick.forward_layout.head_groups for pick in found] == [2, 2]
    assert found[0].worker_imbalance > 1.5 and found[1].worker_imbalance < 1.05
    order = dealt.head_order(0, 2)
    assert order == (0, 2, 1, 3)
    board = ScoreBoard(problem=dealt)
    choice = found[1].placement
    whole, split = board.workload(choice, 0), board.workload(choice, 0, 2)
    assert (split.active == whole.active[..., list(order)]).all()
    assert (split.columns == whole.columns[..., list(order)]).all()
