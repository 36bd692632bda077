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

from ..backend import Backend, register
from ..mask import AttentionMask, block_part, column_part, whole
from ..merge import accumulator_dtype
from ..values import BackwardQueries, Columns, KeyGradients, Keys, Partial, Queries

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
    keys = _AllKeys(k=k, v=v, attended=lambda head: whole(mask, head, q_at, k_at))
    return _forward(Queries(q=q, scale=scale), keys)


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
    queries = BackwardQueries(q=q, scale=scale, grad_out=grad_out, lse=lse, delta=delta)
    _backward(queries, _AllKeys(k=k, v=v, attended=lambda head: whole(mask, head, q_at, k_at)), grads)
    return grads[0], grads[1], grads[2]


class Reference(Backend):
    """The dense mask, head by head; any positions will do. Computed in float64, returned in the accumulator's dtype."""

    name = "reference"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> ReferenceIndex:
        """See Backend."""
        return ReferenceIndex(mask=mask, q_positions=q_positions, k_positions=k_positions)

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> ReferenceIndex:
        """See Backend."""
        return ReferenceIndex(mask=mask, q_positions=q_positions)

    def attend_keys(self, queries: Queries, keys: Keys) -> Partial:
        """See Backend."""
        return _partial(queries, _AllKeys.of_shard(keys))

    def attend_columns(self, queries: Queries, columns: Columns) -> Partial:
        """See Backend."""
        return _partial(queries, _AllKeys.of_columns(columns))

    def add_key_gradients(self, queries: BackwardQueries, keys: Keys, grad_q: Tensor, into: KeyGradients) -> None:
        """See Backend."""
        _backward(queries, _AllKeys.of_shard(keys), [grad_q, into.k, into.v])

    def add_column_gradients(
        self, queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients
    ) -> None:
        """See Backend."""
        _backward(queries, _AllKeys.of_columns(columns), [grad_q, into.k.transpose(1, 2), into.v.transpose(1, 2)])


register(Reference())


@dataclass(frozen=True, kw_only=True)
class _AllKeys:
    """k, v [B, S_k, heads, D] of a shard or of columns, which heads of them query heads read, who attends whom."""

    k: Tensor
    v: Tensor
    attended: Attended
    per_query_head: bool = False

    @classmethod
    def of_shard(cls, keys: Keys) -> _AllKeys:
        return cls(k=keys.k, v=keys.v, attended=keys.index.data.attended)

    @classmethod
    def of_columns(cls, columns: Columns) -> _AllKeys:
        k, v = columns.k.transpose(1, 2), columns.v.transpose(1, 2)
        return cls(k=k, v=v, attended=columns.index.data.attended, per_query_head=True)

    def head_of(self, query_head: int, heads: int) -> int:
        return query_head if self.per_query_head else query_head // (heads // self.k.shape[2])


def _partial(queries: Queries, keys: _AllKeys) -> Partial:
    out, lse = _forward(queries, keys)
    dtype = accumulator_dtype(queries.q.dtype)
    return out.to(dtype), lse.to(dtype)


def _positions(x: Tensor, positions: Tensor | None) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) if positions is None else positions


def _rows(x: Tensor, batch: int, head: int, used: Tensor) -> Tensor:
    """float64 [S, D] of one head; rows that take no part are zeroed, since 0 * NaN is NaN."""
    rows = x[batch, :, head].double()
    return torch.where(used[:, None], rows, torch.zeros_like(rows))


def _forward(queries: Queries, keys: _AllKeys) -> tuple[Tensor, Tensor]:
    q, (batch_size, q_tokens, heads, dim) = queries.q, queries.q.shape
    out = torch.zeros(batch_size, q_tokens, heads, dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch_size, heads, q_tokens), -torch.inf, dtype=torch.float64, device=q.device)
    for head in range(heads):
        pairs, kv_head = keys.attended(head), keys.head_of(head, heads)
        for batch in range(batch_size):
            q_rows = _rows(q, batch, head, pairs.any(1))
            k_rows, v_rows = (_rows(x, batch, kv_head, pairs.any(0)) for x in (keys.k, keys.v))
            scores = (q_rows @ k_rows.T * queries.scale).masked_fill(~pairs, -torch.inf)
            lse[batch, head] = torch.logsumexp(scores, dim=-1)
            out[batch, :, head] = _probabilities(scores, lse[batch, head]) @ v_rows
    return out, lse


def _backward(queries: BackwardQueries, keys: _AllKeys, grads: list[Tensor]) -> None:
    batch_size, _, heads, _ = queries.q.shape
    grad_q, grad_k, grad_v = grads
    for head in range(heads):
        pairs, kv_head = keys.attended(head), keys.head_of(head, heads)
        for batch in range(batch_size):
            q_rows, out_rows = (_rows(x, batch, head, pairs.any(1)) for x in (queries.q, queries.grad_out))
            k_rows, v_rows = (_rows(x, batch, kv_head, pairs.any(0)) for x in (keys.k, keys.v))
            scores = (q_rows @ k_rows.T * queries.scale).masked_fill(~pairs, -torch.inf)
            p = _probabilities(scores, queries.lse[batch, head].double())
            row_delta = torch.where(pairs.any(1), queries.delta[batch, head].double(), 0.0)
            ds = p * (out_rows @ v_rows.T - row_delta[:, None]) * queries.scale
            grad_q[batch, :, head] += (ds @ k_rows).to(grad_q.dtype)
            grad_k[batch, :, kv_head] += (ds.T @ q_rows).to(grad_k.dtype)
            grad_v[batch, :, kv_head] += (p.T @ out_rows).to(grad_v.dtype)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) with 0 where nothing is attended (also in rows whose lse is -inf)."""
    finite = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    return torch.exp(scores - finite[:, None])
