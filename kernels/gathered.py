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
    if not k.shape[1] or not mask.column_capacity:
        return k.new_zeros(k.shape[0], mask.heads, mask.column_capacity, k.shape[3])
    rows, owned = _owned_rows(mask, k_positions)
    gathered = k[:, rows, _kv_heads(mask, k)]
    return torch.where(owned[None, :, :, None], gathered, gathered.new_zeros(()))


def scatter_columns(grad_columns: Tensor, mask: AttentionMask, k_positions: Tensor, *, grad: Tensor) -> None:
    """Add the owner's rows of grad_columns [B, H, C, D], summed over the query heads of a KV head, into grad.

    grad [B, S_k, H_kv, D]; k_positions as given to gather_columns.
    """
    if not grad.shape[1] or not mask.column_capacity:
        return
    rows, owned = _owned_rows(mask, k_positions)
    added = torch.where(owned[None, :, :, None], grad_columns, grad_columns.new_zeros(())).to(grad.dtype)
    batch = torch.arange(grad.shape[0], device=grad.device)[:, None, None]
    # A row may be a column of several query heads of its KV head. Accumulating by index sorts first on a GPU, so the
    # result does not depend on the order in which threads arrive.
    grad.index_put_((batch, rows[None], _kv_heads(mask, grad)[None]), added, accumulate=True)


def _kv_heads(mask: AttentionMask, k: Tensor) -> Tensor:
    """int64 [H, 1]: the KV head of each query head."""
    return torch.arange(mask.heads, device=k.device)[:, None] // (mask.heads // k.shape[2])


def _owned_rows(mask: AttentionMask, k_positions: Tensor) -> tuple[Tensor, Tensor]:
    """For each column slot [H, C]: the local row that holds it, and whether one does.

    Slots owned elsewhere point at rows spread over the shard: many equal ones would be added one after another.
    """
    assert mask.columns is not None
    positions, columns = k_positions.long().contiguous(), mask.columns.long().contiguous()
    rows = torch.searchsorted(positions, columns).clamp_(max=positions.shape[0] - 1)
    owned = (positions[rows] == columns) & (columns < mask.seq_len_tokens)
    anywhere = torch.arange(columns.shape[1], device=columns.device) % positions.shape[0]
    return torch.where(owned, rows, anywhere), owned
