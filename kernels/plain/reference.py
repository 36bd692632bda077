"""The definition of correct: a float64 dense mask, head by head, with the gradients written out. Slow on purpose.

Forward, per head: S = scale * Q K^T where attended, lse = log sum exp S, P = exp(S - lse), O = P V.
Backward, with the lse and delta = rowsum(dO * O) of the whole attention: dV = P^T dO, dS = P * (dO V^T - delta),
dQ = scale * dS K, dK = scale * dS^T Q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask import AttentionMask, block_part, column_part, whole
from ..merge import accumulator_dtype, merge_into

# bool [S_q, S_k] of one head.
Attended = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReferenceIndex:
    """Nothing is precomputed: the mask and the global positions of the local tokens (k_positions None: columns)."""

    mask: AttentionMask
    q_positions: Tensor
    k_positions: Tensor | None = None

    def attended(self, head: int) -> Tensor:
        """bool [S_q, S_k] of the block part, or [S_q, C] of the column part."""
        if self.k_positions is None:
            return column_part(self.mask, head, self.q_positions)
        return block_part(self.mask, head, self.q_positions, self.k_positions)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, S_q, H, D], lse [B, H, S_q]) in float64 of blocks and columns together, for any set of positions."""
    q_at, k_at = _positions(q, q_positions), _positions(k, k_positions)
    return _forward(q, k, v, lambda head: whole(mask, head, q_at, k_at), scale=scale, per_query_head=False)


def reference_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in float64, shaped as q, k, v, of reference_attention, by the formulas above."""
    q_at, k_at = _positions(q, q_positions), _positions(k, k_positions)
    out, lse = reference_attention(q, k, v, mask, scale=scale, q_positions=q_at, k_positions=k_at)
    delta = (grad_out.double().nan_to_num() * out).sum(-1).transpose(1, 2)
    grads = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v)]
    _backward(
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        lambda head: whole(mask, head, q_at, k_at),
        scale=scale,
        per_query_head=False,
        grads=grads,
    )
    return grads[0], grads[1], grads[2]


def block_index(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> ReferenceIndex:
    """See api.block_index; any positions will do."""
    return ReferenceIndex(mask=mask, q_positions=q_positions, k_positions=k_positions)


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, index: ReferenceIndex, *, scale: float, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See api.block_forward; computed in float64, returned in the accumulator dtype."""
    out, lse = _forward(q, k, v, index.attended, scale=scale, per_query_head=False)
    return merge_into(into, out.to(accumulator_dtype(q.dtype)), lse.to(accumulator_dtype(q.dtype)))


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: ReferenceIndex,
    *,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """See api.block_backward."""
    _backward(
        grad_out, q, k, v, lse, delta, index.attended, scale=scale, per_query_head=False, grads=[grad_q, grad_k, grad_v]
    )


def column_index(mask: AttentionMask, q_positions: Tensor) -> ReferenceIndex:
    """See api.column_index."""
    return ReferenceIndex(mask=mask, q_positions=q_positions)


def column_forward(
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    index: ReferenceIndex,
    *,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See api.column_forward."""
    k, v = column_k.transpose(1, 2), column_v.transpose(1, 2)
    out, lse = _forward(q, k, v, index.attended, scale=scale, per_query_head=True)
    return merge_into(into, out.to(accumulator_dtype(q.dtype)), lse.to(accumulator_dtype(q.dtype)))


def column_backward(
    grad_out: Tensor,
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: ReferenceIndex,
    *,
    scale: float,
    grad_q: Tensor,
    grad_column_k: Tensor,
    grad_column_v: Tensor,
) -> None:
    """See api.column_backward."""
    k, v = column_k.transpose(1, 2), column_v.transpose(1, 2)
    _backward(
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        index.attended,
        scale=scale,
        per_query_head=True,
        grads=[grad_q, grad_column_k.transpose(1, 2), grad_column_v.transpose(1, 2)],
    )


def _positions(x: Tensor, positions: Tensor | None) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) if positions is None else positions


def _rows(x: Tensor, batch: int, head: int, used: Tensor) -> Tensor:
    """float64 [S, D] of one head; rows that take no part are zeroed, since 0 * NaN is NaN."""
    rows = x[batch, :, head].double()
    return torch.where(used[:, None], rows, torch.zeros_like(rows))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, attended: Attended, *, scale: float, per_query_head: bool
) -> tuple[Tensor, Tensor]:
    batch_size, q_tokens, heads, dim = q.shape
    out = torch.zeros(batch_size, q_tokens, heads, dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch_size, heads, q_tokens), -torch.inf, dtype=torch.float64, device=q.device)
    for head in range(heads):
        pairs = attended(head)
        kv_head = head if per_query_head else head // (heads // k.shape[2])
        for batch in range(batch_size):
            q_rows = _rows(q, batch, head, pairs.any(1))
            k_rows, v_rows = (_rows(x, batch, kv_head, pairs.any(0)) for x in (k, v))
            scores = (q_rows @ k_rows.T * scale).masked_fill(~pairs, -torch.inf)
            lse[batch, head] = torch.logsumexp(scores, dim=-1)
            out[batch, :, head] = _probabilities(scores, lse[batch, head]) @ v_rows
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    attended: Attended,
    *,
    scale: float,
    per_query_head: bool,
    grads: list[Tensor],
) -> None:
    batch_size, _, heads, _ = q.shape
    grad_q, grad_k, grad_v = grads
    for head in range(heads):
        pairs = attended(head)
        kv_head = head if per_query_head else head // (heads // k.shape[2])
        for batch in range(batch_size):
            q_rows, out_rows = (_rows(x, batch, head, pairs.any(1)) for x in (q, grad_out))
            k_rows, v_rows = (_rows(x, batch, kv_head, pairs.any(0)) for x in (k, v))
            scores = (q_rows @ k_rows.T * scale).masked_fill(~pairs, -torch.inf)
            p = _probabilities(scores, lse[batch, head].double())
            row_delta = torch.where(pairs.any(1), delta[batch, head].double(), 0.0)
            ds = p * (out_rows @ v_rows.T - row_delta[:, None]) * scale
            grad_q[batch, :, head] += (ds @ k_rows).to(grad_q.dtype)
            grad_k[batch, :, kv_head] += (ds.T @ q_rows).to(grad_k.dtype)
            grad_v[batch, :, kv_head] += (p.T @ out_rows).to(grad_v.dtype)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) with 0 where nothing is attended (also in rows whose lse is -inf)."""
    finite = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    return torch.exp(scores - finite[:, None])
