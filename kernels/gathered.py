"""Columns gathered once: each owner writes the K/V rows of its columns into a zeroed buffer, the sum over ranks is all.

Their gradients travel back the same way: summed over ranks, then each owner adds its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import AttentionMask


def gather_columns(k: Tensor, mask: AttentionMask, k_positions: Tensor) -> Tensor:
    """Rows of the columns owned here, zero elsewhere: [B, H, C, D] per query head, in the dtype of k.

    k [B, S_k, H_kv, D] (keys or values); k_positions [S_k] ascending global positions. Empty slots are zero. The sum
    over the ranks of a partition of the sequence holds every column.
    """
    rows, owned = _owned_rows(mask, k_positions)
    batch, _, kv_heads, dim = k.shape
    capacity = mask.column_capacity
    if not k_positions.shape[0]:
        return k.new_zeros(batch, mask.heads, capacity, dim)
    heads = torch.arange(mask.heads, device=k.device)[:, None] // (mask.heads // kv_heads)
    gathered = k[:, rows, heads]
    return torch.where(owned[None, :, :, None], gathered, gathered.new_zeros(()))


def scatter_columns(grad_columns: Tensor, mask: AttentionMask, k_positions: Tensor, *, grad: Tensor) -> None:
    """Add the owner's rows of grad_columns [B, H, C, D], summed over a KV head's query heads, into grad [B, S_k, H_kv, D]."""
    if not k_positions.shape[0] or not mask.column_capacity:
        return
    rows, owned = _owned_rows(mask, k_positions)
    group = mask.heads // grad.shape[2]
    heads = (torch.arange(mask.heads, device=grad.device)[:, None] // group).expand_as(rows)
    added = torch.where(owned[None, :, :, None], grad_columns, grad_columns.new_zeros(())).to(grad.dtype)
    flat = (rows * grad.shape[2] + heads).flatten()
    # One row can be a column of several query heads of its KV head: index_add_ sums them.
    total = torch.zeros(grad.shape[0], grad.shape[1] * grad.shape[2], grad.shape[3], dtype=grad.dtype, device=grad.device)
    total.index_add_(1, flat, added.flatten(1, 2))
    grad += total.view(grad.shape)


def _owned_rows(mask: AttentionMask, k_positions: Tensor) -> tuple[Tensor, Tensor]:
    """For each column slot [H, C]: the local row that holds it (any row if none), and whether one does."""
    if mask.columns is None:
        empty = torch.zeros(mask.heads, 0, dtype=torch.long, device=k_positions.device)
        return empty, empty.bool()
    positions = k_positions.long().contiguous()
    columns = mask.columns.long()
    rows = torch.searchsorted(positions, columns).clamp(max=max(positions.shape[0] - 1, 0))
    if not positions.shape[0]:
        return rows, torch.zeros_like(rows, dtype=torch.bool)
    return rows, (positions[rows] == columns) & (columns < mask.seq_len_tokens)
