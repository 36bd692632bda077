"""Both ends of every transfer agree, and a schedule cannot deadlock.

Every group call and the calls it exchanges with, on all ranks, are contracted to one node: they progress together.
The graph over these nodes and all ranks' phases holds what must come before what:

- a phase begins after the phase before it (its tasks) and after the transfers it waits for;
- a call is launched after its phase begins, and after the call launched before it on the same rank, on whichever
  communicator: NCCL's concurrent communicators need one launch order.

Where this graph is acyclic, the ranks can play it in any of its topological orders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from ..schedule.schedule import ALL_RANKS, GroupCall, Schedule, Transfer
from .rules import broken, every_phase

Ends = dict[str, dict[int, tuple[int, Transfer]]]  # transfer's name -> rank -> (index into all launches, as stated)


@dataclass(frozen=True, slots=True)
class Launch:
    """One group call on one rank."""

    rank: int
    phase: int
    call: GroupCall

    def __str__(self) -> str:
        return f"call {self.call.communicator} {self.call.transfers[0].id}"


def all_launches(schedule: Schedule) -> list[Launch]:
    """Return every group call, rank by rank, in launch order."""
    return [Launch(rank, phase.index, call) for rank, phase in every_phase(schedule) for call in phase.group_calls]


def check_order(schedule: Schedule) -> None:
    """Raise ScheduleError unless ends agree, waits are right, and nothing can deadlock."""
    launches = all_launches(schedule)
    _check_communicator_order(schedule, launches)
    ends = _match(schedule, launches)
    _check_pairs(launches)
    _check_acyclic(schedule, launches, ends, _waits(schedule, ends))


def _check_communicator_order(schedule: Schedule, launches: list[Launch]) -> None:
    place = {communicator.name: index for index, communicator in enumerate(schedule.communicators)}
    for before, after in pairwise(launches):
        earlier, later = before.call.communicator, after.call.communicator
        if (before.rank, before.phase) == (after.rank, after.phase) and place[earlier] > place[later]:
            problem = f"launched after {earlier}, against the order of the communicators"
            raise broken(problem, rank=after.rank, phase=after.phase, about=f"group call on {later}")


def _match(schedule: Schedule, launches: list[Launch]) -> Ends:
    """Return the ends of every transfer; each is stated once, and alike, by all of its ranks."""
    ends: Ends = {}
    for index, launch in enumerate(launches):
        for transfer in launch.call.transfers:
            found = ends.setdefault(transfer.id, {})
            about = f"transfer {transfer.id}"
            if launch.rank in found:
                phase = launches[found[launch.rank][0]].phase
                raise broken("launched twice", rank=launch.rank, phase=phase, about=about)
            found[launch.rank] = index, transfer
            first = next(iter(found))
            if transfer != found[first][1]:
                raise broken(f"differs from that of rank {first}", rank=launch.rank, phase=launch.phase, about=about)
    for name, found in ends.items():
        first, (index, transfer) = next(iter(found.items()))
        collective = transfer.source == ALL_RANKS
        expected = range(schedule.world_size) if collective else (transfer.source, transfer.destination)
        missing = set(expected) - set(found)
        if missing:
            problem = f"not launched on rank {min(missing)}"
            raise broken(problem, rank=first, phase=launches[index].phase, about=f"transfer {name}")
    return ends


def _check_pairs(launches: Iterable[Launch]) -> None:
    """Between two ranks a communicator knows no names: the n-th send meets the n-th receive."""
    orders: dict[tuple[str, int, int], dict[int, list[str]]] = {}
    for launch in launches:
        for transfer in launch.call.transfers:
            if transfer.source != ALL_RANKS:
                route = (transfer.communicator, transfer.source, transfer.destination)
                orders.setdefault(route, {}).setdefault(launch.rank, []).append(transfer.id)
    for (communicator, source, destination), sides in orders.items():
        for sent, received in zip(sides[source], sides[destination], strict=True):
            if sent != received:
                problem = f"on {communicator} meets {sent} of rank {source}: sent in another order"
                raise broken(problem, rank=destination, about=f"transfer {received}")


def _waits(schedule: Schedule, ends: Ends) -> list[tuple[int, int, int]]:
    """Return (launch, rank, phase) of every wait; each end is waited for exactly once, after its launch."""
    waits, waited = [], set()
    for rank, phase in every_phase(schedule):
        for name in phase.waits:
            about = f"transfer {name}"
            if rank not in ends.get(name, ()):
                raise broken("waited for, never launched here", rank=rank, phase=phase.index, about=about)
            if (rank, name) in waited:
                raise broken("waited for twice", rank=rank, phase=phase.index, about=about)
            waited.add((rank, name))
            waits.append((ends[name][rank][0], rank, phase.index))
    for name, found in ends.items():
        for rank in found:
            if (rank, name) not in waited:
                raise broken("never waited for", rank=rank, about=f"transfer {name}")
    return waits


def _check_acyclic(schedule: Schedule, launches: list[Launch], ends: Ends, waits: list[tuple[int, int, int]]) -> None:
    exchanges = nx.utils.UnionFind(range(len(launches)))  # calls joined by a transfer are one node
    for found in ends.values():
        exchanges.union(*(index for index, _ in found.values()))
    node_of = [exchanges[index] for index in range(len(launches))]
    graph = nx.DiGraph()
    for rank in range(schedule.world_size):
        nx.add_path(graph, [("phase", rank, phase.index) for phase in schedule.phases(rank)])
    for index, launch in enumerate(launches):
        graph.add_edge(("phase", launch.rank, launch.phase), node_of[index])
        if index and launches[index - 1].rank == launch.rank:
            graph.add_edge(node_of[index - 1], node_of[index])
    for index, rank, phase in waits:
        graph.add_edge(node_of[index], ("phase", rank, phase))
    if nx.is_directed_acyclic_graph(graph):
        return
    nodes = [edge[0] for edge in nx.find_cycle(graph)]
    names = [str(launches[node]) if isinstance(node, int) else f"rank {node[1]} phase {node[2]}" for node in nodes]
    shown = [*names[:6], *(["…"] if len(names) > 6 else []), names[0]]
    at = launches[next(node for node in nodes if isinstance(node, int))]  # phases alone form no cycle
    raise broken(f"deadlock: {' -> '.join(shown)}", rank=at.rank, phase=at.phase, about=str(at))
