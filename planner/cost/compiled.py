"""The recurrence for many workloads: what a schedule and a cluster alone decide is worked out once and kept.

A search evaluates a few schedules under many placements and layers. The events and their order depend on the schedule
and the cluster; a workload only changes how long launches take. Equal to `recurrence`, number for number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..schedule.launches import Launch, rank_launches
from ..schedule.schedule import Direction, Schedule, Task
from ..schedule.workload import TaskWork, Workload
from .cluster import Cluster
from .evaluation import Evaluation
from .kernels import CostModel, task_work
from .recurrence import EventSystem, longest_paths
from .timing import NS_PER_US, check_sizes, launch_ns

# (query part, key part or -1 for columns, first head, last head): what a task's work depends on
TaskKey = tuple[int, int, int, int]
# (its tasks, begins, ends): what a launch's time depends on beside its direction
LaunchKey = tuple[tuple[TaskKey, ...], bool, bool]


@dataclass(kw_only=True, eq=False)
class CompiledRecurrence:
    """An `Evaluator` that keeps compiled schedules and launch times; it keeps the objects too, so ids stay theirs."""

    _schedules: dict[tuple[int, int, str], _CompiledSchedule] = field(default_factory=dict)
    _tables: dict[tuple[int, int, Direction], _LaunchTable] = field(default_factory=dict)

    def __call__(self, schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel) -> Evaluation:
        """Predict one schedule. ScheduleError when it can never finish."""
        check_sizes(schedule, workload, cluster)
        key = (id(schedule), id(cluster), cost.backend)
        if key not in self._schedules:
            self._schedules[key] = _CompiledSchedule.of(schedule, cluster, cost.backend)
        table_key = (id(workload), id(cost), schedule.direction)
        if table_key not in self._tables:
            self._tables[table_key] = _LaunchTable(workload=workload, cost=cost, direction=schedule.direction)
        return self._schedules[key].evaluate(self._tables[table_key])


@dataclass(kw_only=True, eq=False)
class _LaunchTable:
    """Times of launches under one workload, each worked out once; the work of tasks is shared by launches."""

    workload: Workload
    cost: CostModel
    direction: Direction
    _work: dict[TaskKey, TaskWork] = field(default_factory=dict)
    _times: dict[LaunchKey, int] = field(default_factory=dict)

    def times_ns(self, launches: dict[LaunchKey, Launch]) -> NDArray[np.int64]:
        """Return int64 [launches]."""
        for key, launch in launches.items():
            if key not in self._times:
                work = [self._work_of(*one) for one in zip(key[0], launch.tasks, strict=True)]
                self._times[key] = launch_ns(launch, work, self.cost, self.direction)
        return np.fromiter((self._times[key] for key in launches), dtype=np.int64, count=len(launches))

    def _work_of(self, key: TaskKey, task: Task) -> TaskWork:
        if key not in self._work:
            self._work[key] = task_work(task, self.workload)
        return self._work[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class _CompiledSchedule:
    """A schedule's events. launches: the distinct ones; launch_of, cell_of: per launch played, which, and in which cell
    of [W, phases]; phase_cells: the cells whose compute stands at `phase_edges`; levels: nodes with all the edges into
    them, so that one pass in order settles all times.
    """

    schedule: Schedule
    cluster: Cluster
    launches: dict[LaunchKey, Launch]
    launch_of: NDArray[np.int64]
    cell_of: NDArray[np.int64]
    cells: tuple[int, int]
    phase_cells: NDArray[np.int64]
    phase_edges: NDArray[np.int64]
    edges: NDArray[np.int64]
    nodes: int
    levels: list[_Level]

    @classmethod
    def of(cls, schedule: Schedule, cluster: Cluster, backend: str) -> _CompiledSchedule:
        """Work out the events of a schedule on a cluster, its tasks launched as the backend does."""
        programs = [schedule.phases(rank) for rank in range(schedule.world_size)]
        phases = max(len(program) for program in programs)
        system = EventSystem(schedule=schedule, cluster=cluster)
        distinct: dict[LaunchKey, Launch] = {}
        played: list[tuple[LaunchKey, int]] = []
        phase_cells: list[int] = []
        for rank, program in enumerate(programs):
            system.add_rank(rank, np.zeros(len(program), dtype=np.int64))
            for number, launches in enumerate(rank_launches(program, backend=backend)):
                phase_cells.append(rank * phases + number)
                keyed = [(_launch_key(launch), launch) for launch in launches]
                played += [(key, phase_cells[-1]) for key, _ in keyed]
                distinct.update(keyed)
        numbers = {key: number for number, key in enumerate(distinct)}
        edges = system.weighted_edges()
        return cls(
            schedule=schedule,
            cluster=cluster,
            launches=distinct,
            launch_of=np.array([numbers[key] for key, _ in played], dtype=np.int64),
            cell_of=np.array([cell for _, cell in played], dtype=np.int64),
            cells=(schedule.world_size, phases),
            phase_cells=np.array(phase_cells, dtype=np.int64),
            phase_edges=np.array(system.phase_edges, dtype=np.int64),
            edges=edges,
            nodes=system.nodes,
            levels=_levels(system.nodes, edges),
        )

    def evaluate(self, table: _LaunchTable) -> Evaluation:
        """Return the prediction under one workload."""
        phase_ns = np.zeros(self.cells[0] * self.cells[1], dtype=np.int64)
        np.add.at(phase_ns, self.cell_of, table.times_ns(self.launches)[self.launch_of])
        weight = self.edges[:, 2].copy()
        weight[self.phase_edges] = phase_ns[self.phase_cells]
        time = np.zeros(self.nodes, dtype=np.int64)
        for level in self.levels:
            time[level.nodes] = np.maximum.reduceat(time[level.sources] + weight[level.edges], level.starts)
        phase_us = phase_ns.reshape(self.cells) / NS_PER_US
        return Evaluation(
            makespan_us=int(time.max(initial=0)) / NS_PER_US,
            compute_us=phase_us.sum(axis=1),
            phase_us=phase_us,
            peak_buffer_bytes=self.schedule.buffer_bytes,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Level:
    """Nodes whose predecessors are all in earlier levels. edges: those into `nodes`, from `starts` on one node's."""

    nodes: NDArray[np.int64]
    edges: NDArray[np.int64]
    sources: NDArray[np.int64]
    starts: NDArray[np.int64]


def _launch_key(launch: Launch) -> LaunchKey:
    return tuple(_task_key(task) for task in launch.tasks), launch.begins, launch.ends


def _task_key(task: Task) -> TaskKey:
    return task.query.sequence_part, -1 if task.key is None else task.key.sequence_part, *task.heads


def _levels(nodes: int, edges: NDArray[np.int64]) -> list[_Level]:
    """Return all nodes that have predecessors, by the longest chain to them; those without begin at 0.

    A node's weights do not matter here, so chains are counted with every edge as 1.
    """
    source, target = edges[:, 0], edges[:, 1]
    depth = longest_paths(nodes, source, target, np.ones(len(edges), dtype=np.int64))
    order = np.lexsort((target, depth[target]))
    cuts = np.searchsorted(depth[target[order]], np.arange(1, depth.max(initial=0) + 2))
    levels = []
    for first, last in pairwise(cuts):
        into = order[first:last]
        reached, starts = np.unique(target[into], return_index=True)
        levels.append(_Level(nodes=reached, edges=into, sources=source[into], starts=starts))
    return levels
