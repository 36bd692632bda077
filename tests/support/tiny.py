"""Small clusters, patterns, traces and costs with round numbers, so that expected times can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsering.planner.cost.cluster import Cluster, parse_cluster
from sparsering.planner.cost.constants import NO_CONSTANTS, LayerConstants
from sparsering.planner.cost.model import DeviceCost
from sparsering.planner.layouts.registry import make_layout
from sparsering.planner.schedule.batch import BatchWork, LaunchBatch
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS
from sparsering.planner.schedule.schedule import Direction, Schedule
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import TaskWork, Workload, workload
from sparsering.traces.dataset.manifest import ModelShape, TraceHeader
from sparsering.traces.dataset.rows import HeadChoice
from sparsering.traces.dataset.writer import LayerRecord
from sparsering.traces.pattern import BlockMask, LayerPattern, VerticalSlash, dense, element_mask

BLOCK = 4
KV_BYTES = 4000  # of one shard of one block under `shape`
TRACE_TOKENS, TRACE_BLOCK, TRACE_BLOCKS, TRACE_HEADS, TRACE_LAYERS = 200, 16, 13, 3, 2
CHOICE = HeadChoice(selector="flex", settings={"column_cap": 9, "column_mass": 0.9}, kept_mass_probe=0.5)


@dataclass(frozen=True, kw_only=True)
class PairCost(DeviceCost):
    """So many microseconds per launch that has work, and per tile pair; backward twice that of pairs."""

    us_per_pair: float = 3.0
    us_per_launch: float = 0.0
    backend: str = "reference"  # which launches every task alone

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        pairs = sum(one.tile_pairs for one in work)
        return (pairs > 0) * self.us_per_launch + pairs * self.us_per_pair * (2 if direction == "backward" else 1)


@dataclass(frozen=True, kw_only=True)
class BusyCost(PairCost):
    """A cost with what a layer takes beside its launches; us_to_issue: of the host, for a launch that has work."""

    constants: LayerConstants = NO_CONSTANTS  # pyright: ignore[reportIncompatibleMethodOverride]
    us_to_issue: float = 0.0

    def hosts_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        return np.where(batch.total(work.tile_pairs) > 0, self.us_to_issue, 0.0)


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
    **parameters: bool | int,
) -> Schedule:
    given = shape(world, columns=columns, blocks_per_rank=blocks_per_rank)
    return make_layout(layout, parameters).build(shape=given, direction=direction)


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


def trace_header(**changes: Any) -> TraceHeader:
    """The first two of four layers of three heads over 200 tokens."""
    values: dict[str, Any] = {
        "model": ModelShape(model_id="tiny", layers=4, heads=TRACE_HEADS, kv_heads=1, head_dim=8),
        "recorded_layers": tuple(range(TRACE_LAYERS)),
        "seq_len_tokens": TRACE_TOKENS,
        "block_size": TRACE_BLOCK,
        "origin": "synthetic",
        "seed": 3,
        "versions": {"sparsering": "0"},
    }
    return TraceHeader(**{**values, **changes})


def slash(columns: Any, diagonals: Any) -> VerticalSlash:
    return VerticalSlash(columns=np.asarray(columns, dtype=np.int32), diagonals=np.asarray(diagonals, dtype=np.int32))


def layer_pattern(seed: int, *, documents: bool = False) -> LayerPattern:
    """Two vertical-slash heads (one of them without columns) and a block mask."""
    rng = np.random.default_rng(seed)
    heads = (
        slash(rng.choice(TRACE_TOKENS, 40, replace=False), rng.choice(TRACE_BLOCKS, 4, replace=False)),
        slash([], [0]),
        BlockMask(bits=np.tril(rng.random((TRACE_BLOCKS, TRACE_BLOCKS)) < 0.4)),
    )
    ids = np.sort(rng.integers(0, 5, TRACE_TOKENS)).astype(np.int32) if documents else None
    return LayerPattern(seq_len_tokens=TRACE_TOKENS, block_size=TRACE_BLOCK, heads=heads, documents=ids)


def layer_records(seed: int, *, documents: bool = False) -> dict[int, LayerRecord]:
    """One training step of a trace with `trace_header`."""
    seeds = {layer: seed + (0 if documents else layer) for layer in range(TRACE_LAYERS)}
    return {layer: (layer_pattern(own, documents=documents), [CHOICE] * TRACE_HEADS) for layer, own in seeds.items()}


def assert_same_layer(first: LayerPattern, second: LayerPattern) -> None:
    for name in ("seq_len_tokens", "block_size", "num_heads"):
        assert getattr(first, name) == getattr(second, name)
    for head, (a, b) in enumerate(zip(first.heads, second.heads, strict=True)):
        assert type(a) is type(b)
        assert a.window_tokens == b.window_tokens
        np.testing.assert_array_equal(a.cut, b.cut)
        np.testing.assert_array_equal(a.columns, b.columns)
        np.testing.assert_array_equal(a.block_bits(first.num_blocks), b.block_bits(first.num_blocks))
        np.testing.assert_array_equal(element_mask(first, head), element_mask(second, head))
