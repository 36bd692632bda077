"""Writes docs/figures/schedule.svg: a schedule of two ranks and two phases beside its timeline. `make figures` runs it.

Mask, schedule and timeline come from the code that they explain: a flat ring over two ranks, built by its layout and
played by the simulator on a made-up cluster with round numbers (2 bytes a nanosecond, 1 us latency, 1 us a block pair).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsering.planner.cost.cluster import Cluster, parse_cluster
from sparsering.planner.cost.model import DeviceCost
from sparsering.planner.layouts.registry import parse_layout
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.placement import Placement, striped
from sparsering.planner.schedule.schedule import Direction, Phase, Schedule, Transfer
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import TaskWork, workload
from sparsering.simulator.engine import simulate
from sparsering.traces.pattern import dense
from sparsering.traces.timeline import COMPUTE_STREAM, Timeline

FIGURE = Path(__file__).resolve().parent / "figures/schedule.svg"
RANKS, BLOCKS, BLOCK_TOKENS = 2, 8, 4
COLORS = {(0, 0): "#2f6f9f", (0, 1): "#9cc4e0", (1, 0): "#b5651d", (1, 1): "#eec08f"}  # by (rank, phase)
TRANSFER, INK, GRID = "#d9d2e3", "#243b53", "#bcccdc"
CELL, PIXELS_PER_US = 22, 13.0


@dataclass(frozen=True, kw_only=True)
class PairCost(DeviceCost):
    """One microsecond for every pair of blocks."""

    backend: str = "reference"

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return what a launch takes, in microseconds."""
        return float(sum(one.tile_pairs for one in work))


def cluster() -> Cluster:
    """Return two GPUs joined by a link of 2 bytes a nanosecond."""
    gpu = {"name": "gpu", "memory_bytes": 1 << 30, "peak_flops_per_us": 1e6, "multiprocessors": 4,
           "block_forward_efficiency": 0.5, "block_backward_efficiency": 0.5, "column_efficiency": 0.5,
           "launch_overhead_us": 1.0, "communication_slowdown": 0.0}  # fmt: skip
    link = {"name": "link", "bandwidth_bytes_per_us": 2000.0, "latency_us": 1.0}
    two = {"name": "two", "origin": "datasheet", "nodes": 1, "gpus_per_node": RANKS, "gpu": gpu, "intra_node": link}
    return parse_cluster(two, source="docs/write_figures.py")


def placement() -> Placement:
    """Return blocks dealt to ranks in turns."""
    return striped(seq_len_tokens=BLOCKS * BLOCK_TOKENS, world_size=RANKS, granularity_tokens=BLOCK_TOKENS)


def ring() -> Schedule:
    """Return the forward of a flat ring; K and V of a block are 4,000 bytes."""
    shape = AttentionShape(world_size=RANKS, tokens_per_rank=BLOCKS * BLOCK_TOKENS // RANKS, heads=1, kv_heads=1,
                           head_dim=500, element_bytes=1, accumulator_bytes=2)  # fmt: skip
    return parse_layout("ring:prefetch=1").build(shape=shape, direction="forward")


def timeline(schedule: Schedule) -> Timeline:
    """Return what the simulator says of the schedule, for dense causal attention of one head."""
    pattern = dense(seq_len_tokens=BLOCKS * BLOCK_TOKENS, block_size=BLOCK_TOKENS, heads=1)
    result = simulate(schedule, workload(pattern, placement()), cluster(), PairCost(), timeline=True)
    assert result.timeline is not None
    return result.timeline


def text(x: float, y: float, content: str, *, size: int = 13, anchor: str = "start", bold: bool = False) -> str:
    """Return one line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{weight}>{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """Return a filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#ffffff"/>'


def phase_of_pairs(schedule: Schedule) -> dict[tuple[int, int], int]:
    """Return in which phase the queries of a rank meet the keys of a shard, by (rank, shard)."""
    found = {}
    for rank in range(RANKS):
        for phase in schedule.phases(rank):
            for task in phase.tasks:
                assert task.key is not None
                found[rank, task.key.sequence_part] = phase.index
    return found


def mask(schedule: Schedule, x: float, y: float) -> Iterator[str]:
    """Yield the causal mask, each pair of blocks in the colour of the rank and phase that compute it."""
    owners = [block % RANKS for block in range(BLOCKS)]
    phases = phase_of_pairs(schedule)
    yield text(x, y - 34, "the mask: who computes what", bold=True)
    yield text(x, y - 12, "keys: blocks 0 to 7", size=12)
    for query in range(BLOCKS):
        yield text(x - 8, y + query * CELL + 15, f"{query}: rank {owners[query]}", size=11, anchor="end")
        for key in range(query + 1):
            color = COLORS[owners[query], phases[owners[query], owners[key]]]
            yield box(x + key * CELL, y + query * CELL, CELL, CELL, color)


def said(transfer: Transfer, rank: int) -> str:
    """Return a transfer of K/V as one of its two ends sees it."""
    assert transfer.shard is not None
    shard = f"K/V of shard {transfer.shard.sequence_part}"
    if transfer.source == rank:
        return f"send {shard} to rank {transfer.destination}"
    return f"receive {shard} from rank {transfer.source}"


def lines_of(phase: Phase, rank: int) -> list[str]:
    """Return what a phase does, in the order in which it does it."""
    waits = [f"wait for the {len(phase.waits)} transfers"] if phase.waits else []
    launched = [f"launch: {said(one, rank)}" for call in phase.group_calls for one in call.transfers]
    tasks = [f"compute: queries {rank} × keys {task.key.sequence_part}" for task in phase.tasks if task.key]
    return [*waits, *launched, *tasks]


def program(schedule: Schedule, x: float, y: float) -> Iterator[str]:
    """Yield the schedule: per rank its phases, as they stand in the value."""
    yield text(x, y - 34, "the schedule: a value", bold=True)
    for rank in range(RANKS):
        for phase in schedule.phases(rank):
            yield box(x, y - 10, 8, 16 + 17 * len(lines_of(phase, rank)), COLORS.get((rank, phase.index), GRID))
            yield text(x + 16, y + 2, f"rank {rank}, phase {phase.index}", size=12, bold=True)
            for number, line in enumerate(lines_of(phase, rank)):
                yield text(x + 24, y + 19 + 17 * number, line, size=12)
            y += 26 + 17 * len(lines_of(phase, rank))


def lanes(played: Timeline, x: float, y: float) -> Iterator[str]:
    """Yield the timeline: per rank a lane for compute and one for transfers, in microseconds."""
    yield text(x, y - 34, "its timeline, played by the simulator (µs)", bold=True)
    streams = [(rank, stream) for rank in range(RANKS) for stream in (COMPUTE_STREAM, "ring")]
    for number, (rank, stream) in enumerate(streams):
        top = y + number * 40 + rank * 14
        yield text(x, top - 3, f"rank {rank}, {'compute' if stream == COMPUTE_STREAM else 'transfers'}", size=11)
        for span in played.spans:
            if (span.rank, span.stream) == (rank, stream):
                color = COLORS[rank, span.phase] if stream == COMPUTE_STREAM else TRANSFER
                yield box(x + span.start_us * PIXELS_PER_US, top, span.duration_us * PIXELS_PER_US, 20, color)
    bottom = y + len(streams) * 40 + 20
    for tick in range(0, int(played.makespan_us) + 1, 5):
        yield text(x + tick * PIXELS_PER_US, bottom, str(tick), size=11, anchor="middle")


def rendered() -> str:
    """Return the figure as SVG."""
    schedule = ring()
    parts = [*mask(schedule, 90, 60), *program(schedule, 310, 60), *lanes(timeline(schedule), 620, 60)]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 350" width="930" height="350" role="img" '
    label = 'aria-label="a mask, the schedule of a ring of two ranks, and its timeline" '
    return "\n".join([f'{head}{label}font-family="Helvetica, Arial, sans-serif">',
                      '<rect width="930" height="350" fill="#ffffff"/>', *parts, "</svg>", ""])  # fmt: skip


def main() -> None:
    """Write the figure."""
    FIGURE.write_text(rendered())


if __name__ == "__main__":
    main()
