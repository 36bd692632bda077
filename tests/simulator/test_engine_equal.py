"""The engine against the reference engine (simpy): the same times, timelines and errors, to the nanosecond."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from layout_cases import layout_values, layouts_for
from reference_engine import reference
from sparsering.planner.cost.cluster import Cluster
from sparsering.planner.cost.constants import NO_CONSTANTS, LayerConstants
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, GroupCall, Phase, Schedule, with_programs
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import Workload
from sparsering.simulator.engine import STEADY, Jitter, simulate
from sparsering.traces.errors import InputError, ScheduleError
from sparsering.traces.pattern import LayerPattern

GRIDS = [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (4, 2)]
ROUND = {"bandwidth": 1000.0, "latency_us": 1.0, "nic_bandwidth": 500.0, "nic_latency_us": 2.0}
BUSY = LayerConstants(delta_us_per_token=0.31, round_us_per_token=0.17, landing_us_per_byte=0.0007)


# Round numbers make things meet in one nanosecond, where their order decides; others make rates that have no end.
links = st.one_of(
    st.sampled_from([ROUND, ROUND | {"latency_us": 0.0, "nic_latency_us": 0.0}]),
    st.fixed_dictionaries(
        {
            "bandwidth": st.floats(50.0, 5000.0),
            "latency_us": st.floats(0.0, 20.0),
            "nic_bandwidth": st.floats(20.0, 2000.0),
            "nic_latency_us": st.floats(0.0, 50.0),
        }
    ),
)
slowdowns = st.sampled_from([{}, {"slowdown": 0.5}, {"slowdown": 0.3, "pull_slowdown": 0.1}, {"pull_slowdown": 0.25}])
costs = st.builds(
    tiny.BusyCost,
    us_per_pair=st.sampled_from([0.0, 0.25, 1.0, 0.7313]),
    us_per_launch=st.sampled_from([0.0, 2.0]),
    backend=st.sampled_from(["triton", "flash4", "blockwise"]),
    constants=st.sampled_from([NO_CONSTANTS, BUSY]),
)
jitters = st.sampled_from([STEADY, STEADY, Jitter(sigma=0.2, seed=5)])


def shape_of(world: int, columns: int) -> AttentionShape:
    """Four blocks a rank; few bytes, so that transfers take about as long as launches."""
    return AttentionShape(
        world_size=world, tokens_per_rank=4 * tiny.BLOCK, heads=2 * world, kv_heads=2, head_dim=16,
        columns_capacity=columns,
    )  # fmt: skip


def workload_of(world: int, columns: int, *, seed: int = 0, placement: str = "zigzag") -> Workload:
    """A few random slashes and columns a head."""
    random, blocks = np.random.default_rng(seed), 4 * world
    heads = tuple(
        tiny.slash(np.sort(random.choice(blocks * tiny.BLOCK, columns, replace=False)),
                   np.unique([0, *random.integers(0, blocks, 4)]))
        for _ in range(2 * world)
    )  # fmt: skip
    pattern = LayerPattern(seq_len_tokens=blocks * tiny.BLOCK, block_size=tiny.BLOCK, heads=heads)
    return tiny.counted(pattern, world, placement)


def outcome(evaluate: Callable[..., Evaluation], *given: Any, **options: Any) -> tuple[Any, ...]:
    """What an engine returns, or the error that it raises."""
    try:
        found = evaluate(*given, **options, timeline=True)
    except (InputError, ScheduleError) as error:
        return type(error), str(error)
    return (
        found.makespan_us, found.compute_us.tolist(), found.phase_us.tolist(), found.peak_buffer_bytes, found.timeline,
    )  # fmt: skip


def cluster_for(schedule: Schedule, nodes: int, gpus: int, **options: Any) -> Cluster:
    """A cluster of the ranks of a schedule; of one node where they pull."""
    if schedule.shares:
        nodes, gpus, options = 1, nodes * gpus, options | {"pull_bandwidth": 1.4 * options["bandwidth"], "switch": None}
    return tiny.cluster(nodes=nodes, gpus=gpus, **options)


@given(
    st.data(), st.sampled_from(GRIDS), st.sampled_from(DIRECTIONS), st.sampled_from([0, 3]),
    st.sampled_from([None, 700.0, 1500.0]), links, slowdowns,
)  # fmt: skip
def test_equal_to_the_reference(
    data: st.DataObject, grid: tuple[int, int], direction: Any, columns: int, switch: float | None,
    links: dict[str, float], slowdowns: dict[str, float],
) -> None:  # fmt: skip
    world, shape = grid[0] * grid[1], shape_of(grid[0] * grid[1], columns)
    schedule = data.draw(layout_values(shape)).build(shape=shape, direction=direction)
    nics = data.draw(st.sampled_from([1, grid[1]]))
    cluster = cluster_for(schedule, *grid, nics=nics, switch=switch, **links, **slowdowns)
    placement = data.draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    work = workload_of(world, columns, seed=data.draw(st.integers(0, 3)), placement=placement)
    given, jitter = (schedule, work, cluster, data.draw(costs)), data.draw(jitters)
    assert outcome(simulate, *given, jitter=jitter) == outcome(reference, *given, jitter=jitter)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", layouts_for(shape_of(4, 3), counts=(1, 2, 4)), ids=str)
def test_every_layout_equals_the_reference(layout: Layout, direction: Any) -> None:
    schedule, work = layout.build(shape=shape_of(4, 3), direction=direction), workload_of(4, 3)
    for cost in (tiny.BusyCost(us_per_pair=0.25), tiny.BusyCost(us_per_pair=0.01, constants=BUSY)):
        for options in (ROUND, ROUND | {"slowdown": 0.2}, ROUND | {"latency_us": 0.0, "switch": 900.0}):
            given = (schedule, work, cluster_for(schedule, 2, 2, **options), cost)
            assert outcome(simulate, *given) == outcome(reference, *given)


@given(st.data(), st.sampled_from(DIRECTIONS), links, slowdowns)
def test_equal_where_pairs_are_left_out(
    data: st.DataObject, direction: Any, links: dict[str, float], slowdowns: dict[str, float]
) -> None:
    shape = shape_of(4, 0)
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4))
    layout = data.draw(layout_values(shape, leaves_out=True))
    schedule = layout.build(shape=shape, direction=direction, pairs=Pairs.of(np.array(rows)))
    given = (schedule, workload_of(4, 0), cluster_for(schedule, 2, 2, **links, **slowdowns), data.draw(costs))
    assert outcome(simulate, *given) == outcome(reference, *given)


def broken(schedule: Schedule, data: st.DataObject) -> Schedule:
    """The schedule with one phase of one rank changed, so that it may deadlock or be refused."""
    rank = data.draw(st.integers(0, schedule.world_size - 1))
    phases = list(schedule.phases(rank))
    number = data.draw(st.integers(0, len(phases) - 1))
    phase, other = phases[number], phases[data.draw(st.integers(0, len(phases) - 1))]
    kind = data.draw(st.sampled_from(["no calls", "calls turned", "calls twice", "other waits", "no waits", "split"]))
    changed: dict[str, Phase] = {
        "no calls": replace(phase, group_calls=()),
        "calls turned": replace(phase, group_calls=phase.group_calls[::-1]),
        "calls twice": replace(phase, group_calls=phase.group_calls + other.group_calls),
        "other waits": replace(phase, waits=other.waits),
        "no waits": replace(phase, waits=()),
        "split": replace(phase, group_calls=tuple(
            GroupCall(communicator=call.communicator, transfers=(one,))
            for call in phase.group_calls for one in call.transfers)),
    }  # fmt: skip
    phases[number] = changed[kind]
    return with_programs(schedule, {rank: phases})


@given(st.data(), st.sampled_from(GRIDS), st.sampled_from(DIRECTIONS), links)
def test_broken_schedules_end_alike(
    data: st.DataObject, grid: tuple[int, int], direction: Any, links: dict[str, float]
) -> None:
    shape = shape_of(grid[0] * grid[1], 3)
    schedule = broken(data.draw(layout_values(shape)).build(shape=shape, direction=direction), data)
    given = (schedule, workload_of(shape.world_size, 3), cluster_for(schedule, *grid, **links), tiny.BusyCost())
    assert outcome(simulate, *given) == outcome(reference, *given)
