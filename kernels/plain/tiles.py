"""The walk of plain torch: tiles of query rows against the keys that they may attend, one matmul a tile.

Scores are [B, R, K], R rows of some query heads that read one K/V head, -inf where not attended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merge import accumulator_dtype
from ..values import BackwardQueries, KeyGradients, Keys, Partial, Queries


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Local query rows and the local key rows that they may attend.

    keys: a slice, or int64 local rows, ascending. documents: those of the rows and of the keys, or None.
    """

    rows: slice
    keys: slice | Tensor
    documents: tuple[Tensor, Tensor] | None

    def hide(self, scores: Tensor) -> None:
        """Write -inf into scores [B, heads, rows, keys] where not attended."""
        if self.documents is not None:
            of_rows, of_keys = self.documents
            scores.masked_fill_(of_rows[:, None] != of_keys[None, :], -torch.inf)


# (K/V head, query heads that read it, tile): all that is to be computed, in a fixed order.
Work = Iterable[tuple[int, slice | list[int], Tile]]


def attend(queries: Queries, k: Tensor, v: Tensor, work: Work) -> Partial:
    """Fresh (out, lse) over k, v [B, heads, S_k, D], in the accumulator's dtype; 0 and -inf in rows of no tile."""
    q, k, v = _by_head(queries.q.transpose(1, 2)), _by_head(k), _by_head(v)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)
    for kv_head, heads, tile in work:
        scores, _ = _scores(_stack(q, heads, tile), _keys(k, kv_head, tile), tile, queries)
        top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        p = scores.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        part = torch.bmm(p, _keys(v, kv_head, tile)).div_(torch.where(total == 0, torch.ones_like(total), total))
        _unstack(out, heads, tile, part)
        _unstack(lse, heads, tile, (total.log() + top).squeeze(-1))
    return out.transpose(1, 2).contiguous(), lse


def add_gradients(
    queries: BackwardQueries, kv: Sequence[Tensor], work: Work, grad_q: Tensor, into: Sequence[Tensor]
) -> None:
    """Add the gradients into grad_q [B, S_q, H, D] and those of kv, two of [B, heads, S_k, D], into `into`.

    lse and delta are those of the whole attention, lse -inf in rows that attend nothing at all.
    """
    q, grad_out = (_by_head(x.transpose(1, 2)) for x in (queries.q, queries.grad_out))
    k, v = (_by_head(x) for x in kv)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for kv_head, heads, tile in work:
        tile_k, tile_v = _keys(k, kv_head, tile), _keys(v, kv_head, tile)
        tile_q, grads, lse, delta = (_stack(x, heads, tile) for x in (q, grad_out, queries.lse, queries.delta))
        finite_lse = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
        scores, slope = _scores(tile_q, tile_k, tile, queries, sloped=True)
        p = scores.sub_(finite_lse.unsqueeze(-1)).exp_()
        _add_rows(dv[:, kv_head], tile, torch.bmm(p.transpose(1, 2), grads))
        ds = torch.bmm(grads, tile_v.transpose(1, 2)).sub_(delta.unsqueeze(-1)).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        _unstack(dq, heads, tile, torch.bmm(ds, tile_k))
        _add_rows(dk[:, kv_head], tile, torch.bmm(ds.transpose(1, 2), tile_q))
    grad_q.add_(dq.transpose(1, 2), alpha=queries.scale)
    into[0].add_(dk, alpha=queries.scale)
    into[1].add_(dv)


def by_head(keys: Keys | KeyGradients) -> tuple[Tensor, Tensor]:
    """k and v [B, S_k, heads, D] as views [B, heads, S_k, D]."""
    return keys.k.transpose(1, 2), keys.v.transpose(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """A contiguous copy of [B, heads, S, D] in the accumulator's dtype."""
    return x.to(accumulator_dtype(x.dtype), memory_format=torch.contiguous_format, copy=True)


def _keys(x: Tensor, kv_head: int, tile: Tile) -> Tensor:
    """[B, heads, S_k, D] -> [B, keys, D]."""
    return x[:, kv_head, tile.keys] if isinstance(tile.keys, slice) else x[:, kv_head].index_select(1, tile.keys)


def _stack(x: Tensor, heads: slice | list[int], tile: Tile) -> Tensor:
    """[B, H, S_q, ...] -> [B, heads * rows, ...]: query heads of one KV head as rows of one matmul."""
    return x[:, heads, tile.rows].flatten(1, 2)


def _unstack(x: Tensor, heads: slice | list[int], tile: Tile, part: Tensor) -> None:
    """The inverse of _stack: write part [B, heads * rows, ...] into x; each row belongs to one tile only."""
    x[:, heads, tile.rows] = part.unflatten(1, (-1, tile.rows.stop - tile.rows.start))


def _add_rows(x: Tensor, tile: Tile, part: Tensor) -> None:
    """Add part [B, keys, D] into x [B, S_k, D]."""
    if isinstance(tile.keys, slice):
        x[:, tile.keys] += part
    else:
        x.index_add_(1, tile.keys, part)


def _scores(
    rows: Tensor, keys: Tensor, tile: Tile, queries: Queries, *, sloped: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(scores, by how much their softcap flattens each of them: None without one, or unless asked for)."""
    scores, slope = torch.bmm(rows, keys.transpose(1, 2)).mul_(queries.scale), None
    if queries.softcap is not None:
        scores = scores.div_(queries.softcap).tanh_()
        slope = scores.square().neg_().add_(1) if sloped else None
        scores.mul_(queries.softcap)
    tile.hide(scores.unflatten(1, (-1, tile.rows.stop - tile.rows.start)))
    return scores, slope
