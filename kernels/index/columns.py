"""Which columns each query tile may attend, as bits: the index behind the kernels' column part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from ..jit import run
from ..mask import AttentionMask, document_of
from .block import Side, side_of
from .usable import usable_kernel

COLUMN_TILE = 64  # a multiple of every kernel's N
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class ColumnTask:
    """The index of one query shard's column part, on the mask's device.

    Gathering columns needs no more than the fields. What attention needs is made when it asks: columns are gathered
    before a layer's first kernel, which should not wait for the host.
    """

    mask: AttentionMask
    q_side: Side
    q_valid_tokens: int
    columns: Tensor
    order: Tensor
    q_documents: Tensor | None
    column_documents: Tensor | None

    @property
    def usable(self) -> Tensor:
        """int64 [H, T, ceil(C / 64)]: see columns.usable_kernel."""
        return self._bits[0]

    @property
    def limits(self) -> Tensor:
        """int32 [H, T, 3]: see columns.usable_kernel."""
        return self._bits[1]

    @cached_property
    def _bits(self) -> tuple[Tensor, Tensor]:
        return _usable_bits(self.mask, self.columns, self.q_side.device_blocks)

    @cached_property
    def first_tile(self) -> Tensor:
        """int32 [H, ceil(C / COLUMN_TILE)]: the first query tile that can use any of COLUMN_TILE columns, T if none."""
        heads, tiles, words = self.usable.shape
        if not tiles:
            return self.usable.new_zeros(heads, words, dtype=torch.int32)
        tile = torch.arange(tiles, dtype=torch.int32, device=self.usable.device)[:, None]
        return torch.where(self.usable != 0, tile, tiles).amin(1)

    @cached_property
    def has_own(self) -> Tensor:
        """int32 [H]: whether any tile attends columns of its own block here, because its diagonal pair is inactive."""
        return (self.limits[:, :, 2] > self.limits[:, :, 1]).any(1).to(torch.int32)

    @property
    def nbytes(self) -> int:
        """Device memory held, the mask's own tensors excepted."""
        return sum(
            t.numel() * t.element_size() for t in (self.usable, self.limits, self.first_tile, self.has_own, self.order)
        )


def column_task(mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
    """The index of the column part of one query shard, from its global positions [S_q].

    Raises ValueError when the mask has no columns or the local tiles are not whole mask blocks.
    """
    if mask.columns is None:
        raise ValueError("mask.columns: None, so there is no column part")
    q_side = side_of(q_positions, mask.block_size, mask.active.device, name="q_positions")
    columns = mask.columns.contiguous()
    q_documents, column_documents = (_documents(mask, x) for x in (q_positions.to(columns.device), columns))
    return ColumnTask(
        mask=mask,
        q_side=q_side,
        q_valid_tokens=q_side.valid_tokens(mask),
        columns=columns,
        order=q_side.order(falling=True),
        q_documents=q_documents,
        column_documents=column_documents,
    )


def _usable_bits(mask: AttentionMask, columns: Tensor, q_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(usable, limits) of columns [H, C] for the mask blocks int32 [T] of query tiles. Does not wait."""
    tiles, (heads, capacity) = len(q_blocks), columns.shape
    words = -(-capacity // COLUMN_TILE)
    # Kernels read one word ahead.
    usable = torch.empty(heads * tiles * words + 1, dtype=torch.int64, device=columns.device)
    usable = usable[:-1].view(heads, tiles, words)
    limits = torch.empty(heads, tiles, 3, dtype=torch.int32, device=columns.device)
    if tiles and capacity:
        run(
            usable_kernel,
            (tiles, heads),
            columns,
            mask.active.contiguous().view(torch.uint8),
            q_blocks,
            usable,
            limits,
            tiles,
            capacity,
            words,
            mask.seq_len_tokens,
            mask.blocks,
            BLOCK=mask.block_size,
            TOEPLITZ=mask.is_toeplitz,
            CHUNK=min(_CHUNK, triton.next_power_of_2(words * COLUMN_TILE)),
        )
    return usable, limits


def _documents(mask: AttentionMask, positions: Tensor) -> Tensor | None:
    documents = document_of(mask, positions)
    return None if documents is None else documents.to(torch.int32)
