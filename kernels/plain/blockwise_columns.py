"""Column part in plain torch: tiles of queries against the gathered columns of their head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask import AttentionMask, active_block_pairs, document_of
from ..merge import accumulator_dtype
from ..values import BackwardQueries, Columns, KeyGradients, Partial, Queries
from .softmax import partial_attention, partial_gradients

# Query rows of one matmul.
TILE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class ColumnTile:
    """Local query rows against the first `slots` columns of a head (later ones lie in the future of all rows)."""

    head: int
    rows: slice
    slots: int


@dataclass(frozen=True, kw_only=True)
class BlockwiseColumnIndex:
    """Tiles with work, and what tells attended pairs apart.

    inactive: bool [H, runs, C], the column's block pair is inactive for the queries of this run (of one mask block);
    run_of_row int64 [S_q]; columns int64 [H, C]; documents of the queries [S_q] and of the columns [H, C], or None.
    """

    tiles: list[ColumnTile]
    inactive: Tensor
    run_of_row: Tensor
    q_positions: Tensor
    columns: Tensor
    q_documents: Tensor | None
    column_documents: Tensor | None


def column_index(mask: AttentionMask, q_positions: Tensor) -> BlockwiseColumnIndex:
    """See api.column_index."""
    columns = _columns(mask, q_positions)
    blocks, run_of_row = torch.unique_consecutive(q_positions.long() // mask.block_size, return_inverse=True)
    column_blocks = columns // mask.block_size
    inactive = torch.stack(
        [~active_block_pairs(mask, head, blocks[:, None], column_blocks[head][None, :]) for head in range(mask.heads)]
    )
    inactive &= column_blocks[:, None, :] <= blocks[None, :, None]
    valid = int((q_positions < mask.seq_len_tokens).sum())
    tiles = [
        tile
        for head in range(mask.heads)
        for tile in _tiles(head, columns[head].contiguous(), q_positions[:valid], inactive[head], run_of_row)
    ]
    return BlockwiseColumnIndex(
        tiles=tiles,
        inactive=inactive,
        run_of_row=run_of_row,
        q_positions=q_positions,
        columns=columns,
        q_documents=document_of(mask, q_positions),
        column_documents=document_of(mask, columns),
    )


def attend_columns(queries: Queries, columns: Columns) -> Partial:
    """Fresh (out, lse) over the columns; see Backend.attend_columns."""
    q, dtype, index = queries.q, accumulator_dtype(queries.q.dtype), columns.index.data
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype, device=q.device)
    for tile, keys, values in _work(index, columns, dtype):
        rows = q[:, tile.rows, tile.head].to(dtype)
        part, part_lse = partial_attention(_scores(rows, keys, tile, index, scale=queries.scale), values)
        out[:, tile.rows, tile.head] = part
        lse[:, tile.head, tile.rows] = part_lse
    return out, lse


def add_column_gradients(queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients) -> None:
    """Add the columns' gradients; see Backend.add_column_gradients."""
    dtype, index, scale = accumulator_dtype(queries.q.dtype), columns.index.data, queries.scale
    for tile, keys, values in _work(index, columns, dtype):
        q, grads = (x[:, tile.rows, tile.head].to(dtype) for x in (queries.q, queries.grad_out))
        rows = slice(None), tile.head, tile.rows
        scores = _scores(q, keys, tile, index, scale=scale)
        dq, dk, dv = partial_gradients(scores, grads, q, keys, values, queries.lse[rows], queries.delta[rows])
        grad_q[:, tile.rows, tile.head].add_(dq, alpha=scale)
        into.k[:, tile.head, : tile.slots].add_(dk, alpha=scale)
        into.v[:, tile.head, : tile.slots].add_(dv)


def _columns(mask: AttentionMask, q_positions: Tensor) -> Tensor:
    """int64 [H, C], C = 0 for a mask without columns."""
    if mask.columns is None:
        return torch.zeros(mask.heads, 0, dtype=torch.int64, device=q_positions.device)
    return mask.columns.long()


def _tiles(
    head: int, columns: Tensor, q_positions: Tensor, inactive: Tensor, run_of_row: Tensor
) -> Iterator[ColumnTile]:
    # A run without inactive columns has no work; a tile of such runs is left out.
    busy = inactive.any(1)[run_of_row[: q_positions.shape[0]]]
    starts = torch.arange(0, q_positions.shape[0], TILE_ROWS, device=q_positions.device)
    lasts = q_positions[(starts + TILE_ROWS - 1).clamp(max=q_positions.shape[0] - 1)].long()
    slots = torch.searchsorted(columns, lasts, right=True)
    for start, count in zip(starts.tolist(), slots.tolist(), strict=True):
        rows_busy = busy[start : start + TILE_ROWS]
        if count and bool(rows_busy.any()):
            yield ColumnTile(head=head, rows=slice(start, start + rows_busy.shape[0]), slots=count)


def _work(
    index: BlockwiseColumnIndex, columns: Columns, dtype: torch.dtype
) -> Iterator[tuple[ColumnTile, Tensor, Tensor]]:
    for tile in index.tiles:
        yield tile, columns.k[:, tile.head, : tile.slots].to(dtype), columns.v[:, tile.head, : tile.slots].to(dtype)


def _scores(queries: Tensor, keys: Tensor, tile: ColumnTile, index: BlockwiseColumnIndex, *, scale: float) -> Tensor:
    """[B, rows, slots], -inf where not attended."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    columns = index.columns[tile.head, : tile.slots]
    attended = index.inactive[tile.head, :, : tile.slots][index.run_of_row[tile.rows]]
    attended &= columns[None, :] <= index.q_positions[tile.rows][:, None]
    if index.q_documents is not None and index.column_documents is not None:
        attended &= index.q_documents[tile.rows][:, None] == index.column_documents[tile.head, : tile.slots][None, :]
    return scores.masked_fill_(~attended, -torch.inf)
