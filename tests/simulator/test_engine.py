"""The engine against timelines worked out by hand, and what must hold of every run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import tiny
from layout_cases import layouts_for
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.cost.timing import legs_of
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.schedule.schedule import Direction, Phase, Schedule, with_programs
from sparsering.simulator.engine import Jitter, simulate, simulate_layer
from sparsering.traces.errors import InputError, ScheduleError, UnsupportedError
from sparsering.traces.pattern import LayerPattern, VerticalSlash
from sparsering.traces.timeline import COMPUTE_STREAM, Timeline

COST = tiny.PairCost()
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def events(timeline: Timeline | None) -> list[tuple[float, float, int, str, str]]:
    """(start, end, rank, stream, name) of all spans, in order of time."""
    assert timeline is not None
    return [(span.start_us, span.end_us, span.rank, span.stream, span.name) for span in timeline.spans]


def play(schedule: Schedule, *, placement: str = "contiguous", cost: tiny.PairCost = COST, **cluster: Any) -> Timeline:
    workload = tiny.dense_workload(schedule.world_size, placement)
    result = simulate(schedule, workload, tiny.cluster(**cluster), cost, timeline=True)
    assert result.timeline is not None
    return result.timeline


def test_ring_of_two() -> None:
    # 1 us latency and 4,000 bytes at one a nanosecond: the shards arrive at 5 us, after 3 us of own work
    assert events(play(tiny.schedule("ring", 2))) == [
        (0.0, 3.0, 0, "compute", "q0.0 k0.0"),
        (0.0, 5.0, 0, "ring", "kv send 0.0, receive 1.0"),
        (0.0, 3.0, 1, "compute", "q1.0 k1.0"),
        (0.0, 5.0, 1, "ring", "kv send 1.0, receive 0.0"),
        (5.0, 8.0, 1, "compute", "q1.0 k0.0"),
    ]


def test_ring_of_two_backward() -> None:
    # 6 us a task; dK/dV are 8,000 bytes and go home once phase 1 is computed
    assert events(play(tiny.schedule("ring", 2, "backward"))) == [
        (0.0, 6.0, 0, "compute", "q0.0 k0.0"),
        (0.0, 5.0, 0, "ring", "kv send 0.0, receive 1.0"),
        (0.0, 6.0, 1, "compute", "q1.0 k1.0"),
        (0.0, 5.0, 1, "ring", "kv send 1.0, receive 0.0"),
        (6.0, 21.0, 0, "ring_grad", "dkv send 1.0, receive 0.0"),
        (6.0, 12.0, 1, "compute", "q1.0 k0.0"),
        (12.0, 21.0, 1, "ring_grad", "dkv send 0.0, receive 1.0"),
    ]


def test_a_transfer_waits_for_both_ends_and_a_call_for_all_its_transfers() -> None:
    # rank 0 has nothing to compute in phase 1 and joins at 6, rank 1 at 12: 12 + 1 + 8
    call = [e for e in events(play(tiny.schedule("ring", 2, "backward"))) if e[3] == "ring_grad"]
    assert [(start, end) for start, end, *_ in call] == [(6.0, 21.0), (12.0, 21.0)]


def test_calls_of_one_communicator_queue() -> None:
    # both steps are launched in phase 0; the second starts when the first has ended
    ring = [e[:3] for e in events(play(tiny.schedule("ring", 3, prefetch=2))) if e[3] == "ring"]
    assert ring == [(0.0, 5.0, 0), (0.0, 5.0, 1), (0.0, 5.0, 2), (5.0, 10.0, 0), (5.0, 10.0, 1), (5.0, 10.0, 2)]


def test_transfers_of_one_call_share_the_ports() -> None:
    # each rank sends two shards at once through one port: 1 + 2 * 4
    gather = [e[:3] for e in events(play(tiny.schedule("gather", 3, chunks=1))) if e[3] == "gather"]
    assert gather == [(0.0, 9.0, 0), (0.0, 9.0, 1), (0.0, 9.0, 2)]


def test_tasks_that_a_backend_joins_are_one_span() -> None:
    # 2 us a launch, 3 a pair; all shards arrive at 1 + 2 * 4; only pairs of the causal half have work
    schedule = tiny.schedule("gather", 3, chunks=1)

    def computed(backend: str) -> list[tuple[float, float, str]]:
        cost = tiny.PairCost(us_per_launch=2.0, backend=backend)
        return [(e[0], e[1], e[4]) for e in events(play(schedule, cost=cost)) if e[2:4] == (2, "compute")]

    own = (0.0, 5.0, "q2.0 k2.0")
    assert computed("triton") == computed("flash4") == [own, (9.0, 17.0, "q2.0 k1.0 k0.0")]
    assert computed("blockwise") == [own, (9.0, 14.0, "q2.0 k1.0"), (14.0, 19.0, "q2.0 k0.0")]


@pytest.mark.parametrize(("backend", "name"), [("triton", "q1.0 columns k0.0"), ("flash4", "q1.0 columns")])
def test_columns_are_fused_where_the_backend_fuses_them(backend: str, name: str) -> None:
    counted = tiny.counted(
        LayerPattern(
            seq_len_tokens=2 * tiny.BLOCK,
            block_size=tiny.BLOCK,
            heads=(VerticalSlash(columns=np.array([0, 1]), diagonals=np.array([0, 1])),),
        ),
        2,
    )
    schedule, cost = tiny.schedule("ring", 2, columns=2), tiny.PairCost(us_per_launch=2.0, backend=backend)
    timeline = simulate(schedule, counted, tiny.cluster(), cost, timeline=True).timeline
    spans = [e for e in events(timeline) if e[2:4] == (1, "compute")]
    assert spans[1][4] == name
    work_us = sum(end - start for start, end, *_ in spans)
    assert work_us == (2 if backend == "triton" else 3) * 2.0 + 3 * 3.0  # launches; own, columns, the other shard


def test_hierarchical_ring_over_shared_cards() -> None:
    # outer: 2 + two shards of 4,000 bytes through one card of 0.5 bytes a nanosecond = 18 us; inner: 1 + 4
    timeline = play(tiny.schedule("hierarchical", 4, inner_size=2), nodes=2, gpus=2)
    assert [e[:4] for e in events(timeline) if e[3] != "compute" and e[2] == 3] == [
        (0.0, 5.0, 3, "inner"),
        (0.0, 18.0, 3, "outer"),
        (18.0, 23.0, 3, "inner"),
    ]
    assert timeline.makespan_us == 26.0


def test_columns_are_summed_around_a_ring() -> None:
    # 2 columns * 2 * 500 bytes = 2,000; each of 4 members passes on 2 * 3 / 4 of them, beside the shards of the ring
    timeline = play(tiny.schedule("ring", 4, columns=2))
    spans = [span for span in timeline.spans if span.stream == "columns"]
    # both share the ports: 3,000 bytes at half speed end at 1 + 6 us
    assert [(span.start_us, span.end_us, span.nbytes) for span in spans] == [(0.0, 7.0, 6000)] * 4
    assert {span.end_us for span in timeline.spans if span.stream == "ring" and span.phase == 0} == {8.0}


def test_communication_slows_compute() -> None:
    # 1 us at full speed, then data moves from 1 to 5 us: the other 2 us of work take 4
    timeline = play(tiny.schedule("ring", 2), slowdown=0.5)
    assert [e[:3] for e in events(timeline) if e[3] == "compute"] == [(0.0, 5.0, 0), (0.0, 5.0, 1), (5.0, 8.0, 1)]


def test_pulls_take_less_time_and_slow_compute_less() -> None:
    # a shard of 4,000 bytes: 1 us of latency and 4 us by sends, 2 us by pulls; 3 us of work before it, 3 after it
    cases: list[tuple[bool, dict[str, float], list[float]]] = [
        (False, {"slowdown": 0.5, "pull_slowdown": 0.25}, [5.0, 5.0, 8.0]),  # as test_communication_slows_compute
        (True, {"slowdown": 0.5, "pull_slowdown": 0.0}, [3.0, 3.0, 6.0]),
        (True, {"slowdown": 0.5, "pull_slowdown": 0.5}, [4.0, 4.0, 7.0]),  # 1 us, then 2 us for 1 us of work, then 1 us
        (True, {"slowdown": 0.5}, [4.0, 4.0, 7.0]),
    ]
    for pull, slowdowns, ends in cases:
        schedule = tiny.schedule("gather", 2, chunks=1, pull=pull)
        timeline = play(schedule, **({"pull_bandwidth": 2000.0} | slowdowns))  # pyright: ignore[reportArgumentType]
        assert [event[1] for event in events(timeline) if event[3] == "compute"] == ends, (pull, slowdowns)
        (span, _) = [span for span in timeline.spans if span.stream == "gather"]
        assert (span.end_us, span.nbytes) == (3.0 if pull else 5.0, 8000)  # sent and received


def test_sends_beside_pulls_slow_compute_as_sends() -> None:
    cases = [(True, True), (True, False), (False, True), (False, False)]
    for pull_slowdown, lost in (
        (0.25, [0.5, 0.5, 0.25, 0.0]),
        (0.75, [0.75, 0.5, 0.75, 0.0]),
        (None, [0.5, 0.5, 0.5, 0.0]),
    ):
        gpu = tiny.cluster(slowdown=0.5, pull_slowdown=pull_slowdown).gpu
        assert [gpu.slowdown_of(sends=sends, pulls=pulls) for sends, pulls in cases] == lost


def test_imbalance_and_exposed_communication() -> None:
    result = simulate(tiny.schedule("ring", 2), tiny.dense_workload(2), tiny.cluster(), COST)
    assert result.makespan_us == 8.0
    assert result.compute_us.tolist() == [3.0, 6.0]
    assert result.exposed_us.tolist() == [5.0, 2.0]
    assert result.worker_imbalance == pytest.approx(6.0 / 4.5)
    assert result.step_imbalance == pytest.approx((3.0 + 3.0) / (3.0 + 1.5))
    assert result.peak_buffer_bytes == tiny.KV_BYTES
    assert result.timeline is None


def test_layer_is_forward_then_backward() -> None:
    forward, backward = (tiny.schedule("ring", 2, direction) for direction in DIRECTIONS)
    layer = simulate_layer((forward, backward), tiny.dense_workload(2), tiny.cluster(), COST, timeline=True)
    assert layer.makespan_us == 8.0 + 21.0
    assert layer.timeline is not None
    late = [span for span in layer.timeline.spans if span.direction == "backward"]
    assert min(span.start_us for span in late) == 8.0
    assert layer.timeline.makespan_us == 29.0


CASES = [
    Ring(),
    Ring(prefetch=3),
    Gather(chunks=2),
    Hierarchical(inner_size=2),
    Hierarchical(inner_size=4),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", CASES, ids=str)
def test_every_byte_is_sent_and_received_once(layout: Layout, direction: Direction) -> None:
    schedule = layout.build(shape=tiny.shape(4, columns=3), direction=direction)
    result = simulate(
        schedule, tiny.dense_workload(4), tiny.cluster(nodes=2, gpus=2, slowdown=0.1), COST, timeline=True
    )
    moved = {
        (call.communicator, transfer.id): sum(
            leg.nbytes for leg in legs_of(transfer, schedule.communicator(call.communicator).group_of(rank))
        )
        for rank in range(4)
        for phase in schedule.phases(rank)
        for call in phase.group_calls
        for transfer in call.transfers
    }
    assert result.timeline is not None
    assert sum(span.nbytes for span in result.timeline.spans) == 2 * sum(moved.values())
    assert len(result.timeline.flows) == sum("/all/" not in name for _, name in moved)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", CASES, ids=str)
def test_streams_never_overlap_and_arrows_lie_in_their_spans(layout: Layout, direction: Direction) -> None:
    schedule = layout.build(shape=tiny.shape(4, columns=3), direction=direction)
    workload = tiny.dense_workload(4)
    timeline = simulate(
        schedule, workload, tiny.cluster(nodes=2, gpus=2), COST, jitter=Jitter(sigma=0.5, seed=1), timeline=True
    ).timeline
    assert timeline is not None
    streams: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        streams.setdefault((span.rank, span.stream), []).append((span.start_us, span.end_us))
    for spans in streams.values():
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(sorted(spans)))
    for flow in timeline.flows:
        for end in (flow.source, flow.destination):
            assert any(start <= end.time_us <= stop for start, stop in streams[end.rank, end.stream])
    assert all((rank, COMPUTE_STREAM) in streams for rank in range(4))


def test_runs_repeat_exactly_and_jitter_follows_the_seed() -> None:
    schedule, workload = tiny.schedule("gather", 4), tiny.dense_workload(4, "zigzag")
    cluster = tiny.cluster(nodes=2, gpus=2)
    plain = [simulate(schedule, workload, cluster, COST, timeline=True) for _ in range(2)]
    assert plain[0].timeline == plain[1].timeline
    noises = [Jitter(sigma=0.2, seed=seed) for seed in (1, 1, 2)]
    noisy = [simulate(schedule, workload, cluster, COST, jitter=noise).makespan_us for noise in noises]
    assert noisy[0] == noisy[1] != noisy[2]
    assert noisy[0] != plain[0].makespan_us


def test_jitter_has_mean_one() -> None:
    schedule, workload = tiny.schedule("ring", 1), tiny.dense_workload(1)
    noises = [Jitter(sigma=0.3, seed=seed) for seed in range(400)]
    times = [simulate(schedule, workload, tiny.cluster(), COST, jitter=noise).makespan_us for noise in noises]
    assert np.mean(times) == pytest.approx(3.0, rel=0.05)


def test_a_schedule_that_deadlocks_is_named() -> None:
    schedule = tiny.schedule("ring", 3, prefetch=2)
    first, *rest = schedule.phases(1)
    swapped = Phase(index=0, group_calls=first.group_calls[::-1], tasks=first.tasks)
    broken = with_programs(schedule, {1: [swapped, *rest]})
    with pytest.raises(ScheduleError, match=r"rank 0 phase 1 waits forever for kv/0\.0/0>1/1"):
        simulate(broken, tiny.dense_workload(3), tiny.cluster(), COST)


def test_a_wait_for_something_never_launched_is_named() -> None:
    schedule = tiny.schedule("ring", 2)
    first, last = schedule.phases(0)
    broken = with_programs(schedule, {0: [first, Phase(index=1, waits=("kv/9.0/8>9/1",), tasks=last.tasks)]})
    with pytest.raises(ScheduleError, match=r"rank 0 phase 1 waits for kv/9\.0/8>9/1, which it never launched"):
        simulate(broken, tiny.dense_workload(2), tiny.cluster(), COST)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="workload: is for 4 ranks, the schedule for 2"):
        simulate(tiny.schedule("ring", 2), tiny.dense_workload(4), tiny.cluster(), COST)
    with pytest.raises(InputError, match="cluster: tiny has 4 GPUs, the schedule 8 ranks"):
        simulate(tiny.schedule("ring", 8), tiny.dense_workload(8), tiny.cluster(), COST)
    for jitter, problem in (
        (-1.0, "jitter: must be finite and not negative, not -1.0"),
        (float("nan"), "jitter: must be finite and not negative, not nan"),
        (float("inf"), "jitter: must be finite and not negative, not inf"),
    ):
        with pytest.raises(InputError, match=problem):
            Jitter(sigma=jitter, seed=0)


def test_a_transport_without_a_model_is_refused() -> None:
    schedule = tiny.schedule("ring", 2)
    programs = {}
    for rank in range(2):
        first, last = schedule.phases(rank)
        call = first.group_calls[0]
        unknown = tuple(replace(transfer, transport="pigeons") for transfer in call.transfers)
        programs[rank] = [replace(first, group_calls=(replace(call, transfers=unknown),)), last]
    with pytest.raises(UnsupportedError, match="pigeons of kv"):
        simulate(with_programs(schedule, programs), tiny.dense_workload(2), tiny.cluster(), COST)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pull_is_priced_as_a_send_within_one_node(direction: Direction) -> None:
    sent, pulled = (tiny.schedule("gather", 4, direction, chunks=2, pull=pull) for pull in (False, True))
    inputs = tiny.dense_workload(4), tiny.cluster(), COST
    for evaluate in (simulate, CompiledRecurrence()):
        assert evaluate(sent, *inputs).makespan_us == evaluate(pulled, *inputs).makespan_us
        with pytest.raises(InputError, match="cluster: ranks pull within one node only, tiny has 2 GPUs a node"):
            evaluate(pulled, inputs[0], tiny.cluster(nodes=2, gpus=2), COST)


@pytest.mark.parametrize("layout", layouts_for(tiny.shape(1), counts=(1,)), ids=str)
def test_one_rank_alone_only_computes(layout: Layout) -> None:
    schedule = layout.build(shape=tiny.shape(1), direction="forward")
    result = simulate(schedule, tiny.dense_workload(1), tiny.cluster(), COST)
    assert (result.makespan_us, result.exposed_us.tolist()) == (3.0, [0.0])
