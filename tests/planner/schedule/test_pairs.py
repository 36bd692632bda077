"""Pairs of shards without work: found from patterns, kept by the plan, neither computed nor sent, and never guessed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from ring_cases import PATTERNS, Case, make_case_plan
from sparsering.planner.check.check import check
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import load_plan
from sparsering.planner.replay import find_trace, recorded_layer
from sparsering.planner.schedule.pairs import Pairs, active_blocks, causal_pairs, pattern_pairs
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS, contiguous
from sparsering.planner.schedule.schedule import DIRECTIONS, Direction
from sparsering.planner.search import sampling
from sparsering.planner.search.problem import SearchSpace
from sparsering.planner.search.sampling import summarize
from sparsering.planner.search.search import make_problem, plan_trace
from sparsering.runtime.attention.masks import PairGuard, mask_of, mask_pairs
from sparsering.simulator.engine import simulate
from sparsering.simulator.simulate_plan import simulate_plan
from sparsering.traces.errors import InputError
from sparsering.traces.pattern import dense, element_mask
from sparsering.traces.synthetic import SyntheticSettings, synthesize, write_synthetic_trace

BLOCK = 64
KINDS = ["dense", "vertical-slash", "sink-window", "xattention", "packed-documents"]
WINDOW = SyntheticSettings(seq_len_tokens=16 * 64, block_size=64, heads=2, sink_tokens=4, window_tokens=150)


def window_pairs(world_size: int, placement: str = "contiguous") -> Pairs:
    """Pairs of a window of three blocks over four blocks a rank."""
    pattern = synthesize("sink-window", replace(WINDOW, seq_len_tokens=world_size * 4 * BLOCK), seed=0)
    sizes = {"seq_len_tokens": pattern.seq_len_tokens, "world_size": world_size, "granularity_tokens": BLOCK}
    return pattern_pairs(pattern, REGULAR_PLACEMENTS[placement](**sizes))


@given(
    kind=st.sampled_from(KINDS),
    placement=st.sampled_from(sorted(REGULAR_PLACEMENTS)),
    world_size=st.integers(1, 4),
    granularity=st.sampled_from([1, 16, 64, 128]),
    tokens=st.integers(70, 400),
    seed=st.integers(0, 3),
)
def test_no_pair_with_work_is_ever_left_out(
    kind: str, placement: str, world_size: int, granularity: int, tokens: int, seed: int
) -> None:
    drawn = SyntheticSettings(
        seq_len_tokens=tokens, block_size=BLOCK, heads=2, columns=0, density=0.15, sink_tokens=0, window_tokens=70,
        mean_document_tokens=90,
    )  # fmt: skip
    pattern = synthesize(kind, drawn, seed=seed)
    place = REGULAR_PLACEMENTS[placement](seq_len_tokens=tokens, world_size=world_size, granularity_tokens=granularity)
    attended = np.logical_or.reduce([element_mask(pattern, head) for head in range(pattern.num_heads)])
    owner = place.owner_of_tokens()[:tokens]
    needed = np.zeros((world_size, world_size), dtype=bool)
    needed[owner[:, None].repeat(tokens, 1)[attended], owner[None, :].repeat(tokens, 0)[attended]] = True
    found = pattern_pairs(pattern, place)
    assert not (needed & ~found.matrix).any()
    assert causal_pairs(place).covers(found)
    mask = mask_of(pattern, columns_capacity=64, device=torch.device("cpu"))
    assert mask_pairs(mask, place) == found


def test_a_window_over_stretches_needs_the_neighbour_alone() -> None:
    assert window_pairs(4).rows == ("1000", "1100", "0110", "0011")
    assert window_pairs(4, "striped").complete
    assert causal_pairs(contiguous(seq_len_tokens=400, world_size=3, granularity_tokens=64)).rows == (
        "100", "110", "111")  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "hops"),
    [
        (Ring(prefetch=1), 3),
        (Gather(chunks=2), 3),
        (Hierarchical(inner_size=2), 4),  # from one node to the other over the rail, then to the next place
    ],
)
def test_a_window_moves_one_shard_a_rank(layout: Layout, hops: int) -> None:
    shape, pairs = tiny.shape(4), window_pairs(4)
    forward, backward = (
        check(layout.build(shape=shape, direction=direction, pairs=pairs), inactive=pairs.left_out())
        for direction in DIRECTIONS
    )
    assert (forward.tasks, forward.transfers) == (7, hops)
    assert (backward.tasks, backward.transfers) == (7, 2 * hops)  # gradients go straight home
    everything = check(layout.build(shape=shape, direction="backward"))
    assert (everything.tasks, everything.transfers) == (16, 24)
    assert backward.peak_bytes < everything.peak_bytes


@given(data=st.data(), direction=st.sampled_from(DIRECTIONS))
def test_engine_and_recurrence_play_reduced_schedules_alike(data: st.DataObject, direction: Direction) -> None:
    """The same work on every rank, and on forward rings on one node the same time.

    Elsewhere transfers share ports: the recurrence fixes their order beforehand, and may be above or below.
    """
    layout = data.draw(st.sampled_from([Ring(prefetch=2), Gather(chunks=2), Hierarchical(inner_size=2)]))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4))
    schedule = layout.build(shape=tiny.shape(4), direction=direction, pairs=Pairs.of(np.array(rows)))
    work, cluster, cost = tiny.dense_workload(4), tiny.cluster(gpus=4), tiny.PairCost()
    quick, played = CompiledRecurrence()(schedule, work, cluster, cost), simulate(schedule, work, cluster, cost)
    assert quick.compute_us.tolist() == played.compute_us.tolist()
    assert quick.makespan_us >= quick.compute_us.max()
    if isinstance(layout, Ring) and direction == "forward":
        assert quick.makespan_us == played.makespan_us


# Plans


def test_a_plan_keeps_its_pairs(tmp_path: Path) -> None:
    case = Case(world_size=4, placement="contiguous", granularity_tokens=64, layout=Ring(),
                pattern="documents")  # fmt: skip
    plan = make_case_plan(case, leave_out=True)
    assert plan.pairs is not None and plan.digest != make_case_plan(case).digest
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan and again.active_pairs() == plan.active_pairs()
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace(f'"{plan.pairs[3]}"', '"1111"'))
    with pytest.raises(InputError, match="digest"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("rows", [("10", "11", "11"), ("1x", "11"), ("01", "11")])
def test_impossible_pairs_are_refused(rows: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="pairs"):
        Pairs(rows=rows)


def test_another_pattern_is_refused_by_name() -> None:
    """On replay before any work, with the layer; by the simulator; and any mask before it is computed with."""
    case = Case(world_size=4, placement="contiguous", granularity_tokens=64, layout=Ring(),
                pattern="documents")  # fmt: skip
    plan, pattern = make_case_plan(case, leave_out=True), PATTERNS["documents"].pattern
    device, other = torch.device("cpu"), replace(pattern, documents=None, anchor_tokens=0)
    plan.require_covered(pattern, about="layer 5")
    with pytest.raises(InputError, match=r"pairs: layer 5 activates the queries of rank 2 against the keys of rank 0"):
        plan.require_covered(other, about="layer 5")
    with pytest.raises(InputError, match="a pair that the plan leaves out"):
        simulate_plan(plan, other, tiny.cluster(gpus=4))
    guard = PairGuard(plan.active_pairs(), plan.make_placement())
    admitted = mask_of(pattern, columns_capacity=64, device=device)
    guard.admit(admitted)
    guard.admit(admitted)
    with pytest.raises(InputError, match=r"the mask activates the queries of rank 2"):
        guard.admit(mask_of(other, columns_capacity=64, device=device))


def test_a_guard_that_leaves_out_nothing_causal_never_looks() -> None:
    place = contiguous(seq_len_tokens=256, world_size=4, granularity_tokens=64)
    guard = PairGuard(causal_pairs(place), place)
    mask = mask_of(dense(seq_len_tokens=256, block_size=64, heads=1), columns_capacity=0, device=torch.device("cpu"))
    object.__setattr__(mask, "active", None)  # looking would fail
    guard.admit(mask)


def test_the_search_plans_for_what_the_whole_trace_needs(tmp_path: Path) -> None:
    """A window of three blocks over stretches of four: only neighbours exchange."""
    trace = write_synthetic_trace(tmp_path / "trace", "sink-window", WINDOW, layers=3, steps=2, kv_heads=2, head_dim=64)
    cluster = tiny.cluster(gpus=4, bandwidth=1.0)
    plan = plan_trace(trace, cluster, SearchSpace(placements=("contiguous",), layouts=("ring",)), evaluator=simulate)
    assert plan.active_pairs() == window_pairs(4)
    sent = check(plan.schedule("backward"), inactive=plan.active_pairs().left_out()).sent_bytes
    shape = plan.attention_shape()
    assert sent["ring"] == (shape.kv_bytes,) * 3 + (0,)
    assert sent["ring_grad"] == (0,) + (shape.dkv_bytes,) * 3
    plan.save(tmp_path / "plan.json")
    recorded = recorded_layer(find_trace(plan, tmp_path / "plan.json", None), None, None)
    simulate_plan(load_plan(tmp_path / "plan.json"), recorded.pattern, cluster)


def test_all_layers_steps_and_heads_count(tmp_path: Path) -> None:
    drawn = SyntheticSettings(seq_len_tokens=32 * 64, block_size=64, heads=3, density=0.2)
    trace = write_synthetic_trace(tmp_path, "xattention", drawn, layers=3, steps=2, kv_heads=3, head_dim=64)
    found = summarize(trace).active_blocks
    patterns = [trace.layer_pattern(step, layer) for step in trace.steps for layer in trace.layers]
    wanted = np.logical_or.reduce([head.block_bits(32) for pattern in patterns for head in pattern.heads])
    assert found is not None and (found == wanted).all()
    assert (wanted != active_blocks(patterns[0])).any()


def test_where_some_layers_activate_most_blocks_the_others_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = SyntheticSettings(seq_len_tokens=32 * 64, block_size=64, heads=3, density=0.4)
    trace = write_synthetic_trace(tmp_path, "xattention", drawn, layers=3, steps=2, kv_heads=3, head_dim=64)
    whole = summarize(trace)
    monkeypatch.setattr(sampling, "MAX_LOADED_LAYERS", 2)
    assert whole.active_blocks is not None
    found = summarize(trace)
    assert found.active_blocks is None
    assert {layer: load.tolist() for layer, load in found.head_load.items()} == {
        layer: load.tolist() for layer, load in whole.head_load.items()
    }
    monkeypatch.setattr(sampling, "WIDE_SHARE", 1.0)
    again = summarize(trace).active_blocks
    assert again is not None and np.array_equal(again, whole.active_blocks)


def test_what_is_chosen_anew_is_bound_by_causality_alone(tmp_path: Path) -> None:
    trace = write_synthetic_trace(tmp_path, "sink-window", WINDOW, layers=1, steps=1, kv_heads=2, head_dim=64)
    problem = make_problem(trace, tiny.cluster(gpus=4), SearchSpace(pattern="choose"), cost=tiny.PairCost())
    place = contiguous(seq_len_tokens=WINDOW.seq_len_tokens, world_size=4, granularity_tokens=64)
    assert problem.pairs(place) == causal_pairs(place)
    assert replace(problem, space=SearchSpace()).pairs(place) == window_pairs(4)
    unknown = replace(problem.summary, active_blocks=None)
    assert replace(problem, space=SearchSpace(), summary=unknown).pairs(place) == causal_pairs(place)


def test_pairs_that_every_node_has_make_nodes_alike() -> None:
    """Neighbours of two nodes of two: around the ranks they are neighbours already, but for the first and the last."""
    chain = Pairs.of(np.tri(4, dtype=bool) & ~np.tri(4, k=-2, dtype=bool))
    assert (chain.period(1), chain.period(2)) == (4, 4)
    ring = chain.closed(1)
    assert (ring.period(1), ring.period(2), ring.matrix.sum()) == (1, 2, 8)
    assert ring.covers(chain)
    halves = Pairs.of(np.tri(4, dtype=bool)).closed(2)
    assert (halves.matrix.sum(), halves.period(2)) == (16 - 2, 2)
    assert Pairs.all_of(4).closed(2) == Pairs.all_of(4)
