"""How work falls on ranks and phases, before planning (contiguous and zigzag rings) and after."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from ...planner.cost.cluster import Cluster
from ...planner.cost.evaluation import imbalance
from ...planner.cost.kernels import task_work
from ...planner.cost.measured import plan_cost
from ...planner.layouts.ring import Ring
from ...planner.plan import Plan
from ...planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from ...planner.schedule.schedule import DIRECTIONS, Schedule
from ...planner.schedule.workload import Workload, workload
from ...traces.pattern import LayerPattern
from ..engine import simulate
from .figures import LOAD_SCALE, styled


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """One way to spread a layer's forward pass. pairs: int64 [W, phases], tile pairs; step_time_us: if simulated."""

    title: str
    pairs: NDArray[np.int64]
    step_time_us: float | None = None

    @property
    def worker_imbalance(self) -> float:
        """Maximum over ranks of all their work over the mean."""
        return imbalance(self.pairs.sum(axis=1).astype(float))

    @property
    def step_imbalance(self) -> float:
        """Sum over phases of the maximum over ranks, over that of the means."""
        mean = self.pairs.mean(axis=0).sum()
        return float(self.pairs.max(axis=0).sum() / mean) if mean else 1.0


def spread_loads(plan: Plan, pattern: LayerPattern, cluster: Cluster | None = None) -> list[Loads]:
    """Return contiguous ring, zigzag ring and plan, each with its step time where there is a cluster to simulate."""

    def loads(title: str, schedules: list[Schedule], placement: Placement) -> Loads:
        counts, step_time_us = workload(pattern, placement), None
        if cluster is not None:
            cost = plan_cost(plan, cluster)
            step_time_us = sum(simulate(schedule, counts, cluster, cost).makespan_us for schedule in schedules)
        return Loads(title=title, pairs=_pairs(schedules[0], counts), step_time_us=step_time_us)

    found = []
    for name in ("contiguous", "zigzag"):
        placement = REGULAR_PLACEMENTS[name](
            seq_len_tokens=plan.seq_len_tokens, world_size=plan.world_size, granularity_tokens=plan.block_size
        )
        shape = replace(plan.attention_shape(), tokens_per_rank=placement.tokens_per_rank)
        schedules = [Ring().build(shape=shape, direction=direction) for direction in DIRECTIONS]
        found.append(loads(f"before: {name} ring", schedules, placement))
    schedules = [plan.schedule(direction) for direction in DIRECTIONS]
    return [*found, loads(f"planned: {plan.placement.name} {plan.forward.layout}", schedules, plan.make_placement())]


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


def load_figure(loads: list[Loads]) -> go.Figure:
    """Return one map of rank × phase for each, on one colour scale."""
    titles = [
        f"<b>{one.title}</b><br>worker imbalance {one.worker_imbalance:.2f}, step imbalance {one.step_imbalance:.2f}"
        for one in loads
    ]
    figure = make_subplots(rows=1, cols=len(loads), subplot_titles=titles, horizontal_spacing=0.05)
    for number, one in enumerate(loads, start=1):
        ranks, phases = one.pairs.shape
        figure.add_heatmap(
            z=one.pairs.astype(np.int32),
            coloraxis="coloraxis",
            xgap=1 if phases <= 40 else 0,
            ygap=1 if ranks <= 40 else 0,
            hovertemplate="rank %{y}, phase %{x}: %{z:,} tile pairs<extra></extra>",
            row=1,
            col=number,
        )
        axis = {"showgrid": False, "zeroline": False, "row": 1, "col": number}
        figure.update_xaxes(title="phase", dtick=_tick(phases), **axis)
        figure.update_yaxes(dtick=_tick(ranks), autorange="reversed", **axis)
    figure.update_yaxes(title="rank", col=1)
    bar = {"title": {"text": "tile pairs", "side": "right"}, "thickness": 14}
    most = max(int(one.pairs.max()) for one in loads)
    figure.update_layout(coloraxis={"colorscale": LOAD_SCALE, "cmin": 0, "cmax": most, "colorbar": bar})
    height = 430 if loads[0].pairs.shape[0] > 8 else 290
    return styled(figure, height=height, margin={"l": 56, "r": 24, "t": 70, "b": 52})


def _tick(count: int) -> int:
    return 1 if count <= 8 else 4
