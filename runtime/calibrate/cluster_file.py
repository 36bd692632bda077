"""A cluster file made of measured points: prices of launches, rates, links; the rest from the file it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from ...planner.cost.cluster import Cluster, Gpu, NodeLink
from ...planner.cost.constants import HostPrices
from ...planner.cost.tables import Calibration, LaunchPoint, LaunchTable, fit_prices
from ...traces.errors import InputError
from ...traces.yaml_files import yaml_text
from .links import LinkTimes
from .machine import CPU_CACHE_BYTES, Rates
from .raw import RawPoints, Shape

# Matrices of whole training steps reached 75 % of the peak of H100s and H200s on which one large product reached 79 %.
SHARE_OF_ONE_PRODUCT = 0.95
FEWEST_POINTS = 4  # of one kind of mask in one direction: fewer say too little


def calibrated(
    base: Cluster,
    raw: RawPoints,
    shapes: Sequence[Shape],
    *,
    rates: Rates,
    host: HostPrices | None,
    links: Mapping[str, LinkTimes],
) -> Cluster:
    """Return `base` with what was measured in place of what it says; its `origin` stays unless all was."""
    cache_bytes = raw.facts.get("cache_bytes", CPU_CACHE_BYTES)
    tables = [table for shape in shapes for table in _tables(shape, list(raw.of_shape(shape)), cache_bytes)]
    known = {(table.backend, table.head_dim, table.queries_per_kv_head, table.block_size) for table in tables}
    kept = [
        table
        for table in (base.calibration.tables if base.calibration else ())
        if (table.backend, table.head_dim, table.queries_per_kv_head, table.block_size) not in known
    ]
    return base.model_copy(
        update={
            "name": base.name if base.calibration else f"{base.name}-calibrated",
            "origin": "measured" if links and base.nodes == 1 else base.origin,
            "gpu": gpu_of(base.gpu, raw.facts, rates, links),
            "intra_node": _link(base.intra_node, links),
            "calibration": Calibration(
                date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                versions=raw.facts["versions"],
                element_bytes=2 if "cache_bytes" in raw.facts else 4,
                cache_bytes=cache_bytes,
                host=host,
                tables=(*kept, *tables),
            ),
            "notes": _notes(base, raw.facts, links),
        }
    )


def cluster_yaml(cluster: Cluster) -> str:
    """Return the text of a cluster's file."""
    document = cluster.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
    return yaml_text(_rounded(document))


def _rounded(value: Any) -> Any:
    """Return plain values with six significant digits, which is more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _tables(shape: Shape, points: Sequence[LaunchPoint], cache_bytes: int) -> Iterator[LaunchTable]:
    ordered = sorted(points, key=_kind)
    for (direction, listed, documents), group in groupby(ordered, key=_kind):
        found = list(group)
        if len(found) < FEWEST_POINTS:
            continue
        prices, errors = fit_prices(found, cache_bytes=cache_bytes)
        sizes = [abs(error) for error in errors]
        pairs = [point.counts.tile_pairs for point in found]
        yield LaunchTable.model_validate(
            {
                "backend": shape.backend,
                "direction": direction,
                "listed": listed,
                "documents": documents,
                "head_dim": shape.head_dim,
                "queries_per_kv_head": shape.heads // shape.kv_heads,
                "block_size": shape.block_size,
                "prices": prices,
                "points": len(found),
                "median_error": sorted(sizes)[len(sizes) // 2],
                "largest_error": max(sizes),
                "tile_pairs": (min(pairs), max(pairs)),
            }
        )


def _kind(point: LaunchPoint) -> tuple[str, bool, bool]:
    return point.direction, point.mask.listed, point.mask.documents


def gpu_of(gpu: Gpu, facts: Mapping[str, Any], rates: Rates, links: Mapping[str, LinkTimes]) -> Gpu:
    """Return a GPU with what was measured of it: its name, sizes, rates, and what kernels lose beside transfers."""
    update: dict[str, Any] = {
        "name": facts["device"],
        "memory_bytes": facts.get("memory_bytes", gpu.memory_bytes),
        "multiprocessors": facts.get("multiprocessors", gpu.multiprocessors),
        "memory_bandwidth_bytes_per_us": rates.memory_bytes_per_us,
        "host_bandwidth_bytes_per_us": rates.host_bytes_per_us,
    } | _matrix_rates(gpu, rates)
    if "p2p" in links:
        update["communication_slowdown"] = links["p2p"].slowdown
    if "pull" in links:
        update["pull_slowdown"] = links["pull"].slowdown
    return gpu.model_copy(update=update)


def _matrix_rates(gpu: Gpu, rates: Rates) -> dict[str, float]:
    """Return the peak, which stays where it is a GPU's, and the share of it that layers' matrices reach.

    InputError where one product reached more than the peak: the file that this began with is of a slower GPU.
    """
    if rates.host_bytes_per_us is None:  # a CPU, of which no data sheet says anything
        return {"peak_flops_per_us": rates.flops_per_us}
    reached = rates.flops_per_us / gpu.peak_flops_per_us
    if reached > 1:
        problem = f"{gpu.peak_flops_per_us:g} of {gpu.name} is less than a product reached here: {rates.flops_per_us:g}"
        raise InputError(problem, field="gpu.peak_flops_per_us")
    return {"matmul_efficiency": SHARE_OF_ONE_PRODUCT * reached}


def _link(link: NodeLink, links: Mapping[str, LinkTimes]) -> NodeLink:
    update: dict[str, Any] = {}
    if "p2p" in links:
        latency_us, bytes_per_us = links["p2p"].line()
        update |= {"latency_us": latency_us, "bandwidth_bytes_per_us": bytes_per_us}
    if "pull" in links:
        update["pull_bandwidth_bytes_per_us"] = links["pull"].line()[1]
    return link.model_copy(update=update)


def _notes(base: Cluster, facts: Mapping[str, Any], links: Mapping[str, LinkTimes]) -> str:
    measured = "kernels, indexes, the host" + (" and links between two GPUs" if links else "")
    return (
        f"Measured by `sparsering calibrate` on {facts['device']}: {measured}. Nodes"
        f"{'' if links else ', links'} and the network between nodes are those of {base.name}, "
        f"which are {'measured' if base.origin == 'measured' else 'from data sheets'}."
    )
