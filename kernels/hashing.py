"""Sums of hashed words: by which ranks compare their masks, and what one pass over 268 MB of a mask tells.

On GPUs one launch reads the bytes once (triton/hashing.py). The same in torch's operations passes over them fourteen
times, which for 16 heads at 512K tokens are 4 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

HASH_MULTIPLIER = 6364136223846793005  # Knuth's MMIX generator


def words_of(data: Tensor) -> Tensor:
    """int64 [W]: the bytes of a tensor in words, the last one filled with zeros. A copy only where it must be."""
    flat = data.contiguous().view(torch.uint8).flatten()
    if flat.numel() % 8 or flat.data_ptr() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).clone()
    return flat.view(torch.int64)


def hashed_sum(words: Tensor, first: int) -> Tensor:
    """int64 scalar: the sum of all words, each mixed with its place, the first of which is at `first`.

    A sum of products would not see heads or layers swapped: so each word is mixed before they are added. Products and
    sums wrap around on purpose. Does not wait for the device.
    """
    mixed = torch.arange(first, first + words.numel(), device=words.device).mul_(HASH_MULTIPLIER)
    mixed.bitwise_xor_(words).mul_(HASH_MULTIPLIER)
    mixed ^= mixed >> 32
    mixed *= HASH_MULTIPLIER
    mixed ^= mixed >> 29
    return mixed.mul_(HASH_MULTIPLIER).sum()
