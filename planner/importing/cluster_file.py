"""A cluster made of what other tools' texts say, on top of one that says the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...traces.errors import InputError, UnsupportedError
from ..cost.cluster import Cluster, parse_cluster
from .nccl_tests import NcclTable, PortLine, fit_line
from .topology import Topology

DIGITS = 4  # significant: more than was measured
INTRA, INTER = "intra_node", "inter_node"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A cluster, and a line for each thing that it says: where from, and what a cluster file cannot say."""

    cluster: Cluster
    lines: tuple[str, ...]


def imported_cluster(
    base: Cluster,
    topology: Topology | None,
    tables: Sequence[tuple[Path, NcclTable]],
    *,
    name: str,
    nodes: int | None = None,
) -> Imported:
    """Return `base` with the GPUs and cards of a topology, and the links that tables measured.

    name: the cluster's; nodes: how many, which no text says. It stays `datasheet` where base is: its kernels are not
    measured by these texts. Raises InputError for tables that measure the same links, UnsupportedError for ones that
    mix links within and between nodes.
    """
    lines = [] if topology is None else _told(topology)
    document = base.model_dump(mode="json") | {"name": name, "nodes": base.nodes if nodes is None else nodes}
    if topology is None:
        lines.append(f"GPUs of a node ({base.gpus_per_node}): of {base.name}")
    else:
        document["gpus_per_node"] = topology.gpus
    links = _links(tables)
    document[INTRA] = _within(document[INTRA], links, base, topology, lines)
    document[INTER] = _between(document[INTER], links, base, topology, lines)
    lines.append(
        f"the GPU ({base.gpu.name}, its kernels, its slowdowns): of {base.name}, not measured{_others(tables)}"
    )
    if nodes is None:
        lines.append(f"nodes ({base.nodes}): of {base.name}")
    measured = [f"{place} by {table.test}" for place, (_, table, _) in links.items()]
    head = f"Links measured ({', '.join(measured)}, nccl-tests)" if measured else "No link measured"
    document["notes"] = f"{head}; the rest of {base.name}. {'. '.join(lines)}."
    return Imported(cluster=parse_cluster(document, source=name), lines=tuple(lines))


def _told(topology: Topology) -> list[str]:
    lines = [f"GPUs of a node ({topology.gpus}), cards ({len(topology.cards)}): of the topology"]
    if topology.may_be_a_mesh:
        lines.append(
            f"NV{topology.nvlinks} between {topology.gpus} GPUs may be wires of each pair; a cluster file has a "
            "switch, through which one pair could use them all"
        )
    if topology.far_cards:
        lines.append(f"cards left out, which no GPU is near to: {', '.join(topology.far_cards)}")
    if topology.remote_gpus:
        lines.append(f"{', '.join(topology.remote_gpus)} have no card near; a cluster file shares the cards out evenly")
    return lines


def _links(tables: Sequence[tuple[Path, NcclTable]]) -> dict[str, tuple[Path, NcclTable, PortLine]]:
    """Return which link each table measured, and its line."""
    found: dict[str, tuple[Path, NcclTable, PortLine]] = {}
    for path, table in tables:
        if 1 < table.nodes < table.ranks:
            problem = f"{table.ranks} ranks on {table.nodes} hosts mix links within and between nodes: one rank a host"
            raise UnsupportedError(problem, source=path)
        place = INTRA if table.nodes == 1 else INTER
        if place in found:
            raise InputError(f"measures the same links as {found[place][0]}: give one of the two", source=path)
        found[place] = path, table, fit_line(table, path)
    return found


def _measured(link: dict[str, Any], place: str, table: NcclTable, line: PortLine, lines: list[str]) -> dict[str, Any]:
    """Return the link with latency and bandwidth of the line; `lines` gets what was measured and what was not."""
    bandwidth = float(f"{line.bandwidth_bytes_per_us:.{DIGITS}g}")
    found = link | {"bandwidth_bytes_per_us": bandwidth}
    if line.latency_us is None:
        latency = f"latency {link['latency_us']:g} µs not measured, the sizes are too large"
    else:
        found["latency_us"] = float(f"{line.latency_us:.{DIGITS}g}")
        latency = f"{found['latency_us']:g} µs"
    lines.append(
        f"{place}: {bandwidth / 1e3:,.4g} GB/s a port, {latency}; a line through {line.sizes} sizes of {table.test}, "
        f"{line.median_error:.0%} off in the median, {line.largest_error:.0%} at most"
    )
    return found


def _within(
    link: dict[str, Any], links: dict[str, tuple[Path, NcclTable, PortLine]], base: Cluster, topology: Topology | None,
    lines: list[str],
) -> dict[str, Any]:  # fmt: skip
    if topology is not None and topology.nvlinks:
        link = link | {"name": f"NVLink, {topology.nvlinks} a GPU pair"}
    if INTRA not in links:
        lines.append(f"{INTRA}: of {base.name}")
        return link
    _, table, line = links[INTRA]
    link = _measured(link, INTRA, table, line, lines)
    if topology is not None and table.ranks < topology.gpus:
        lines.append(f"{INTRA} was measured with {table.ranks} of {topology.gpus} GPUs")
    for field in ("pull_bandwidth_bytes_per_us", "switch_bandwidth_bytes_per_us"):
        if link[field] is not None:
            lines.append(f"{INTRA}.{field} ({link[field]:g}): of {base.name}, not measured")
    return link


def _between(
    link: dict[str, Any] | None, links: dict[str, tuple[Path, NcclTable, PortLine]], base: Cluster,
    topology: Topology | None, lines: list[str],
) -> dict[str, Any] | None:  # fmt: skip
    cards = len(topology.cards) if topology is not None else 0
    if link is None and INTER not in links:
        if cards:
            lines.append(f"cards have no use: neither {base.name} nor a table says what they carry")
        return None
    if INTER in links:
        empty = {"name": "network", "nics_per_node": None, "latency_us": 0.0, "switch_bandwidth_bytes_per_us": None}
        _, table, line = links[INTER]
        if link is None and line.latency_us is None:
            lines.append(f"{INTER}: no text says its latency: 0 µs")
        link = _measured(link or empty, INTER, table, line, lines)
        lines.append(f"{INTER}: what one rank a host sends is taken to be what one card carries")
        if link["switch_bandwidth_bytes_per_us"] is not None:
            lines.append(f"{INTER}.switch_bandwidth_bytes_per_us: of {base.name}, not measured")
    else:
        lines.append(f"{INTER} (but for the number of cards): of {base.name}" if cards else f"{INTER}: of {base.name}")
    assert link is not None
    known = cards or link["nics_per_node"]
    if not known:
        raise InputError("no text says how many cards a node has: give a topology that lists them", field=INTER)
    return link | {"nics_per_node": known}


def _others(tables: Sequence[tuple[Path, NcclTable]]) -> str:
    names = sorted({gpu for _, table in tables for gpu in table.gpus})
    return f"; the tests ran on {', '.join(names)}" if names else ""
