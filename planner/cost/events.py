"""A schedule's events on a cluster as a graph: what must pass between two of them stands on the edge.

Nodes: the beginning of a rank, of each of its phases (before and after gradients that landed are added), its end, and
every transfer. A call is no node where its beginning is the phase's and its end that of one or two transfers; it has
one for its beginning where it may have to wait for the call before it, one for its end where many transfers end it.

Where a schedule says that ranks come in turns that are alike, the events of the first turn are the graph, and an edge
says how many turns later its other end is: a rank of the last turn meets one of the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...traces.errors import ScheduleError
from ..schedule.batch import LaunchBatch, Numbers
from ..schedule.launches import Launch, rank_launches
from ..schedule.schedule import ALL_RANKS, Direction, GroupCall, Phase, Schedule, Transfer, transfer_id
from .cluster import Cluster
from .constants import LayerConstants
from .paths import Paths
from .timing import (
    NS_PER_US,
    Leg,
    Port,
    capacity_bytes_per_us,
    landing_ns,
    latency_ns,
    legs_of,
    port_bytes,
    route,
    transfer_ns,
)

ANY_LANDING = LayerConstants(landing_us_per_byte=1.0)  # says after which transfers there may be something to add
Event = tuple[int, int]  # a node, and how many turns after the first it lies
OF_ITS_TRANSFER = -1  # in place of an edge's weight, until all ends of the transfer have joined
MOST_ENDS = 2  # of a call, before they get a node of their own


@dataclass(kw_only=True, slots=True)
class _Joined:
    """A transfer's node: how many of its ends have joined it, and the longest time that one of them gives it.

    ends: those in all turns, of a transfer of the first turn.
    """

    node: int
    ends: int
    joined: int = 0
    duration_ns: int = 0


@dataclass(kw_only=True, slots=True)
class _Called:
    """A call of a rank: the events that end it, and whether the rank has waited for it."""

    ends: list[Event]
    waited: bool = False


class Events:
    """A schedule's events on a cluster. batch: all launches, as the backend cuts tasks into them, rank by rank.

    cells: ranks and phases of the longest; launch_cells: in which of these cells each launch lies. ScheduleError when
    events wait in a circle, or a transfer lacks an end.
    """

    def __init__(self, schedule: Schedule, cluster: Cluster, backend: str) -> None:
        self.direction: Direction = schedule.direction
        self.buffer_bytes = schedule.buffer_bytes
        self._schedule = schedule
        self._links = _Links(cluster)
        self._period = _period(schedule, cluster)
        self._turns = schedule.world_size // self._period
        self._nodes = 0
        self._edges: list[tuple[int, int, int, int]] = []  # source, target, turns from target to source, weight
        self._shared: list[int] = []  # nodes that all turns have in common
        self._transfers: dict[tuple[str, int, str], _Joined] = {}
        self._groups: dict[tuple[str, int], tuple[int, ...]] = {}
        self._beginnings: list[int] = []  # edges into the first phase of each rank
        self._landings: list[tuple[int, int, list[Transfer]]] = []  # edges, with rank and transfers waited for
        self._endings: list[int] = []  # edges into the end of each rank
        self._constants: tuple[LayerConstants, int, Numbers] | None = None
        programs = [schedule.phases(rank) for rank in range(self._period)]
        phases = max(len(program) for program in programs)
        self.cells = schedule.world_size, phases
        launches: list[Launch] = []
        launch_cells: list[int] = []
        phase_cells: list[int] = []
        phase_edges: list[int] = []
        for rank, program in enumerate(programs):
            phase_edges += self._add_rank(rank, program)
            for cell, together in enumerate(rank_launches(program, backend=backend), rank * phases):
                phase_cells.append(cell)
                launches += together
                launch_cells += [cell] * len(together)
        self.batch = LaunchBatch.of(launches).turned(period=self._period, world_size=schedule.world_size)
        turns = np.arange(self._turns)[:, None] * self._period * phases
        self.launch_cells = (turns + np.array(launch_cells, dtype=np.int64)).reshape(-1)
        self._phase_cells = turns.T + np.array(phase_cells, dtype=np.int64)[:, None]  # [phases of a turn, T]
        self._phase_edges = np.array(phase_edges, dtype=np.int64)
        edges = self._weighted_edges()
        self._weight = edges[:, 3].copy()
        shared = np.array(self._shared, dtype=np.int64)
        self._paths = Paths.through(self._nodes, edges[:, 0], edges[:, 1], edges[:, 2], shared)
        del self._schedule, self._edges, self._transfers, self._groups  # what it was made of is many times as large

    def makespan_ns(self, phase_ns: Numbers, constants: LayerConstants, tokens_per_rank: int) -> int:
        """Return when the last event happens. phase_ns: int64 [cells], compute of each phase."""
        one_turn = self._with_constants(constants, tokens_per_rank)
        weight = np.repeat(one_turn[:, None], self._turns, axis=1)
        weight[self._phase_edges] = phase_ns[self._phase_cells]
        return int(self._paths.longest(weight).max(initial=0))

    def _with_constants(self, constants: LayerConstants, tokens: int) -> Numbers:
        """Return int64 [edges]: the edges' weights with these constants; that of compute is left at 0."""
        if self._constants is None or self._constants[:2] != (constants, tokens):
            weight, direction = self._weight.copy(), self.direction
            weight[self._beginnings] = round(constants.begin_us(direction, tokens) * NS_PER_US)
            weight[self._endings] = round(constants.end_us(direction, tokens) * NS_PER_US)
            for edge, rank, transfers in self._landings:
                weight[edge] = landing_ns(constants, transfers, rank)
            self._constants = constants, tokens, weight
        return self._constants[2]

    def _node(self) -> int:
        self._nodes += 1
        return self._nodes - 1

    def _after(self, node: int, edges: list[int]) -> int:
        """Add a node that follows another, and return it; note the edge between them in `edges`."""
        following = self._node()
        edges.append(len(self._edges))
        self._edges.append((node, following, 0, 0))
        return following

    def _all_before(self, events: Iterable[Event], node: int) -> None:
        self._edges += [(one, node, turns, 0) for one, turns in events]

    def _add_rank(self, rank: int, program: Sequence[Phase]) -> list[int]:
        """Add the program of one rank; return where each phase's compute stands among the edges."""
        launched: dict[str, tuple[_Called, Transfer]] = {}  # by transfer id
        last: dict[str, _Called] = {}  # by communicator
        begin, computes = self._node(), []
        begin = self._after(begin, self._beginnings)
        for phase in program:
            landed = []
            for name in phase.waits:
                if name not in launched:
                    raise ScheduleError(f"rank {rank} phase {phase.index} waits for {name}, which it never launched")
                call, transfer = launched[name]
                if not call.waited:
                    self._all_before(call.ends, begin)
                    call.waited = True
                if ANY_LANDING.landing_us(transfer, rank):
                    landed.append(transfer)
            if landed:
                self._landings.append((len(self._edges), rank, landed))
                begin = self._after(begin, [])
            for group_call in phase.group_calls:
                called = self._add_call(rank, group_call, begin, last.get(group_call.communicator))
                last[group_call.communicator] = called
                launched.update((transfer.id, (called, transfer)) for transfer in group_call.transfers)
            begin = self._after(begin, computes)
        self._after(begin, self._endings)
        return computes

    def _add_call(self, rank: int, call: GroupCall, begin: int, previous: _Called | None) -> _Called:
        start = begin
        if previous is not None and not previous.waited:
            start = self._node()
            self._all_before([(begin, 0), *previous.ends], start)
        group = self._group_of(call.communicator, rank)
        ends: list[Event] = []
        for transfer, duration_ns in zip(call.transfers, self._links.durations_ns(call, group), strict=True):
            one, turns = self._joined(call, transfer, group)
            one.joined += 1
            one.duration_ns = max(one.duration_ns, duration_ns)
            self._edges.append((start, one.node, -turns, OF_ITS_TRANSFER))
            ends.append((one.node, turns))
        if len(ends) > MOST_ENDS:
            end = self._node()
            self._all_before(ends, end)
            ends = [(end, 0)]
        return _Called(ends=ends or [(start, 0)])

    def _group_of(self, communicator: str, rank: int) -> tuple[int, ...]:
        found = self._groups.get((communicator, rank))
        if found is None:
            found = self._schedule.communicator(communicator).group_of(rank)
            self._groups.update(((communicator, member), found) for member in found)
        return found

    def _joined(self, call: GroupCall, transfer: Transfer, group: tuple[int, ...]) -> tuple[_Joined, int]:
        """Return a transfer, and the turn of its source: it is kept as what it is in the first turn."""
        if transfer.source == ALL_RANKS:
            assert self._turns == 1 or len(group) == self._schedule.world_size
            turns, ends = 0, len(group) // self._turns
            key = call.communicator, group[0], transfer.id
        else:
            turns, ends = transfer.source // self._period, 2
            key = call.communicator, ALL_RANKS, self._first(transfer, turns) if turns else transfer.id
        found = self._transfers.get(key)
        if found is None:
            found = self._transfers[key] = _Joined(node=self._node(), ends=ends)
            if transfer.source == ALL_RANKS and self._turns > 1:
                self._shared.append(found.node)
        return found, turns

    def _first(self, transfer: Transfer, turns: int) -> str:
        """Return the id of the transfer of the first turn that this one is like."""
        world, back, shard = self._schedule.world_size, turns * self._period, transfer.shard
        return transfer_id(
            transfer.kind,
            None if shard is None else shard.moved(-back, world),
            transfer.source - back,
            (transfer.destination - back) % world,
            transfer.sequence,
        )

    def _weighted_edges(self) -> Numbers:
        """Return int64 [edges, 4]: source, target, turns between them, weight; that of a phase's compute is 0."""
        duration = np.zeros(self._nodes, dtype=np.int64)
        for (_, _, name), one in self._transfers.items():
            if one.joined != one.ends:
                raise ScheduleError(f"transfer {name} has {one.joined} of {one.ends} ends")
            duration[one.node] = one.duration_ns
        edges = np.array(self._edges, dtype=np.int64).reshape(-1, 4)
        edges[:, 3] = np.where(edges[:, 3] == OF_ITS_TRANSFER, duration[edges[:, 1]], edges[:, 3])
        return edges


def _period(schedule: Schedule, cluster: Cluster) -> int:
    """Return how many ranks make up a turn: those of the schedule, and whole nodes where there are several.

    All of them where that does not come out even.
    """
    world, nodes_of = schedule.world_size, cluster.gpus_per_node if cluster.nodes > 1 else 1
    period = math.lcm(schedule.period or world, nodes_of)
    return world if world % period else period


class _Links:
    """How long transfers of a call are on their way: ports are shared with the same call's other transfers alone."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._routes: dict[tuple[int, int], tuple[tuple[Port, float], ...]] = {}
        self._latencies: dict[tuple[int, int], int] = {}
        self._times: dict[tuple[Leg, tuple[int, ...]], int] = {}

    def durations_ns(self, call: GroupCall, group: tuple[int, ...]) -> list[int]:
        """Return the latency and the time on the way of each of a call's transfers."""
        legs = [legs_of(transfer, group) for transfer in call.transfers]
        load = Counter(port for several in legs for leg in several for port, _ in self._route(leg))
        return [
            self._latency_ns(several) + max((self._leg_ns(leg, load) for leg in several), default=0) for several in legs
        ]

    def _route(self, leg: Leg) -> tuple[tuple[Port, float], ...]:
        ends = leg.source, leg.destination
        found = self._routes.get(ends)
        if found is None:
            ports = route(self._cluster, *ends)
            found = tuple((port, capacity_bytes_per_us(self._cluster, port)) for port in ports)
            self._routes[ends] = found
        return found

    def _latency_ns(self, legs: list[Leg]) -> int:
        if len(legs) != 1:
            return latency_ns(self._cluster, legs)
        ends = legs[0].source, legs[0].destination
        found = self._latencies.get(ends)
        if found is None:
            found = self._latencies[ends] = latency_ns(self._cluster, legs)
        return found

    def _leg_ns(self, leg: Leg, load: Counter[Port]) -> int:
        ports = self._route(leg)
        key = leg, tuple([load[port] for port, _ in ports])
        found = self._times.get(key)
        if found is None:
            share = min(capacity / load[port] for port, capacity in ports)
            found = self._times[key] = transfer_ns(port_bytes(self._cluster, leg), share)
        return found
