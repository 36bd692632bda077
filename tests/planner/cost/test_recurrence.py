"""The recurrence against the engine: equal to the nanosecond where nothing contends, else close and seldom above."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from layout_cases import layout_shape, layouts_for
from sparsering.planner.cost.cluster import Cluster
from sparsering.planner.cost.constants import LayerConstants
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.cost.paths import Paths
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, Direction, Phase, Schedule, with_programs
from sparsering.planner.schedule.workload import Workload
from sparsering.simulator.engine import simulate
from sparsering.traces.errors import InputError, ScheduleError
from sparsering.traces.pattern import LayerPattern, VerticalSlash

ROUNDING_US = 0.1  # a shared flow's end is rounded to a nanosecond whenever its rate changes

clusters = st.fixed_dictionaries(
    {
        "bandwidth": st.floats(50.0, 5000.0),
        "latency_us": st.floats(0.0, 20.0),
        "nic_bandwidth": st.floats(20.0, 2000.0),
        "nic_latency_us": st.floats(0.0, 50.0),
    }
)
grids = st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2), (2, 3), (3, 2)])
placements = st.sampled_from(["contiguous", "zigzag", "striped"])
costs = st.builds(
    tiny.PairCost,
    us_per_pair=st.floats(0.1, 30.0),
    us_per_launch=st.floats(0.0, 5.0),
    backend=st.sampled_from(["triton", "flash4", "blockwise"]),
)


@st.composite
def workloads(draw: st.DrawFn, world: int) -> Workload:
    """A random vertical-slash layer of four blocks a rank, one head, under a random placement."""
    blocks = 4 * world
    diagonals = draw(st.sets(st.integers(1, blocks - 1), max_size=6)) | {0}
    head = VerticalSlash(columns=np.zeros(0, np.int32), diagonals=np.array(sorted(diagonals)))
    pattern = LayerPattern(seq_len_tokens=blocks * tiny.BLOCK, block_size=tiny.BLOCK, heads=(head,))
    return tiny.counted(pattern, world, draw(placements))


def both(
    schedule: Schedule, workload: Workload, cluster: Cluster, cost: tiny.PairCost
) -> tuple[Evaluation, Evaluation]:
    engine, quick = simulate(schedule, workload, cluster, cost), CompiledRecurrence()(schedule, workload, cluster, cost)
    assert quick.compute_us.tolist() == engine.compute_us.tolist()
    assert quick.phase_us.tolist() == engine.phase_us.tolist()
    assert quick.peak_buffer_bytes == engine.peak_buffer_bytes
    return engine, quick


@given(st.data(), grids, clusters, costs, st.integers(1, 4))
def test_equal_on_forward_rings(
    data: st.DataObject, grid: tuple[int, int], links: dict[str, Any], cost: tiny.PairCost, prefetch: int
) -> None:
    nodes, gpus = grid
    schedule = tiny.schedule("ring", nodes * gpus, blocks_per_rank=4, prefetch=prefetch)
    cluster = tiny.cluster(nodes=nodes, gpus=gpus, **links)
    engine, quick = both(schedule, data.draw(workloads(nodes * gpus)), cluster, cost)
    assert quick.makespan_us == engine.makespan_us


@given(st.data(), grids, clusters, costs)
def test_equal_on_forward_hierarchical_rings_with_a_card_each(
    data: st.DataObject, grid: tuple[int, int], links: dict[str, Any], cost: tiny.PairCost
) -> None:
    nodes, gpus = grid
    schedule = tiny.schedule("hierarchical", nodes * gpus, blocks_per_rank=4, inner_size=gpus)
    cluster = tiny.cluster(nodes=nodes, gpus=gpus, nics=gpus, **links)
    engine, quick = both(schedule, data.draw(workloads(nodes * gpus)), cluster, cost)
    assert quick.makespan_us == engine.makespan_us


@given(st.data(), st.integers(1, 6), clusters, costs, st.integers(1, 5), st.sampled_from([None, 700.0, 3000.0]))
def test_equal_on_forward_gathers_of_one_node(
    data: st.DataObject, world: int, links: dict[str, Any], cost: tiny.PairCost, chunks: int, pulled: float | None
) -> None:
    schedule = tiny.schedule("gather", world, blocks_per_rank=4, chunks=chunks, pull=pulled is not None)
    cluster = tiny.cluster(gpus=world, pull_bandwidth=pulled, **links)
    engine, quick = both(schedule, data.draw(workloads(world)), cluster, cost)
    assert quick.makespan_us == engine.makespan_us


@given(st.integers(2, 5), st.floats(30.0, 90.0), st.sampled_from(["ring", "hierarchical"]))
def test_equal_on_backward_rings_whose_transfers_hide(world: int, us: float, layout: str) -> None:
    """K/V and dK/dV share ports, but both have arrived before the phase's compute ends: only the last hop shows."""
    parameters = {"inner_size": world} if layout == "hierarchical" else {}
    schedule = tiny.schedule(layout, world, "backward", blocks_per_rank=4, **parameters)
    workload = tiny.dense_workload(world, "striped", blocks_per_rank=4)
    engine, quick = both(schedule, workload, tiny.cluster(gpus=world, bandwidth=2000.0), tiny.PairCost(us_per_pair=us))
    assert quick.makespan_us == engine.makespan_us


LAYOUTS = st.sampled_from([Ring(), Ring(prefetch=2), Gather(chunks=2), Hierarchical(inner_size=2)])


@given(st.data(), LAYOUTS, clusters, costs, st.sampled_from(["forward", "backward"]), st.integers(0, 40))
def test_not_above_the_engine_in_these_cases(
    data: st.DataObject,
    layout: Layout,
    links: dict[str, Any],
    cost: tiny.PairCost,
    direction: Direction,
    columns: int,
) -> None:
    schedule = layout.build(shape=tiny.shape(4, columns=columns, blocks_per_rank=4), direction=direction)
    cluster = tiny.cluster(nodes=2, gpus=2, nics=1, **links)
    engine, quick = both(schedule, data.draw(workloads(4)), cluster, cost)
    assert quick.makespan_us <= engine.makespan_us + ROUNDING_US
    assert quick.makespan_us >= quick.compute_us.max()


@given(st.data(), LAYOUTS, clusters, st.sampled_from(["forward", "backward"]), st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(
    data: st.DataObject, layout: Layout, links: dict[str, Any], direction: Direction, more: float
) -> None:
    schedule = layout.build(shape=tiny.shape(4, columns=8, blocks_per_rank=4), direction=direction)
    workload, cost = data.draw(workloads(4)), tiny.PairCost()
    slow = CompiledRecurrence()(schedule, workload, tiny.cluster(nodes=2, gpus=2, **links), cost)
    wider = links | {"bandwidth": links["bandwidth"] * more, "nic_bandwidth": links["nic_bandwidth"] * more}
    fast = CompiledRecurrence()(schedule, workload, tiny.cluster(nodes=2, gpus=2, **wider), cost)
    assert fast.makespan_us <= slow.makespan_us


@pytest.mark.parametrize(("nodes", "gpus", "columns"), [(1, 4, 0), (2, 3, 64), (4, 2, 64)])
def test_ranks_that_are_alike_are_timed_as_all_of_them(nodes: int, gpus: int, columns: int) -> None:
    """A schedule says which ranks tell of all others: every rank's own program gives the same times, phase by phase."""
    world, rng = nodes * gpus, np.random.default_rng(nodes)
    shape, cluster, cost = layout_shape(world, columns), tiny.cluster(nodes=nodes, gpus=gpus), tiny.PairCost()
    work = replace(tiny.dense_workload(world), active=rng.integers(0, 9, (world, world, shape.heads)))
    work = replace(work, rows=work.active, longest=work.active, columns=rng.integers(0, 9, (world, shape.heads)))
    distances = (np.arange(world)[:, None] - np.arange(world)) % world
    alike = 0
    for layout, pairs, way in product(layouts_for(shape), (None, Pairs.of(distances < 3)), DIRECTIONS):
        if layout.transfers.pull and nodes > 1:
            continue
        schedule = layout.build(shape=shape, direction=way, pairs=pairs)
        found, expected = (
            CompiledRecurrence()(one, work, cluster, cost) for one in (schedule, replace(schedule, period=0))
        )
        assert found.makespan_us == expected.makespan_us, layout
        assert found.phase_us.tolist() == expected.phase_us.tolist(), layout
        alike += 0 < schedule.period < world
    assert alike > 50


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.integers(0, 50)), max_size=30))
def test_longest_paths_are_those_of_networkx(edges: list[tuple[int, int, int]]) -> None:
    forward = {(min(a, b), max(a, b)): weight for a, b, weight in edges if a != b}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(12))
    graph.add_weighted_edges_from((a, b, weight) for (a, b), weight in forward.items())
    expected = [nx.dag_longest_path_length(graph.subgraph({node} | nx.ancestors(graph, node))) for node in range(12)]
    table = np.array([(a, b, weight) for (a, b), weight in forward.items()], dtype=np.int64).reshape(-1, 3)
    paths = Paths.through(12, table[:, 0], table[:, 1])
    assert paths.longest(table[:, 2:])[:, 0].tolist() == expected


def test_a_circle_is_refused() -> None:
    schedule = tiny.schedule("ring", 3, prefetch=2)
    first, *rest = schedule.phases(1)
    swapped = Phase(index=0, group_calls=first.group_calls[::-1], tasks=first.tasks)
    with pytest.raises(ScheduleError, match="wait in a circle"):
        CompiledRecurrence()(
            with_programs(schedule, {1: [swapped, *rest]}), tiny.dense_workload(3), tiny.cluster(), tiny.PairCost()
        )


def test_a_missing_end_is_refused() -> None:
    schedule = tiny.schedule("ring", 2)
    first, last = schedule.phases(0)
    broken = with_programs(schedule, {0: [Phase(index=0, tasks=first.tasks), Phase(index=1, tasks=last.tasks)]})
    with pytest.raises(ScheduleError, match="has 1 of 2 ends"):
        CompiledRecurrence()(broken, tiny.dense_workload(2), tiny.cluster(), tiny.PairCost())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="workload"):
        CompiledRecurrence()(tiny.schedule("ring", 2), tiny.dense_workload(4), tiny.cluster(), tiny.PairCost())


def test_collectives_by_hand() -> None:
    """Rings of their own: three of four shards pass every port, K/V of 4,000 bytes and gradients of 8,000."""
    work, cluster, free = tiny.dense_workload(4), tiny.cluster(gpus=4), tiny.PairCost(us_per_pair=0.0)
    engine, quick = both(tiny.schedule("collective", 4), work, cluster, free)
    assert engine.makespan_us == quick.makespan_us == 1 + 3 * 4
    constants = LayerConstants(delta_us_per_token=0.3, round_us_per_token=0.2, landing_us_per_byte=0.1)
    busy = tiny.BusyCost(us_per_pair=0.0, constants=constants)
    engine, quick = both(tiny.schedule("collective", 4, "backward"), work, cluster, busy)
    assert engine.makespan_us == quick.makespan_us == 4 * 0.3 + (1 + 3 * 4) + (1 + 3 * 8) + 4 * 0.2
    engine, quick = both(tiny.schedule("collective", 4, "backward"), work, cluster, free)
    assert engine.makespan_us == quick.makespan_us == (1 + 3 * 4) + (1 + 3 * 8)
