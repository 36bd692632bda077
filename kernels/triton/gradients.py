"""Launches of the Triton kernels' gradients: dQ, dK/dV of the block part, dK/dV of the columns.

row_values everywhere: lse and delta as row_values_of prepares them. Gradients are written, or added into, tensors that
no other program touches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..index.block import BlockTask
from ..index.columns import COLUMN_TILE
from ..jit import run
from ..merge import accumulator_dtype
from ..values import BackwardQueries, Columns, KeyGradients, Keys, Partial
from . import launching, tuning
from .backward import grad_kv_kernel, grad_q_kernel, join_split_kernel, prepare_kernel
from .columns import column_grad_kv_kernel
from .launching import (
    QueryLaunch,
    Task,
    by_token,
    column_lists,
    query_task,
    query_tiles,
    scale_of,
    settings,
    source,
)
from .partials import QueryTarget
from .views import NO_STRIDES, BlockLists, ColumnChunks, KeyRows, KeyStrides, PartStrides, RowValues, Strides

PREPARE_ROWS = 1024
# Key tiles of a block mask whose lists are split over programs: those with most work. Sinks and vertical stripes are
# attended by every later query; one program walking such a list would end long after all others. On an H200, 96K
# tokens, an XAttention-like mask of 1.9 %: 5.9 ms for dK/dV when split by query heads, 4.7 in 8 pieces, 3.2 in 32.
SPLIT_ROWS, SPLIT_PIECES = 16, 32
SPLIT_BYTES = 128 << 20  # at most, of all their shares: fewer pieces where there are many K/V heads
JOIN_ROWS = 32
# Query tiles that one column dK/dV program walks: fewer give more programs and more partial sums.
COLUMN_CHUNK_TILES = 128


def row_values_of(queries: BackwardQueries, task: Task) -> Tensor:
    """lse and scale * delta [B, H, S_q] as the backward kernels read them: [B * H * 2, tokens of whole tiles]."""
    lse, delta = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries.lse, queries.delta))
    batch, heads, _ = lse.shape
    tokens = len(task.q_side.blocks) * task.mask.block_size
    values = torch.empty(batch * heads * 2, tokens, dtype=lse.dtype, device=lse.device)
    run(
        prepare_kernel,
        (-(-tokens // PREPARE_ROWS), batch * heads),
        lse,
        delta,
        values,
        *lse.stride()[:2],
        *delta.stride()[:2],
        heads,
        task.q_valid_tokens,
        tokens,
        queries.scale,
        SIZE=PREPARE_ROWS,
    )
    return values


def grad_query(
    queries: BackwardQueries, keys: Keys | None, columns: Columns | None, row_values: Tensor, into: QueryTarget
) -> None:
    """Launch dQ of the block part, the column part, or both."""
    q, grad_out = queries.q, queries.grad_out
    made, valid = QueryLaunch.of(tuning.GRAD_QS, q, keys, columns), query_task(keys, columns).q_valid_tokens
    launch = made.launch
    run(
        grad_q_kernel,
        made.grid,
        grad_out=source(grad_out, valid, launch.m, launch),
        grad_q=source(into.grad, valid, launch.m, launch),
        prior=None if into.prior is None else source(into.prior, valid, launch.m, launch),
        row_values=RowValues(row_values, row_values.shape[1]),
        at=made.at._replace(grad_out=Strides.of(grad_out), out=Strides.of(into.grad)),
        scale=scale_of(queries),
        ADD=into.add,
        **made.given,
    )


def grad_key_value(queries: BackwardQueries, keys: Keys, row_values: Tensor, into: KeyGradients) -> None:
    """Launch dK and dV of the block part."""
    q, k, index = queries.q, keys.k, keys.index.data
    tiles = len(index.k_side.blocks)
    pieces = _pieces(q, k, index)
    split = 0 if index.mask.is_toeplitz or pieces < 2 else min(SPLIT_ROWS, tiles)
    if split:
        _grad_key_value_split(queries, keys, row_values, into, rows=split, pieces=pieces)
    if tiles > split:
        launch, common = settings(tuning.GRAD_KV, q, index.mask)
        run(
            grad_kv_kernel,
            launching.programs(k, tiles - split, index.mask.block_size, launch.n),
            grad_k=source(into.k, index.k_valid_tokens, launch.n, launch),
            grad_v=source(into.v, index.k_valid_tokens, launch.n, launch),
            rows=KeyRows(index.keys.order, split, tiles - split, tiles, k.shape[2]),
            SPLIT=0,
            ADD=into.add,
            **_key_arguments(queries, keys, row_values, into, launch),
            **common,
        )


def _pieces(q: Tensor, k: Tensor, index: BlockTask) -> int:
    """In how many pieces the longest lists are cut: no piece of less than two entries, none that memory has not."""
    rows = k.shape[0] * k.shape[2] * SPLIT_ROWS * index.mask.block_size
    piece_bytes = 2 * rows * k.shape[3] * accumulator_dtype(q.dtype).itemsize
    longest = q.shape[2] // k.shape[2] * len(index.q_side.blocks)
    return min(SPLIT_PIECES, longest // 2, SPLIT_BYTES // piece_bytes)


def _grad_key_value_split(
    queries: BackwardQueries, keys: Keys, row_values: Tensor, into: KeyGradients, *, rows: int, pieces: int
) -> None:
    """The first `rows` key tiles in the order of work: `pieces` programs each, then their sum, in a fixed order."""
    q, k, index = queries.q, keys.k, keys.index.data
    launch, common = settings(tuning.GRAD_KV, q, index.mask)
    (batch, _, kv_heads, dim), block = k.shape, index.mask.block_size
    shape = (2, batch * kv_heads * rows * pieces, block, dim)
    parts = torch.empty(shape, dtype=accumulator_dtype(q.dtype), device=q.device)
    run(
        grad_kv_kernel,
        (batch * kv_heads * rows * pieces * (block // launch.n),),
        grad_k=launching.part_source(parts[0], launch),
        grad_v=launching.part_source(parts[1], launch),
        rows=KeyRows(index.keys.order, 0, rows, len(index.k_side.blocks), kv_heads),
        SPLIT=pieces,
        ADD=False,
        **_key_arguments(queries, keys, row_values, into, launch),
        **common,
    )
    for part, grad in zip(parts, (into.k, into.v), strict=True):
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
            PIECES=pieces,
            BLOCK=block,
            D=dim,
            ROWS=step,
            ADD=into.add,
        )


def _key_arguments(
    queries: BackwardQueries, keys: Keys, row_values: Tensor, into: KeyGradients, launch: tuning.Launch
) -> dict[str, Any]:
    """What both kinds of dK/dV launches take."""
    q, grad_out, k, v = queries.q, queries.grad_out, keys.k, keys.v
    index: BlockTask = keys.index.data
    lists, q_valid, k_valid = index.keys, index.q_valid_tokens, index.k_valid_tokens
    return {
        "q": source(q, q_valid, launch.m, launch),
        "grad_out": source(grad_out, q_valid, launch.m, launch),
        "k": source(k, k_valid, launch.n, launch),
        "v": source(v, k_valid, launch.n, launch),
        "row_values": launching.line_source(row_values, launch),
        "padded": row_values.shape[1],
        "at": KeyStrides(*map(Strides.of, (q, k, v, grad_out, into.k, into.v))),
        "queries": query_tiles(q, index),
        "blocks": BlockLists(lists.rows, lists.entries, index.k_documents, k_valid),
        "scale": scale_of(queries),
        "GROUP": q.shape[2] // k.shape[2],
        "SIGN": lists.sign,
    }


def grad_columns(queries: BackwardQueries, columns: Columns, row_values: Tensor) -> Partial:
    """Launch dK and dV [B, H, C, D] of the columns: sums over chunks of query tiles, added in a fixed order."""
    q, grad_out, index = queries.q, queries.grad_out, columns.index.data
    launch, common = settings(tuning.COLUMN_GRAD_KV, q, index.mask)
    assert COLUMN_TILE % launch.n == 0, f"column tile {COLUMN_TILE} is no multiple of {launch.n}"
    batch, heads, capacity, dim = columns.k.shape
    chunks = -(-len(index.q_side.blocks) // COLUMN_CHUNK_TILES)
    column_tiles = -(-capacity // launch.n)
    first_tile = index.first_tile
    if launch.n != COLUMN_TILE:
        first_tile = first_tile.repeat_interleave(COLUMN_TILE // launch.n, 1)[:, :column_tiles].contiguous()
    parts = torch.empty(2, chunks * batch * heads, capacity, dim, dtype=accumulator_dtype(q.dtype), device=q.device)
    k, v = by_token(columns)
    run(
        column_grad_kv_kernel,
        (column_tiles, batch * heads, chunks),
        q=source(q, index.q_valid_tokens, launch.m, launch),
        column_k=source(k, capacity, launch.n, launch),
        column_v=source(v, capacity, launch.n, launch),
        grad_out=source(grad_out, index.q_valid_tokens, launch.m, launch),
        row_values=launching.line_source(row_values, launch),
        padded=row_values.shape[1],
        grad_k=launching.part_source(parts[0], launch),
        grad_v=launching.part_source(parts[1], launch),
        at=PartStrides(
            q=Strides.of(q),
            out=NO_STRIDES,
            grad_out=Strides.of(grad_out),
            column_k=Strides.of(k),
            column_v=Strides.of(v),
        ),
        queries=query_tiles(q, index),
        # With the loop for columns of own blocks compiled in, if never entered, an H200 takes 2.5 ms, without it 3.5.
        columns=column_lists(columns, own=True),
        chunks=ColumnChunks(first_tile, index.has_own, column_tiles, COLUMN_CHUNK_TILES),
        scale=scale_of(queries),
        **common,
    )
    grad_k, grad_v = parts.view(2, chunks, batch, heads, capacity, dim).sum(1)
    return grad_k, grad_v
