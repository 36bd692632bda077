"""The demo's calibration finds the costs that a timeline was made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.cost.model import DeviceCost
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import zigzag
from sparsering.planner.schedule.schedule import Direction
from sparsering.planner.schedule.workload import TaskWork
from sparsering.runtime.demo.calibrate import calibrate
from sparsering.simulator.simulate_plan import simulate_plan
from sparsering.traces.errors import InputError
from sparsering.traces.pattern import LayerPattern, VerticalSlash
from sparsering.traces.timeline import COMPUTE_STREAM

TOKENS, BLOCK = 2048, 64


@dataclass(frozen=True)
class KnownCost(DeviceCost):
    """100 µs a task, 5 a row, 7 a tile pair; backward three times that, columns half."""

    backend: str = "blockwise"

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        (task,), (counted,) = launch.tasks, work
        if not counted.tile_pairs:
            return 0.0
        factor = (3.0 if direction == "backward" else 1.0) * (0.5 if task.kind == "columns" else 1.0)
        return factor * (100.0 + 5.0 * counted.rows_with_work + 7.0 * counted.tile_pairs)


def pattern() -> LayerPattern:
    random = np.random.default_rng(0)
    heads = tuple(
        VerticalSlash(
            columns=np.sort(random.choice(TOKENS, 40, replace=False)).astype(np.int32),
            diagonals=np.union1d([0], random.choice(TOKENS // BLOCK, 4 + 6 * head, replace=False)).astype(np.int32),
        )
        for head in range(4)
    )
    return LayerPattern(seq_len_tokens=TOKENS, block_size=BLOCK, heads=heads)


def ring_plan() -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=4, kv_heads=2, head_dim=32),
            seq_len_tokens=TOKENS,
            block_size=BLOCK,
            dtype="float64",
            columns_capacity=64,
        ),
        placement=zigzag(seq_len_tokens=TOKENS, world_size=4, granularity_tokens=BLOCK),
        forward=Ring(prefetch=1),
        pattern=PatternSpec(source="trace", trace_sha256="0" * 64),
        kernels=KernelSpec(backend="blockwise"),
    )


def measured_with_known_cost():
    preset = load_cluster("local-cpu-4")
    cluster = preset.model_copy(update={"gpu": preset.gpu.model_copy(update={"communication_slowdown": 0.0})})
    timeline = simulate_plan(ring_plan(), pattern(), cluster, cost=KnownCost()).timeline
    assert timeline is not None
    return cluster, timeline


def test_the_fit_predicts_what_it_was_fitted_to():
    cluster, timeline = measured_with_known_cost()
    fitted = calibrate(cluster, ring_plan(), pattern(), timeline)
    again = simulate_plan(ring_plan(), pattern(), fitted.cluster, cost=fitted.cost).timeline
    assert again is not None
    times = [[span.duration_us for span in one.spans if span.stream == COMPUTE_STREAM] for one in (timeline, again)]
    assert sum(times[1]) == pytest.approx(sum(times[0]), rel=1e-4)
    forward = fitted.cost.tasks["forward", "block"]
    assert forward.tile_pair_us == pytest.approx(7.0, rel=0.2)
    assert fitted.cluster.origin == "measured"
    record = fitted.record()
    assert {(one["direction"], one["kind"]) for one in record["tasks"]} == set(fitted.cost.tasks)


def test_a_timeline_of_another_plan_is_refused():
    cluster, timeline = measured_with_known_cost()
    other = replace(timeline, metadata={"plan_digest": "f" * 64})
    with pytest.raises(InputError, match="another plan"):
        calibrate(cluster, ring_plan(), pattern(), other)


def test_a_backend_that_joins_tasks_is_refused():
    cluster, timeline = measured_with_known_cost()
    plan = ring_plan().model_copy(update={"kernels": KernelSpec(backend="triton")})
    with pytest.raises(InputError, match="calibration: backend: 'triton' computes several tasks in one launch"):
        calibrate(cluster, plan, pattern(), timeline)
