"""The recurrence for many workloads: what a schedule and a cluster alone decide is worked out once and kept.

A search evaluates a few schedules under many placements and layers. The events and their order depend on the schedule
and the cluster; a workload only changes how long tasks take. Equal to `recurrence`, number for number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .cluster import Cluster
from .cost import CostModel
from .evaluation import Evaluation
from .recurrence import EventSystem, longest_paths
from .schedule import Direction, Schedule, Task
from .timing import NS_PER_US, check_sizes, task_ns
from .workload import Workload

# (query part, key part or -1 for columns, first head, last head): what a task's time depends on beside its direction
TaskKey = tuple[int, int, int, int]


@dataclass(kw_only=True, eq=False)
class CompiledRecurrence:
    """An `Evaluator` that keeps compiled schedules and task times; it keeps the objects too, so ids stay theirs."""

    _schedules: dict[tuple[int, int], _CompiledSchedule] = field(default_factory=dict)
    _tables: dict[tuple[int, int, Direction], _TaskTable] = field(default_factory=dict)

    def __call__(self, schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel) -> Evaluation:
        """Predict one schedule. ScheduleError when it can never finish."""
        check_sizes(schedule, workload, cluster)
        key = (id(schedule), id(cluster))
        if key not in self._schedules:
            self._schedules[key] = _CompiledSchedule.of(schedule, cluster)
        table_key = (id(workload), id(cost), schedule.direction)
        if table_key not in self._tables:
            self._tables[table_key] = _TaskTable(workload=workload, cost=cost, direction=schedule.direction)
        return self._schedules[key].evaluate(self._tables[table_key])


@dataclass(kw_only=True, eq=False)
class _TaskTable:
    """Times of tasks under one workload, each worked out once."""

    workload: Workload
    cost: CostModel
    direction: Direction
    _times: dict[TaskKey, int] = field(default_factory=dict)

    def times_ns(self, tasks: dict[TaskKey, Task]) -> NDArray[np.int64]:
        """Return int64 [tasks]."""
        for key, task in tasks.items():
            if key not in self._times:
                self._times[key] = task_ns(task, self.workload, self.cost, self.direction)
        return np.fromiter((self._times[key] for key in tasks), dtype=np.int64, count=len(tasks))


@dataclass(frozen=True, kw_only=True, eq=False)
class _CompiledSchedule:
    """A schedule's events. tasks: the distinct ones; task_of, cell_of: per task played, which, and in which cell of
    [W, phases]; phase_cells: the cells whose compute stands at `phase_edges`; levels: nodes with all the edges into
    them, so that one pass in order settles all times.
    """

    schedule: Schedule
    cluster: Cluster
    tasks: dict[TaskKey, Task]
    task_of: NDArray[np.int64]
    cell_of: NDArray[np.int64]
    cells: tuple[int, int]
    phase_cells: NDArray[np.int64]
    phase_edges: NDArray[np.int64]
    edges: NDArray[np.int64]
    nodes: int
    levels: list[_Level]

    @classmethod
    def of(cls, schedule: Schedule, cluster: Cluster) -> _CompiledSchedule:
        """Work out the events of a schedule on a cluster."""
        programs = [schedule.phases(rank) for rank in range(schedule.world_size)]
        phases = max(len(program) for program in programs)
        system = EventSystem(schedule=schedule, cluster=cluster)
        tasks: dict[TaskKey, Task] = {}
        played: list[tuple[TaskKey, int]] = []
        phase_cells: list[int] = []
        for rank, program in enumerate(programs):
            system.add_rank(rank, np.zeros(len(program), dtype=np.int64))
            for number, phase in enumerate(program):
                phase_cells.append(rank * phases + number)
                played += [(_key(task), phase_cells[-1]) for task in phase.tasks]
                tasks.update((_key(task), task) for task in phase.tasks)
        numbers = {key: number for number, key in enumerate(tasks)}
        edges = system.weighted_edges()
        return cls(
            schedule=schedule,
            cluster=cluster,
            tasks=tasks,
            task_of=np.array([numbers[key] for key, _ in played], dtype=np.int64),
            cell_of=np.array([cell for _, cell in played], dtype=np.int64),
            cells=(schedule.world_size, phases),
            phase_cells=np.array(phase_cells, dtype=np.int64),
            phase_edges=np.array(system.phase_edges, dtype=np.int64),
            edges=edges,
            nodes=system.nodes,
            levels=_levels(system.nodes, edges),
        )

    def evaluate(self, table: _TaskTable) -> Evaluation:
        """Return the prediction under one workload."""
        phase_ns = np.zeros(self.cells[0] * self.cells[1], dtype=np.int64)
        np.add.at(phase_ns, self.cell_of, table.times_ns(self.tasks)[self.task_of])
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


def _key(task: Task) -> TaskKey:
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
