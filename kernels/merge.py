"""Merging two partial attentions over disjoint keys by their log-sum-exp, and what else is summed up in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

PIECES = 8


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """promote(dtype, float32): the dtype of out, lse and gradients while they are accumulated."""
    return torch.promote_types(dtype, torch.float32)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of two partials over disjoint keys: out [B, S, H, D], lse [B, H, S], natural log.

    A partial with lse -inf counts nothing; where both are -inf the result is out 0, lse -inf (no NaN).
    The inputs are left unchanged.
    """
    top = torch.maximum(lse_a, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    lse = torch.where(top == -torch.inf, top, lse)
    shift = torch.where(top == -torch.inf, torch.zeros_like(lse), lse)
    weight_a, weight_b = (torch.exp(part - shift).transpose(1, 2).unsqueeze(-1) for part in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse


def merge_into(into: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) merged with earlier partials, or as they are where there are none."""
    return (out, lse) if into is None else merge(*into, out, lse)


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
