"""The planner's quick evaluator: a schedule as a max-plus system, solved level by level with numpy.

Same semantics as the simulator's engine (see schedule.py), with these simplifications: a transfer moves at the
bandwidth of its slowest port, shared only among the transfers that the same call puts on that port; different calls
do not slow each other, and communication does not slow compute. The host is taken to be ahead of the device; what else
the costs' constants say is honoured. Without contention both agree to the nanosecond. With it, the recurrence is an
estimate, most often below the engine and no bound: a call's transfers share a port here as long as the longest of them
takes, where the engine gives what one leaves to the others, and ends that join late meet on other ports there.
Times are integer nanoseconds.

Nodes of the system: the beginning of a rank, of every phase of it (before and after gradients that landed are added),
and its end, the start and the end of every group call, and every transfer. An edge carries what must pass between two
of them. The events and their order depend on the schedule and the cluster alone; a workload only changes how long
launches take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import ScheduleError
from ..schedule.launches import Launch, rank_launches
from ..schedule.schedule import ALL_RANKS, Direction, GroupCall, Phase, Schedule, Task, Transfer
from ..schedule.workload import TaskWork, Workload
from .cluster import Cluster
from .constants import LayerConstants
from .evaluation import Evaluation
from .kernels import CostModel, task_work
from .timing import (
    NS_PER_US,
    Leg,
    Port,
    capacity_bytes_per_us,
    check_sizes,
    landing_ns,
    latency_ns,
    launch_ns,
    legs_of,
    port_bytes,
    route,
    transfer_ns,
)

# (query part, key part or -1 for columns, first head, last head): what a task's work depends on
TaskKey = tuple[int, int, int, int]
# (its tasks, begins, ends): what a launch's time depends on beside its direction
LaunchKey = tuple[tuple[TaskKey, ...], bool, bool]


ANY_LANDING = LayerConstants(landing_us_per_byte=1.0)  # says after which transfers there may be something to add


@dataclass(kw_only=True, eq=False)
class CompiledRecurrence:
    """An `Evaluator` that keeps events of schedules and times of launches; it keeps the objects too: ids stay theirs.

    A search evaluates a few schedules under many placements and layers.
    """

    _events: dict[tuple[int, int, str], _Events] = field(default_factory=dict)
    _tables: dict[tuple[int, int, Direction], _LaunchTable] = field(default_factory=dict)

    def __call__(self, schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel) -> Evaluation:
        """Predict one schedule. ScheduleError when it can never finish."""
        check_sizes(schedule, workload, cluster)
        key = (id(schedule), id(cluster), cost.backend)
        if key not in self._events:
            self._events[key] = _Events(schedule, cluster, cost.backend)
        table_key = (id(workload), id(cost), schedule.direction)
        if table_key not in self._tables:
            self._tables[table_key] = _LaunchTable(workload=workload, cost=cost, direction=schedule.direction)
        return self._events[key].evaluate(self._tables[table_key], cost.constants)


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


@dataclass(kw_only=True)
class _Joined:
    """A transfer's node: how many of its ends have joined it, and the longest time that one of them gives it."""

    node: int
    ends: int
    joined: int = 0
    duration_ns: int = 0


class _Events:
    """A schedule's events on a cluster. launches: the distinct ones, as the backend cuts tasks into them.

    launch_of, cell_of: per launch played, which, and in which cell of [W, phases]; phase_cells: the cells whose compute
    stands at `phase_edges`. ScheduleError when events wait in a circle, or a transfer lacks an end.
    """

    def __init__(self, schedule: Schedule, cluster: Cluster, backend: str) -> None:
        self.schedule, self.cluster, self.nodes = schedule, cluster, 0
        self._edges: list[tuple[int, int, int]] = []  # a weight of -1: of the transfer's node that it leads to
        self._transfers: dict[tuple[str, int, str], _Joined] = {}
        self._beginnings: list[int] = []  # edges into the first phase of each rank
        self._landings: list[tuple[int, int, list[Transfer]]] = []  # edges, with rank and transfers waited for
        self._endings: list[int] = []  # edges into the end of each rank
        self._constants: tuple[LayerConstants, int, NDArray[np.int64]] | None = None
        programs = [schedule.phases(rank) for rank in range(schedule.world_size)]
        self.cells = len(programs), max(len(program) for program in programs)
        self.launches: dict[LaunchKey, Launch] = {}
        played: list[tuple[LaunchKey, int]] = []
        phase_cells: list[int] = []
        phase_edges: list[int] = []
        for rank, program in enumerate(programs):
            phase_edges += self._add_rank(rank, program)
            for number, launches in enumerate(rank_launches(program, backend=backend), rank * self.cells[1]):
                phase_cells.append(number)
                keyed = [(_launch_key(launch), launch) for launch in launches]
                played += [(key, number) for key, _ in keyed]
                self.launches.update(keyed)
        numbers = {key: number for number, key in enumerate(self.launches)}
        self.launch_of = np.array([numbers[key] for key, _ in played], dtype=np.int64)
        self.cell_of = np.array([cell for _, cell in played], dtype=np.int64)
        self.phase_cells, self.phase_edges = np.array([phase_cells, phase_edges], dtype=np.int64)
        self.edges = self._weighted_edges()
        self.levels = levels_of(self.nodes, self.edges[:, 0], self.edges[:, 1])

    def evaluate(self, table: _LaunchTable, constants: LayerConstants) -> Evaluation:
        """Return the prediction under one workload."""
        phase_ns = np.zeros(self.cells[0] * self.cells[1], dtype=np.int64)
        np.add.at(phase_ns, self.cell_of, table.times_ns(self.launches)[self.launch_of])
        weight = self._weight(constants, table.workload.tokens_per_rank).copy()
        weight[self.phase_edges] = phase_ns[self.phase_cells]
        phase_ns = phase_ns.reshape(self.cells)
        return Evaluation(
            makespan_us=int(longest_paths(self.nodes, self.levels, weight).max(initial=0)) / NS_PER_US,
            compute_us=phase_ns.sum(axis=1) / NS_PER_US,
            phase_us=phase_ns / NS_PER_US,
            peak_buffer_bytes=self.schedule.buffer_bytes,
        )

    def _weight(self, constants: LayerConstants, tokens: int) -> NDArray[np.int64]:
        """Return int64 [edges]: the edges' weights with these constants; that of compute is left at 0."""
        if self._constants is None or self._constants[:2] != (constants, tokens):
            weight, direction = self.edges[:, 2].copy(), self.schedule.direction
            weight[self._beginnings] = round(constants.begin_us(direction, tokens) * NS_PER_US)
            weight[self._endings] = round(constants.end_us(direction, tokens) * NS_PER_US)
            for edge, rank, transfers in self._landings:
                weight[edge] = landing_ns(constants, transfers, rank)
            self._constants = constants, tokens, weight
        return self._constants[2]

    def _node(self) -> int:
        self.nodes += 1
        return self.nodes - 1

    def _add_rank(self, rank: int, program: Sequence[Phase]) -> list[int]:
        """Add the program of one rank; return where each phase's compute stands among the edges."""
        end_of: dict[str, tuple[int, Transfer]] = {}  # transfer id -> end of the call that this rank launched it with
        tail: dict[str, int] = {}  # communicator -> end of its last call
        begin, computes = self._node(), []
        begin = self._after(begin, self._beginnings)
        for phase in program:
            for name in phase.waits:
                if name not in end_of:
                    raise ScheduleError(f"rank {rank} phase {phase.index} waits for {name}, which it never launched")
                self._edges.append((end_of[name][0], begin, 0))
            landed = [end_of[name][1] for name in phase.waits if ANY_LANDING.landing_us(end_of[name][1], rank)]
            if landed:
                self._landings.append((len(self._edges), rank, landed))
                begin = self._after(begin, [])
            for call in phase.group_calls:
                tail[call.communicator] = self._add_call(rank, call, begin, tail.get(call.communicator))
                end_of.update((transfer.id, (tail[call.communicator], transfer)) for transfer in call.transfers)
            begin = self._after(begin, computes)
        self._after(begin, self._endings)
        return computes

    def _after(self, node: int, edges: list[int]) -> int:
        """Add a node that follows another, and return it; note the edge between them in `edges`."""
        following = self._node()
        edges.append(len(self._edges))
        self._edges.append((node, following, 0))
        return following

    def _add_call(self, rank: int, call: GroupCall, begin: int, previous_end: int | None) -> int:
        start, end = self._node(), self._node()
        self._edges += [(begin, start, 0), (start, end, 0)]
        if previous_end is not None:
            self._edges.append((previous_end, start, 0))
        group = self.schedule.communicator(call.communicator).group_of(rank)
        legs = [legs_of(transfer, group) for transfer in call.transfers]
        load = Counter(port for several in legs for leg in several for port in route(self.cluster, *leg[:2]))
        for transfer, moved in zip(call.transfers, legs, strict=True):
            collective = transfer.source == ALL_RANKS
            key = (call.communicator, group[0] if collective else ALL_RANKS, transfer.id)
            if key not in self._transfers:
                self._transfers[key] = _Joined(node=self._node(), ends=len(group) if collective else 2)
            one = self._transfers[key]
            one.joined += 1
            moving_ns = max((self._leg_ns(leg, load) for leg in moved), default=0)
            one.duration_ns = max(one.duration_ns, latency_ns(self.cluster, moved) + moving_ns)
            self._edges += [(start, one.node, -1), (one.node, end, 0)]
        return end

    def _leg_ns(self, leg: Leg, load: Counter[Port]) -> int:
        ports = route(self.cluster, leg.source, leg.destination)
        share = min(capacity_bytes_per_us(self.cluster, port) / load[port] for port in ports)
        return transfer_ns(port_bytes(self.cluster, leg), share)

    def _weighted_edges(self) -> NDArray[np.int64]:
        """Return int64 [edges, 3]: source, target and weight; that of a phase's compute is left at 0."""
        duration = np.zeros(self.nodes, dtype=np.int64)
        for (_, _, name), one in self._transfers.items():
            if one.joined != one.ends:
                raise ScheduleError(f"transfer {name} has {one.joined} of {one.ends} ends")
            duration[one.node] = one.duration_ns
        edges = np.array(self._edges, dtype=np.int64).reshape(-1, 3)
        edges[:, 2] = np.where(edges[:, 2] < 0, duration[edges[:, 1]], edges[:, 2])
        return edges


@dataclass(frozen=True, kw_only=True, eq=False)
class _Level:
    """Nodes whose predecessors are all in earlier levels. edges: those into `nodes`, from `starts` on one node's."""

    nodes: NDArray[np.int64]
    edges: NDArray[np.int64]
    sources: NDArray[np.int64]
    starts: NDArray[np.int64]


def levels_of(nodes: int, source: NDArray[np.int64], target: NDArray[np.int64]) -> list[_Level]:
    """Return all nodes that have predecessors, by the longest chain to them; ScheduleError when edges close a circle.

    source, target: int64 [edges].
    """
    order = np.argsort(source, kind="stable")
    offset = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=nodes))])
    missing = np.bincount(target, minlength=nodes)
    depth, settled, ready = np.zeros(nodes, dtype=np.int64), 0, np.flatnonzero(missing == 0)
    while ready.size:
        settled += ready.size
        counts = offset[ready + 1] - offset[ready]
        edges = np.arange(counts.sum()) + np.repeat(offset[ready] - np.cumsum(counts) + counts, counts)
        reached = target[order[edges]]
        depth[reached] = depth[ready[0]] + 1
        np.subtract.at(missing, reached, 1)
        touched = np.unique(reached)
        ready = touched[missing[touched] == 0]
    if settled != nodes:
        raise ScheduleError(f"the schedule cannot finish: {nodes - settled} of its {nodes} events wait in a circle")
    order = np.lexsort((target, depth[target]))
    cuts = np.searchsorted(depth[target[order]], np.arange(1, depth.max(initial=0) + 2))
    levels = []
    for first, last in pairwise(cuts):
        into = order[first:last]
        reached, starts = np.unique(target[into], return_index=True)
        levels.append(_Level(nodes=reached, edges=into, sources=source[into], starts=starts))
    return levels


def longest_paths(nodes: int, levels: Sequence[_Level], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64 [nodes]: the longest path to each node; those without predecessors begin at 0. weight: [edges]."""
    time = np.zeros(nodes, dtype=np.int64)
    for level in levels:
        time[level.nodes] = np.maximum.reduceat(time[level.sources] + weight[level.edges], level.starts)
    return time


def _launch_key(launch: Launch) -> LaunchKey:
    keys = [-1 if task.key is None else task.key.sequence_part for task in launch.tasks]
    tasks = tuple((task.query.sequence_part, key, *task.heads) for task, key in zip(launch.tasks, keys, strict=True))
    return tasks, launch.begins, launch.ends
