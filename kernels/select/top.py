"""Choosing the highest scores of every head without waiting for the device; ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(scores: Tensor, capacity: int) -> Tensor:
    """[..., min(capacity, n)]: the highest scores [..., n], in descending order."""
    return torch.topk(scores, min(capacity, scores.shape[-1]), dim=-1).values


def take_highest(scores: Tensor, counts: Tensor, sorted_scores: Tensor) -> Tensor:
    """bool, like scores [..., n]: the counts [...] highest ones, ties by lower index.

    sorted_scores [..., c]: the highest scores in descending order, at least as many as any count.
    """
    last = (counts - 1).clamp(min=0, max=sorted_scores.shape[-1] - 1)
    cut = sorted_scores.gather(-1, last.unsqueeze(-1))
    above = scores > cut
    tied = scores == cut
    missing = counts - above.sum(-1)
    taken = above | (tied & (tied.cumsum(-1) <= missing.unsqueeze(-1)))
    return taken & (counts > 0).unsqueeze(-1)


def counts_for_mass(sorted_scores: Tensor, total: Tensor, mass: Tensor) -> Tensor:
    """int64 [...]: how many of sorted_scores [..., c] (descending) first reach mass * total, at least 1, at most c."""
    reached = sorted_scores.double().cumsum(-1)
    below = (reached < (mass * total.double()).unsqueeze(-1)).sum(-1)
    return (below + 1).clamp(max=sorted_scores.shape[-1])


def positions_of(taken: Tensor, capacity: int) -> Tensor:
    """int32 [H, capacity]: ascending positions of the True entries of taken [H, n], padded with n."""
    heads, length = taken.shape
    slots = torch.where(taken, taken.cumsum(1) - 1, capacity).clamp_(max=capacity)
    positions = torch.arange(length, device=taken.device, dtype=torch.int32).expand(heads, -1)
    found = torch.full((heads, capacity + 1), length, dtype=torch.int32, device=taken.device)
    return found.scatter_(1, slots, positions)[:, :capacity].contiguous()


def diagonals_of(distances: Tensor, block_size: int) -> Tensor:
    """bool [H, N]: block diagonals floor(s / b) and ceil(s / b) of the True distances s of [H, n], and diagonal 0."""
    heads, length = distances.shape
    blocks = -(-length // block_size)
    by_block = distances.new_zeros(heads, blocks * block_size)
    by_block[:, :length] = distances
    by_block = by_block.view(heads, blocks, block_size)
    active = by_block.any(-1)
    active[:, 1:] |= by_block[:, :-1, 1:].any(-1)
    active[:, 0] = True
    return active
