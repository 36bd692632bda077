"""Block part in plain torch: inactive tiles are skipped, the active keys of a query tile share one matmul.

A query tile is a run of local tokens of one mask block, so any ascending positions work (contiguous, striped by
blocks or by tokens). Query heads of one KV head with equal patterns are computed together. What gloo runs use, and
the tests; it also works on a GPU, slowly. The column part is in blockwise_columns.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import Backend, register
from ..mask import AttentionMask, active_block_pairs, document_of
from ..merge import accumulator_dtype
from ..values import BackwardQueries, Columns, KeyGradients, Keys, Partial, Queries
from .blockwise_columns import BlockwiseColumnIndex, add_column_gradients, attend_columns, column_index
from .softmax import partial_attention, partial_gradients

# Scores computed at once: 4 MB of float32 stay in a core's cache.
SCORES_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class QueryTile:
    """Local query rows of one mask block and the local key rows that they may attend.

    keys: a slice, or int64 local rows, ascending. causal: bool [rows, n], which of the last n keys (those of the
    queries' own block) are not in the future; None when no key shares the block.
    """

    rows: slice
    keys: slice | Tensor
    causal: Tensor | None

    @property
    def scores(self) -> int:
        """Rows times keys."""
        count = self.keys.stop - self.keys.start if isinstance(self.keys, slice) else self.keys.shape[0]
        return (self.rows.stop - self.rows.start) * count


@dataclass(frozen=True, kw_only=True)
class BlockwiseIndex:
    """The tiles of every distinct pattern: patterns[p] are its tiles, pattern_of_head[h] names a head's pattern.

    q_documents [S_q], k_documents [S_k]: documents of the local tokens, or None.
    """

    patterns: list[list[QueryTile]]
    pattern_of_head: list[int]
    q_documents: Tensor | None
    k_documents: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs of valid local tokens with one mask block each: blocks, first local rows and lengths, all int64 [T]."""

    blocks: Tensor
    starts: Tensor
    lengths: Tensor


class Blockwise(Backend):
    """Plain torch on any device, at the price of what is active."""

    name = "blockwise"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> BlockwiseIndex:
        """See Backend; raises ValueError when positions do not ascend."""
        _check_ascending("q_positions", q_positions)
        _check_ascending("k_positions", k_positions)
        distinct, pattern_of_head = torch.unique(mask.active, dim=0, return_inverse=True)
        heads = [int((pattern_of_head == p).nonzero()[0]) for p in range(distinct.shape[0])]
        causal: dict[int, Tensor] = {}
        return BlockwiseIndex(
            patterns=[_tiles(mask, head, q_positions, k_positions, causal) for head in heads],
            pattern_of_head=pattern_of_head.tolist(),
            q_documents=document_of(mask, q_positions),
            k_documents=document_of(mask, k_positions),
        )

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> BlockwiseColumnIndex:
        """See Backend."""
        return column_index(mask, q_positions)

    def attend_keys(self, queries: Queries, keys: Keys) -> Partial:
        """See Backend."""
        index: BlockwiseIndex = keys.index.data
        q, k, v = (_by_head(x) for x in (queries.q, keys.k, keys.v))
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)
        for kv_head, heads, tile in _work(index, q.shape[1], k.shape[1]):
            scores = _scores(_stack(q, heads, tile), _keys(k, kv_head, tile), tile, index, scale=queries.scale)
            part, part_lse = partial_attention(scores, _keys(v, kv_head, tile))
            _unstack(out, heads, tile, part)
            _unstack(lse, heads, tile, part_lse)
        return out.transpose(1, 2).contiguous(), lse

    def attend_columns(self, queries: Queries, columns: Columns) -> Partial:
        """See Backend."""
        return attend_columns(queries, columns)

    def add_key_gradients(self, queries: BackwardQueries, keys: Keys, grad_q: Tensor, into: KeyGradients) -> None:
        """See Backend."""
        index, scale = keys.index.data, queries.scale
        q, k, v, grad_out = (_by_head(x) for x in (queries.q, keys.k, keys.v, queries.grad_out))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for kv_head, heads, tile in _work(index, q.shape[1], k.shape[1]):
            tile_k, tile_v = _keys(k, kv_head, tile), _keys(v, kv_head, tile)
            tile_q, grads, *rows = (_stack(x, heads, tile) for x in (q, grad_out, queries.lse, queries.delta))
            scores = _scores(tile_q, tile_k, tile, index, scale=scale)
            parts = partial_gradients(scores, grads, tile_q, tile_k, tile_v, *rows)
            _unstack(dq, heads, tile, parts[0])
            _add_rows(dk[:, kv_head], tile, parts[1])
            _add_rows(dv[:, kv_head], tile, parts[2])
        grad_q.add_(dq.transpose(1, 2), alpha=scale)
        into.k.add_(dk.transpose(1, 2), alpha=scale)
        into.v.add_(dv.transpose(1, 2))

    def add_column_gradients(
        self, queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients
    ) -> None:
        """See Backend."""
        add_column_gradients(queries, columns, grad_q, into)


register(Blockwise())


def _check_ascending(name: str, positions: Tensor) -> None:
    steps = positions[1:] - positions[:-1]
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        raise ValueError(f"{name}: {int(positions[at + 1])} follows {int(positions[at])}; positions must ascend")


def _runs(mask: AttentionMask, positions: Tensor) -> _Runs:
    valid = positions[positions < mask.seq_len_tokens].long()
    blocks, lengths = torch.unique_consecutive(valid // mask.block_size, return_counts=True)
    return _Runs(blocks=blocks, starts=lengths.cumsum(0) - lengths, lengths=lengths)


def _tiles(
    mask: AttentionMask, head: int, q_positions: Tensor, k_positions: Tensor, causal: dict[int, Tensor]
) -> list[QueryTile]:
    """The tiles of one head's pattern. `causal` keeps the tests of own blocks, the same for all patterns."""
    q_runs, k_runs = _runs(mask, q_positions), _runs(mask, k_positions)
    pairs = active_block_pairs(mask, head, q_runs.blocks[:, None], k_runs.blocks[None, :])
    pairs &= k_runs.blocks[None, :] <= q_runs.blocks[:, None]
    row_of_pair, run_of_pair = pairs.nonzero(as_tuple=True)
    keys = _expand(k_runs.starts[run_of_pair], k_runs.lengths[run_of_pair])
    counts = torch.zeros_like(q_runs.blocks).index_add_(0, row_of_pair, k_runs.lengths[run_of_pair])
    own = pairs & (k_runs.blocks[None, :] == q_runs.blocks[:, None])
    own_lengths = (own * k_runs.lengths[None, :]).sum(1).tolist()
    tiles = []
    for start, length, row_keys, own_length in zip(
        q_runs.starts.tolist(), q_runs.lengths.tolist(), keys.split(counts.tolist()), own_lengths, strict=True
    ):
        if not row_keys.shape[0]:
            continue
        rows = slice(start, start + length)
        if own_length and start not in causal:
            causal[start] = k_positions[row_keys[-own_length:]][None, :] <= q_positions[rows][:, None]
        tiles.append(QueryTile(rows=rows, keys=_as_slice(row_keys), causal=causal[start] if own_length else None))
    return tiles


def _expand(starts: Tensor, lengths: Tensor) -> Tensor:
    """The concatenated ranges [starts[i], starts[i] + lengths[i])."""
    shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return shift + torch.arange(shift.shape[0], device=shift.device)


def _as_slice(rows: Tensor) -> slice | Tensor:
    """Ascending rows as a slice where they are consecutive: no copy is needed then."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.shape[0] else rows


def _work(index: BlockwiseIndex, q_heads: int, kv_heads: int) -> Iterator[tuple[int, slice | list[int], QueryTile]]:
    """(KV head, some of its query heads that share a pattern, tile): everything to compute, in a fixed order."""
    group = q_heads // kv_heads
    for kv_head in range(kv_heads):
        for pattern, tiles in enumerate(index.patterns):
            heads = [h for h in range(kv_head * group, (kv_head + 1) * group) if index.pattern_of_head[h] == pattern]
            for tile in tiles if heads else ():
                at_once = max(1, SCORES_AT_ONCE // tile.scores)
                for first in range(0, len(heads), at_once):
                    yield kv_head, _consecutive(heads[first : first + at_once]), tile


def _consecutive(heads: list[int]) -> slice | list[int]:
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] + 1 == len(heads) else heads


def _by_head(x: Tensor) -> Tensor:
    """[B, S, H, D] -> contiguous [B, H, S, D] in the accumulator dtype."""
    return x.transpose(1, 2).to(accumulator_dtype(x.dtype), memory_format=torch.contiguous_format, copy=True)


def _keys(x: Tensor, kv_head: int, tile: QueryTile) -> Tensor:
    """[B, H_kv, S_k, D] -> [B, keys, D]."""
    return x[:, kv_head, tile.keys] if isinstance(tile.keys, slice) else x[:, kv_head].index_select(1, tile.keys)


def _stack(x: Tensor, heads: slice | list[int], tile: QueryTile) -> Tensor:
    """[B, H, S_q, ...] -> [B, heads * rows, ...]: query heads of one KV head as rows of one matmul."""
    return x[:, heads, tile.rows].flatten(1, 2)


def _unstack(x: Tensor, heads: slice | list[int], tile: QueryTile, part: Tensor) -> None:
    """The inverse of _stack: write part [B, heads * rows, ...] into x; each row belongs to one tile only."""
    rows = tile.rows.stop - tile.rows.start
    x[:, heads, tile.rows] = part.unflatten(1, (-1, rows))


def _add_rows(x: Tensor, tile: QueryTile, part: Tensor) -> None:
    """Add part [B, keys, D] into x [B, S_k, D]."""
    if isinstance(tile.keys, slice):
        x[:, tile.keys] += part
    else:
        x.index_add_(1, tile.keys, part)


def _scores(queries: Tensor, keys: Tensor, tile: QueryTile, index: BlockwiseIndex, *, scale: float) -> Tensor:
    """[B, heads * rows, keys], -inf where not attended."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    rows = tile.rows.stop - tile.rows.start
    if tile.causal is not None:
        own = scores.unflatten(1, (-1, rows))[..., -tile.causal.shape[1] :]
        own.masked_fill_(~tile.causal, -torch.inf)
    if index.q_documents is not None and index.k_documents is not None:
        differ = index.q_documents[tile.rows][:, None] != index.k_documents[tile.keys][None, :]
        scores.unflatten(1, (-1, rows)).masked_fill_(differ, -torch.inf)
    return scores
