"""The training setting of MTraining's ladder: model, patterns, and the work that they make under each placement.

MTraining leaves columns in the ring: each step also computes the columns that lie in the shard at hand, gathered in
tiles of 64. `columns_in_ring` counts them so, instead of gathering all columns once as our own plans do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from ..planner.schedule.shape import AttentionShape
from ..planner.schedule.workload import Workload, workload
from ..traces.pattern import LayerPattern, VerticalSlash, dense, num_blocks
from ..traces.synthetic import SyntheticSettings, synthesize

SEED = 0
BANDS = 8
LOCAL_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a Llama-like model; the embedding's look-up costs nothing, the output projection does."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Weights that every token meets in the layers."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Weights of the output projection."""
        return self.hidden * self.vocabulary


QWEN25_3B = Model(layers=36, heads=16, kv_heads=2, head_dim=128, hidden=2048, intermediate=11008, vocabulary=151936)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The training setting and what is assumed of kernels; `ladder.ASSUMPTIONS` says why."""

    model: Model = QWEN25_3B
    seq_len_tokens: int = 512 * 1024
    density: float = 0.05
    columns: int = 1024
    sparse_block: int = 64
    dense_block: int = 128
    dense_forward_efficiency: float = 0.70
    dense_backward_efficiency: float = 0.60
    published_step_us: float = 510.0
    backward_to_forward: float = 180.15 / 382.10
    choosing_us: float = 1130.0 + 2080.0
    matmul_efficiency: float = 0.5
    recomputed: bool = True
    slashes: Literal["spread", "banded"] = "spread"


def shape_of(setting: Setting, world_size: int) -> AttentionShape:
    """Return the sizes of a layer's attention on every rank; no columns are gathered."""
    model = setting.model
    return AttentionShape(
        world_size=world_size,
        tokens_per_rank=setting.seq_len_tokens // world_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
    )


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
    nothing = np.zeros_like(counted.columns)
    return replace(
        counted,
        active=active,
        rows=rows,
        longest=longest,
        columns=nothing,
        column_rows=nothing,
        longest_column_row=nothing,
    )


def workloads(setting: Setting, placements: dict[bool, list[str]], world_size: int) -> dict[tuple[str, bool], Workload]:
    """Count the work of every (placement, sparse). placements: those of dense (False) and of sparse (True) rungs."""
    counted = {}
    for sparse, names in placements.items():
        pattern = sparse_pattern(setting) if sparse else _dense_pattern(setting)
        for name in dict.fromkeys(names):
            placement = REGULAR_PLACEMENTS[name](
                seq_len_tokens=setting.seq_len_tokens, world_size=world_size, granularity_tokens=pattern.block_size
            )
            work = workload(pattern, placement)
            counted[name, sparse] = columns_in_ring(pattern, placement, work) if sparse else work
    return counted


def _dense_pattern(setting: Setting) -> LayerPattern:
    return dense(seq_len_tokens=setting.seq_len_tokens, block_size=setting.dense_block, heads=setting.model.heads)


def sparse_pattern(setting: Setting) -> LayerPattern:
    """Return a seeded vertical-slash layer: slashes spread over all distances, or in bands that all heads share."""
    settings = SyntheticSettings(
        seq_len_tokens=setting.seq_len_tokens,
        heads=setting.model.heads,
        block_size=setting.sparse_block,
        density=setting.density,
        columns=setting.columns,
    )
    spread = synthesize("vertical-slash", settings, seed=SEED)
    if setting.slashes == "spread":
        return spread
    diagonals = _banded_diagonals(num_blocks(setting.seq_len_tokens, setting.sparse_block), setting.density)
    heads = [VerticalSlash(columns=head.columns, diagonals=diagonals) for head in spread.heads]
    return replace(spread, heads=tuple(heads))


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
