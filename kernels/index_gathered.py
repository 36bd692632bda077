"""Toeplitz lists over several gathered shards at once: one list per head, whatever the number of shards.

Under block striping over W ranks, own query blocks are I = r + W m and shard c holds the blocks J = c (mod W), shards
laid one after the other. A diagonal d takes query tile m to J = I - d, whose shard (r - d) mod W is the same for all m,
and whose tile is m plus a constant of that diagonal. So entries are these constants, sorted by d, and a row visits the
first ones: those with d <= I.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .mask import AttentionMask

Lists = tuple[Tensor, Tensor, Tensor, Tensor, int]


def gathered_lists(mask: AttentionMask, rows: np.ndarray, others: np.ndarray) -> Lists | None:
    """Starts, counts, base, entries, sign as `index._toeplitz_lists` returns them; None where the shape is another.

    rows, others: int64 mask blocks of the local tiles of the queries and of the gathered keys.
    """
    runs = _runs(others)
    if runs is None or not len(rows):
        return None
    stride, tile_of_residue = runs
    residue, last = int(rows[0]) % stride, int(rows.max())
    if (rows % stride != residue).any() or not _reach(others, tile_of_residue, stride, min(last, mask.blocks - 1)):
        return None
    constant, present = _constants(mask.blocks, residue, stride, tile_of_residue)
    return _lists(mask, torch.from_numpy(rows), torch.from_numpy(constant), torch.from_numpy(present), stride)


def _runs(others: np.ndarray) -> tuple[int, dict[int, int]] | None:
    """The common stride and, for each residue, the tile where its run begins; None unless each residue is one run."""
    if len(others) < 2:
        return None
    stride = int(others[1] - others[0])
    if stride < 1:
        return None
    starts = np.flatnonzero(np.diff(others, prepend=others[0] - stride - 1) != stride)
    residues = (others[starts] % stride).tolist()
    begins_low = (others[starts] < stride).all()  # every run starts at its residue's first block
    if len(set(residues)) != len(residues) or not begins_low:
        return None
    return stride, dict(zip(residues, starts.tolist(), strict=True))


def _reach(others: np.ndarray, tile_of_residue: dict[int, int], stride: int, last_row: int) -> bool:
    """Whether every run goes on to the last block of its residue that a query block could attend."""
    counts = np.bincount(others % stride, minlength=stride)
    return all(counts[residue] > (last_row - residue) // stride for residue in tile_of_residue)


def _constants(blocks: int, residue: int, stride: int, tile_of_residue: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For each diagonal: tile - m of the block it leads to, and whether that block's shard is here."""
    diagonals = np.arange(blocks)
    shard = (residue - diagonals) % stride
    tile = np.array([tile_of_residue.get(value, -1) for value in range(stride)])[shard]
    return tile + (residue - diagonals - shard) // stride, (tile >= 0) & (diagonals > 0)


def _lists(mask: AttentionMask, rows: Tensor, constant: Tensor, present: Tensor, stride: int) -> Lists:
    device, heads = mask.active.device, mask.heads
    rows, constant, present = (x.to(device, non_blocking=True) for x in (rows, constant, present))
    taken = mask.active & present
    before = torch.zeros(heads, mask.blocks + 1, dtype=torch.int64, device=device)
    torch.cumsum(taken, dim=-1, out=before[:, 1:])
    slot = torch.where(taken, before[:, :-1], mask.blocks)  # the last slot takes what is not active
    entries = torch.zeros(heads, mask.blocks + 1, dtype=torch.int32, device=device)
    entries.scatter_(1, slot, constant.to(torch.int32).expand_as(slot))
    counts = before[:, (rows + 1).clamp(max=mask.blocks)]
    counts = torch.where(rows < mask.blocks, counts, 0)
    starts = (torch.arange(heads, device=device) * (mask.blocks + 1))[:, None].expand_as(counts)
    m = torch.div(rows, stride, rounding_mode="floor")
    return starts, counts, m[None, :], entries.flatten(), 1
