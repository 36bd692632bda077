"""The cluster that a command was given: read, with a word on stderr about rates that are hardly meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from .cost.cluster import Cluster, load_cluster

SLOW_LINK_BYTES_PER_US = 100.0  # 100 MB/s: less than a gigabit Ethernet card
SLOW_GPU_FLOPS_PER_US = 10e3  # 10 GFLOP/s: less than one processor core


def chosen_cluster(name_or_path: str | Path) -> Cluster:
    """Read a cluster from a YAML file or by preset name, and warn on stderr, a line for each of its `doubts`."""
    cluster = load_cluster(name_or_path)
    for doubt in doubts(cluster):
        typer.echo(f"warning: {name_or_path}: {doubt}", err=True)
    return cluster


def doubts(cluster: Cluster) -> Iterator[str]:
    """Yield what looks like a wrong unit: links below 100 MB/s, a GPU below 10 GFLOP/s."""
    for place, link in (("intra_node", cluster.intra_node), ("inter_node", cluster.inter_node)):
        if link is not None and (slow := link.bandwidth_bytes_per_us) < SLOW_LINK_BYTES_PER_US:
            yield f"{place}.bandwidth_bytes_per_us: {slow:g} is {slow:g} MB/s"
    if (slow := cluster.gpu.peak_flops_per_us) < SLOW_GPU_FLOPS_PER_US:
        yield f"gpu.peak_flops_per_us: {slow:g} is {slow / 1e3:g} GFLOP/s"
