"""Sliding windows in mask blocks: which block diagonals lie wholly in one, and which its edge crosses.

A window of w tokens lets query i attend key j where 0 <= i - j < w. The tokens of block diagonal d (of blocks of b
tokens) are d * b - (b - 1) .. d * b + b - 1 apart, so diagonals below w // b lie wholly in the window, and its edge
crosses at most EDGES more: those up to (w + b - 2) // b. On d = 0 causality cuts as well.
Shape legend: H query heads, N mask blocks of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

EDGES = 2
NO_EDGE = -1


def whole_diagonals(window_tokens: int, block_size: int) -> int:
    """How many block diagonals, from 0 on, lie wholly in the window."""
    return window_tokens // block_size


def edge_diagonals(window_tokens: int, block_size: int, blocks: int) -> tuple[int, ...]:
    """The block diagonals of a sequence of so many blocks that the window's edge crosses: at most EDGES."""
    if not window_tokens:
        return ()
    last = min((window_tokens + block_size - 2) // block_size, blocks - 1)
    return tuple(range(whole_diagonals(window_tokens, block_size), last + 1))


@lru_cache(maxsize=64)
def whole_table(windows: tuple[int, ...], block_size: int, blocks: int, device: torch.device) -> Tensor:
    """bool [H, N]: the diagonals wholly in each head's window. Kept, not to be written; made without waiting."""
    counts = [min(whole_diagonals(window, block_size), blocks) for window in windows]
    return _moved(torch.arange(blocks)[None, :] < torch.tensor(counts)[:, None], device)


@lru_cache(maxsize=64)
def edge_table(windows: tuple[int, ...], block_size: int, blocks: int, device: torch.device) -> Tensor:
    """int32 [H, EDGES]: the diagonals that each head's edge crosses, NO_EDGE where there are fewer. Kept."""
    edges = [edge_diagonals(window, block_size, blocks) for window in windows]
    return _moved(torch.tensor([[*one, *(NO_EDGE,) * (EDGES - len(one))] for one in edges], dtype=torch.int32), device)


@lru_cache(maxsize=64)
def window_table(windows: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [H]: the windows. Kept."""
    return _moved(torch.tensor(windows, dtype=torch.int32), device)


def check_windows(windows: Sequence[int], heads: int) -> tuple[int, ...]:
    """The windows as ints; ValueError unless there is one for each head, of no negative length."""
    found = tuple(int(window) for window in windows)
    if len(found) != heads:
        raise ValueError(f"AttentionMask.windows: {len(found)} of them for {heads} heads")
    if min(found) < 0:
        raise ValueError(f"AttentionMask.windows: {min(found)} is negative")
    return found


def _moved(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
