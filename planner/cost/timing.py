"""What the simulator's engine and the planner's recurrence share: routes, latencies, and times in whole nanoseconds.

A transfer leaves through a port of its source and enters through a port of its destination: within a node the GPUs'
own ports, between nodes the network cards, which several GPUs may share. Where a switch is given a capacity, the
transfer crosses that too. An all-reduce is a ring of its members in rank order: a reduce-scatter and an all-gather
pass 2 (W - 1) / W of the bytes from each member to the next. An all-gather or reduce-scatter alone is the same ring:
each member passes on W - 1 slots. Pulls share ports with sends; where copy engines carry more of them than a port
carries of sends, a pull counts as so many bytes fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError, UnsupportedError
from ..schedule.batch import BatchWork, LaunchBatch
from ..schedule.launches import Launch
from ..schedule.schedule import ALL_RANKS, Direction, Schedule, Transfer
from ..schedule.workload import TaskWork, Workload
from .cluster import Cluster, Link
from .constants import LayerConstants
from .model import CostModel

NS_PER_US = 1000


class Port(NamedTuple):
    """One direction of one port or switch. kind: gpu-out, gpu-in, gpu-switch, nic-out, nic-in or nic-switch."""

    kind: str
    node: int = 0
    number: int = 0


class Leg(NamedTuple):
    """Bytes that move from one rank to another. pulled: by copy engines."""

    source: int
    destination: int
    nbytes: int
    pulled: bool = False


def route(cluster: Cluster, source: int, destination: int) -> tuple[Port, ...]:
    """Return the ports that data from rank `source` to rank `destination` occupies."""
    source_node, destination_node = cluster.node_of(source), cluster.node_of(destination)
    if source_node == destination_node:
        ports = [Port("gpu-out", source_node, source), Port("gpu-in", source_node, destination)]
        switch = Port("gpu-switch", source_node)
    else:
        ports = [
            Port("nic-out", source_node, cluster.nic_of(source)),
            Port("nic-in", destination_node, cluster.nic_of(destination)),
        ]
        switch = Port("nic-switch")
    limited = link_of(cluster, source, destination).switch_bandwidth_bytes_per_us is not None
    return (*ports, switch) if limited else tuple(ports)


def link_of(cluster: Cluster, source: int, destination: int) -> Link:
    """Return the kind of link between two ranks; InputError when they are on nodes that nothing connects."""
    if cluster.node_of(source) == cluster.node_of(destination):
        return cluster.intra_node
    if cluster.inter_node is None:
        raise InputError(f"is needed between ranks {source} and {destination}", field="inter_node")
    return cluster.inter_node


def capacity_bytes_per_us(cluster: Cluster, port: Port) -> float:
    """Return what a port or switch carries."""
    link = cluster.intra_node if port.kind.startswith("gpu") else cluster.inter_node
    assert link is not None
    bandwidth = link.switch_bandwidth_bytes_per_us if port.kind.endswith("switch") else link.bandwidth_bytes_per_us
    assert bandwidth is not None
    return bandwidth


def legs_of(transfer: Transfer, group: tuple[int, ...]) -> list[Leg]:
    """Return what a transfer moves between which ranks; UnsupportedError for a transport without a model."""
    if transfer.transport in ("p2p", "pull") and transfer.source != ALL_RANKS:
        pulled = transfer.transport == "pull"
        return [Leg(transfer.source, transfer.destination, transfer.capacity_bytes, pulled)]
    if transfer.transport == "all_reduce":
        share = 2 * (len(group) - 1) * transfer.capacity_bytes // len(group)
    elif transfer.transport in ("all_gather", "reduce_scatter"):
        share = (len(group) - 1) * transfer.capacity_bytes
    else:
        raise UnsupportedError(f"{transfer.transport} of {transfer.id} has no timing model", field="transport")
    return [Leg(rank, group[(place + 1) % len(group)], share) for place, rank in enumerate(group) if len(group) > 1]


def port_bytes(cluster: Cluster, leg: Leg) -> float:
    """Return the bytes that could be sent while a leg's are on their way: fewer, where pulls are quicker."""
    link = cluster.intra_node
    if not leg.pulled or link.pull_bandwidth_bytes_per_us is None:
        return leg.nbytes
    return leg.nbytes * link.bandwidth_bytes_per_us / link.pull_bandwidth_bytes_per_us


def latency_ns(cluster: Cluster, legs: list[Leg]) -> int:
    """Return the latency before the data of a call moves: that of the slowest link it uses."""
    links = [link_of(cluster, leg.source, leg.destination) for leg in legs]
    return max((round(link.latency_us * NS_PER_US) for link in links), default=0)


def transfer_ns(nbytes: float, bytes_per_us: float) -> int:
    """Return the time of so many bytes at a constant rate."""
    return round(nbytes / bytes_per_us * NS_PER_US)


def launch_ns(launch: Launch, work: Sequence[TaskWork], cost: CostModel, direction: Direction) -> int:
    """Return the time that a launch takes alone on its GPU. work: of each of its tasks."""
    return round(cost.launch_us(launch, work, direction) * NS_PER_US)


def launches_ns(
    batch: LaunchBatch, workload: Workload, cost: CostModel, direction: Direction
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what each launch takes alone on its GPU, and the host to issue it, int64 [L] each; 0 without a host."""
    if not batch.launches:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    work = BatchWork.under(workload, batch)
    device_us, host_us = cost.launches_us(batch, work, direction), np.zeros(len(batch.launches))
    if cost.constants.host is not None:
        host_us = cost.hosts_us(batch, work, direction)
    return _whole_ns(device_us), _whole_ns(host_us)


def _whole_ns(us: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(us * NS_PER_US).astype(np.int64)


def landing_ns(constants: LayerConstants, transfers: Iterable[Transfer], rank: int) -> int:
    """Return what a rank's compute stream does with what landed when it has waited for these transfers."""
    return round(sum(constants.landing_us(transfer, rank) for transfer in transfers) * NS_PER_US)


def check_sizes(schedule: Schedule, workload: Workload, cluster: Cluster) -> None:
    """Raise InputError unless schedule and workload are of the same ranks, and the cluster has that many.

    A schedule whose ranks pull must lie within one node.
    """
    if schedule.world_size != workload.world_size:
        raise InputError(
            f"is for {workload.world_size} ranks, the schedule for {schedule.world_size}", field="workload"
        )
    if schedule.world_size > cluster.world_size:
        raise InputError(
            f"{cluster.name} has {cluster.world_size} GPUs, the schedule {schedule.world_size} ranks", field="cluster"
        )
    if schedule.shares and cluster.node_of(schedule.world_size - 1):
        raise InputError(
            f"ranks pull within one node only, {cluster.name} has {cluster.gpus_per_node} GPUs a node", field="cluster"
        )
