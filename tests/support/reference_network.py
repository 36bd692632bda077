"""Links of the reference engine, with simpy: flows get max-min fair rates, recomputed whenever one arrives or leaves.

Only flows connected to the change through shared ports are looked at again, and a flow whose rate stays keeps its end:
so a transfer that nobody disturbs takes exactly `transfer_ns(bytes, rate)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import simpy

from sparsering.planner.cost.cluster import Cluster
from sparsering.planner.cost.timing import NS_PER_US, Leg, Port, capacity_bytes_per_us, port_bytes, route, transfer_ns

SAME_SHARE = 1 + 1e-12


def max_min_rates(routes: Sequence[tuple[Port, ...]], capacity: Callable[[Port], float]) -> list[float]:
    """Return the max-min fair rate of every flow by progressive filling.

    Again and again the port with the smallest fair share is full: its flows get that share and leave the rest to others
    (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2).
    """
    left = {port: capacity(port) for ports in routes for port in ports}
    users = Counter(port for ports in routes for port in ports)
    rates = [0.0] * len(routes)
    waiting = list(range(len(routes)))
    while waiting:
        share = min(left[port] / count for port, count in users.items() if count)
        full = {port for port, count in users.items() if count and left[port] / count <= share * SAME_SHARE}
        fixed = [flow for flow in waiting if not full.isdisjoint(routes[flow])]
        for flow in fixed:
            rates[flow] = share
            for port in routes[flow]:
                users[port] -= 1
                left[port] -= share
        waiting = [flow for flow in waiting if full.isdisjoint(routes[flow])]
    return rates


@dataclass(kw_only=True, slots=True, eq=False)
class _Flow:
    """Bytes on their way. `version` counts rate changes, so that an outdated end is recognised."""

    leg: Leg
    ports: tuple[Port, ...]
    left_bytes: float
    done: simpy.Event
    rate: float = 0.0
    since_ns: int = 0
    version: int = 0


class Network:
    """All flows of a cluster at one moment."""

    def __init__(self, environment: simpy.Environment, cluster: Cluster) -> None:
        self._environment = environment
        self._cluster = cluster
        self._flows: dict[Port, dict[_Flow, None]] = {}  # dicts keep the order of arrival: runs repeat exactly
        self._changed: dict[Port, None] = {}
        self._active: Counter[tuple[int, bool]] = Counter()  # flows by rank, and whether they are pulls
        self._flips: dict[int, simpy.Event] = {}

    def move(self, leg: Leg) -> simpy.Event:
        """Start a flow now; the returned event happens when its last byte has arrived."""
        ports = route(self._cluster, leg.source, leg.destination)
        flow = _Flow(
            leg=leg,
            ports=ports,
            left_bytes=float(port_bytes(self._cluster, leg)),
            done=self._environment.event(),
            since_ns=int(self._environment.now),
        )
        for port in ports:
            self._flows.setdefault(port, {})[flow] = None
        self._count(flow, +1)
        self._mark(ports)
        return flow.done

    def slowdown(self, rank: int) -> float:
        """Return the share of its compute speed that this rank loses now, to what leaves and enters it."""
        sends, pulls = (self._active[rank, pulled] > 0 for pulled in (False, True))
        return self._cluster.gpu.slowdown_of(sends=sends, pulls=pulls)

    def flip(self, rank: int) -> simpy.Event:
        """Return the event of the next moment at which `slowdown(rank)` changes."""
        if rank not in self._flips:
            self._flips[rank] = self._environment.event()
        return self._flips[rank]

    def _count(self, flow: _Flow, step: int) -> None:
        for rank in (flow.leg.source, flow.leg.destination):
            before = self.slowdown(rank)
            self._active[rank, flow.leg.pulled] += step
            if before != self.slowdown(rank) and rank in self._flips:
                self._flips.pop(rank).succeed()

    def _mark(self, ports: Iterable[Port]) -> None:
        """Settle rates once after everything else that happens at this instant."""
        if not self._changed:
            self._environment.timeout(0).callbacks.append(self._settle)  # type: ignore[union-attr]
        self._changed.update(dict.fromkeys(ports))

    def _settle(self, _: simpy.Event) -> None:
        flows = self._connected(self._changed)
        self._changed = {}
        for flow, rate in zip(flows, max_min_rates([flow.ports for flow in flows], self._capacity), strict=True):
            if rate != flow.rate:
                self._set_rate(flow, rate)

    def _capacity(self, port: Port) -> float:
        return capacity_bytes_per_us(self._cluster, port)

    def _connected(self, ports: Iterable[Port]) -> list[_Flow]:
        """Return the flows on these ports, on the other ports of those flows, and so on."""
        seen_ports, seen = dict.fromkeys(ports), {}
        waiting = list(seen_ports)
        while waiting:
            for flow in self._flows.get(waiting.pop(), {}):
                if flow not in seen:
                    seen[flow] = None
                    waiting += [port for port in flow.ports if port not in seen_ports]
                    seen_ports.update(dict.fromkeys(flow.ports))
        return list(seen)

    def _set_rate(self, flow: _Flow, rate: float) -> None:
        now = int(self._environment.now)
        flow.left_bytes = max(flow.left_bytes - flow.rate * (now - flow.since_ns) / NS_PER_US, 0.0)
        flow.rate, flow.since_ns, flow.version = rate, now, flow.version + 1
        version = flow.version
        end = self._environment.timeout(transfer_ns(flow.left_bytes, rate))
        end.callbacks.append(lambda _: self._finish(flow, version))  # type: ignore[union-attr]

    def _finish(self, flow: _Flow, version: int) -> None:
        if version != flow.version:
            return  # its rate changed meanwhile, and so did its end
        for port in flow.ports:
            del self._flows[port][flow]
        self._count(flow, -1)
        self._mark(flow.ports)
        flow.done.succeed()
