"""Patterns on their way to the kernels: replayed from a trace, or chosen on the device, distributed over the ranks."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.mask import AttentionMask
from ..traces.errors import InputError
from ..traces.pattern import LayerPattern, VerticalSlash


def mask_of(pattern: LayerPattern, *, columns_capacity: int, device: torch.device) -> AttentionMask:
    """Return a layer's patterns as tensors on `device`, with `columns_capacity` column slots per head.

    Raises InputError when a head has more columns than that.
    """
    if pattern.max_columns > columns_capacity:
        raise InputError(f"a head has {pattern.max_columns} columns; the plan has room for {columns_capacity}",
                         field="columns_capacity")  # fmt: skip
    documents = None if pattern.documents is None else torch.from_numpy(pattern.documents).to(device)
    return AttentionMask(
        seq_len_tokens=pattern.seq_len_tokens,
        block_size=pattern.block_size,
        active=torch.from_numpy(_active(pattern)).to(device),
        columns=torch.from_numpy(_columns(pattern, columns_capacity)).to(device) if columns_capacity else None,
        documents=documents,
    )


def _active(pattern: LayerPattern) -> np.ndarray:
    """Return bool [H, N] when all heads are made of diagonals, else [H, N, N]."""
    blocks = pattern.num_blocks
    diagonals = [head.diagonals for head in pattern.heads if isinstance(head, VerticalSlash)]
    if len(diagonals) < pattern.num_heads:
        return np.stack([head.block_bits(blocks) for head in pattern.heads])
    active = np.zeros((pattern.num_heads, blocks), dtype=bool)
    for number, values in enumerate(diagonals):
        active[number, values] = True
    return active


def _columns(pattern: LayerPattern, capacity: int) -> np.ndarray:
    columns = np.full((pattern.num_heads, capacity), pattern.seq_len_tokens, dtype=np.int32)
    for number, head in enumerate(pattern.heads):
        columns[number, : head.columns.size] = head.columns
    return columns
