"""Shares of links: known max-min allocations, the definition as a property, and flows in simulated time."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from sparsering.planner.cost.timing import Leg, Port, capacity_bytes_per_us, route
from sparsering.simulator.clock import Clock
from sparsering.simulator.network import Network, max_min_rates

A, B, C = Port("gpu-out", 0, 0), Port("gpu-in", 0, 1), Port("nic-switch")


@pytest.mark.parametrize(
    ("routes", "capacity", "expected"),
    [
        ([(A,)], {A: 10.0}, [10.0]),
        ([(A,), (A,), (A,), (A,)], {A: 10.0}, [2.5] * 4),
        # one flow over both links, one on each: the narrow link gives 2 each, the wide one the rest
        ([(A, B), (A,), (B,)], {A: 4.0, B: 10.0}, [2.0, 2.0, 8.0]),
        # the classic line: the long flow is held by the middle link, neighbours take what it leaves
        ([(A, B, C), (A,), (B,), (B,), (C,)], {A: 12.0, B: 6.0, C: 3.0}, [1.5, 10.5, 2.25, 2.25, 1.5]),
        ([], {}, []),
    ],
)
def test_known_allocations(routes: list[tuple[Port, ...]], capacity: dict[Port, float], expected: list[float]) -> None:
    assert max_min_rates(routes, capacity.__getitem__) == pytest.approx(expected)


@given(
    capacity=st.lists(st.floats(1.0, 100.0), min_size=1, max_size=5),
    routes=st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3), max_size=8),
)
def test_rates_are_max_min_fair(capacity: list[float], routes: list[set[int]]) -> None:
    """No port carries more than it can, and every flow has a full port on which nobody is faster."""
    ports = [Port("gpu-out", 0, number) for number in range(len(capacity))]
    paths = [tuple(ports[number % len(ports)] for number in sorted({n % len(ports) for n in path})) for path in routes]
    rates = max_min_rates(paths, lambda port: capacity[port.number])
    carried, fastest = defaultdict(float), defaultdict(float)
    for path, rate in zip(paths, rates, strict=True):
        for port in path:
            carried[port] += rate
            fastest[port] = max(fastest[port], rate)
    for port, total in carried.items():
        assert total <= capacity[port.number] * (1 + 1e-9)
    for path, rate in zip(paths, rates, strict=True):
        assert any(
            carried[port] >= capacity[port.number] * (1 - 1e-9) and rate >= fastest[port] * (1 - 1e-9) for port in path
        )


def arrivals(sends: list[tuple[int, int, int, int]], **cluster: float) -> list[tuple[int, int]]:
    """Play (start, source, destination, bytes) and return (nanosecond, number of the flow) in order of arrival."""
    clock, log = Clock(), []
    network = Network(clock, tiny.cluster(**cluster))  # type: ignore[arg-type]
    for number, (start, source, destination, nbytes) in enumerate(sends):
        done = partial(lambda number: log.append((clock.now, number)), number)
        clock.after(start, partial(network.move, Leg(source, destination, nbytes), done))
    clock.run()
    return sorted(log)


def test_a_flow_alone_gets_the_port() -> None:
    assert arrivals([(0, 0, 1, 4000)]) == [(4000, 0)]


def test_two_directions_do_not_disturb_each_other() -> None:
    assert arrivals([(0, 0, 1, 4000), (0, 1, 0, 4000)]) == [(4000, 0), (4000, 1)]


def test_flows_out_of_one_port_share_it_and_the_rest_speeds_up_when_one_ends() -> None:
    # 1,000 + 3,000 bytes: both at half speed until 2,000 ns, then the second alone for its other 2,000 bytes
    assert arrivals([(0, 0, 1, 1000), (0, 0, 2, 3000)]) == [(2000, 0), (4000, 1)]


def test_a_late_flow_slows_an_early_one() -> None:
    # alone until 1,000 ns, then shared: 3,000 bytes left at half speed would end at 7,000; the late one ends at 3,000
    assert arrivals([(0, 0, 1, 4000), (1000, 0, 2, 1000)]) == [(3000, 1), (5000, 0)]


def test_flows_into_one_port_share_it() -> None:
    assert arrivals([(0, 0, 2, 1000), (0, 1, 2, 1000)]) == [(2000, 0), (2000, 1)]


def test_gpus_of_a_node_share_its_card_but_not_with_traffic_inside() -> None:
    sends = [(0, 0, 4, 1000), (0, 1, 5, 1000), (0, 0, 1, 1000)]
    assert arrivals(sends, nodes=2, nics=1) == [(1000, 2), (4000, 0), (4000, 1)]
    assert arrivals(sends, nodes=2, nics=4) == [(1000, 2), (2000, 0), (2000, 1)]


def test_a_switch_limits_all_ports_together() -> None:
    assert arrivals([(0, 0, 1, 1000), (0, 2, 3, 1000)], switch=1000.0) == [(2000, 0), (2000, 1)]


def test_nothing_takes_no_time() -> None:
    assert arrivals([(5, 0, 1, 0)]) == [(5, 0)]


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 7), st.integers(1, 7), st.integers(1, 9000)),
        min_size=1,
        max_size=12,
    )
)
def test_all_bytes_arrive_no_faster_than_the_ports_allow(sends: list[tuple[int, int, int, int]]) -> None:
    """Conservation: every flow arrives once; the bytes over a port take at least their time from the first start on."""
    cluster = tiny.cluster(nodes=2, gpus=4, nics=2)
    flows = [(start, source, (source + offset) % 8, nbytes) for start, source, offset, nbytes in sends]
    ends = {number: end for end, number in arrivals(flows, nodes=2, gpus=4, nics=2)}
    assert sorted(ends) == list(range(len(flows)))
    users: dict[Port, list[int]] = defaultdict(list)
    for number, (_, source, destination, _) in enumerate(flows):
        for port in route(cluster, source, destination):
            users[port].append(number)
    for port, numbers in users.items():
        first, last = min(flows[n][0] for n in numbers), max(ends[n] for n in numbers)
        nbytes = sum(flows[n][3] for n in numbers)
        assert last - first >= nbytes / capacity_bytes_per_us(cluster, port) * 1000 - len(numbers)
