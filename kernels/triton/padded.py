"""Attention of heads that the Triton kernels do not have: computed with zeros behind them, as the next larger heads.

Zeros in q and k add nothing to scores, zeros in v and in grad_out nothing to the rest, and the scale is the caller's.
So whatever a launch reads is copied with zeros behind each head's elements, what it writes gets room as large, and of
that the first elements go where the caller wants them: rounded as often, and as repeatable, as without.

`compute` everywhere: the backend's method of that name, which is handed heads that the kernels have.
Shape legend: D elements of a head, P those that the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..head_dims import kernel_head_dim
from ..values import BackwardQueries, Columns, Gradients, KeyGradients, Keys, Partial, Queries, QueryGradient, with_kv


def forward(
    compute: Callable[..., Partial],
    queries: Queries,
    keys: Keys | None,
    columns: Columns | None,
    *,
    earlier: Partial | None,
    final: bool,
) -> Partial:
    """(out, lse). An earlier partial is merged in place where its dtype is the one wanted, as without padding."""
    dim, wide = queries.q.shape[3], kernel_head_dim(queries.q.shape[3])
    widen = partial(padded, wide=wide)
    queries = replace(queries, q=widen(queries.q))
    before = earlier and (widen(earlier[0]), earlier[1])
    keys, columns = with_kv(keys, widen), with_kv(columns, widen)
    out, lse = compute(queries, keys, columns, earlier=before, final=final)
    part = out[..., :dim]
    if earlier is None or earlier[0].dtype != out.dtype:
        return part.contiguous(), lse
    earlier[0].copy_(part)
    return earlier[0], lse


def backward(
    compute: Callable[..., None],
    queries: BackwardQueries,
    keys: Keys | None,
    columns: Columns | None,
    into: Gradients,
) -> None:
    """Write, or add, the gradients where they go."""
    dim, wide = queries.q.shape[3], kernel_head_dim(queries.q.shape[3])
    widen = partial(padded, wide=wide)
    grad_out = widen(queries.grad_out.to(queries.q.dtype))
    queries = replace(queries, q=widen(queries.q), grad_out=grad_out)
    room = Gradients(
        query=QueryGradient(total=_room(into.query.total, wide), add=False),
        keys=_rooms(into.keys, wide),
        columns=_rooms(into.columns, wide),
    )
    keys, columns = with_kv(keys, widen), with_kv(columns, widen)
    compute(queries, keys, columns, room)
    into.query.take(room.query.total[..., :dim])
    for target, part in ((into.keys, room.keys), (into.columns, room.columns)):
        if target is not None and part is not None:
            target.put(part.k[..., :dim], part.v[..., :dim])


def padded(x: Tensor, wide: int) -> Tensor:
    """A contiguous copy of x [..., D] with zeros behind each row's elements: [..., wide]."""
    copy, dim = _room(x, wide), x.shape[-1]
    copy[..., :dim] = x
    copy[..., dim:] = 0
    return copy


def _room(x: Tensor, wide: int) -> Tensor:
    """Contiguous room [..., wide] for what is to become x [..., D], in its dtype."""
    return torch.empty((*x.shape[:-1], wide), dtype=x.dtype, device=x.device)


def _rooms(into: KeyGradients | None, wide: int) -> KeyGradients | None:
    return into and KeyGradients(k=_room(into.k, wide), v=_room(into.v, wide), add=False)
