"""Small clusters, patterns and costs with round numbers, so that expected times can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsering.planner.cost.cluster import Cluster, parse_cluster
from sparsering.planner.layouts.registry import build
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS
from sparsering.planner.schedule.schedule import Direction, Schedule
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import TaskWork, Workload, workload
from sparsering.traces.pattern import LayerPattern, dense

BLOCK = 4
KV_BYTES = 4000  # of one shard of one block under `shape`


@dataclass(frozen=True, kw_only=True)
class PairCost:
    """So many microseconds per launch that has work, and per tile pair; backward twice that of pairs."""

    us_per_pair: float = 3.0
    us_per_launch: float = 0.0
    backend: str = "reference"  # which launches every task alone

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        pairs = sum(one.tile_pairs for one in work)
        return (pairs > 0) * self.us_per_launch + pairs * self.us_per_pair * (2 if direction == "backward" else 1)


def cluster(
    *,
    nodes: int = 1,
    gpus: int = 4,
    bandwidth: float = 1000.0,
    latency_us: float = 1.0,
    nic_bandwidth: float = 500.0,
    nic_latency_us: float = 2.0,
    nics: int = 1,
    slowdown: float = 0.0,
    switch: float | None = None,
    pull_bandwidth: float | None = None,
    pull_slowdown: float | None = None,
) -> Cluster:
    """A cluster whose ports carry one byte a nanosecond."""
    return parse_cluster(
        {
            "name": "tiny",
            "origin": "datasheet",
            "nodes": nodes,
            "gpus_per_node": gpus,
            "gpu": {
                "name": "tiny",
                "memory_bytes": 1 << 30,
                "peak_flops_per_us": 1e6,
                "multiprocessors": 4,
                "block_forward_efficiency": 0.5,
                "block_backward_efficiency": 0.5,
                "column_efficiency": 0.5,
                "launch_overhead_us": 1.0,
                "communication_slowdown": slowdown,
                "pull_slowdown": pull_slowdown,
            },
            "intra_node": {
                "name": "port",
                "bandwidth_bytes_per_us": bandwidth,
                "latency_us": latency_us,
                "switch_bandwidth_bytes_per_us": switch,
                "pull_bandwidth_bytes_per_us": pull_bandwidth,
            },
            "inter_node": {
                "name": "card",
                "bandwidth_bytes_per_us": nic_bandwidth,
                "latency_us": nic_latency_us,
                "nics_per_node": nics,
            },
        },
        source="tiny",
    )


def shape(world: int, *, blocks_per_rank: int = 1, columns: int = 0) -> AttentionShape:
    """K and V of one block are 4,000 bytes."""
    return AttentionShape(
        world_size=world,
        tokens_per_rank=blocks_per_rank * BLOCK,
        heads=1,
        kv_heads=1,
        head_dim=500,
        element_bytes=1,
        accumulator_bytes=2,
        columns_capacity=columns,
    )


def schedule(
    layout: str,
    world: int,
    direction: Direction = "forward",
    *,
    columns: int = 0,
    blocks_per_rank: int = 1,
    **parameters: int,
) -> Schedule:
    return build(
        layout, parameters, shape=shape(world, columns=columns, blocks_per_rank=blocks_per_rank), direction=direction
    )


def dense_workload(world: int, placement: str = "contiguous", *, blocks_per_rank: int = 1) -> Workload:
    """Dense causal attention of one head over `blocks_per_rank` blocks a rank."""
    tokens = world * blocks_per_rank * BLOCK
    return counted(dense(seq_len_tokens=tokens, block_size=BLOCK, heads=1), world, placement)


def counted(pattern: LayerPattern, world: int, placement: str = "striped") -> Workload:
    place = REGULAR_PLACEMENTS[placement]
    granularity = pattern.block_size
    return workload(
        pattern, place(seq_len_tokens=pattern.seq_len_tokens, world_size=world, granularity_tokens=granularity)
    )
