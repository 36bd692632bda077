"""The planner's quick evaluator: a schedule as a max-plus system, solved level by level with numpy.

Same semantics as the simulator's engine (see schedule.py), with these simplifications: a transfer moves at the
bandwidth of its slowest port, shared only among the transfers that the same call puts on that port; different calls
do not slow each other, and communication does not slow compute. Without such contention both agree to the nanosecond;
with it, the recurrence is a lower bound. Times are integer nanoseconds.

Nodes of the system: the beginning of every phase of every rank (and the rank's end), the start and the end of every
group call, and every transfer. An edge carries what must pass between two of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import ScheduleError
from ..schedule.launches import rank_launches
from ..schedule.schedule import ALL_RANKS, GroupCall, Phase, Schedule, Transfer
from ..schedule.workload import Workload
from .cluster import Cluster
from .evaluation import Evaluation
from .kernels import CostModel, launch_work
from .timing import (
    NS_PER_US,
    Leg,
    Port,
    capacity_bytes_per_us,
    check_sizes,
    latency_ns,
    launch_ns,
    legs_of,
    port_bytes,
    route,
    transfer_ns,
)


def recurrence(schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel) -> Evaluation:
    """Predict one schedule; an `Evaluator`. ScheduleError when it can never finish."""
    check_sizes(schedule, workload, cluster)
    phase_ns = _phase_compute_ns(schedule, workload, cost)
    system = EventSystem(schedule=schedule, cluster=cluster)
    for rank in range(schedule.world_size):
        system.add_rank(rank, phase_ns[rank])
    makespan_ns = int(system.solve().max(initial=0))
    return Evaluation(
        makespan_us=makespan_ns / NS_PER_US,
        compute_us=phase_ns.sum(axis=1) / NS_PER_US,
        phase_us=phase_ns / NS_PER_US,
        peak_buffer_bytes=schedule.buffer_bytes,
    )


def _phase_compute_ns(schedule: Schedule, workload: Workload, cost: CostModel) -> NDArray[np.int64]:
    """Return int64 [W, phases]: every rank's compute in every phase; ranks with fewer phases have zeros at the end."""
    programs = [schedule.phases(rank) for rank in range(schedule.world_size)]
    result = np.zeros((len(programs), max(len(program) for program in programs)), dtype=np.int64)
    for rank, program in enumerate(programs):
        for number, launches in enumerate(rank_launches(program, backend=cost.backend)):
            result[rank, number] = sum(
                launch_ns(launch, launch_work(launch, workload), cost, schedule.direction) for launch in launches
            )
    return result


@dataclass(kw_only=True)
class EventSystem:
    """Nodes and weighted edges; the time of a node is the longest path to it."""

    schedule: Schedule
    cluster: Cluster
    nodes: int = 0
    edges: list[tuple[int, int, int]] = field(default_factory=list)
    transfers: dict[tuple[str, int, str], int] = field(default_factory=dict)
    durations: dict[int, int] = field(default_factory=dict)
    joined: Counter[int] = field(default_factory=Counter)
    expected: dict[int, tuple[int, str]] = field(default_factory=dict)
    phase_edges: list[int] = field(default_factory=list)  # where each phase's compute stands in `edges`, rank by rank

    def node(self) -> int:
        self.nodes += 1
        return self.nodes - 1

    def add_rank(self, rank: int, phase_ns: NDArray[np.int64]) -> None:
        """Add the program of one rank."""
        end_of: dict[str, int] = {}  # transfer id -> end of the call that this rank launched it with
        tail: dict[str, int] = {}  # communicator -> end of its last call
        begin = self.node()
        for number, phase in enumerate(self.schedule.phases(rank)):
            self._add_waits(rank, phase, begin, end_of)
            for call in phase.group_calls:
                tail[call.communicator] = self._add_call(rank, call, begin, tail.get(call.communicator))
                end_of.update((transfer.id, tail[call.communicator]) for transfer in call.transfers)
            following = self.node()
            self.phase_edges.append(len(self.edges))
            self.edges.append((begin, following, int(phase_ns[number])))
            begin = following

    def _add_waits(self, rank: int, phase: Phase, begin: int, end_of: dict[str, int]) -> None:
        for name in phase.waits:
            if name not in end_of:
                raise ScheduleError(f"rank {rank} phase {phase.index} waits for {name}, which it never launched")
            self.edges.append((end_of[name], begin, 0))

    def _add_call(self, rank: int, call: GroupCall, begin: int, previous_end: int | None) -> int:
        start, end = self.node(), self.node()
        self.edges += [(begin, start, 0), (start, end, 0)]
        if previous_end is not None:
            self.edges.append((previous_end, start, 0))
        group = self.schedule.communicator(call.communicator).group_of(rank)
        legs = [legs_of(transfer, group) for transfer in call.transfers]
        load = Counter(port for several in legs for leg in several for port in route(self.cluster, *leg[:2]))
        for transfer, moved in zip(call.transfers, legs, strict=True):
            node = self._transfer_node(transfer, call.communicator, group, moved)
            self.joined[node] += 1
            self.durations[node] = max(self.durations[node], self._duration_ns(moved, load))
            self.edges += [(start, node, -1), (node, end, 0)]  # the weight is filled in when both ends are known
        return end

    def _transfer_node(self, transfer: Transfer, communicator: str, group: tuple[int, ...], legs: list[Leg]) -> int:
        collective = transfer.source == ALL_RANKS
        key = (communicator, group[0] if collective else ALL_RANKS, transfer.id)
        if key not in self.transfers:
            node = self.transfers[key] = self.node()
            self.expected[node] = (len(group) if collective else 2, transfer.id)
            self.durations[node] = 0
        return self.transfers[key]

    def _duration_ns(self, legs: list[Leg], load: Counter[Port]) -> int:
        moving = max((self._leg_ns(leg, load) for leg in legs), default=0)
        return latency_ns(self.cluster, legs) + moving

    def _leg_ns(self, leg: Leg, load: Counter[Port]) -> int:
        ports = route(self.cluster, leg.source, leg.destination)
        share = min(capacity_bytes_per_us(self.cluster, port) / load[port] for port in ports)
        return transfer_ns(port_bytes(self.cluster, leg), share)

    def solve(self) -> NDArray[np.int64]:
        """Return int64 [nodes]: the time of every node."""
        edges = self.weighted_edges()
        return longest_paths(self.nodes, edges[:, 0], edges[:, 1], edges[:, 2])

    def weighted_edges(self) -> NDArray[np.int64]:
        """Return int64 [edges, 3]: source, target and weight; ScheduleError when a transfer lacks an end."""
        for node, (ends, name) in self.expected.items():
            if self.joined[node] != ends:
                raise ScheduleError(f"transfer {name} has {self.joined[node]} of {ends} ends")
        edges = np.array(self.edges, dtype=np.int64).reshape(-1, 3)
        duration = np.zeros(self.nodes, dtype=np.int64)
        duration[list(self.durations)] = list(self.durations.values())
        edges[:, 2] = np.where(edges[:, 2] < 0, duration[edges[:, 1]], edges[:, 2])
        return edges


def longest_paths(
    nodes: int, source: NDArray[np.int64], target: NDArray[np.int64], weight: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return int64 [nodes]: the longest path to each node from any node without predecessors; all starts are at 0.

    Level by level: a node is settled once all its predecessors are. ScheduleError when the edges close a circle.
    """
    order = np.argsort(source, kind="stable")
    target, weight = target[order], weight[order]
    offset = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=nodes))])
    missing = np.bincount(target, minlength=nodes)
    time = np.zeros(nodes, dtype=np.int64)
    settled, ready = 0, np.flatnonzero(missing == 0)
    while ready.size:
        settled += ready.size
        counts = offset[ready + 1] - offset[ready]
        edges = np.arange(counts.sum()) + np.repeat(offset[ready] - np.cumsum(counts) + counts, counts)
        reached = target[edges]
        np.maximum.at(time, reached, np.repeat(time[ready], counts) + weight[edges])
        np.subtract.at(missing, reached, 1)
        touched = np.unique(reached)
        ready = touched[missing[touched] == 0]
    if settled != nodes:
        raise ScheduleError(f"the schedule cannot finish: {nodes - settled} of its {nodes} events wait in a circle")
    return time
