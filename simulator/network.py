"""Shared links in simulated time: flows get max-min fair rates, recomputed whenever one arrives or leaves.

Only flows connected to the change through shared ports are looked at again, and a flow whose rate stays keeps its end:
so a transfer that nobody disturbs takes exactly `transfer_ns(bytes, rate)`. Where no port is shared, every flow gets
what the narrowest of its ports carries, without looking for fair shares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from ..planner.cost.cluster import Cluster
from ..planner.cost.timing import (
    NS_PER_US,
    Leg,
    Port,
    capacity_bytes_per_us,
    latency_ns,
    port_bytes,
    route,
    transfer_ns,
)
from .clock import Clock, Event

SAME_SHARE = 1 + 1e-12

Name = TypeVar("Name", bound=Hashable)


def max_min_rates(routes: Sequence[tuple[Name, ...]], capacity: Callable[[Name], float]) -> list[float]:
    """Return the max-min fair rate of every flow by progressive filling. routes: the ports of each.

    Again and again the port with the smallest fair share is full: its flows get that share and leave the rest to others
    (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2).
    """
    users: dict[Name, int] = {}
    for ports in routes:
        for port in ports:
            users[port] = users.get(port, 0) + 1
    left = {port: capacity(port) for port in users}
    rates = [0.0] * len(routes)
    waiting: Sequence[int] = range(len(routes))
    while waiting:
        shares = {port: left[port] / count for port, count in users.items()}
        share = min(shares.values())
        limit = share * SAME_SHARE
        full = {port for port, its in shares.items() if its <= limit}
        later = []
        for flow in waiting:
            ports = routes[flow]
            if full.isdisjoint(ports):
                later.append(flow)
                continue
            rates[flow] = share
            for port in ports:
                users[port] -= 1
                left[port] -= share
        users = {port: count for port, count in users.items() if count}
        waiting = later
    return rates


class _Flow:
    """Bytes on their way. `version` counts rate changes, so that an outdated end is recognised.

    ports: by number; alone_rate: what it gets where it shares none of them.
    """

    __slots__ = ("alone_rate", "done", "left_bytes", "leg", "ports", "rate", "since_ns", "version")

    def __init__(
        self, leg: Leg, path: tuple[tuple[int, ...], float], nbytes: float, done: Event, since_ns: int
    ) -> None:
        self.leg, self.left_bytes, self.done, self.since_ns = leg, nbytes, done, since_ns
        self.ports, self.alone_rate = path
        self.rate, self.version = 0.0, 0


class Network:
    """All flows of a cluster at one moment."""

    def __init__(self, clock: Clock, cluster: Cluster) -> None:
        self._clock, self._cluster = clock, cluster
        self._numbers: dict[Port, int] = {}
        self._capacity: list[float] = []  # by number of the port, as the next
        self._flows: list[dict[_Flow, None]] = []  # dicts keep the order of arrival: runs repeat exactly
        self._paths: dict[tuple[int, int], tuple[tuple[int, ...], float]] = {}
        self._latencies: dict[tuple[int, int], int] = {}
        self._changed: dict[int, None] = {}
        gpu = cluster.gpu
        self.slows = bool(gpu.communication_slowdown or gpu.pull_slowdown)
        self._lost = {(s, p): gpu.slowdown_of(sends=s, pulls=p) for s in (False, True) for p in (False, True)}
        self._active: list[list[int]] = [[0] * cluster.world_size for _ in range(2)]  # [pulled][rank]: flows
        self._flips: dict[int, Event] = {}

    def move(self, leg: Leg, done: Event) -> None:
        """Start a flow now; `done` is queued when its last byte has arrived."""
        ends = (leg.source, leg.destination)
        path = self._paths.get(ends)
        if path is None:
            path = self._paths[ends] = self._path(*ends)
        flow = _Flow(leg, path, float(port_bytes(self._cluster, leg)), done, self._clock.now)
        for port in flow.ports:
            self._flows[port][flow] = None
        if self.slows:
            self._count(leg, +1)
        self._mark(flow.ports)

    def latency_ns(self, legs: list[Leg]) -> int:
        """Return the latency before the data of a transfer move, as `timing.latency_ns` says."""
        if len(legs) != 1:
            return latency_ns(self._cluster, legs)
        ends = (legs[0].source, legs[0].destination)
        found = self._latencies.get(ends)
        if found is None:
            found = self._latencies[ends] = latency_ns(self._cluster, legs)
        return found

    def slowdown(self, rank: int) -> float:
        """Return the share of its compute speed that this rank loses now, to what leaves and enters it."""
        return self._lost[self._active[False][rank] > 0, self._active[True][rank] > 0]

    def on_flip(self, rank: int, event: Event) -> None:
        """Queue an event at the next moment at which `slowdown(rank)` changes, in place of the one asked for before."""
        self._flips[rank] = event

    def _path(self, source: int, destination: int) -> tuple[tuple[int, ...], float]:
        """Return the numbers of the ports between two ranks, and what the narrowest of them carries."""
        ports = route(self._cluster, source, destination)
        for port in ports:
            if port not in self._numbers:
                self._numbers[port] = len(self._numbers)
                self._capacity.append(capacity_bytes_per_us(self._cluster, port))
                self._flows.append({})
        numbers = tuple(self._numbers[port] for port in ports)
        return numbers, min(self._capacity[number] for number in numbers)

    def _count(self, leg: Leg, step: int) -> None:
        active = self._active[leg.pulled]
        for rank in (leg.source, leg.destination):
            before = self.slowdown(rank)
            active[rank] += step
            if rank in self._flips and before != self.slowdown(rank):
                self._clock.queue.append(self._flips.pop(rank))

    def _mark(self, ports: Iterable[int]) -> None:
        """Settle rates once after everything else that is queued for this moment."""
        changed = self._changed
        if not changed:
            self._clock.queue.append(self._settle)
        for port in ports:
            changed[port] = None

    def _settle(self) -> None:
        flows, shared = self._connected(self._changed)
        self._changed = {}
        if shared:
            rates = max_min_rates([flow.ports for flow in flows], self._capacity.__getitem__)
        else:
            rates = [flow.alone_rate for flow in flows]
        for flow, rate in zip(flows, rates, strict=True):
            if rate != flow.rate:
                self._set_rate(flow, rate)

    def _connected(self, ports: dict[int, None]) -> tuple[list[_Flow], bool]:
        """Return the flows on these ports, on the other ports of those flows, and so on; whether any port is shared."""
        waiting, seen_ports, shared = list(ports), set(ports), False
        seen: dict[_Flow, None] = {}
        while waiting:
            flows = self._flows[waiting.pop()]
            shared = shared or len(flows) > 1
            for flow in flows:
                if flow not in seen:
                    seen[flow] = None
                    for port in flow.ports:
                        if port not in seen_ports:
                            waiting.append(port)
                            seen_ports.add(port)
        return list(seen), shared

    def _set_rate(self, flow: _Flow, rate: float) -> None:
        now = self._clock.now
        if flow.rate:
            flow.left_bytes = max(flow.left_bytes - flow.rate * (now - flow.since_ns) / NS_PER_US, 0.0)
        flow.rate, flow.since_ns = rate, now
        flow.version += 1
        self._clock.after(transfer_ns(flow.left_bytes, rate), partial(self._finish, flow, flow.version))

    def _finish(self, flow: _Flow, version: int) -> None:
        if version != flow.version:
            return  # its rate changed meanwhile, and so did its end
        for port in flow.ports:
            del self._flows[port][flow]
        if self.slows:
            self._count(flow.leg, -1)
        self._mark(flow.ports)
        self._clock.queue.append(flow.done)
