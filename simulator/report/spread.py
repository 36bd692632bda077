"""How work falls on ranks and phases: before planning (plain rings and the best plain layout) and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...planner.cost.cluster import Cluster
from ...planner.cost.evaluation import imbalance
from ...planner.cost.kernels import task_work
from ...planner.cost.measured import plan_cost
from ...planner.layouts.layout import Layout
from ...planner.layouts.registry import make_layout
from ...planner.layouts.ring import Ring
from ...planner.plan import Plan
from ...planner.schedule.pairs import pattern_pairs
from ...planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from ...planner.schedule.schedule import DIRECTIONS, Schedule
from ...planner.schedule.workload import Workload, workload
from ...traces.pattern import LayerPattern
from ...traces.timeline import Timeline
from ..engine import simulate_layer
from .baseline import Row, best_baseline

PLAINEST = ("contiguous", "zigzag")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A plain layout under a regular placement, as it is drawn beside the plan."""

    role: str
    title: str
    placement: str
    granularity_tokens: int
    layout: Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """One way to spread a layer's forward pass. pairs: int64 [W, phases], tile pairs; timeline: where it was simulated.

    role: "before", "baseline" (the plain layout that the plan is compared with) or "plan".
    """

    role: str
    title: str
    pairs: NDArray[np.int64]
    timeline: Timeline | None = None

    @property
    def step_time_us(self) -> float | None:
        """Microseconds of forward and backward, where simulated."""
        return None if self.timeline is None else self.timeline.makespan_us

    @property
    def worker_imbalance(self) -> float:
        """Maximum over ranks of all their work over the mean."""
        return imbalance(self.pairs.sum(axis=1).astype(float))

    @property
    def step_imbalance(self) -> float:
        """Sum over phases of the maximum over ranks, over that of the means."""
        mean = self.pairs.mean(axis=0).sum()
        return float(self.pairs.max(axis=0).sum() / mean) if mean else 1.0


def spread_loads(
    plan: Plan, pattern: LayerPattern, *, layer: int | None = None, cluster: Cluster | None = None
) -> list[Loads]:
    """Return plain rings, the plain layout that the plan is compared with, and the plan.

    cluster: simulate each on it. layer: whose pattern it is, for plans that order heads by layer.
    """
    ways = [Way(role="before", title=f"{name} ring", placement=name, granularity_tokens=plan.block_size, layout=Ring())
            for name in PLAINEST]  # fmt: skip
    baseline = best_baseline(plan)
    if baseline is not None:
        ways.append(_way_of(baseline))
    found = [_loads_of(way, plan, pattern, cluster) for way in ways]
    return [*found, _loads_of_plan(plan, pattern, layer, cluster)]


def _loads_of_plan(plan: Plan, pattern: LayerPattern, layer: int | None, cluster: Cluster | None) -> Loads:
    counts, order = workload(pattern, plan.make_placement()), plan.head_order(layer)
    work = counts if order is None else counts.with_heads(order)
    schedules = plan.schedule("forward"), plan.schedule("backward")
    title = f"{plan.placement.name} {plan.placement.granularity_tokens}, {plan.forward.value}"
    timeline = _simulated(plan, schedules, work, cluster)
    return Loads(role="plan", title=title, pairs=_pairs(schedules[0], work), timeline=timeline)


def _way_of(row: Row) -> Way:
    layout = make_layout(row["layout"], row["parameters"])
    title = f"{row['placement']} {row['granularity_tokens']}, {layout}"
    placed = {"placement": row["placement"], "granularity_tokens": row["granularity_tokens"]}
    return Way(role="baseline", title=title, layout=layout, **placed)


def _loads_of(way: Way, plan: Plan, pattern: LayerPattern, cluster: Cluster | None) -> Loads:
    """Return the loads of a plain layout with the plan's sizes."""
    make: Callable[..., Placement] = REGULAR_PLACEMENTS[way.placement]
    placed = make(
        seq_len_tokens=plan.seq_len_tokens, world_size=plan.world_size, granularity_tokens=way.granularity_tokens
    )
    shape = replace(plan.attention_shape(), tokens_per_rank=placed.tokens_per_rank)
    alike = (way.placement, way.granularity_tokens) == (plan.placement.name, plan.placement.granularity_tokens)
    # Pairs of shards without work are left out, as the search does: else a baseline would send what its plan does not.
    pairs = plan.active_pairs() if alike else pattern_pairs(pattern, placed)
    forward, backward = (way.layout.build(shape=shape, direction=one, pairs=pairs) for one in DIRECTIONS)
    counts = workload(pattern, placed)
    timeline = _simulated(plan, (forward, backward), counts, cluster)
    return Loads(role=way.role, title=way.title, pairs=_pairs(forward, counts), timeline=timeline)


def _simulated(
    plan: Plan, schedules: tuple[Schedule, Schedule], work: Workload, cluster: Cluster | None
) -> Timeline | None:
    if cluster is None:
        return None
    return simulate_layer(schedules, work, cluster, plan_cost(plan, cluster), timeline=True).timeline


def _pairs(schedule: Schedule, counts: Workload) -> NDArray[np.int64]:
    """Return int64 [W, phases]: tile pairs of every rank's tasks in every phase that has any task anywhere."""
    programs = [schedule.phases(rank) for rank in range(schedule.world_size)]
    pairs = np.zeros((len(programs), max(len(program) for program in programs)), dtype=np.int64)
    computes = np.zeros(pairs.shape[1], dtype=bool)
    for rank, program in enumerate(programs):
        for number, phase in enumerate(program):
            computes[number] |= bool(phase.tasks)
            pairs[rank, number] = sum(task_work(task, counts).tile_pairs for task in phase.tasks)
    return pairs[:, computes]
