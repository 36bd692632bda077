"""One list of visited tiles per row, for block masks and irregular placements: counted, then written, by one kernel.

Rows read their line of the mask once per pass, tile by tile of the other side, so that nothing of the size rows times
tiles is ever stored.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run
from ..mask import AttentionMask

# Above this many entries that there could be (512 MB), they are counted on the host first: one synchronisation.
UNCOUNTED_LIMIT = 1 << 27
_CHUNK = 1024


@triton.jit(do_not_specialize=["tiles", "others", "blocks"])
def lists_kernel(active, row_blocks, other_blocks, counts, starts, entries, tiles, others, blocks,
                 TOEPLITZ: tl.constexpr, TRANSPOSED: tl.constexpr, FILL: tl.constexpr, SIZE: tl.constexpr):
    """counts int32 [H, T], or with FILL entries from starts [H, T] on. Grid (T, H).

    active: rows of the mask with the other side along them, [H, N, N], or diagonals [H, N].
    """
    row, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(row_blocks + row)
    line = head * tiles + row
    found = 0
    first_entry = tl.cast(0, tl.int64)
    if FILL:
        first_entry = tl.load(starts + line)
    for first in range(0, others, SIZE):
        tile = first + tl.arange(0, SIZE)
        other = tl.load(other_blocks + tile, mask=tile < others, other=-1)
        if TRANSPOSED:
            causal = (other > block) & (other < blocks)
        else:
            causal = (other >= 0) & (other < tl.where(block < blocks, block, 0))
        if TOEPLITZ:
            offset = head * blocks + tl.abs(block - other)
        else:
            offset = (head.to(tl.int64) * blocks + block) * blocks + other
        on = (tl.load(active + offset, mask=causal, other=0) != 0).to(tl.int32)
        if FILL:
            tl.store(entries + first_entry + found + tl.cumsum(on, 0) - 1, tile, mask=on != 0)
        found += tl.sum(on, 0)
    if not FILL:
        tl.store(counts + line, found)


def csr_lists(
    mask: AttentionMask, rows: tuple[np.ndarray, Tensor], others: tuple[np.ndarray, Tensor], *, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(starts int64 [H, T], counts int32 [H, T], entries int32 [E]): the other side's local tiles of each row, rising.

    rows, others: the blocks of both sides' tiles, on the host and on the device (int32). transposed: rows are keys.
    """
    row_blocks, other_blocks = rows[1], others[1]
    tiles, heads = row_blocks.shape[0], mask.heads
    active = mask.active if mask.is_toeplitz or not transposed else mask.active.transpose(1, 2)
    counts = torch.empty(heads, tiles, dtype=torch.int32, device=row_blocks.device)
    given = {
        "active": active.contiguous().view(torch.uint8), "row_blocks": row_blocks, "other_blocks": other_blocks,
        "tiles": tiles, "others": other_blocks.shape[0], "blocks": mask.blocks, "TOEPLITZ": mask.is_toeplitz,
        "TRANSPOSED": transposed, "SIZE": min(_CHUNK, triton.next_power_of_2(max(other_blocks.shape[0], 1))),
    }
    if tiles:
        run(lists_kernel, (tiles, heads), counts=counts, starts=None, entries=None, FILL=False, **given)
    ends = counts.view(-1).cumsum(0).view_as(counts)
    starts = ends - counts
    room = heads * _causal_pairs(rows[0], others[0], mask.blocks, transposed=transposed)
    if room > UNCOUNTED_LIMIT:
        room = int(ends[-1, -1])
    entries = torch.empty(room, dtype=torch.int32, device=row_blocks.device)
    if room:
        run(lists_kernel, (tiles, heads), counts=None, starts=starts, entries=entries, FILL=True, **given)
    return starts, counts, entries


def _causal_pairs(rows: np.ndarray, others: np.ndarray, blocks: int, *, transposed: bool) -> int:
    """How many (row, tile) pairs of valid blocks are strictly causal."""
    rows, others = rows[rows < blocks], np.sort(others[others < blocks])
    before = np.searchsorted(others, rows, side="right" if transposed else "left")
    return int((len(others) - before).sum() if transposed else before.sum())
