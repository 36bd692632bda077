"""Which tiles of the other side a sliding window cuts, for every row: at most two, apart from its lists of whole tiles.

Shape legend: H query heads, T rows (local query tiles or, transposed, key tiles), N mask blocks of the sequence.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run
from ..mask import AttentionMask
from ..window import EDGES

EDGE_FIELDS = 3  # of each edge: local tile or -1, limit, floor
_ROWS = 128


@triton.jit(do_not_specialize=["tiles", "blocks"])
def edges_kernel(active, row_blocks, tile_of_block, edges, windows, fields, tiles, blocks, EDGES: tl.constexpr,
                 FIELDS: tl.constexpr, BLOCK: tl.constexpr, TOEPLITZ: tl.constexpr, TRANSPOSED: tl.constexpr,
                 SIZE: tl.constexpr):
    """fields int32 [H, T, EDGES, FIELDS] of every row. Grid (T / SIZE, H).

    edges int32 [H, EDGES]: block diagonals, negative for none; windows int32 [H]. Of a tile that is cut, query token r
    attends key token c (of their blocks) where floor <= r - c < limit.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    block = tl.load(row_blocks + rows, mask=rows < tiles, other=blocks)
    window = tl.load(windows + head)
    for edge in tl.static_range(EDGES):
        diagonal = tl.zeros_like(block) + tl.load(edges + head * EDGES + edge)
        if TRANSPOSED:
            query, key = block + diagonal, block
            other = query
        else:
            query, key = block, block - diagonal
            other = key
        inside = (block < blocks) & (diagonal >= 0) & (key >= 0) & (query < blocks)
        if TOEPLITZ:
            offset = head * blocks + diagonal
        else:
            offset = (head.to(tl.int64) * blocks + query) * blocks + key
        is_open = tl.load(active + offset, mask=inside, other=1) == 0
        tile = tl.load(tile_of_block + other, mask=inside & is_open, other=-1)
        at = fields + ((head * tiles + rows) * EDGES + edge) * FIELDS
        tl.store(at, tile, mask=rows < tiles)
        tl.store(at + 1, window - diagonal * BLOCK, mask=rows < tiles)
        tl.store(at + 2, tl.where(diagonal == 0, 0, -BLOCK), mask=rows < tiles)


def edge_fields(mask: AttentionMask, row_blocks: Tensor, tile_of_block: Tensor, *, transposed: bool) -> Tensor | None:
    """int32 [H, T, EDGES, EDGE_FIELDS]: see edges_kernel; None where the mask has no windows. Does not wait.

    row_blocks int32 [T]: the rows' mask blocks; tile_of_block int32 [N]: the other side's tile of each block, or -1.
    """
    edges, windows = mask.edges(), mask.window_lengths()
    if edges is None or windows is None:
        return None
    tiles = row_blocks.shape[0]
    fields = torch.empty(mask.heads, tiles, EDGES, EDGE_FIELDS, dtype=torch.int32, device=row_blocks.device)
    if tiles:
        run(
            edges_kernel, (triton.cdiv(tiles, _ROWS), mask.heads),
            mask.active.contiguous().view(torch.uint8), row_blocks, tile_of_block, edges, windows, fields, tiles,
            mask.blocks, EDGES=EDGES, FIELDS=EDGE_FIELDS, BLOCK=mask.block_size, TOEPLITZ=mask.is_toeplitz,
            TRANSPOSED=transposed, SIZE=_ROWS)
    return fields
