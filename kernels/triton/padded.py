"""Attention of heads that the Triton kernels do not have: computed with zeros behind them, as the next larger heads.

Zeros in q and k add nothing to scores, zeros in v and in grad_out nothing to the rest, and the scale is the caller's.
So whatever a launch reads is copied with zeros behind each head's elements, what it writes gets room as large, and of
that the first elements go where the caller wants them: rounded as often, and as repeatable, as without.

`compute` everywhere: an entry point of triton_backend.py, which is handed heads that the kernels have.
Shape legend: D elements of a head, P those that the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..head_dims import kernel_head_dim
from ..index.block import BlockTask
from ..index.columns import ColumnTask
from .launching import Columns, Partial
from .partials import QueryGradient, check_partial


def forward(
    compute: Callable[..., Partial],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    index: BlockTask | ColumnTask,
    *,
    into: Partial | None,
    columns: Columns | None = None,
    **given: Any,
) -> Partial:
    """(out, lse) of block_forward or column_forward; keys, values: k and v, or column_k and column_v.

    An earlier partial is merged in place where its dtype is the one wanted, as without padding.
    """
    dim, wide = q.shape[3], kernel_head_dim(q.shape[3])
    if into is not None:
        check_partial(*into, q)
        given["into"] = padded(into[0], wide), into[1]
    if columns is not None:
        given["columns"] = _padded_columns(columns, wide)
    out, lse = compute(padded(q, wide), padded(keys, wide), padded(values, wide), index, **given)
    part = out[..., :dim]
    if into is None or into[0].dtype != out.dtype:
        return part.contiguous(), lse
    into[0].copy_(part)
    return into[0], lse


def block_backward(
    compute: Callable[..., None],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    index: BlockTask,
    *,
    scale: float,
    of_query: QueryGradient,
    grad_k: Tensor,
    grad_v: Tensor,
    add_kv: bool,
    columns: Columns | None,
    grad_columns: Partial | None,
) -> None:
    """Gradients of the block part. inputs: grad_out, q, k, v; rows: lse, delta."""
    wide = kernel_head_dim(inputs[1].shape[3])
    grad_out, q, k, v = inputs
    given: dict[str, Any] = {"grad_q": _room(of_query.total, wide), "add_q": False, "add_kv": False}
    given |= {"grad_k": _room(grad_k, wide), "grad_v": _room(grad_v, wide)}
    of_columns = [_room(grad, wide).zero_() for grad in grad_columns or ()]
    if columns is not None:
        given |= {"columns": _padded_columns(columns, wide), "grad_columns": of_columns or None}
    operands = (padded(x, wide) for x in (grad_out.to(q.dtype), q, k, v))
    compute(*operands, *rows, index, scale=scale, **given)
    of_query.take(_first(given["grad_q"], of_query.total))
    for name, grad in (("grad_k", grad_k), ("grad_v", grad_v)):
        _put(given[name], grad, add=add_kv)
    for room, grad in zip(of_columns, grad_columns or (), strict=True):
        _put(room, grad, add=True)


def column_backward(
    compute: Callable[..., None],
    inputs: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    columns: Columns,
    *,
    scale: float,
    of_query: QueryGradient,
    grad_column_k: Tensor,
    grad_column_v: Tensor,
) -> None:
    """Gradients of the column part. inputs: grad_out, q; rows: lse, delta."""
    grad_out, q = inputs
    wide = kernel_head_dim(q.shape[3])
    column_k, column_v, index = _padded_columns(columns, wide)
    grad_q, grad_k, grad_v = (_room(x, wide) for x in (of_query.total, grad_column_k, grad_column_v))
    into = {"grad_q": grad_q, "grad_column_k": grad_k.zero_(), "grad_column_v": grad_v.zero_(), "add_q": False}
    operands = padded(grad_out.to(q.dtype), wide), padded(q, wide), column_k, column_v
    compute(*operands, *rows, index, scale=scale, **into)
    of_query.take(_first(grad_q, of_query.total))
    _put(grad_k, grad_column_k, add=True)
    _put(grad_v, grad_column_v, add=True)


def full_gradients(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor, Partial | None]],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    index: BlockTask,
    *,
    scale: float,
    columns: Columns | None,
) -> tuple[Tensor, Tensor, Tensor, Partial | None]:
    """See triton_backend.full_gradients. inputs: grad_out, q, k, v, out."""
    dim = inputs[1].shape[3]
    wide = kernel_head_dim(dim)
    wide_columns = None if columns is None else _padded_columns(columns, wide)
    operands = (padded(x, wide) for x in inputs)
    *grads, of_columns = compute(*operands, lse, index, scale=scale, columns=wide_columns)
    dq, dk, dv = (grad[..., :dim].contiguous() for grad in grads)
    if of_columns is None:
        return dq, dk, dv, None
    return dq, dk, dv, (of_columns[0][..., :dim].contiguous(), of_columns[1][..., :dim].contiguous())


def padded(x: Tensor, wide: int) -> Tensor:
    """A contiguous copy of x [..., D] with zeros behind each row's elements: [..., wide]."""
    copy, dim = _room(x, wide), x.shape[-1]
    copy[..., :dim] = x
    copy[..., dim:] = 0
    return copy


def _padded_columns(columns: Columns, wide: int) -> Columns:
    column_k, column_v, index = columns
    return padded(column_k, wide), padded(column_v, wide), index


def _room(x: Tensor, wide: int) -> Tensor:
    """Contiguous room [..., wide] for what is to become x [..., D], in its dtype."""
    return torch.empty((*x.shape[:-1], wide), dtype=x.dtype, device=x.device)


def _first(room: Tensor, x: Tensor) -> Tensor:
    return room[..., : x.shape[-1]]


def _put(room: Tensor, grad: Tensor, *, add: bool) -> None:
    """Write the first elements of each row of room into grad, or add them."""
    part = _first(room, grad)
    if add:
        grad += part
    else:
        grad.copy_(part)
