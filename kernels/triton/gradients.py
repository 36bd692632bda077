"""Launches of the Triton kernels' gradients: dQ, dK/dV of the block part, dK/dV of the columns.

row_values everywhere: lse and delta as launching.row_values_of prepares them. Gradients are written, or with add=True
added into, tensors that no other program touches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..index.block import BlockTask
from ..index.columns import COLUMN_TILE
from ..jit import run
from ..merge import accumulator_dtype
from . import launching, tuning
from .backward import grad_kv_kernel, grad_q_kernel, join_split_kernel
from .columns import column_grad_kv_kernel
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

# Key tiles of a block mask whose query heads are split over programs: those with most work. Sinks are attended by every
# query of every head; one program walking such a list would end long after all others.
SPLIT_ROWS = 32
JOIN_ROWS = 32
# Query tiles that one column dK/dV program walks: fewer give more programs and more partial sums.
COLUMN_CHUNK_TILES = 128


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
    prior: Tensor | None = None,
) -> None:
    """Launch dQ of the block part, the column part, or both; row_values: see launching.row_values_of.

    prior: [B, S_q, H, D] of grad_q's strides, in any float dtype: what is written is the sum with it.
    """
    task = query_task(index, columns)
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
        prior=None if prior is None else source(prior, valid, launch.m, launch),
        scale=scale,
        scale_log2=scale * BASE_2,
        order=query_order(index, columns),
        PRIOR=prior is not None,
        ADD=add,
        **strides(do=grad_out, dq=grad_q),
        **launching.query_arguments(q, task, launch),
        **both_parts(q, k, v, index, columns, launch),
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
    group, tiles = q.shape[2] // k.shape[2], len(index.k_side.blocks)
    split = 0 if index.mask.is_toeplitz or group == 1 else min(SPLIT_ROWS, tiles)
    inputs = grad_out, q, k, v, row_values, index, scale
    if split:
        _grad_key_value_split(*inputs, grad_k, grad_v, rows=split, add=add)
    if tiles > split:
        launch, common = settings(tuning.GRAD_KV, q, index.mask)
        run(
            grad_kv_kernel,
            launching.programs(k, tiles - split, index.mask.block_size, launch.n),
            grad_k=source(grad_k, index.k_valid_tokens, launch.n, launch),
            grad_v=source(grad_v, index.k_valid_tokens, launch.n, launch),
            first_row=split,
            row_count=tiles - split,
            SPLIT=False,
            ADD=add,
            **strides(dk=grad_k, dv=grad_v),
            **_key_arguments(*inputs, launch),
            **common,
        )


def _grad_key_value_split(
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
    rows: int,
    add: bool,
) -> None:
    """The first `rows` key tiles in the order of work: a program per query head, then the sum over each group."""
    launch, common = settings(tuning.GRAD_KV, q, index.mask)
    (batch, _, kv_heads, dim), group, block = k.shape, q.shape[2] // k.shape[2], index.mask.block_size
    shape = (2, batch * kv_heads * rows * group, block, dim)
    parts = torch.empty(shape, dtype=accumulator_dtype(q.dtype), device=q.device)
    run(
        grad_kv_kernel,
        (batch * kv_heads * rows * group * (block // launch.n),),
        grad_k=launching.part_source(parts[0], launch),
        grad_v=launching.part_source(parts[1], launch),
        first_row=0,
        row_count=rows,
        SPLIT=True,
        ADD=False,
        **strides(dk=grad_k, dv=grad_v),
        **_key_arguments(grad_out, q, k, v, row_values, index, scale, launch),
        **common,
    )
    for part, grad in zip(parts, (grad_k, grad_v), strict=True):
        step = min(block, JOIN_ROWS)
        run(
            join_split_kernel,
            (rows, kv_heads * batch, block // step),
            part,
            grad,
            index.keys.order,
            grad.stride(0),
            grad.stride(1),
            grad.stride(2),
            kv_heads,
            rows,
            index.k_valid_tokens,
            GROUP=group,
            BLOCK=block,
            D=dim,
            ROWS=step,
            ADD=add,
        )


def _key_arguments(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_values: Tensor,
    index: BlockTask,
    scale: float,
    launch: tuning.Launch,
) -> dict[str, object]:
    """What both kinds of dK/dV launches take."""
    lists, q_valid, k_valid = index.keys, index.q_valid_tokens, index.k_valid_tokens
    return {
        "q": source(q, q_valid, launch.m, launch),
        "grad_out": source(grad_out, q_valid, launch.m, launch),
        "k": source(k, k_valid, launch.n, launch),
        "v": source(v, k_valid, launch.n, launch),
        "row_values": launching.line_source(row_values, launch),
        "padded": row_values.shape[1],
        "row_fields": lists.rows,
        "entries": lists.entries,
        "order": lists.order,
        "q_documents": index.q_documents,
        "k_documents": index.k_documents,
        "scale": scale,
        "scale_log2": scale * BASE_2,
        "kv_heads": k.shape[2],
        "tiles": len(index.k_side.blocks),
        "q_valid": q_valid,
        "k_valid": k_valid,
        "GROUP": q.shape[2] // k.shape[2],
        "SIGN": lists.sign,
        "DOCUMENTS": index.q_documents is not None,
        **strides(q=q, k=k, v=v, do=grad_out),
    }


def grad_columns(grad_out: Tensor, q: Tensor, columns: Columns, row_values: Tensor, scale: float) -> Partial:
    """Launch dK and dV [B, H, C, D] of the columns: sums over chunks of query tiles, added in a fixed order."""
    column_k, column_v, index = (loadable(columns[0]), loadable(columns[1]), columns[2])
    if not index.columns.shape[1]:
        empty = torch.empty(column_k.shape, dtype=accumulator_dtype(q.dtype), device=q.device)
        return empty, empty
    launch, common = settings(tuning.COLUMN_GRAD_KV, q, index.mask)
    assert COLUMN_TILE % launch.n == 0, f"column tile {COLUMN_TILE} is no multiple of {launch.n}"
    batch, heads, capacity, dim = column_k.shape
    chunks = -(-len(index.q_side.blocks) // COLUMN_CHUNK_TILES)
    column_tiles = -(-capacity // launch.n)
    first_tile = index.first_tile
    if launch.n != COLUMN_TILE:
        first_tile = first_tile.repeat_interleave(COLUMN_TILE // launch.n, 1)[:, :column_tiles].contiguous()
    parts = torch.empty(2, chunks * batch * heads, capacity, dim, dtype=accumulator_dtype(q.dtype), device=q.device)
    arguments = launching.column_arguments(column_k, column_v, index, launch)
    del arguments["COLUMNS"]
    # With the loop for columns of own blocks compiled in, if never entered, an H200 takes 2.5 ms, without it 3.5.
    arguments["OWN"] = True
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
