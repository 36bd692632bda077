"""The search: its pick against every plain layout, the memory limit, the bound, and what it says."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tiny
from search_cases import BLOCK, allowing, of_model, problem, problems, senseless
from sparsering.planner.cost.bounds import Allowed, compute_bound_us, entering_us, layout_bound_us, lower_bound_us
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.cost.kernels import DatasheetCost
from sparsering.planner.cost.memory import layer_memory
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.registry import layout_names
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.two_level import TwoLevel
from sparsering.planner.layouts.ulysses import MARGIN_PER_RANK
from sparsering.planner.plan import KernelSpec
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import workload
from sparsering.planner.search import estimates, selection
from sparsering.planner.search.candidates import baselines, layout_choices, placement_choices, why_not_executable
from sparsering.planner.search.problem import Problem, SearchSpace
from sparsering.planner.search.scores import ScoreBoard, Step
from sparsering.planner.search.selection import Selection, competing_us, select
from sparsering.simulator.engine import simulate
from sparsering.traces.errors import InputError


def whimsical(schedule, workload, cluster, cost) -> Evaluation:
    """An evaluator without any sense: times follow from hashes. The promises must hold under it too."""
    text = f"{schedule.layout} {schedule.buffer_bytes} {schedule.direction} {workload.active.tobytes()!r}"
    return senseless(float(hashlib.sha256(text.encode()).digest()[0]), schedule.world_size)


def plain_steps(found: Selection) -> list[Step]:
    return list(found.baselines)


def check_promises(given_problem: Problem, found: Selection) -> None:
    # Values are taken out first: an assertion that fails would print the whole of what it names.
    pick, backend = found.pick, given_problem.backend
    why_not = why_not_executable(pick.placement, backend=backend, block_size=BLOCK)
    assert why_not is None
    memory_bytes, limit_bytes = pick.memory_bytes, given_problem.memory_limit_bytes
    assert memory_bytes <= limit_bytes
    step_time_us, name = pick.step_time_us, pick.rater.name
    rivals = [step for step in found.table if step.eligible and step.rater.name == name]
    own_us, quickest_us = competing_us(pick), min(competing_us(step) for step in rivals)
    assert own_us <= quickest_us
    plain_us = min((step.step_time_us for step in rivals if step in plain_steps(found)), default=math.inf)
    assert step_time_us <= plain_us
    plain = {(step.placement, step.forward_layout) for step in found.baselines}
    assert plain == set(baselines(given_problem.space.offers(given_problem.cluster), block_size=BLOCK))
    assert {step.rater.name for step in found.baselines} == {name}


@given(given_problem=problems())
@settings(max_examples=8)
def test_no_plain_layout_beats_the_pick_under_the_recurrence(given_problem: Problem):
    found = select(given_problem, quick=CompiledRecurrence())
    check_promises(given_problem, found)


@given(given_problem=problems())
@settings(max_examples=6)
def test_no_plain_layout_beats_the_pick_under_the_simulator(given_problem: Problem):
    found = select(given_problem, quick=CompiledRecurrence(), final=simulate)
    check_promises(given_problem, found)
    bound_us, step_time_us = found.bound_us, found.pick.step_time_us
    assert bound_us <= step_time_us + 0.01


@given(given_problem=problems())
@settings(max_examples=10)
def test_no_plain_layout_beats_the_pick_under_a_whimsical_evaluator(given_problem: Problem):
    check_promises(given_problem, select(given_problem, quick=CompiledRecurrence(), final=whimsical))
    check_promises(given_problem, select(given_problem, quick=whimsical))


@given(given_problem=problems(), share=st.floats(0.0, 1.2))
@settings(max_examples=6)
def test_the_memory_limit_is_kept_or_refused_in_one_line(given_problem: Problem, share: float):
    free = select(given_problem, quick=CompiledRecurrence())
    sizes = [step.memory_bytes for step in free.table if step.why_not is None]
    limit = int(min(sizes) + share * (max(sizes) - min(sizes)))
    limited = allowing(given_problem, memory_limit_bytes=limit)
    found = select(limited, quick=CompiledRecurrence())
    check_promises(limited, found)
    free_us, limited_us = free.pick.step_time_us, found.pick.step_time_us
    assert limited_us >= free_us
    with pytest.raises(InputError, match="memory_limit_bytes") as caught:
        select(allowing(given_problem, memory_limit_bytes=1), quick=CompiledRecurrence())
    assert "\n" not in str(caught.value)


@given(given_problem=problems(), data=st.data())
@settings(max_examples=20)
def test_kept_events_and_times_change_nothing(given_problem: Problem, data):
    cluster, compiled = given_problem.cluster, CompiledRecurrence()
    choices = placement_choices(given_problem.attention, world_size=cluster.world_size)
    placement = data.draw(st.sampled_from(choices)).build(
        seq_len_tokens=given_problem.attention.seq_len_tokens,
        world_size=cluster.world_size,
        block_size=BLOCK,
        block_load=given_problem.summary.block_load,
    )
    layout = data.draw(st.sampled_from(layout_choices(given_problem.space.offers(cluster))))
    shape = given_problem.shape(placement)
    assume(layout.why_not(shape) is None)
    for direction in DIRECTIONS:
        shape = given_problem.shape(placement)
        schedule = layout.build(shape=shape, direction=direction)
        for sample in given_problem.samples:  # the second one meets the kept events
            work = workload(sample.pattern, placement)
            one = compiled(schedule, work, cluster, given_problem.cost)
            other = CompiledRecurrence()(schedule, work, cluster, given_problem.cost)
            assert (one.makespan_us, one.peak_buffer_bytes) == (other.makespan_us, other.peak_buffer_bytes)
            assert np.array_equal(one.phase_us, other.phase_us)
            split = (layout.head_groups,) if layout.head_groups > 1 else ()
            allowed = Allowed(keep_kv=layout.kept_slots is not None, degrees=split)
            bound_us = lower_bound_us(work, cluster, given_problem.cost, shape, direction, allowed)
            compute_bound = compute_bound_us(work, given_problem.cost, direction)
            # The recurrence lets transfers of different calls share a port for free, so it may beat the links.
            simulated = simulate(schedule, work, cluster, given_problem.cost)
            simulated_us = simulated.makespan_us
            assert compute_bound <= other.makespan_us + 0.01
            assert bound_us <= simulated_us + 0.01
            sent = cluster, shape, direction, layout, Pairs.all_of(cluster.world_size)
            slowed_us = (one.compute_us + cluster.gpu.communication_slowdown * entering_us(*sent)).max()
            assert max(layout_bound_us(*sent), slowed_us) <= simulated_us + 0.01


def test_memory_by_hand():
    shape = AttentionShape(
        world_size=4, tokens_per_rank=100, heads=8, kv_heads=2, head_dim=16, columns_capacity=64
    )  # fmt: skip
    kv, dkv = 2 * 100 * 2 * 16 * 2, 2 * 100 * 2 * 16 * 4
    q, accumulator, rows = 100 * 8 * 16 * 2, 100 * 8 * 16 * 4, 100 * 8 * 4
    columns = 2 * 64 * 8 * 16 * 2
    forward = layer_memory(Ring(prefetch=1).build(shape=shape, direction="forward"), shape)
    assert forward.buffer_bytes == 2 * kv
    backward = layer_memory(Gather(chunks=3).build(shape=shape, direction="backward"), shape)
    # q, k, v, out, dout; lse and delta; dq, dk, dv as they are summed, and as they are returned
    assert backward.home_bytes == 3 * q + kv + 2 * rows + accumulator + dkv + q + kv
    assert forward.home_bytes == backward.home_bytes
    assert forward.columns_bytes == backward.columns_bytes
    assert backward.columns_bytes == columns + 2 * columns
    assert backward.buffer_bytes == 3 * kv + 2 * dkv + dkv
    assert backward.total_bytes == backward.home_bytes + backward.columns_bytes + backward.buffer_bytes


def test_kv_are_kept_where_memory_allows():
    """Slow links make gathering again costly. The limit is for what all layers keep; plain layouts keep nothing."""
    rich = problem(kind="dense", gpus=4, blocks=16, bandwidth=10.0)
    found = select(allowing(rich, layouts=("ring", "gather")), quick=CompiledRecurrence())
    assert found.pick.forward_layout.kept_slots and found.pick.backward_layout.kept_slots
    assert not any(step.forward_layout.kept_slots for step in found.baselines)
    shape = rich.shape(ScoreBoard(problem=rich).placement(found.pick.placement))
    deep = of_model(rich, layers=50)
    kept = 3 * shape.kv_bytes
    schedule = Gather(chunks=1, keep_kv=True).build(shape=shape, direction="backward")
    one, all_of_them = (layer_memory(schedule, shape, layers=layers) for layers in (1, 50))
    assert (one.kept_bytes, all_of_them.kept_bytes) == (0, 49 * kept)
    poor = allowing(deep, memory_limit_bytes=49 * kept)
    found = select(poor, quick=CompiledRecurrence())
    assert not (found.pick.forward_layout.kept_slots or found.pick.backward_layout.kept_slots)
    assert found.pick.memory_bytes <= poor.memory_limit_bytes


def test_slow_links_between_nodes_are_crossed_once():
    """Two nodes of two: every shard crosses once; rounded gradients, where allowed, are quicker, and only there."""
    slow = problem(kind="dense", nodes=2, gpus=2, blocks=16, nic_bandwidth=10.0)
    wide, narrow = (
        select(allowing(slow, narrow_gradients=allowed), quick=CompiledRecurrence()).pick for allowed in (False, True)
    )
    for pick, rounded in ((wide, False), (narrow, True)):
        for layout in (pick.forward_layout, pick.backward_layout):
            assert layout == TwoLevel(inner_size=2, narrow_gradients=rounded)
    assert narrow.backward.makespan_us < 0.75 * wide.backward.makespan_us
    assert narrow.forward.makespan_us == wide.forward.makespan_us


def test_heads_are_split_where_that_gains_much():
    """As many K/V heads as query heads: a head group of K/V is a quarter of what a gather fetches."""
    slow = problem(kind="dense", gpus=4, blocks=16, bandwidth=20.0)
    many = of_model(slow, kv_heads=slow.attention.model.heads)
    pick = select(many, quick=CompiledRecurrence()).pick
    assert pick.forward_layout.head_groups > 1 and pick.backward_layout.head_groups > 1
    others = tuple(name for name in layout_names() if name != "ulysses")
    without = select(allowing(many, layouts=others), quick=CompiledRecurrence()).pick
    assert pick.step_time_us * (1 + MARGIN_PER_RANK * pick.forward_layout.head_groups) < without.step_time_us
    quick = replace(many, cluster=tiny.cluster(gpus=4, bandwidth=1e6))
    assert not select(quick, quick=CompiledRecurrence()).pick.forward_layout.head_groups > 1


def test_ranks_pull_where_the_file_says_how_fast_and_may_be_told_not_to():
    """Pulls at twice the rate, in whose shadow no compute slows, are picked in both directions."""
    slow = problem(kind="dense", pull_bandwidth=2000.0, pull_slowdown=0.0, slowdown=0.5)
    pulling, sending = (select(allowing(slow, pulls=pulls), quick=CompiledRecurrence()).pick for pulls in (True, False))
    for layout, pulled in ((pulling.forward_layout, True), (pulling.backward_layout, True)):
        assert layout.name == "gather" and layout.transfers.pull == pulled
    assert "pull" not in f"{sending.forward_layout} {sending.backward_layout}"
    assert pulling.step_time_us < sending.step_time_us
    final = select(slow, quick=CompiledRecurrence(), final=simulate).pick
    assert final.forward_layout.transfers.pull


def test_gradients_that_kernels_round_travel_so_unasked():
    """flash4 writes 16 bits: nothing is lost. Sums of a node's ranks are another thing."""
    cluster, slow = tiny.cluster(nodes=2, gpus=2), problem(kind="dense", nodes=2, gpus=2, bandwidth=100.0)
    flash4 = SearchSpace(kernels=KernelSpec(backend="flash4"))
    names = {str(one) for one in layout_choices(flash4.offers(cluster))}
    assert "gather (chunks 1, narrow_gradients)" in names and "two_level (inner_size 2)" in names
    assert not any("two_level" in name and "narrow_gradients" in name for name in names)
    assert (slow.space.rounds_parts, flash4.rounds_parts) == (False, True)
    assert allowing(slow, narrow_gradients=True).space.rounds_parts
    one_node = problem(kind="dense", bandwidth=100.0, backend="flash4")
    pick = select(one_node, quick=CompiledRecurrence()).pick
    assert pick.backward_layout.transfers.narrow


def test_rounded_gradients_are_quicker_within_a_node_too():
    slow = problem(kind="dense", bandwidth=100.0)
    wide, narrow = (
        select(allowing(slow, narrow_gradients=allowed), quick=CompiledRecurrence()) for allowed in (False, True)
    )
    assert narrow.pick.backward_layout.transfers.narrow
    assert narrow.pick.backward.makespan_us < 0.75 * wide.pick.backward.makespan_us
    assert narrow.bound_us <= narrow.pick.step_time_us


def test_token_striping_is_looked_at_but_never_picked_for_triton():
    whole_blocks, tokens = (
        select(problem(kind="dense", blocks=16, backend=backend, placements=("striped",)), quick=CompiledRecurrence())
        for backend in ("triton", "reference")
    )
    rows = [step for step in whole_blocks.table if step.placement.granularity_tokens == 1]
    assert rows
    assert {step.why_not for step in rows} >= {"triton needs whole blocks"}
    assert not any(step.eligible for step in rows)
    assert whole_blocks.pick.placement.granularity_tokens % BLOCK == 0
    assert any(one.eligible for one in tokens.table if one.placement.granularity_tokens == 1)


def test_heads_are_split_where_they_can_be_and_a_note_says_where_not():
    """Whole head parallelism is looked at under one placement, since all are alike to it; eight ranks have 4 heads."""
    found = select(problem(kind="vertical-slash", gpus=4), quick=CompiledRecurrence())
    choices = [one.placement for one in found.table if one.forward_layout.head_groups == 4]
    assert len(set(choices)) == 1
    assert len([one for one in found.table if one.forward_layout.head_groups == 2]) > 1
    too_many = select(problem(kind="dense", gpus=8), quick=CompiledRecurrence())
    assert "not for these sizes: ulysses (4 heads (2 K/V heads) cannot be split evenly over 8 ranks)" in too_many.notes


@pytest.mark.parametrize(("backend", "launches_less"), [("triton", 2), ("flash4", 2), ("blockwise", 0)])
def test_where_transfers_hide_only_launches_tell_chunks_apart(backend: str, launches_less: int):
    """Three shards are one launch or three, of 1 us each, where the backend joins them; then one chunk is picked."""
    given_problem = problem(kind="dense", gpus=4, backend=backend, bandwidth=1e6)
    given_problem = replace(given_problem, cost=DatasheetCost(
        gpu=given_problem.cluster.gpu, head_dim=64, block_size=BLOCK, backend=backend,
    ))  # fmt: skip
    only = allowing(given_problem, layouts=("gather",), placements=("striped",))
    found = select(only, quick=CompiledRecurrence())
    forward_us = {
        str(step.forward_layout): step.forward.makespan_us
        for step in found.table
        if step.placement == found.pick.placement
    }
    assert forward_us["gather (chunks 3)"] - forward_us["gather (chunks 1)"] == pytest.approx(launches_less)
    assert found.pick.forward_layout.parameters["chunks"] == 1


def test_equal_candidates_go_to_the_plainer_one():
    def equal(schedule, workload, cluster, cost) -> Evaluation:
        return senseless(100.0, schedule.world_size)

    found = select(problem(gpus=4), quick=equal)
    layouts = {str(layout) for layout in (found.pick.forward_layout, found.pick.backward_layout)}
    assert (str(found.pick.placement), layouts) == (f"striped ({BLOCK} tokens)", {"gather (chunks 1)"})


def evaluator_by_placement(given_problem: Problem, times_us: dict[str, float]):
    """Times of gathers by placement ("balanced", "striped 64", "striped"), 1,000 for all else."""
    board, known = ScoreBoard(problem=given_problem), {}
    choices = placement_choices(given_problem.attention, world_size=4)
    for choice in choices:
        if choice.granularity_tokens >= BLOCK:
            work = workload(given_problem.samples[0].pattern, board.placement(choice)).active.tobytes()
            known.setdefault(work, f"{choice.name} {choice.granularity_tokens}")

    def evaluate(schedule, workload, cluster, cost) -> Evaluation:
        name = known.get(workload.active.tobytes(), "other 1")
        us = times_us.get(name, times_us.get(name.split()[0], 1000.0))
        return senseless(us if schedule.layout == "gather" else 1000.0, schedule.world_size)

    return evaluate


@pytest.mark.parametrize("final", [False, True], ids=["recurrence", "simulator"])
@pytest.mark.parametrize(
    ("times_us", "picked"),
    [
        ({"striped 64": 100.0, "balanced": 99.1}, "striped (64 tokens)"),
        ({"striped 64": 100.0, "balanced": 98.9}, "balanced (64 tokens)"),
        ({"striped 64": 103.0, "balanced": 100.9, "striped 128": 100.0}, "striped (128 tokens)"),
        ({"striped 64": 100.4, "balanced": 100.0, "striped 128": 100.1}, "striped (128 tokens)"),
        ({"striped 64": 100.4, "striped 128": 100.0}, "striped (128 tokens)"),
    ],
)
def test_irregular_placements_must_gain_more_than_their_kernels_may_lose(
    times_us: dict[str, float], picked: str, final: bool
):
    given_problem = problem(kind="skewed", columns=0)
    evaluate = evaluator_by_placement(given_problem, times_us)
    found = select(given_problem, quick=evaluate, final=evaluate if final else None)
    assert str(found.pick.placement) == picked


def test_the_best_few_of_every_way_to_transfer_have_the_last_word():
    """The quick evaluator takes sends for the quickest, the good one pulls: it must be asked about them."""

    def quick(schedule, workload, cluster, cost) -> Evaluation:
        return senseless(100.0 + schedule.shares, schedule.world_size)

    def good(schedule, workload, cluster, cost) -> Evaluation:
        return senseless(100.0 - schedule.shares, schedule.world_size)

    found = select(problem(pull_bandwidth=2000.0), quick=quick, final=good)
    for layout in (found.pick.forward_layout, found.pick.backward_layout):
        assert layout.transfers.pull


def test_the_best_regular_placement_has_the_last_word_beside_the_best_few(monkeypatch: pytest.MonkeyPatch):
    for module in (estimates, selection):
        monkeypatch.setattr(module, "SCREENED", 100.0)  # bounds know nothing of what these evaluators say
    given_problem = problem(kind="skewed", columns=0, blocks=48)
    irregular = {f"balanced {blocks * BLOCK}": 100.0 for blocks in (1, 2, 4)}
    evaluate = evaluator_by_placement(given_problem, irregular | {"striped 128": 100.5})
    assert str(select(given_problem, quick=evaluate, final=evaluate).pick.placement) == "striped (128 tokens)"
