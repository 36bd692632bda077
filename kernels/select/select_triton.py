"""Taking the highest scores of many lines at once, as a list or as block diagonals: two kernels over the scores.

top.py defines the same with tensor operations: all scores above the cut, then ties with it from the lowest index on.
Shape legend: L lines (score kinds times heads), n scores a line.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run

CHUNK = 2048


@triton.jit
def count_kernel(scores, cuts, found, length, chunks, SIZE: tl.constexpr):
    """found int32 [2, L, chunks]: how many scores of a chunk lie above the line's cut, and how many equal it."""
    chunk, line = tl.program_id(0), tl.program_id(1)
    at = chunk * SIZE + tl.arange(0, SIZE)
    values = tl.load(scores + line.to(tl.int64) * length + at, mask=at < length, other=float("-inf"))
    cut = tl.load(cuts + line)
    here = found + line * chunks + chunk
    tl.store(here, tl.sum(((values > cut) & (at < length)).to(tl.int32), 0))
    tl.store(here + tl.num_programs(1) * chunks, tl.sum(((values == cut) & (at < length)).to(tl.int32), 0))


@triton.jit
def take_kernel(scores, cuts, before, missing, positions, active, length, chunks, heads, capacity, blocks,
                BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Lines below `heads` fill positions int32 [heads, capacity]; the others set active uint8 [heads, blocks].

    before int32 [2, L, chunks]: scores above and at the cut in earlier chunks; missing [L]: ties that are taken.
    """
    chunk, line = tl.program_id(0), tl.program_id(1)
    at = chunk * SIZE + tl.arange(0, SIZE)
    values = tl.load(scores + line.to(tl.int64) * length + at, mask=at < length, other=float("-inf"))
    cut, ties = tl.load(cuts + line), tl.load(missing + line)
    here = before + line * chunks + chunk
    above_before, ties_before = tl.load(here), tl.load(here + tl.num_programs(1) * chunks)
    tied = (values == cut) & (at < length)
    tied = tied & (ties_before + tl.cumsum(tied.to(tl.int32), 0) <= ties)
    taken = ((values > cut) & (at < length)) | tied
    if line < heads:
        rank = above_before + tl.minimum(ties_before, ties) + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(positions + line * capacity + rank, at, mask=taken & (rank < capacity))
    else:
        # Many threads may set one diagonal: all of them to 1.
        floor, ceiling = at // BLOCK, (at + BLOCK - 1) // BLOCK
        row = active + (line - heads) * blocks
        tl.store(row + floor, tl.full([SIZE], 1, tl.uint8), mask=taken)
        tl.store(row + ceiling, tl.full([SIZE], 1, tl.uint8), mask=taken & (ceiling < blocks))


@torch.no_grad()
def take(
    scores: Tensor, counts: Tensor, sorted_scores: Tensor, *, column_capacity: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """(columns int32 [H, column_capacity], padded with n; active bool [H, ceil(n / block_size)]) of both kinds' scores.

    scores [2, H, n]: by key, then by distance; counts [2, H]: how many of each; sorted_scores [2, H, c]: the highest
    ones in descending order, at least as many as any count. Diagonal 0 is always active.
    """
    _, heads, length = scores.shape
    lines, chunks, blocks = 2 * heads, triton.cdiv(length, CHUNK), triton.cdiv(length, block_size)
    last = (counts - 1).clamp_(min=0, max=max(sorted_scores.shape[2] - 1, 0))
    cuts = sorted_scores.gather(2, last.unsqueeze(2)).masked_fill_((counts < 1).unsqueeze(2), torch.inf)
    found = torch.empty(2, lines, chunks, dtype=torch.int32, device=scores.device)
    size = min(CHUNK, triton.next_power_of_2(length))
    chunks_of = {"length": length, "chunks": chunks, "SIZE": size}
    run(count_kernel, (chunks, lines), scores=scores, cuts=cuts, found=found, **chunks_of)
    reached = found.cumsum(2, dtype=torch.int32)
    missing = counts.view(-1).to(torch.int32) - reached[0, :, -1]
    columns = torch.full((heads, column_capacity), length, dtype=torch.int32, device=scores.device)
    active = torch.zeros(heads, blocks, dtype=torch.uint8, device=scores.device)
    active[:, 0] = 1
    run(take_kernel, (chunks, lines), scores=scores, cuts=cuts, before=reached - found, missing=missing,
        positions=columns, active=active, heads=heads, capacity=column_capacity, blocks=blocks, BLOCK=block_size,
        **chunks_of)
    return columns, active.view(torch.bool)
