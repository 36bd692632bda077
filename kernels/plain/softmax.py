"""The arithmetic of one partial attention on stacked rows: scores [B, R, K] with -inf where not attended."""

from __future__ import annotations

import torch
from torch import Tensor


def partial_attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, R, D], lse [B, R]) of scores [B, R, K] (overwritten) over values [B, K, D]; empty rows: 0, -inf."""
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = torch.bmm(p, values).div_(torch.where(total == 0, torch.ones_like(total), total))
    return out, (total.log() + top).squeeze(-1)


def partial_gradients(
    scores: Tensor, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [B, R, D], dk [B, K, D], dv [B, K, D]) of scores [B, R, K] (overwritten), before the scale of dq and dk.

    lse and delta [B, R] are those of the whole attention, lse -inf in rows that attend nothing at all.
    """
    finite_lse = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    p = scores.sub_(finite_lse.unsqueeze(-1)).exp_()
    dv = torch.bmm(p.transpose(1, 2), grad_out)
    ds = torch.bmm(grad_out, values.transpose(1, 2)).sub_(delta.unsqueeze(-1)).mul_(p)
    return torch.bmm(ds, keys), torch.bmm(ds.transpose(1, 2), queries), dv
