"""Block part in plain torch: inactive tiles are skipped, the active keys of a query tile share one matmul.

A query tile is a run of local tokens of one mask block, so any ascending positions work (contiguous, striped by
blocks or by tokens). Query heads of one KV head with equal patterns are computed together. What gloo runs use, and
the tests; it also works on a GPU, slowly. The column part's tiles are in blockwise_columns.py, the walk in tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..backend import Backend, register
from ..mask import AttentionMask, active_block_pairs, document_of, edge_block_pairs
from ..values import BackwardQueries, Columns, KeyGradients, Keys, Partial, Queries
from .blockwise_columns import ColumnTile, column_tiles
from .tiles import Tile, add_gradients, attend, by_head

# Scores computed at once: 4 MB of float32 stay in a core's cache.
SCORES_AT_ONCE = 1 << 20
Numbers = TypeVar("Numbers", Tensor, list[int])


@dataclass(frozen=True, kw_only=True)
class BlockTile(Tile):
    """Rows of one mask block against all keys of its active blocks.

    causal: bool [rows, n], which of the last n keys (those of the queries' own block) are not in the future; None when
    no key shares the block. edge: the keys of blocks that the window's edge cuts, neighbours, and bool [rows, of them],
    which lie in the window; None where there are none.
    """

    causal: Tensor | None
    edge: tuple[slice, Tensor] | None = None

    @property
    def scores(self) -> int:
        """Rows times keys."""
        count = self.keys.stop - self.keys.start if isinstance(self.keys, slice) else self.keys.shape[0]
        return (self.rows.stop - self.rows.start) * count

    def hide(self, scores: Tensor) -> None:
        """See Tile: later keys of the own block, keys before the window, and other documents."""
        if self.causal is not None:
            scores[..., -self.causal.shape[1] :].masked_fill_(~self.causal, -torch.inf)
        if self.edge is not None:
            keys, within = self.edge
            scores[..., keys].masked_fill_(~within, -torch.inf)
        super().hide(scores)


@dataclass(frozen=True, kw_only=True)
class BlockwiseIndex:
    """The tiles of every distinct pattern: patterns[p] are its tiles, pattern_of_head[h] names a head's pattern."""

    patterns: list[list[BlockTile]]
    pattern_of_head: list[int]

    def work(self, kv_heads: int) -> Iterator[tuple[int, slice | list[int], BlockTile]]:
        """What tiles.attend walks: query heads of one K/V head that share a pattern, as many as the cache takes."""
        group = len(self.pattern_of_head) // kv_heads
        for kv_head in range(kv_heads):
            for pattern, tiles in enumerate(self.patterns):
                members = range(kv_head * group, (kv_head + 1) * group)
                heads = [h for h in members if self.pattern_of_head[h] == pattern]
                for tile in tiles if heads else ():
                    at_once = max(1, SCORES_AT_ONCE // tile.scores)
                    for first in range(0, len(heads), at_once):
                        yield kv_head, _as_slice(heads[first : first + at_once]), tile


class Blockwise(Backend):
    """Plain torch on any device, at the price of what is active."""

    name = "blockwise"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> BlockwiseIndex:
        """See Backend; raises ValueError when positions do not ascend."""
        _check_ascending("q_positions", q_positions)
        _check_ascending("k_positions", k_positions)
        patterns = mask.active.flatten(1)
        if mask.windows is not None:
            lengths = torch.tensor(mask.windows, device=patterns.device)[:, None]
            patterns = torch.cat([patterns.to(lengths.dtype), lengths], dim=1)
        distinct, pattern_of_head = torch.unique(patterns, dim=0, return_inverse=True)
        heads = [int((pattern_of_head == p).nonzero()[0]) for p in range(distinct.shape[0])]
        known = _Known()
        return BlockwiseIndex(
            patterns=[_tiles(mask, head, q_positions, k_positions, known) for head in heads],
            pattern_of_head=pattern_of_head.tolist(),
        )

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> list[ColumnTile]:
        """See Backend."""
        return column_tiles(mask, q_positions)

    def attend_keys(self, queries: Queries, keys: Keys) -> Partial:
        """See Backend."""
        return attend(queries, *by_head(keys), keys.index.data.work(keys.k.shape[2]))

    def attend_columns(self, queries: Queries, columns: Columns) -> Partial:
        """See Backend."""
        return attend(queries, columns.k, columns.v, _column_work(columns))

    def add_key_gradients(self, queries: BackwardQueries, keys: Keys, grad_q: Tensor, into: KeyGradients) -> None:
        """See Backend."""
        add_gradients(queries, by_head(keys), keys.index.data.work(keys.k.shape[2]), grad_q, by_head(into))

    def add_column_gradients(
        self, queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients
    ) -> None:
        """See Backend."""
        add_gradients(queries, (columns.k, columns.v), _column_work(columns), grad_q, (into.k, into.v))


register(Blockwise())


def _column_work(columns: Columns) -> Iterator[tuple[int, slice, ColumnTile]]:
    return ((tile.head, slice(tile.head, tile.head + 1), tile) for tile in columns.index.data)


def _check_ascending(name: str, positions: Tensor) -> None:
    steps = positions[1:] - positions[:-1]
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        raise ValueError(f"{name}: {int(positions[at + 1])} follows {int(positions[at])}; positions must ascend")


def _runs(mask: AttentionMask, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of valid local tokens with one mask block each: blocks, first local rows and lengths, all int64 [T]."""
    valid = positions[positions < mask.seq_len_tokens].long()
    blocks, lengths = torch.unique_consecutive(valid // mask.block_size, return_counts=True)
    return blocks, lengths.cumsum(0) - lengths, lengths


@dataclass(frozen=True, kw_only=True)
class _Known:
    """Tests of elements that patterns share: of own blocks by their first row; of edges by offset, sizes and window."""

    causal: dict[int, Tensor] = field(default_factory=dict)
    within: dict[tuple[bytes, int], Tensor] = field(default_factory=dict)

    def window_test(self, q_positions: Tensor, k_positions: Tensor, window_tokens: int) -> Tensor:
        """bool [rows, keys]: the key is less than so many tokens before the row."""
        offsets = torch.cat([q_positions, k_positions]) - q_positions[0]
        key = offsets.cpu().numpy().tobytes(), window_tokens
        if key not in self.within:
            self.within[key] = q_positions[:, None] - k_positions[None, :] < window_tokens
        return self.within[key]


def _tiles(mask: AttentionMask, head: int, q_positions: Tensor, k_positions: Tensor, known: _Known) -> list[BlockTile]:
    """The tiles of one head's pattern."""
    (q_blocks, *q_runs), (k_blocks, k_starts, k_lengths) = _runs(mask, q_positions), _runs(mask, k_positions)
    q_documents, k_documents = document_of(mask, q_positions), document_of(mask, k_positions)
    pairs = active_block_pairs(mask, head, q_blocks[:, None], k_blocks[None, :])
    pairs &= k_blocks[None, :] <= q_blocks[:, None]
    edges = edge_block_pairs(mask, head, q_blocks[:, None], k_blocks[None, :])
    pairs |= edges
    row_of_pair, run_of_pair = pairs.nonzero(as_tuple=True)
    keys = _expand(k_starts[run_of_pair], k_lengths[run_of_pair])
    counts = torch.zeros_like(q_blocks).index_add_(0, row_of_pair, k_lengths[run_of_pair])
    own = pairs & (k_blocks[None, :] == q_blocks[:, None])
    own_lengths = (own * k_lengths[None, :]).sum(1).tolist()
    is_edge = torch.repeat_interleave(edges[row_of_pair, run_of_pair], k_lengths[run_of_pair])
    tiles = []
    rows_of_keys = keys.split(counts.tolist()), is_edge.split(counts.tolist())
    for start, length, row_keys, row_edges, own_length in zip(
        *(x.tolist() for x in q_runs), *rows_of_keys, own_lengths, strict=True
    ):
        if not row_keys.shape[0]:
            continue
        rows, taken = slice(start, start + length), _as_slice(row_keys)
        if own_length and start not in known.causal:
            known.causal[start] = k_positions[row_keys[-own_length:]][None, :] <= q_positions[rows][:, None]
        documents = None
        if q_documents is not None and k_documents is not None:
            documents = q_documents[rows], k_documents[taken]
        edge = None
        if mask.windows is not None and bool(row_edges.any()):
            at = row_edges.nonzero()[:, 0]
            cut = slice(int(at[0]), int(at[-1]) + 1)
            assert cut.stop - cut.start == len(at), "blocks that an edge cuts are neighbours"
            within = known.window_test(q_positions[rows], k_positions[row_keys[cut]], mask.windows[head])
            edge = cut, within
        own_causal = known.causal[start] if own_length else None
        tiles.append(BlockTile(rows=rows, keys=taken, documents=documents, causal=own_causal, edge=edge))
    return tiles


def _expand(starts: Tensor, lengths: Tensor) -> Tensor:
    """The concatenated ranges [starts[i], starts[i] + lengths[i])."""
    shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return shift + torch.arange(shift.shape[0], device=shift.device)


def _as_slice(numbers: Numbers) -> slice | Numbers:
    """Ascending rows or heads as a slice where they are consecutive: no copy is needed then."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers
