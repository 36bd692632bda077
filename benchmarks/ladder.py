"""MTraining's ladder in simulated time: what each of its ideas gains for Qwen2.5-3B at 512K tokens on 32 A100s.

MTraining (arXiv 2510.18830) trains with attention that is 95 % sparse and reports up to six times the throughput of
dense attention. The rungs: dense zigzag ring, sparse zigzag ring, sparse striped ring, sparse striped hierarchical
ring. Columns stay in its rings: each step also computes the columns that lie in the shard at hand, gathered in tiles
of 64. Decoder layers are recomputed in backward. Not modelled: optimizer, gradient reduction, merging partial outputs,
adding landed gradients, the data loader. Nothing is fitted to the published speed-ups: docs/measured/ladder.md.
    python -m sparsering.benchmarks.ladder
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..planner.cost.cluster import Cluster, Link, load_cluster
from ..planner.cost.evaluation import Evaluation
from ..planner.cost.kernels import DatasheetCost
from ..planner.layouts.hierarchical import Hierarchical
from ..planner.layouts.ring import Ring
from ..planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from ..planner.schedule.schedule import DIRECTIONS, Direction, Schedule
from ..planner.schedule.shape import AttentionShape
from ..planner.schedule.workload import Workload, workload
from ..simulator.engine import simulate
from ..traces.pattern import LayerPattern, VerticalSlash, dense
from ..traces.synthetic import SyntheticSettings, synthesize
from .lib.common import RESULTS, ResultFile

CLUSTER = "a100-hdr-4x8"
KERNELS = "mtraining"  # no backend of ours: every step of a ring is one launch, in backward too
PUBLISHED_STEP_US = 510.0  # compute of a step of the hierarchical ring, forward
PUBLISHED_LINKS_US = {"intra_node": 130.0, "inter_node": 980.0}  # a K/V shard over NVLink and InfiniBand
CHOOSING_US = 1130.0 + 2080.0  # the index of a layer, on GPU and CPU, per forward; published
DENSE_EFFICIENCY = (0.70, 0.60)  # of peak, forward and backward; FlashAttention-2 (2307.08691) reports 0.73 and 0.63
BACKWARD_TO_FORWARD = 180.15 / 382.10  # efficiency of MTraining's Triton kernels on one H200 at 6.3 % density
MATMUL_EFFICIENCY = 0.5  # everything but attention
DENSE_BLOCK = 128
QWEN = SyntheticSettings(seq_len_tokens=512 * 1024, heads=16, block_size=64, density=0.05, columns=1024)
# With bands that all heads share, a zigzag's step imbalance is above 2.4, as published; eight is arbitrary.
BANDS, LOCAL_SHARE, SEED = 8, 0.3, 0


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder. hierarchical: a ring of rings. published: training speed-up over dense, if any is."""

    name: str
    placement: str
    hierarchical: bool = False
    sparse: bool = True
    published: float | None = None


RUNGS = (
    Rung(name="dense, zigzag ring", placement="zigzag", sparse=False, published=1.0),
    Rung(name="sparse, zigzag ring", placement="zigzag", published=2.9),
    Rung(name="sparse, striped ring", placement="striped", published=4.6),
    Rung(name="sparse, striped hierarchical ring", placement="striped", hierarchical=True, published=6.0),
    Rung(name="sparse, zigzag hierarchical ring", placement="zigzag", hierarchical=True),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to fill what the paper leaves open: cluster, pattern and kernels; the model is Qwen2.5-3B.

    drawn: sequence, heads and patterns; banded: slashes lie in bands that all heads share, not anywhere.
    layer_weights: those that a token meets in one layer; head_weights: of the output projection.
    """

    title: str
    cluster: Cluster
    drawn: SyntheticSettings = QWEN
    banded: bool = False
    backward_to_forward: float = BACKWARD_TO_FORWARD
    published_step_us: float = PUBLISHED_STEP_US
    layers: int = 36
    kv_heads: int = 2
    head_dim: int = 128
    layer_weights: int = 2 * 2048 * (16 + 2) * 128 + 3 * 2048 * 11008
    head_weights: int = 2048 * 151936

    @property
    def shape(self) -> AttentionShape:
        """Sizes of a layer's attention on every rank; no columns are gathered."""
        return AttentionShape(
            world_size=self.cluster.world_size,
            tokens_per_rank=self.drawn.seq_len_tokens // self.cluster.world_size,
            heads=self.drawn.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )

    @property
    def other_us(self) -> float:
        """Time of all but attention: two FLOPs per weight and token forward (twice in layers), four backward."""
        flops = self.drawn.seq_len_tokens * (8 * self.layers * self.layer_weights + 6 * self.head_weights)
        return flops / (self.cluster.world_size * self.cluster.gpu.peak_flops_per_us * MATMUL_EFFICIENCY)

    def schedule(self, rung: Rung, direction: Direction) -> Schedule:
        """Return a rung's schedule; inner rings are nodes."""
        layout = Hierarchical(inner_size=self.cluster.gpus_per_node) if rung.hierarchical else Ring()
        return layout.build(shape=self.shape, direction=direction)

    def work(self, rung: Rung) -> Workload:
        """Return what a layer computes on this rung."""
        return _work(self.drawn, self.banded, rung.placement, rung.sparse, self.cluster.world_size)

    def cost(self, rung: Rung, efficiency: tuple[float, float]) -> DatasheetCost:
        """Return the cost of kernels of this efficiency; partial outputs are merged outside of them."""
        changes = {"block_forward_efficiency": efficiency[0], "block_backward_efficiency": efficiency[1]}
        return DatasheetCost(
            gpu=self.cluster.gpu.model_copy(update=changes | {"memory_bandwidth_bytes_per_us": None}),
            head_dim=self.head_dim,
            block_size=self.drawn.block_size if rung.sparse else DENSE_BLOCK,
            backend=KERNELS,
            one_pass_backward=True,
        )


def play(variant: Variant, rung: Rung, efficiency: tuple[float, float]) -> list[Evaluation]:
    """Simulate forward and backward of a layer. efficiency: share of peak of the kernels in either."""
    cost, work = variant.cost(rung, efficiency), variant.work(rung)
    return [simulate(variant.schedule(rung, direction), work, variant.cluster, cost) for direction in DIRECTIONS]


def sparse_efficiency(variant: Variant) -> tuple[float, float]:
    """Return the efficiency at which the mean step of the striped hierarchical ring computes for the published time.

    A task takes overhead + (its time at full efficiency) / efficiency, so one evaluation at 1.0 settles forward.
    """
    gpu = variant.cluster.gpu
    silent = gpu.model_copy(update={"communication_slowdown": 0.0, "pull_slowdown": None})
    quiet = replace(variant, cluster=variant.cluster.model_copy(update={"gpu": silent}))
    ideal_us = play(quiet, RUNGS[3], (1.0, 1.0))[0].phase_us
    overhead_us = np.count_nonzero(ideal_us) * gpu.launch_overhead_us
    forward = (ideal_us.sum() - overhead_us) / (variant.published_step_us * ideal_us.size - overhead_us)
    return float(forward), float(forward * variant.backward_to_forward)


def climb(variant: Variant) -> list[dict[str, Any]]:
    """Simulate all rungs of a variant and return a row for each; the speed-up is over the first."""
    sparse = sparse_efficiency(variant)
    rows = [_row(variant, rung, sparse if rung.sparse else DENSE_EFFICIENCY) for rung in RUNGS]
    return [row | {"speed_up": rows[0]["step_s"] / row["step_s"]} for row in rows]


def _row(variant: Variant, rung: Rung, efficiency: tuple[float, float]) -> dict[str, Any]:
    forward, backward = play(variant, rung, efficiency)
    choosing_us = CHOOSING_US if rung.sparse else 0.0
    attention_us = variant.layers * (2 * (forward.makespan_us + choosing_us) + backward.makespan_us)
    waiting_us = forward.exposed_us.mean() + backward.exposed_us.mean()
    return {
        "variant": variant.title,
        "rung": rung.name,
        "forward_ms": forward.makespan_us / 1e3,
        "backward_ms": backward.makespan_us / 1e3,
        "choosing_ms": choosing_us / 1e3,
        "attention_s": attention_us / 1e6,
        "other_s": variant.other_us / 1e6,
        "step_s": (attention_us + variant.other_us) / 1e6,
        "published_speed_up": rung.published,
        "worker_imbalance": forward.worker_imbalance,
        "step_imbalance": forward.step_imbalance,
        "exposed": float(waiting_us / (forward.makespan_us + backward.makespan_us)),
        "forward_efficiency": efficiency[0],
        "backward_efficiency": efficiency[1],
    }


@cache
def _work(drawn: SyntheticSettings, banded: bool, placed: str, sparse: bool, world_size: int) -> Workload:
    whole = dense(seq_len_tokens=drawn.seq_len_tokens, block_size=DENSE_BLOCK, heads=drawn.heads)
    pattern = sparse_pattern(drawn, banded=banded) if sparse else whole
    placement = REGULAR_PLACEMENTS[placed](
        seq_len_tokens=drawn.seq_len_tokens, world_size=world_size, granularity_tokens=pattern.block_size
    )
    counted = workload(pattern, placement)
    return columns_in_ring(pattern, placement, counted) if sparse else counted


def columns_in_ring(pattern: LayerPattern, placement: Placement, counted: Workload) -> Workload:
    """Return the workload with each column counted in the task of the rank that owns it, in tiles of gathered columns.

    A query tile needs the owned columns that do not lie behind its last token.
    """
    active, rows, longest = counted.active.copy(), counted.rows.copy(), counted.longest.copy()
    size, owner = pattern.block_size, placement.owner_of_tokens()
    last = np.stack([placement.positions(rank)[size - 1 :: size] for rank in range(placement.world_size)])
    for number, head in enumerate(pattern.heads):
        for key in range(placement.world_size):
            owned = head.columns[owner[head.columns] == key]
            tiles = -(-np.searchsorted(owned, last, side="right") // size)  # [W query, T]
            active[:, key, number] += tiles.sum(axis=1)
            longest[:, key, number] += tiles.max(axis=1)
            rows[:, key, number] = np.maximum(rows[:, key, number], (tiles > 0).sum(axis=1))
    gathered = dict.fromkeys(("columns", "column_rows", "longest_column_row"), np.zeros_like(counted.columns))
    return replace(counted, active=active, rows=rows, longest=longest, **gathered)


def sparse_pattern(drawn: SyntheticSettings, *, banded: bool) -> LayerPattern:
    """Return a seeded vertical-slash layer: slashes spread over all distances, or in bands that all heads share."""
    spread = synthesize("vertical-slash", drawn, seed=SEED)
    if not banded:
        return spread
    diagonals = _banded_diagonals(drawn.blocks, drawn.density)
    return drawn.layer([VerticalSlash(columns=head.columns, diagonals=diagonals) for head in spread.heads])


def _banded_diagonals(blocks: int, density: float) -> NDArray[np.int32]:
    """Return three tenths of the asked pairs beside the diagonal and the others in a few bands of equal width."""
    asked = density * blocks * (blocks + 1) / 2
    lengths = blocks - np.arange(blocks)
    local = 1 + int(np.searchsorted(np.cumsum(lengths), LOCAL_SHARE * asked))
    starts = np.random.default_rng(SEED).choice(np.arange(local, blocks), min(BANDS, blocks - local), replace=False)
    chosen = np.arange(blocks) < local
    width = 0
    while lengths[chosen].sum() < asked and width < blocks:
        chosen[np.minimum(starts + width, blocks - 1)] = True
        width += 1
    return np.flatnonzero(chosen).astype(np.int32)


def published_links(cluster: Cluster, kv_bytes: int) -> Cluster:
    """Return the cluster with links on which a K/V shard takes the 0.13 (NVLink) and 0.98 ms (InfiniBand) published."""
    slowed: dict[str, Link] = {}
    for name, step_us in PUBLISHED_LINKS_US.items():
        link: Link = getattr(cluster, name)
        slowed[name] = link.model_copy(update={"bandwidth_bytes_per_us": kv_bytes / (step_us - link.latency_us)})
    return cluster.model_copy(update=slowed)


def default_variants() -> list[Variant]:
    """Return two patterns on two kinds of links, and one with a faster backward."""
    spread = Variant(title="spread slashes, links from data sheets", cluster=load_cluster(CLUSTER))
    slow = published_links(spread.cluster, spread.shape.kv_bytes)
    banded = replace(spread, title="banded slashes, links as slow as published", cluster=slow, banded=True)
    return [
        spread,
        replace(spread, title="banded slashes, links from data sheets", banded=True),
        replace(spread, title="spread slashes, links as slow as published", cluster=slow),
        banded,
        replace(banded, title="the same, backward kernels as efficient as forward", backward_to_forward=1.0),
    ]


def main() -> None:
    """Simulate all variants, print as it goes, write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder, rows, variants = parser.parse_args().results, [], default_variants()
    for variant in variants:
        print(f"{variant.title}:")
        for row in climb(variant):
            rows.append(row)
            print(f"  {row['rung']:34} {row['step_s']:6.2f} s a step, {row['speed_up']:.2f}x", end="")
            print(f", published {row['published_speed_up']}x" if row["published_speed_up"] else "", flush=True)
    simulated = {"device": CLUSTER, "count": variants[0].cluster.world_size, "validity": "simulated, unvalidated"}
    result = ResultFile("ladder", folder=folder, simulated=simulated)
    result.write(rows, finished=True)
    print(result.path)


if __name__ == "__main__":
    main()
