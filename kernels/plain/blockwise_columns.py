"""Column part in plain torch: tiles of queries against the gathered columns of their head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask import AttentionMask, active_block_pairs, document_of
from .tiles import Tile

# Query rows of one matmul.
TILE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class ColumnTile(Tile):
    """Query rows against the first columns of their head (later ones lie in the future of all rows).

    inactive: bool [runs, keys], the column's block pair is inactive for the queries of this run (of one mask block);
    run_of_row int64 [rows]; positions of the rows [rows]; columns int64 [keys]. window_tokens: of the head's window,
    which has the columns inside. anchors: how many of the first columns rows of other documents attend, see mask.py.
    """

    head: int
    inactive: Tensor
    run_of_row: Tensor
    positions: Tensor
    columns: Tensor
    window_tokens: int
    anchors: int

    def hide(self, scores: Tensor) -> None:
        """See Tile: later columns, those that an active block or the window covers, and other documents."""
        attended = self.inactive[self.run_of_row]
        attended &= self.columns[None, :] <= self.positions[:, None] - self.window_tokens
        if self.documents is not None:
            of_rows, of_keys = self.documents
            other = of_rows[:, None] != of_keys[None, :]
            attended &= ~other
            attended[:, : self.anchors] |= other[:, : self.anchors]
        scores.masked_fill_(~attended, -torch.inf)


def column_tiles(mask: AttentionMask, q_positions: Tensor) -> list[ColumnTile]:
    """The tiles with work of all heads; see api.column_index."""
    if mask.columns is None:
        return []
    columns = mask.columns.long()
    blocks, run_of_row = torch.unique_consecutive(q_positions.long() // mask.block_size, return_inverse=True)
    q_documents, column_documents = document_of(mask, q_positions), document_of(mask, columns)
    valid = q_positions[q_positions < mask.seq_len_tokens]
    starts = torch.arange(0, valid.shape[0], TILE_ROWS, device=q_positions.device)
    lasts = valid[(starts + TILE_ROWS - 1).clamp(max=valid.shape[0] - 1)].long()
    tiles = []
    for head, own in enumerate(columns):
        column_blocks = own // mask.block_size
        inactive = ~active_block_pairs(mask, head, blocks[:, None], column_blocks[None, :])
        inactive &= column_blocks[None, :] <= blocks[:, None]
        # A run without inactive columns has no work; a tile of such runs is left out.
        busy = inactive.any(1)[run_of_row[: valid.shape[0]]]
        counts = torch.searchsorted(own.contiguous(), lasts, right=True)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            rows, slots = slice(start, min(start + TILE_ROWS, valid.shape[0])), slice(count)
            if not count or not (mask.anchors or bool(busy[rows].any())):
                continue
            documents = None
            if q_documents is not None and column_documents is not None:
                documents = q_documents[rows], column_documents[head, slots]
            tiles.append(
                ColumnTile(
                    rows=rows,
                    keys=slots,
                    documents=documents,
                    head=head,
                    inactive=inactive[:, slots],
                    run_of_row=run_of_row[rows],
                    positions=valid[rows],
                    columns=own[slots],
                    anchors=mask.anchors,
                    window_tokens=0 if mask.windows is None else mask.windows[head],
                )
            )
    return tiles
