"""The Triton backend: checks and launches. Contracts are those of api.py.

Beyond them: `columns=(column_k, column_v, index)` fuses the column part behind the block part of the same launch, and
full_gradients differentiates attention that one device computes whole, without accumulators.
On a CPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before triton was imported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launching, tuning
from .backward import grad_kv_kernel, grad_q_kernel
from .column_copies import gather as gather_columns
from .column_copies import scatter as scatter_columns
from .column_index import COLUMN_TILE, ColumnTask, column_task
from .columns import column_grad_kv_kernel
from .forward import forward_kernel
from .index import BlockTask, block_task
from .launching import BASE_2, loadable, settings, source, strides
from .mask import AttentionMask
from .merge import accumulator_dtype
from .triton_run import run

# Query tiles that one column dK/dV program walks: fewer give more programs and more partial sums.
COLUMN_CHUNK_TILES = 128

__all__ = [
    "block_backward",
    "block_forward",
    "block_index",
    "column_backward",
    "column_forward",
    "column_index",
    "full_gradients",
    "gather_columns",
    "scatter_columns",
]

Columns = tuple[Tensor, Tensor, ColumnTask]
Partial = tuple[Tensor, Tensor]


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
    """See api.block_forward. `into` is merged in place and returned.

    out_dtype: of a fresh out, where the caller will not merge it; default the accumulator's. columns: (column_k,
    column_v, index) of the same queries, attended in the same launch.
    """
    launching.check_query(q, index)
    launching.check_keys(k, index)
    q, k, v = (loadable(x) for x in (q, k, v))
    return _forward(q, k, v, index, columns, scale, into, out_dtype)


def column_forward(
    q: Tensor, column_k: Tensor, column_v: Tensor, index: ColumnTask, *, scale: float, into: Partial | None = None
) -> Partial:
    """See api.column_forward. `into` is merged in place and returned."""
    launching.check_query(q, index)
    q = loadable(q)
    return _forward(q, None, None, None, (column_k, column_v, index), scale, into, None)


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
    task = _query_task(index, columns)
    kernel = tuning.COLUMN_FORWARD if index is None else tuning.FUSED_FORWARD if columns else tuning.FORWARD
    launch, common = settings(kernel, q, task.mask)
    grid = launching.programs(q, len(task.q_side.blocks), task.mask.block_size, launch.m)
    out, lse = into or launching.empty_partial(q, out_dtype)
    launching.check_partial(out, lse, q)
    if grid[0]:
        run(
            forward_kernel,
            grid,
            out=source(out, q.shape[1], launch.m, launch),
            lse=lse,
            scale_log2=scale * BASE_2,
            q_tokens=q.shape[1],
            order=_order(index, columns),
            lse_b=lse.stride(0),
            lse_h=lse.stride(1),
            MERGE=into is not None,
            **strides(out=out),
            **launching.query_arguments(q, task, launch),
            **_both_parts(q, k, v, index, columns, launch),
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
) -> None:
    """See api.block_backward. Bitwise repeatable: every accumulator element has one owner and one order."""
    launching.check_query(q, index)
    launching.check_keys(k, index)
    if not index.q_valid_tokens or not index.k_valid_tokens:
        return
    q, k, v, grad_out = (loadable(x) for x in (q, k, v, grad_out.to(q.dtype)))
    values = launching.row_values_of(lse, delta, index, scale)
    with launching.accumulators(grad_q, grad_k, grad_v) as (into_q, into_k, into_v):
        grad_query(grad_out, q, k, v, values, index, None, scale, into_q, add=True)
        grad_key_value(grad_out, q, k, v, values, index, scale, into_k, into_v, add=True)


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
) -> None:
    """See api.column_backward. Bitwise repeatable: partial sums of query chunks are added in a fixed order."""
    launching.check_query(q, index)
    launching.check_columns(column_k, index)
    if not index.q_valid_tokens or not column_k.shape[2]:
        return
    q, grad_out = loadable(q), loadable(grad_out.to(q.dtype))
    values = launching.row_values_of(lse, delta, index, scale)
    columns = column_k, column_v, index
    with launching.accumulators(grad_q) as (into_q,):
        grad_query(grad_out, q, None, None, values, None, columns, scale, into_q, add=True)
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


def grad_query(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    row_values: Tensor,
    index: BlockTask | None,
    columns: Columns | None,
    scale: float,
    grad_q: Tensor,
    *,
    add: bool,
) -> None:
    """Launch dQ of the block part, the column part, or both; row_values: see launching.row_values_of."""
    task = _query_task(index, columns)
    kernel = tuning.COLUMN_GRAD_Q if index is None else tuning.FUSED_GRAD_Q if columns else tuning.GRAD_Q
    launch, common = settings(kernel, q, task.mask)
    valid = task.q_valid_tokens
    run(
        grad_q_kernel,
        launching.programs(q, len(task.q_side.blocks), task.mask.block_size, launch.m),
        grad_out=source(grad_out, valid, launch.m, launch),
        row_values=row_values,
        padded=row_values.shape[1],
        grad_q=source(grad_q, valid, launch.m, launch),
        scale=scale,
        scale_log2=scale * BASE_2,
        order=_order(index, columns),
        ADD=add,
        **strides(do=grad_out, dq=grad_q),
        **launching.query_arguments(q, task, launch),
        **_both_parts(q, k, v, index, columns, launch),
        **common,
    )


def grad_key_value(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_values: Tensor,
    index: BlockTask,
    scale: float,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    add: bool,
) -> None:
    """Launch dK and dV of the block part."""
    launch, common = settings(tuning.GRAD_KV, q, index.mask)
    lists, q_valid, k_valid = index.keys, index.q_valid_tokens, index.k_valid_tokens
    run(
        grad_kv_kernel,
        launching.programs(k, len(index.k_side.blocks), index.mask.block_size, launch.n),
        q=source(q, q_valid, launch.m, launch),
        grad_out=source(grad_out, q_valid, launch.m, launch),
        k=source(k, k_valid, launch.n, launch),
        v=source(v, k_valid, launch.n, launch),
        grad_k=source(grad_k, k_valid, launch.n, launch),
        grad_v=source(grad_v, k_valid, launch.n, launch),
        row_values=launching.line_source(row_values, launch),
        padded=row_values.shape[1],
        row_fields=lists.rows,
        entries=lists.entries,
        order=lists.order,
        q_documents=index.q_documents,
        k_documents=index.k_documents,
        scale=scale,
        scale_log2=scale * BASE_2,
        kv_heads=k.shape[2],
        tiles=len(index.k_side.blocks),
        q_valid=q_valid,
        k_valid=k_valid,
        GROUP=q.shape[2] // k.shape[2],
        SIGN=lists.sign,
        DOCUMENTS=index.q_documents is not None,
        ADD=add,
        **strides(q=q, k=k, v=v, do=grad_out, dk=grad_k, dv=grad_v),
        **common,
    )


def grad_columns(grad_out: Tensor, q: Tensor, columns: Columns, row_values: Tensor, scale: float) -> Partial:
    """Launch dK and dV [B, H, C, D] of the columns: sums over chunks of query tiles, added in a fixed order."""
    column_k, column_v, index = (loadable(columns[0]), loadable(columns[1]), columns[2])
    launch, common = settings(tuning.COLUMN_GRAD_KV, q, index.mask)
    assert COLUMN_TILE % launch.n == 0, f"column tile {COLUMN_TILE} is no multiple of {launch.n}"
    batch, heads, capacity, dim = column_k.shape
    chunks = -(-len(index.q_side.blocks) // COLUMN_CHUNK_TILES)
    column_tiles = -(-capacity // launch.n)
    first_tile = index.first_tile.repeat_interleave(COLUMN_TILE // launch.n, 1)[:, :column_tiles].contiguous()
    parts = torch.empty(2, chunks * batch * heads, capacity, dim, dtype=accumulator_dtype(q.dtype), device=q.device)
    arguments = launching.column_arguments(column_k, column_v, index, launch)
    del arguments["COLUMNS"]
    run(
        column_grad_kv_kernel,
        (column_tiles, batch * heads, chunks),
        grad_out=source(grad_out, index.q_valid_tokens, launch.m, launch),
        padded=row_values.shape[1],
        row_values=launching.line_source(row_values, launch),
        grad_k=launching.part_source(parts[0], launch),
        grad_v=launching.part_source(parts[1], launch),
        first_tile=first_tile,
        has_own=index.has_own,
        scale=scale,
        scale_log2=scale * BASE_2,
        column_tiles=column_tiles,
        chunk_tiles=COLUMN_CHUNK_TILES,
        **strides(do=grad_out),
        **launching.query_arguments(q, index, launch),
        **arguments,
        **common,
    )
    grad_k, grad_v = parts.view(2, chunks, batch, heads, capacity, dim).sum(1)
    return grad_k, grad_v


def _query_task(index: BlockTask | None, columns: Columns | None) -> BlockTask | ColumnTask:
    if columns is not None:
        launching.check_columns(columns[0], columns[2])
        if index is not None and len(index.q_side.blocks) != len(columns[2].q_side.blocks):
            raise ValueError("columns: their index was built for other queries than the block index")
    task = index if index is not None else columns[2] if columns else None
    assert task is not None
    return task


def _order(index: BlockTask | None, columns: Columns | None) -> Tensor:
    if index is not None:
        return index.queries.order
    assert columns is not None
    return columns[2].order


def _both_parts(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    index: BlockTask | None,
    columns: Columns | None,
    launch: tuning.Launch,
) -> dict[str, object]:
    column_k, column_v, column_task_ = columns or (None, None, None)
    if column_k is not None and column_v is not None:
        column_k, column_v = loadable(column_k), loadable(column_v)
    return {
        **launching.block_arguments(k, v, index, q.shape[2], launch),
        **launching.column_arguments(column_k, column_v, column_task_, launch),
    }
