"""A backend of one's own in one file: keys in blocks against a dense mask, in plain torch.

What a user writes: six methods and a registration. Merging, sums that launches begin, round and end, gathered columns
and whole attention are the base class's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsering.kernels.backend import Backend, register
from sparsering.kernels.mask import AttentionMask, block_part, column_part
from sparsering.kernels.merge import accumulator_dtype, merge
from sparsering.kernels.values import BackwardQueries, Columns, KeyGradients, Keys, Partial, Queries

KEYS_AT_ONCE = 48


class DenseMask(Backend):
    """Every pair is computed, a block of keys at a time, and what is not attended is masked."""

    name = "dense-mask"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """bool [H, S_q, S_k]: the block part of every head."""
        return torch.stack([block_part(mask, head, q_positions, k_positions) for head in range(mask.heads)])

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> Tensor:
        """bool [H, S_q, C]: the column part of every head."""
        return torch.stack([column_part(mask, head, q_positions) for head in range(mask.heads)])

    def attend_keys(self, queries: Queries, keys: Keys) -> Partial:
        """Attend K/V heads that several query heads share."""
        return attend(queries, by_query_head(queries, keys.k), by_query_head(queries, keys.v), keys.index.data)

    def attend_columns(self, queries: Queries, columns: Columns) -> Partial:
        """Attend columns, which every query head has of its own."""
        return attend(queries, columns.k, columns.v, columns.index.data)

    def add_key_gradients(self, queries: BackwardQueries, keys: Keys, grad_q: Tensor, into: KeyGradients) -> None:
        """Add, summed over the query heads of a K/V head."""
        k, v = (by_query_head(queries, x) for x in (keys.k, keys.v))
        heads = keys.k.shape[2]
        for place, dq, dk, dv in gradients(queries, k, v, keys.index.data):
            grad_q += dq.transpose(1, 2)
            for grad, part in ((into.k, dk), (into.v, dv)):
                grad[:, place] += part.unflatten(1, (heads, -1)).sum(2).transpose(1, 2)

    def add_column_gradients(
        self, queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients
    ) -> None:
        """Add, for every query head."""
        for place, dq, dk, dv in gradients(queries, columns.k, columns.v, columns.index.data):
            grad_q += dq.transpose(1, 2)
            into.k[:, :, place] += dk
            into.v[:, :, place] += dv


register(DenseMask())


def by_query_head(queries: Queries, x: Tensor) -> Tensor:
    """[B, S_k, H_kv, D] -> [B, H, S_k, D]."""
    return x.repeat_interleave(queries.q.shape[2] // x.shape[2], 2).transpose(1, 2)


def places(pairs: Tensor) -> Iterator[slice]:
    """Cut keys into blocks."""
    return (slice(start, start + KEYS_AT_ONCE) for start in range(0, pairs.shape[2], KEYS_AT_ONCE))


def scores_of(queries: Queries, k: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(q [B, H, S_q, D], scores [B, H, S_q, n]); -inf where not attended; what takes no part at all is not read."""
    dtype = accumulator_dtype(queries.q.dtype)
    q = queries.q.transpose(1, 2).to(dtype).masked_fill(~pairs.any(2)[..., None], 0)
    return q, (q @ k.transpose(2, 3) * queries.scale).masked_fill(~pairs, -torch.inf)


def used(x: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [B, H, n, D] of keys that somebody attends, zero elsewhere: 0 * NaN is NaN."""
    return x.to(dtype).masked_fill(~pairs.any(1)[..., None], 0)


def attend(queries: Queries, k: Tensor, v: Tensor, index: Tensor) -> Partial:
    """(out, lse) over k, v [B, H, S_k, D]."""
    dtype, (batch, tokens, heads, _) = accumulator_dtype(queries.q.dtype), queries.q.shape
    out = torch.zeros(queries.q.shape, dtype=dtype, device=k.device)
    lse = torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=k.device)
    for place in places(index):
        pairs = index[:, :, place]
        _, scores = scores_of(queries, used(k[:, :, place], pairs, dtype), pairs)
        part = torch.softmax(scores, -1).nan_to_num(0) @ used(v[:, :, place], pairs, dtype)
        out, lse = merge(out, lse, part.transpose(1, 2), torch.logsumexp(scores, -1))
    return out, lse


def gradients(
    queries: BackwardQueries, k: Tensor, v: Tensor, index: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(which keys, dQ, dK, dV), each [B, H, rows, D], block by block."""
    dtype, grad_out = accumulator_dtype(queries.q.dtype), queries.grad_out.transpose(1, 2)
    for place in places(index):
        pairs = index[:, :, place]
        keys, values = (used(x[:, :, place], pairs, dtype) for x in (k, v))
        q, scores = scores_of(queries, keys, pairs)
        weights = (scores - queries.lse[..., None]).exp().masked_fill(~pairs, 0)
        grads = grad_out.to(dtype).masked_fill(~pairs.any(2)[..., None], 0)
        ds = weights * (grads @ values.transpose(2, 3) - queries.delta[..., None]) * queries.scale
        ds = ds.masked_fill(~pairs, 0)
        yield place, ds @ keys, ds.transpose(2, 3) @ q, weights.transpose(2, 3) @ grads
