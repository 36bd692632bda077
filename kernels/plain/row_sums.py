"""Row sums of products in plain torch, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..merge import accumulator_dtype

PIECES = 8


def plain_row_products(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, S]: the sums over D of the products of two [B, S, H, D], in the accumulator's dtype.

    Whole products in that dtype would be the largest tensors of backward, so they are made in pieces.
    """
    dtype = accumulator_dtype(left.dtype)
    batch, tokens, heads, _ = left.shape
    sums = torch.empty(batch, heads, tokens, dtype=dtype, device=left.device)
    step = max(1, -(-tokens // PIECES))
    for start in range(0, tokens, step):
        piece = slice(start, start + step)
        sums[:, :, piece] = (left[:, piece].to(dtype) * right[:, piece]).sum(-1).transpose(1, 2)
    return sums
