"""The Triton backend: checks and launches. Contracts are those of api.py.

Beyond them: `columns=(column_k, column_v, index)` fuses the column part behind the block part of the same launch, and
full_gradients differentiates attention that one device computes whole, without accumulators. Heads of sizes that the
kernels lack (head_dims.py) are computed as the next larger ones (padded.py).
On a CPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before triton was imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..head_dims import kernel_head_dim
from ..index.block import BlockTask, block_task
from ..index.columns import ColumnTask, column_task
from ..jit import run
from ..mask import AttentionMask
from . import gradients, launching, padded, tuning
from .column_copies import gather as gather_columns
from .column_copies import scatter as scatter_columns
from .forward import forward_kernel
from .gradients import grad_columns, grad_key_value, grad_query
from .launching import (
    BASE_2,
    Columns,
    Partial,
    both_parts,
    loadable,
    query_order,
    query_task,
    settings,
    source,
    strides,
)
from .partials import QueryGradient, check_partial, key_gradients, narrows_after, next_partial
from .passes import add_up, row_products

__all__ = [
    "add_up",
    "block_backward",
    "block_forward",
    "block_index",
    "column_backward",
    "column_forward",
    "column_index",
    "full_gradients",
    "gather_columns",
    "row_products",
    "scatter_columns",
]


def block_index(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> BlockTask:
    """See api.block_index. Raises ValueError for block sizes other than 16 to 128 and for tiles that split a block."""
    launching.check_block_size(mask)
    return block_task(mask, q_positions, k_positions)


def column_index(mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
    """See api.column_index. Raises ValueError as block_index does, and for a mask without columns."""
    launching.check_block_size(mask)
    return column_task(mask, q_positions)


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockTask,
    *,
    scale: float,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
    columns: Columns | None = None,
) -> Partial:
    """See api.block_forward. `into` is merged in place where it has the dtype wanted.

    out_dtype: of out; default the accumulator's. columns: (column_k, column_v, index) of the same queries, attended in
    the same launch.
    """
    if _is_padded(q):
        given: dict[str, Any] = {"scale": scale, "into": into, "out_dtype": out_dtype, "columns": columns}
        return padded.forward(block_forward, q, k, v, index, **given)
    launching.check_query(q, index)
    launching.check_keys(k, index)
    q, k, v = (loadable(x) for x in (q, k, v))
    return _forward(q, k, v, index, columns, scale, into, out_dtype)


def column_forward(
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    index: ColumnTask,
    *,
    scale: float,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
) -> Partial:
    """See api.column_forward; into and out_dtype as in block_forward."""
    if _is_padded(q):
        given: dict[str, Any] = {"scale": scale, "into": into, "out_dtype": out_dtype}
        return padded.forward(column_forward, q, column_k, column_v, index, **given)
    launching.check_query(q, index)
    q = loadable(q)
    return _forward(q, None, None, None, (column_k, column_v, index), scale, into, out_dtype)


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    index: BlockTask | None,
    columns: Columns | None,
    scale: float,
    into: Partial | None,
    out_dtype: torch.dtype | None,
) -> Partial:
    task = query_task(index, columns)
    kernel = tuning.COLUMN_FORWARD if index is None else tuning.FUSED_FORWARD if columns else tuning.FORWARD
    launch, common = settings(kernel, q, task.mask)
    grid = launching.programs(q, len(task.q_side.blocks), task.mask.block_size, launch.m)
    if into is not None:
        check_partial(*into, q)
    if narrows_after(launch, q, into, out_dtype):
        out, lse = _forward(q, k, v, index, columns, scale, into, None)
        return out.to(q.dtype), lse
    (out, lse), prior = next_partial(q, into, out_dtype)
    if grid[0]:
        run(
            forward_kernel,
            grid,
            out=source(out, q.shape[1], launch.m, launch),
            prior=None if prior is None else source(prior, q.shape[1], launch.m, launch),
            lse=lse,
            scale_log2=scale * BASE_2,
            q_tokens=q.shape[1],
            order=query_order(index, columns),
            lse_b=lse.stride(0),
            lse_h=lse.stride(1),
            MERGE=into is not None,
            **strides(out=out),
            **launching.query_arguments(q, task, launch),
            **both_parts(q, k, v, index, columns, launch),
            **common,
        )
    return out, lse


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: BlockTask,
    *,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    columns: Columns | None = None,
    grad_columns: Partial | None = None,
    add_q: bool = True,
    add_kv: bool = True,
    final_q: Tensor | None = None,
) -> None:
    """See api.block_backward. Bitwise repeatable: every accumulator element has one owner and one order."""
    of_query = QueryGradient(total=grad_q, add=add_q, final=final_q)
    if _is_padded(q):
        targets: dict[str, Any] = {"of_query": of_query, "grad_k": grad_k, "grad_v": grad_v, "add_kv": add_kv}
        targets |= {"columns": columns, "grad_columns": grad_columns}
        padded.block_backward(block_backward, (grad_out, q, k, v), (lse, delta), index, scale=scale, **targets)
        return
    launching.check_query(q, index)
    launching.check_keys(k, index)
    if not add_kv:
        valid = index.k_valid_tokens if index.q_valid_tokens else 0
        grad_k[:, valid:], grad_v[:, valid:] = 0, 0
    if not index.q_valid_tokens or not index.k_valid_tokens:
        if columns is not None and grad_columns is not None:
            into: dict[str, Any] = {"grad_column_k": grad_columns[0], "grad_column_v": grad_columns[1]}
            into |= {"grad_q": grad_q, "add_q": add_q, "final_q": final_q}
            column_backward(grad_out, q, *columns[:2], lse, delta, columns[2], scale=scale, **into)
        else:
            of_query.finish_rows(0)
        return
    q, k, v, grad_out = (loadable(x) for x in (q, k, v, grad_out.to(q.dtype)))
    values = launching.row_values_of(lse, delta, index, scale)
    of_query.finish_rows(index.q_valid_tokens)
    with of_query.launched() as into_q, key_gradients(grad_k, grad_v, add=add_kv) as (into_k, into_v):
        grad_query(grad_out, q, k, v, values, index, columns, scale, **into_q)
        grad_key_value(grad_out, q, k, v, values, index, scale, into_k, into_v, add=add_kv)
    if columns is not None and grad_columns is not None:
        of_columns = gradients.grad_columns(grad_out, q, columns, values, scale)
        for part, added in zip(grad_columns, of_columns, strict=True):
            part += added


def column_backward(
    grad_out: Tensor,
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: ColumnTask,
    *,
    scale: float,
    grad_q: Tensor,
    grad_column_k: Tensor,
    grad_column_v: Tensor,
    add_q: bool = True,
    final_q: Tensor | None = None,
) -> None:
    """See api.column_backward. Bitwise repeatable: partial sums of query chunks are added in a fixed order."""
    of_query, columns = QueryGradient(total=grad_q, add=add_q, final=final_q), (column_k, column_v, index)
    if _is_padded(q):
        targets: dict[str, Any] = {"grad_column_k": grad_column_k, "grad_column_v": grad_column_v}
        targets |= {"scale": scale, "of_query": of_query}
        padded.column_backward(column_backward, (grad_out, q), (lse, delta), columns, **targets)
        return
    launching.check_query(q, index)
    launching.check_columns(column_k, index)
    if not index.q_valid_tokens or not column_k.shape[2]:
        of_query.finish_rows(0)
        return
    q, grad_out = loadable(q), loadable(grad_out.to(q.dtype))
    values = launching.row_values_of(lse, delta, index, scale)
    of_query.finish_rows(index.q_valid_tokens)
    with of_query.launched() as into_q:
        grad_query(grad_out, q, None, None, values, None, columns, scale, **into_q)
    grad_k, grad_v = grad_columns(grad_out, q, columns, values, scale)
    grad_column_k += grad_k
    grad_column_v += grad_v


def full_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: BlockTask,
    *,
    scale: float,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor, Tensor, Partial | None]:
    """(dq, dk, dv, (grad_column_k, grad_column_v) or None) where this one task and its columns are all there is.

    dq (of both parts), dk, dv (of the block part) have q's dtype; columns' gradients [B, H, C, D] the accumulator's.
    out [B, S_q, H, D] (any float dtype) and lse [B, H, S_q] are the forward's; delta is computed here.
    """
    if _is_padded(q):
        inputs = grad_out, q, k, v, out
        return padded.full_gradients(full_gradients, inputs, lse, index, scale=scale, columns=columns)
    launching.check_query(q, index)
    launching.check_keys(k, index)
    q, k, v, grad_out, out = (loadable(x) for x in (q, k, v, grad_out.to(q.dtype), out))
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad_q[:, index.q_valid_tokens :] = 0
    grad_k[:, index.k_valid_tokens :] = 0
    grad_v[:, index.k_valid_tokens :] = 0
    values = launching.row_values_from_out(out, grad_out, lse, index, scale)
    grad_query(grad_out, q, k, v, values, index, columns, scale, grad_q, add=False)
    grad_key_value(grad_out, q, k, v, values, index, scale, grad_k, grad_v, add=False)
    of_columns = grad_columns(grad_out, q, columns, values, scale) if columns else None
    return grad_q, grad_k, grad_v, of_columns


def _is_padded(q: Tensor) -> bool:
    """Whether heads are computed as larger ones. Raises ValueError where no kernel is large enough."""
    return kernel_head_dim(q.shape[3]) != q.shape[3]
