"""Which columns each query tile may attend, as bits: the index behind the kernels' column part.

A query tile lies in one mask block, so whether a column of an earlier block is *usable* is one bit for the whole tile.
Shape legend: H query heads, T query tiles, words of 64 columns each.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run
from ..mask import AttentionMask
from ..window import EDGES
from .block import Side, documents_at, side_of

COLUMN_TILE = 64  # a multiple of every kernel's N
_CHUNK = 1024


@triton.jit
def usable_kernel(columns, active, q_blocks, edges, usable, limits, tiles, capacity, words, seq_len, blocks,
                  EDGES: tl.constexpr, BLOCK: tl.constexpr, TOEPLITZ: tl.constexpr, CHUNK: tl.constexpr):
    """usable int64 [H, T, words], and one word more that may be read, with a bit for each column of the head.

    Bit c % 64 of word c // 64 is set if column c lies in an earlier, inactive block that no window cuts. limits int32
    [H, T, 3]: one past the last column with a bit; how many columns lie before the tile's block; how many before its
    end if the diagonal pair is inactive (else the same number again). Of a head whose window cuts blocks, the latter
    two are instead the first column in such blocks, as far as they are inactive, and one past the last (0, 0 if none).
    Grid (T, H). edges int32 [H, EDGES], see window.py, or None.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(q_blocks + tile)
    valid_end = tl.where(block < blocks, seq_len, 0)
    reach, earlier, within = 0, 0, 0
    cut_first, cut_end = 2147483647, 0
    for start in range(0, words * 64, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        positions = tl.load(columns + head * capacity + slots, mask=slots < capacity, other=2147483647)
        column_block = positions // BLOCK
        valid = positions < valid_end
        before = valid & (column_block < block)
        if TOEPLITZ:
            offset = head * blocks + block - column_block
        else:
            offset = (head.to(tl.int64) * blocks + block) * blocks + column_block
        open_pair = tl.load(active + offset, mask=valid & (column_block <= block), other=1) == 0
        if edges is not None:
            distance, first_edge = block - column_block, tl.load(edges + head * EDGES)
            cut = (distance == first_edge) | (distance == tl.load(edges + head * EDGES + 1))
            inside = valid & (column_block <= block) & open_pair & cut
            cut_first = tl.minimum(cut_first, tl.min(tl.where(inside, slots, 2147483647), 0))
            cut_end = tl.maximum(cut_end, tl.max(tl.where(inside, slots + 1, 0), 0))
            open_pair = open_pair & (cut == 0)
        bits = tl.reshape((before & open_pair).to(tl.int64) << (slots % 64).to(tl.int64), [CHUNK // 64, 64])
        word = start // 64 + tl.arange(0, CHUNK // 64)
        packed = usable + (head.to(tl.int64) * tiles + tile) * words + word
        tl.store(packed, tl.sum(bits, 1), mask=word < words)
        reach = tl.maximum(reach, tl.max(tl.where(before & open_pair, slots + 1, 0), 0))
        earlier += tl.sum(before.to(tl.int32), 0)
        within += tl.sum((valid & (column_block == block) & open_pair).to(tl.int32), 0)
    end = earlier + within
    if edges is not None:
        has_edge = tl.load(edges + head * EDGES) >= 0
        earlier = tl.where(has_edge, tl.where(cut_end > 0, cut_first, 0), earlier)
        end = tl.where(has_edge, cut_end, end)
    line = limits + (head * tiles + tile) * 3
    tl.store(line, reach)
    tl.store(line + 1, earlier)
    tl.store(line + 2, end)


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
    q_documents: Tensor | None
    column_documents: Tensor | None

    @cached_property
    def bits(self) -> tuple[Tensor, Tensor]:
        """(usable int64 [H, T, ceil(C / 64)], limits int32 [H, T, 3]): see usable_kernel."""
        mask, tiles, (heads, capacity) = self.mask, len(self.q_side.blocks), self.columns.shape
        words = -(-capacity // COLUMN_TILE)
        # Kernels read one word ahead.
        usable = torch.empty(heads * tiles * words + 1, dtype=torch.int64, device=self.columns.device)
        usable = usable[:-1].view(heads, tiles, words)
        limits = torch.empty(heads, tiles, 3, dtype=torch.int32, device=self.columns.device)
        if tiles and capacity:
            run(
                usable_kernel, (tiles, heads),
                self.columns, mask.active.contiguous().view(torch.uint8), self.q_side.device_blocks, mask.edges(),
                usable, limits, tiles, capacity, words, mask.seq_len_tokens, mask.blocks, EDGES=EDGES,
                BLOCK=mask.block_size, TOEPLITZ=mask.is_toeplitz,
                CHUNK=min(_CHUNK, triton.next_power_of_2(words * COLUMN_TILE)))
        limits[:, :, 0].clamp_(min=mask.anchors)  # rows of other documents attend anchors, which have no bit for that
        return usable, limits

    @cached_property
    def first_tile(self) -> Tensor:
        """int32 [H, ceil(C / COLUMN_TILE)]: the first query tile that can use any of COLUMN_TILE columns, T if none."""
        usable, _ = self.bits
        heads, tiles, words = usable.shape
        if not tiles:
            return usable.new_zeros(heads, words, dtype=torch.int32)
        tile = torch.arange(tiles, dtype=torch.int32, device=usable.device)[:, None]
        first = torch.where(usable != 0, tile, tiles).amin(1)
        first[:, : -(-self.mask.anchors // COLUMN_TILE)] = 0
        return first

    @cached_property
    def has_own(self) -> Tensor:
        """int32 [H]: whether any tile attends some columns of a block: of its own, or of one that a window cuts."""
        _, limits = self.bits
        return (limits[:, :, 2] > limits[:, :, 1]).any(1).to(torch.int32)

    @property
    def nbytes(self) -> int:
        """Device memory held, the mask's own tensors excepted."""
        return sum(t.nbytes for t in (*self.bits, self.first_tile, self.has_own, self.q_side.order(falling=True)))


def column_task(mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
    """The index of the column part of one query shard, from its global positions [S_q].

    Raises ValueError when the mask has no columns or the local tiles are not whole mask blocks.
    """
    if mask.columns is None:
        raise ValueError("mask.columns: None, so there is no column part")
    q_side = side_of(q_positions, mask.block_size, mask.active.device, name="q_positions")
    columns = mask.columns.contiguous()
    return ColumnTask(
        mask=mask,
        q_side=q_side,
        q_valid_tokens=q_side.valid_tokens(mask.seq_len_tokens, mask.block_size),
        columns=columns,
        q_documents=documents_at(mask, q_positions),
        column_documents=documents_at(mask, columns),
    )
