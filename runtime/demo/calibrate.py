"""What tasks and transfers cost on this machine, fitted to one measured run: no data sheet knows a laptop's gloo.

The fit is deliberately small: three coefficients for every kind of task and direction, one for transfers. It is taken
from a run of *another* plan than the one that is predicted with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ...planner.cost.cluster import Cluster
from ...planner.cost.kernels import task_work
from ...planner.cost.model import DeviceCost
from ...planner.plan import Plan
from ...planner.schedule.backends import facts_of
from ...planner.schedule.launches import Launch
from ...planner.schedule.schedule import DIRECTIONS, Direction
from ...planner.schedule.workload import TaskWork, workload
from ...traces.errors import InputError
from ...traces.pattern import LayerPattern
from ...traces.timeline import COMPUTE_STREAM, Span, Timeline

LINK_QUANTILE = 0.75
Key = tuple[Direction, str]  # direction, kind of task


@dataclass(frozen=True, kw_only=True)
class FittedTask:
    """Microseconds of a task: per launch, per query tile with work, per tile pair; fitted to so many points."""

    launch_us: float
    row_us: float
    tile_pair_us: float
    points: int


@dataclass(frozen=True, kw_only=True)
class FittedCost(DeviceCost):
    """A `CostModel` of this machine, for a backend that launches every task alone."""

    tasks: Mapping[Key, FittedTask]
    backend: str

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the microseconds of one task; an empty one costs nothing."""
        (task,), (counted,) = launch.tasks, work
        if not counted.tile_pairs:
            return 0.0
        fitted = self.tasks[direction, task.kind]
        return fitted.launch_us + fitted.row_us * counted.rows_with_work + fitted.tile_pair_us * counted.tile_pairs


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A cluster and a cost model fitted to a run; `record` says both in plain values."""

    cluster: Cluster
    cost: FittedCost

    def record(self) -> dict[str, Any]:
        """Return the fit as plain values."""
        fitted = self.cost.tasks.items()
        tasks = [{"direction": direction, "kind": kind, **vars(task)} for (direction, kind), task in fitted]
        return {"tasks": tasks, "cluster": self.cluster.model_dump(mode="json", exclude_none=True)}


def calibrate(cluster: Cluster, plan: Plan, pattern: LayerPattern, measured: Timeline) -> Calibration:
    """Fit to a measured run of `plan` on `pattern`. cluster: what the run was on, by its data sheet.

    Time that processes spend sharing cores is in the measured tasks already, so the fitted cluster slows no compute
    for communication. Raises InputError when the timeline is not of that plan, or its backend joins tasks in launches:
    then what each of them takes cannot be told.
    """
    backend = plan.kernels.backend
    if facts_of(backend).joins_keys or facts_of(backend).fuses_columns:
        raise InputError(f"{backend!r} computes several tasks in one launch", source="calibration", field="backend")
    if measured.plan_digest != plan.digest:
        raise InputError("is of another plan", source="calibration", field="plan_digest")
    points: dict[Key, list[tuple[TaskWork, float]]] = defaultdict(list)
    for key, work, duration_us in _measured_tasks(plan, pattern, measured):
        points[key].append((work, duration_us))
    cost = FittedCost(tasks={key: _fit(found) for key, found in sorted(points.items())}, backend=backend)
    return Calibration(cluster=_fitted_cluster(cluster, measured), cost=cost)


def _measured_tasks(plan: Plan, pattern: LayerPattern, measured: Timeline) -> Iterator[tuple[Key, TaskWork, float]]:
    """Pair every task that has work with the time it took: tasks of a phase were recorded in the schedule's order."""
    spans: dict[tuple[str, int, int], list[Span]] = defaultdict(list)
    for span in sorted(measured.spans, key=lambda span: span.start_us):
        if span.stream == COMPUTE_STREAM:
            spans[span.direction, span.rank, span.phase].append(span)
    counts = workload(pattern, plan.make_placement())
    for direction in DIRECTIONS:
        schedule = plan.schedule(direction)
        for rank in range(plan.world_size):
            for phase in schedule.phases(rank):
                for task, span in zip(phase.tasks, spans[direction, rank, phase.index], strict=True):
                    work = task_work(task, counts)
                    if work.tile_pairs:
                        yield (direction, task.kind), work, span.duration_us


def _fit(points: list[tuple[TaskWork, float]]) -> FittedTask:
    """Least squares without negative coefficients; the total of the fitted times is that of the measured ones."""
    features = np.array([[1.0, work.rows_with_work, work.tile_pairs] for work, _ in points])
    times = np.array([duration_us for _, duration_us in points])
    scale = features.max(axis=0)
    coefficients, _ = nnls(features / scale, times)
    predicted = (features / scale) @ coefficients
    coefficients = coefficients / scale * (times.sum() / predicted.sum() if predicted.sum() else 1.0)
    launch_us, row_us, tile_pair_us = (float(value) for value in coefficients)
    return FittedTask(launch_us=launch_us, row_us=row_us, tile_pair_us=tile_pair_us, points=len(points))


def _fitted_cluster(cluster: Cluster, measured: Timeline) -> Cluster:
    """Give the links the upper quartile of the measured rates: slower calls mostly waited for their other ends."""
    rates = [
        span.nbytes / 2 / span.duration_us  # sent and received at once
        for span in measured.spans
        if span.stream != COMPUTE_STREAM and span.duration_us > 0 and span.nbytes
    ]
    link = cluster.intra_node
    if rates:
        unknown = {"switch_bandwidth_bytes_per_us": None, "pull_bandwidth_bytes_per_us": None}
        rate = float(np.quantile(rates, LINK_QUANTILE))
        link = link.model_copy(update={"bandwidth_bytes_per_us": rate} | unknown)
    gpu = cluster.gpu.model_copy(update={"communication_slowdown": 0.0, "pull_slowdown": None})
    said = {
        "name": f"{cluster.name}-calibrated",
        "origin": "measured",
        "notes": "Links and tasks fitted to one run of a plain ring on this machine; memory from the data sheet.",
    }
    return cluster.model_copy(update=said | {"gpu": gpu, "intra_node": link})
