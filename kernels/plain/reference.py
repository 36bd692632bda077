"""The definition of correct: a float64 dense mask, head by head, with the gradients written out. Slow on purpose.

Forward, per head: S = scale * Q K^T where attended, with a softcap c then c tanh(S / c); lse = log sum exp S,
P = exp(S - lse), O = P V. Backward, with the lse and delta = rowsum(dO * O) of the whole attention: dV = P^T dO,
dS = P * (dO V^T - delta), with a softcap times 1 - (S / c)^2; dQ = scale * dS K, dK = scale * dS^T Q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..backend import Backend, register
from ..mask import AttentionMask, block_part, column_part, whole
from ..merge import accumulator_dtype
from ..values import BackwardQueries, Columns, KeyGradients, Keys, Partial, Queries
from .tiles import by_head

# bool [S_q, S_k] of one head.
Attended = Callable[[int], Tensor]


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, S_q, H, D], lse [B, H, S_q]) in float64 of blocks and columns together, for any set of positions."""
    attended = _attended(whole, mask, q_positions=_positions(q, q_positions), k_positions=_positions(k, k_positions))
    return _forward(Queries(q=q, scale=scale, softcap=softcap), (k.transpose(1, 2), v.transpose(1, 2)), attended)


def reference_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in float64, shaped as q, k, v, of reference_attention, by the formulas above."""
    at = {"q_positions": _positions(q, q_positions), "k_positions": _positions(k, k_positions)}
    out, lse = reference_attention(q, k, v, mask, scale=scale, softcap=softcap, **at)
    delta = (grad_out.double().nan_to_num() * out).sum(-1).transpose(1, 2)
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    queries = BackwardQueries(q=q, scale=scale, softcap=softcap, grad_out=grad_out, lse=lse, delta=delta)
    kv, into = ([x.transpose(1, 2) for x in pair] for pair in ((k, v), (grad_k, grad_v)))
    _backward(queries, kv, _attended(whole, mask, **at), grad_q, into)
    return grad_q, grad_k, grad_v


class Reference(Backend):
    """The dense mask, head by head; any positions will do. Computed in float64, returned in the accumulator's dtype.

    Nothing is precomputed: an index is the function that says who attends whom.
    """

    name = "reference"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Attended:
        """See Backend."""
        return _attended(block_part, mask, q_positions=q_positions, k_positions=k_positions)

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> Attended:
        """See Backend."""
        return _attended(column_part, mask, q_positions=q_positions)

    def attend_keys(self, queries: Queries, keys: Keys) -> Partial:
        """See Backend."""
        return _partial(queries, by_head(keys), keys.index.data)

    def attend_columns(self, queries: Queries, columns: Columns) -> Partial:
        """See Backend."""
        return _partial(queries, (columns.k, columns.v), columns.index.data)

    def add_key_gradients(self, queries: BackwardQueries, keys: Keys, grad_q: Tensor, into: KeyGradients) -> None:
        """See Backend."""
        _backward(queries, by_head(keys), keys.index.data, grad_q, by_head(into))

    def add_column_gradients(
        self, queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients
    ) -> None:
        """See Backend."""
        _backward(queries, (columns.k, columns.v), columns.index.data, grad_q, (into.k, into.v))


register(Reference())


def _attended(part: Callable[..., Tensor], mask: AttentionMask, **positions: Tensor) -> Attended:
    """One of mask.py's definitions, of a mask and of local tokens at these global positions, as a function of heads."""
    return lambda head: part(mask, head, **positions)


def _partial(queries: Queries, kv: Sequence[Tensor], attended: Attended) -> Partial:
    out, lse = _forward(queries, kv, attended)
    dtype = accumulator_dtype(queries.q.dtype)
    return out.to(dtype), lse.to(dtype)


def _positions(x: Tensor, positions: Tensor | None) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) if positions is None else positions


def _rows(x: Tensor, used: Tensor) -> Tensor:
    """float64 [S, D]; rows that take no part are zeroed, since 0 * NaN is NaN."""
    rows = x.double()
    return torch.where(used[:, None], rows, torch.zeros_like(rows))


def _heads(
    queries: Queries, kv: Sequence[Tensor], attended: Attended
) -> Iterator[tuple[int, int, int, Tensor, list[Tensor]]]:
    """(batch entry, query head, its K/V head, bool [S_q, S_k], [q, k, v, scores]) of every head; kv [B, H, S_k, D].

    q, k, v float64 [S, D], scores [S_q, S_k] with -inf where not attended.
    """
    heads = queries.q.shape[2]
    for head in range(heads):
        pairs, kv_head = attended(head), head // (heads // kv[0].shape[1])
        for batch in range(queries.q.shape[0]):
            q = _rows(queries.q[batch, :, head], pairs.any(1))
            k, v = (_rows(x[batch, kv_head], pairs.any(0)) for x in kv)
            scores = q @ k.T * queries.scale
            if queries.softcap is not None:
                scores = torch.tanh(scores / queries.softcap) * queries.softcap
            scores = scores.masked_fill(~pairs, -torch.inf)
            yield batch, head, kv_head, pairs, [q, k, v, scores]


def _forward(queries: Queries, kv: Sequence[Tensor], attended: Attended) -> tuple[Tensor, Tensor]:
    q, (batch_size, q_tokens, heads, _) = queries.q, queries.q.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full((batch_size, heads, q_tokens), -torch.inf, dtype=torch.float64, device=q.device)
    for batch, head, _, _, (_, _, v, scores) in _heads(queries, kv, attended):
        lse[batch, head] = torch.logsumexp(scores, dim=-1)
        out[batch, :, head] = _probabilities(scores, lse[batch, head]) @ v
    return out, lse


def _backward(
    queries: BackwardQueries, kv: Sequence[Tensor], attended: Attended, grad_q: Tensor, into: Sequence[Tensor]
) -> None:
    for batch, head, kv_head, pairs, (q, k, v, scores) in _heads(queries, kv, attended):
        grad_out = _rows(queries.grad_out[batch, :, head], pairs.any(1))
        p = _probabilities(scores, queries.lse[batch, head].double())
        row_delta = torch.where(pairs.any(1), queries.delta[batch, head].double(), 0.0)
        ds = p * (grad_out @ v.T - row_delta[:, None]) * queries.scale
        if queries.softcap is not None:
            ds = ds * (1 - (scores.masked_fill(~pairs, 0.0) / queries.softcap) ** 2)
        grad_q[batch, :, head] += (ds @ k).to(grad_q.dtype)
        into[0][batch, kv_head] += (ds.T @ q).to(into[0].dtype)
        into[1][batch, kv_head] += (p.T @ grad_out).to(into[1].dtype)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) with 0 where nothing is attended (also in rows whose lse is -inf)."""
    finite = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    return torch.exp(scores - finite[:, None])
