"""The kernels' entry points by loose tensors, as most tests hold them: launches of keys, of columns, or of both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsering.kernels import api

ColumnPart = tuple[Tensor, Tensor, api.ColumnIndex]


def _as_columns(columns: ColumnPart | None) -> api.Columns | None:
    return None if columns is None else api.Columns(k=columns[0], v=columns[1], index=columns[2])


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, index: api.BlockIndex, *, scale: float, into: api.Partial | None = None,
    columns: ColumnPart | None = None, final: bool = False,
) -> api.Partial:  # fmt: skip
    keys = api.Keys(k=k, v=v, index=index)
    return api.forward(api.Queries(q=q, scale=scale), keys, _as_columns(columns), earlier=into, final=final)


def column_forward(
    q: Tensor, column_k: Tensor, column_v: Tensor, index: api.ColumnIndex, *, scale: float,
    into: api.Partial | None = None, final: bool = False,
) -> api.Partial:  # fmt: skip
    columns = api.Columns(k=column_k, v=column_v, index=index)
    return api.forward(api.Queries(q=q, scale=scale), None, columns, earlier=into, final=final)


def block_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: api.BlockIndex, *,
    scale: float, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, columns: ColumnPart | None = None,
    grad_columns: api.Partial | None = None, add_q: bool = True, add_kv: bool = True, final_q: Tensor | None = None,
    scratch: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    queries = api.BackwardQueries(q=q, scale=scale, grad_out=grad_out, lse=lse, delta=delta, scratch=scratch)
    of_columns = None if grad_columns is None else api.KeyGradients(k=grad_columns[0], v=grad_columns[1], add=True)
    into = api.Gradients(
        query=api.QueryGradient(total=grad_q, add=add_q, final=final_q),
        keys=api.KeyGradients(k=grad_k, v=grad_v, add=add_kv),
        columns=of_columns,
    )
    api.backward(queries, api.Keys(k=k, v=v, index=index), _as_columns(columns), into)


def column_backward(
    grad_out: Tensor, q: Tensor, column_k: Tensor, column_v: Tensor, lse: Tensor, delta: Tensor, index: api.ColumnIndex,
    *, scale: float, grad_q: Tensor, grad_column_k: Tensor, grad_column_v: Tensor, add_q: bool = True,
    final_q: Tensor | None = None,
) -> None:  # fmt: skip
    queries = api.BackwardQueries(q=q, scale=scale, grad_out=grad_out, lse=lse, delta=delta)
    into = api.Gradients(
        query=api.QueryGradient(total=grad_q, add=add_q, final=final_q),
        columns=api.KeyGradients(k=grad_column_k, v=grad_column_v, add=True),
    )
    api.backward(queries, None, api.Columns(k=column_k, v=column_v, index=index), into)
