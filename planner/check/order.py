"""Both ends of every transfer agree, and a schedule cannot deadlock.

Every group call and the calls it exchanges with, on all ranks, are contracted to one node: they progress together.
The graph over these nodes and all ranks' phases holds what must come before what:

- a phase begins after the phase before it (its tasks) and after the transfers it waits for;
- a call is launched after its phase begins, and after the call launched before it on the same rank, on whichever
  communicator: NCCL's concurrent communicators need one launch order.

Where this graph is acyclic, the ranks can play it in any of its topological orders.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from ..schedule.schedule import ALL_RANKS, GroupCall, Schedule, Transfer
from .rules import broken, every_phase


@dataclass(frozen=True, slots=True)
class Launch:
    """One group call on one rank."""

    rank: int
    phase: int
    call: GroupCall

    def __str__(self) -> str:
        return f"call {self.call.communicator} {self.call.transfers[0].id}"


@dataclass(frozen=True, slots=True)
class End:
    """A transfer as one of its ranks states it."""

    launch: int  # index into all launches
    rank: int
    transfer: Transfer


def all_launches(schedule: Schedule) -> list[Launch]:
    """Return every group call, rank by rank, in launch order."""
    return [Launch(rank, phase.index, call) for rank, phase in every_phase(schedule) for call in phase.group_calls]


def check_order(schedule: Schedule) -> None:
    """Raise ScheduleError unless ends agree, waits are right, and nothing can deadlock."""
    _check_communicator_order(schedule)
    launches = all_launches(schedule)
    ends = _match(schedule, launches)
    _check_pairs(ends)
    waits = _waits(schedule, ends)
    _check_acyclic(schedule, launches, ends, waits)


def _check_communicator_order(schedule: Schedule) -> None:
    place = {communicator.name: index for index, communicator in enumerate(schedule.communicators)}
    for rank, phase in every_phase(schedule):
        names = [call.communicator for call in phase.group_calls]
        for earlier, later in pairwise(names):
            if place[earlier] > place[later]:
                problem = f"launched after {earlier}, against the order of the communicators"
                raise broken(problem, rank=rank, phase=phase.index, about=f"group call on {later}")


def _match(schedule: Schedule, launches: list[Launch]) -> dict[Hashable, list[End]]:
    """Return the ends of every transfer, by its name; each is stated once, and alike, by all of its ranks."""
    ends: dict[Hashable, list[End]] = {}
    for index, launch in enumerate(launches):
        for transfer in launch.call.transfers:
            ends.setdefault(transfer.id, []).append(End(index, launch.rank, transfer))
    for found in ends.values():
        transfer = found[0].transfer
        everyone = set(range(schedule.world_size))
        expected = everyone if transfer.source == ALL_RANKS else {transfer.source, transfer.destination}
        _check_ends(found, expected, launches)
    return ends


def _check_ends(found: list[End], expected: set[int], launches: list[Launch]) -> None:
    stated = [end.rank for end in found]
    about = f"transfer {found[0].transfer.id}"
    for end in found:
        phase = launches[end.launch].phase
        if stated.count(end.rank) > 1:
            raise broken("launched twice", rank=end.rank, phase=phase, about=about)
        if end.transfer != found[0].transfer:
            raise broken(f"differs from that of rank {found[0].rank}", rank=end.rank, phase=phase, about=about)
    missing = expected - set(stated)
    if missing:
        first = found[0]
        problem = f"not launched on rank {min(missing)}"
        raise broken(problem, rank=first.rank, phase=launches[first.launch].phase, about=about)


def _check_pairs(ends: dict[Hashable, list[End]]) -> None:
    """Between two ranks a communicator knows no names: the n-th send meets the n-th receive."""
    orders: dict[tuple[str, int, int], dict[int, list[End]]] = {}
    for found in ends.values():
        for end in found:
            transfer = end.transfer
            if transfer.source != ALL_RANKS:
                route = (transfer.communicator, transfer.source, transfer.destination)
                orders.setdefault(route, {}).setdefault(end.rank, []).append(end)
    for (communicator, source, destination), sides in orders.items():
        _check_pair(communicator, in_launch_order(sides[source]), in_launch_order(sides[destination]))


def in_launch_order(ends: Iterable[End]) -> list[End]:
    """Sort the ends on one rank; within a call they are found in the order listed, which sorting keeps."""
    return sorted(ends, key=lambda end: end.launch)


def _check_pair(communicator: str, sends: list[End], receives: list[End]) -> None:
    for sent, received in zip(sends, receives, strict=True):
        if sent.transfer.id != received.transfer.id:
            problem = f"on {communicator} meets {sent.transfer.id} of rank {sent.rank}: sent in another order"
            raise broken(problem, rank=received.rank, about=f"transfer {received.transfer.id}")


def _waits(schedule: Schedule, ends: dict[Hashable, list[End]]) -> list[tuple[int, int, int]]:
    """Return (launch, rank, phase) of every wait; each end is waited for exactly once, after its launch."""
    launch_of = {(end.rank, name): end.launch for name, found in ends.items() for end in found}
    waits, waited = [], set()
    for rank, phase in every_phase(schedule):
        for name in phase.waits:
            about = f"transfer {name}"
            if (rank, name) not in launch_of:
                raise broken("waited for, never launched here", rank=rank, phase=phase.index, about=about)
            if (rank, name) in waited:
                raise broken("waited for twice", rank=rank, phase=phase.index, about=about)
            waited.add((rank, name))
            waits.append((launch_of[rank, name], rank, phase.index))
    for rank, name in launch_of:
        if (rank, name) not in waited:
            raise broken("never waited for", rank=rank, about=f"transfer {name}")
    return waits


def _check_acyclic(
    schedule: Schedule, launches: list[Launch], ends: dict[Hashable, list[End]], waits: list[tuple[int, int, int]]
) -> None:
    node_of = _contract(len(launches), ends)
    graph = nx.DiGraph()
    for rank in range(schedule.world_size):
        nx.add_path(graph, [("phase", rank, phase.index) for phase in schedule.phases(rank)])
    for index, launch in enumerate(launches):
        graph.add_edge(("phase", launch.rank, launch.phase), node_of[index])
        if index and launches[index - 1].rank == launch.rank:
            graph.add_edge(node_of[index - 1], node_of[index])
    for launch, rank, phase in waits:
        graph.add_edge(node_of[launch], ("phase", rank, phase))
    if not nx.is_directed_acyclic_graph(graph):
        raise _deadlock(graph, launches)


def _contract(count: int, ends: dict[Hashable, list[End]]) -> list[int]:
    """Return for every launch the number of its node: calls joined by a transfer share one."""
    exchanges = nx.utils.UnionFind(range(count))
    for found in ends.values():
        exchanges.union(*(end.launch for end in found))
    return [exchanges[index] for index in range(count)]


def _deadlock(graph: nx.DiGraph, launches: list[Launch]) -> Exception:
    nodes = [edge[0] for edge in nx.find_cycle(graph)]
    names = [str(launches[node]) if isinstance(node, int) else f"rank {node[1]} phase {node[2]}" for node in nodes]
    shown = [*names[:6], *(["…"] if len(names) > 6 else []), names[0]]
    calls = [launches[node] for node in nodes if isinstance(node, int)]
    at = calls[0]  # phases alone form no cycle
    return broken(f"deadlock: {' -> '.join(shown)}", rank=at.rank, phase=at.phase, about=str(at))
