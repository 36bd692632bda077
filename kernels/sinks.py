"""Attention sinks that are learned: a logit of each head that takes its share of the softmax and gives nothing.

With sink logit t a query's weights are exp(s_j) / (exp(t) + sum exp(s_j)). Over all keys attention gives (out, lse)
without it; the sink then turns them into out * exp(lse - lse') and lse' = log(exp(lse) + exp(t)). Backward is that of
attention with this out and lse', and d t = - sum over the queries of exp(t - lse') * delta. Rows that attend nothing
stay as they are (out 0, lse -inf) and give the sink nothing.
Shape legend: B batch, S tokens, H query heads, D elements of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) beside sinks [H]; out [B, S, H, D] is overwritten, lse [B, H, S] is that of all keys."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total))  # a sink of minus infinity, too
    out.mul_(weight.transpose(1, 2).unsqueeze(-1))
    return out, torch.where(lse == -torch.inf, lse, total)


def sink_gradients(lse: Tensor, delta: Tensor, sinks: Tensor) -> Tensor:
    """[H] in lse's dtype; lse and delta = rowsum(grad_out * out) [B, H, S] of what with_sinks returned."""
    share = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -torch.where(lse == -torch.inf, torch.zeros_like(delta), share * delta).sum((0, 2))


def check_sinks(sinks: Tensor, heads: int) -> None:
    """Raise ValueError unless there is one logit a head."""
    if sinks.shape != (heads,):
        raise ValueError(f"sinks: shape {tuple(sinks.shape)} is not [{heads}], one logit a query head")
