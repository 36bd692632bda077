"""Writes the tables and the drawing of docs/worked-mask.md: one small mask, counted and simulated. `make docs` runs it.

Nothing is worked out here: mask, placements, schedule and times come from the code that plans and simulates. The
made-up cluster is that of docs/write_figures.py: 2 bytes a nanosecond, 1 us latency, 1 us a block pair.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsering.planner.cost.cluster import Cluster, parse_cluster
from sparsering.planner.layouts.registry import parse_layout
from sparsering.planner.schedule.pairs import pattern_pairs
from sparsering.planner.schedule.placement import Placement, contiguous, striped
from sparsering.planner.schedule.schedule import Schedule
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import Workload, workload
from sparsering.simulator.engine import simulate
from sparsering.simulator.metrics import DirectionMetrics, timeline_metrics
from sparsering.traces.pattern import LayerPattern, VerticalSlash, element_mask

sys.path.insert(0, str(Path(__file__).resolve().parent))

from write_figures import CELL, COLORS, PairCost, box, cluster, text

DOCS = Path(__file__).resolve().parent
PAGE, FIGURE = DOCS / "worked-mask.md", DOCS / "figures/worked-mask.svg"
BEGIN, END = "<!-- worked mask: begin -->\n", "<!-- worked mask: end -->\n"
RANKS, BLOCKS, BLOCK_TOKENS = 4, 8, 4
DIAGONALS, COLUMNS = (0, 1, 4), (5,)
PHASE_COLORS = (COLORS[0, 1], COLORS[1, 1], COLORS[0, 0], COLORS[1, 0])


@dataclass(frozen=True, kw_only=True)
class Worked:
    """The mask under one placement: its work, the ring that computes it, and what the simulator says of that."""

    placement: Placement
    work: Workload
    ring: Schedule
    metrics: DirectionMetrics

    def pairs_of(self, rank: int) -> list[int]:
        """Return how many block pairs a rank computes in each phase."""
        counted = []
        for phase in self.ring.phases(rank):
            keys = [task.key.sequence_part for task in phase.tasks if task.key]
            counted.append(sum(int(self.work.active[rank, key, 0]) for key in keys))
        return counted


def mask(columns: tuple[int, ...] = ()) -> LayerPattern:
    """Return the mask of one head: three block diagonals, and columns where they are asked for."""
    head = VerticalSlash(columns=np.array(columns, np.int32), diagonals=np.array(DIAGONALS, np.int32))
    return LayerPattern(seq_len_tokens=BLOCKS * BLOCK_TOKENS, block_size=BLOCK_TOKENS, heads=(head,))


def four(bandwidth_bytes_per_us: float) -> Cluster:
    """Return the made-up cluster with four GPUs."""
    document = cluster().model_dump(mode="json", exclude_none=True)
    link = document["intra_node"] | {"bandwidth_bytes_per_us": bandwidth_bytes_per_us}
    return parse_cluster(document | {"gpus_per_node": RANKS, "intra_node": link}, source=Path(__file__).name)


def placements() -> dict[str, Placement]:
    """Return blocks dealt to ranks in turns, and in stretches."""
    tokens = BLOCKS * BLOCK_TOKENS
    return {
        "striped": striped(seq_len_tokens=tokens, world_size=RANKS, granularity_tokens=BLOCK_TOKENS),
        "contiguous": contiguous(seq_len_tokens=tokens, world_size=RANKS, granularity_tokens=BLOCK_TOKENS),
    }


def worked(placement: Placement, *, bandwidth_bytes_per_us: float = 2000.0) -> Worked:
    """Return what a flat ring makes of the mask; K and V of a block are 4,000 bytes."""
    pattern = mask()
    shape = AttentionShape(world_size=RANKS, tokens_per_rank=BLOCKS * BLOCK_TOKENS // RANKS, heads=1, kv_heads=1,
                           head_dim=500, element_bytes=1, accumulator_bytes=2)  # fmt: skip
    ring = parse_layout("ring:prefetch=1").build(
        shape=shape, direction="forward", pairs=pattern_pairs(pattern, placement)
    )
    work = workload(pattern, placement)
    played = simulate(ring, work, four(bandwidth_bytes_per_us), PairCost(), timeline=True)
    assert played.timeline is not None
    (metrics,) = timeline_metrics(played.timeline)
    return Worked(placement=placement, work=work, ring=ring, metrics=metrics)


def tokens_attended_by_column() -> int:
    """Return how many (query, key) pairs the column adds to the diagonals."""
    return int(element_mask(mask(COLUMNS), 0).sum() - element_mask(mask(), 0).sum())


def owner_of(placement: Placement, block: int) -> int:
    """Return the rank that owns a block."""
    owned = [set((placement.positions(rank) // BLOCK_TOKENS).tolist()) for rank in range(RANKS)]
    return next(rank for rank in range(RANKS) if block in owned[rank])


def table(name: str, found: Worked) -> list[str]:
    """Return what each rank computes in each phase, as rows."""
    phases = max(len(found.pairs_of(rank)) for rank in range(RANKS))
    heads = " | ".join(f"phase {phase}" for phase in range(phases))
    rows = [f"| {name} | blocks | {heads} | in all |", "|---|---|" + "---|" * (phases + 1)]
    for rank in range(RANKS):
        pairs = found.pairs_of(rank)
        owned = ", ".join(str(block) for block in range(BLOCKS) if owner_of(found.placement, block) == rank)
        cells = [str(count) for count in [*pairs, *[0] * (phases - len(pairs)), sum(pairs)]]
        rows.append(f"| rank {rank} | {owned} | {' | '.join(cells)} |")
    return [*rows, ""]


def told(name: str, found: Worked) -> str:
    """Return what the simulator says, as one row."""
    one = found.metrics
    ratios = f"{one.worker_imbalance:.2f} | {one.step_imbalance:.2f}"
    return f"| {name} | {one.compute_mean_us:.2f} | {one.compute_max_us:g} | {one.makespan_us:g} | {ratios} |"


def rendered() -> str:
    """Return what belongs between the marks of the page."""
    found = {name: worked(placement) for name, placement in placements().items()}
    tables = [line for name, one in found.items() for line in table(name, one)]
    headings = "mean compute, µs | most compute, µs | forward, µs | worker imbalance | step imbalance"
    quick = worked(placements()["striped"], bandwidth_bytes_per_us=8000.0)
    rows = [*(told(name, one) for name, one in found.items()), told("striped, links four times as quick", quick)]
    return "\n".join(["", *tables, f"| simulated | {headings} |", "|---|" + "---|" * 5, *rows, "", ""])


def drawing() -> str:
    """Return the mask as SVG: cells coloured by the phase that computes them when blocks are striped."""
    placement = placements()["striped"]
    bits = mask().heads[0].block_bits(BLOCKS)
    parts: list[str] = []
    numbers: list[str] = []
    x, y = 110, 50
    parts += [text(x, 20, "keys: blocks 0 to 7", size=12), text(x, 38, "(numbers: the phase of the ring)", size=11)]
    for query in range(BLOCKS):
        owner = owner_of(placement, query)
        parts.append(text(x - 8, y + query * CELL + 15, f"{query}: rank {owner}", size=11, anchor="end"))
        for key in range(query + 1):
            phase = (owner - owner_of(placement, key)) % RANKS
            active = bool(bits[query, key])
            parts.append(
                box(x + key * CELL, y + query * CELL, CELL, CELL, PHASE_COLORS[phase] if active else "#eeeeee")
            )
            if active:
                numbers.append(text(x + key * CELL + 11, y + query * CELL + 15, str(phase), size=11, anchor="middle"))
    column = x + COLUMNS[0] / BLOCK_TOKENS * CELL
    top = y + COLUMNS[0] // BLOCK_TOKENS * CELL
    height = y + BLOCKS * CELL - top
    parts.append(box(column, top, 4, height, "#d1495b").replace("/>", ' fill-opacity="0.6"/>'))
    parts += numbers
    parts.append(text(column + 2, y + BLOCKS * CELL + 15, "column: token 5", size=11, anchor="middle"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 260" width="320" height="260" role="img" '
    label = 'aria-label="a mask of three diagonals and one column, by the phase that computes each block" '
    background = '<rect width="320" height="260" fill="#ffffff"/>'
    return "\n".join([f'{head}{label}font-family="Helvetica, Arial, sans-serif">', background, *parts, "</svg>", ""])


def main() -> None:
    """Replace what stands between the marks, and write the drawing."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{rendered()}{END}{after}")
    FIGURE.write_text(drawing())


if __name__ == "__main__":
    main()
