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
from ..values import BackwardQueries, Columns, KeyGradients, Keys, Partial, QueryGradient
from . import tuning
from .backward import grad_kv_kernel, grad_q_kernel, join_split_kernel, prepare_kernel
from .columns import column_grad_kv_kernel
from .launching import (
    Source,
    Task,
    box_source,
    by_token,
    column_lists,
    query_launch,
    query_task,
    query_tiles,
    scale_of,
    settings,
    source,
)
from .views import BlockLists, ColumnChunks, KeyRows, Rows, Strides, strides_of

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
    (batch, heads, _), valid = lse.shape, task.q_valid_tokens
    tokens = len(task.q_side.blocks) * task.mask.block_size
    values = torch.empty(batch * heads * 2, tokens, dtype=lse.dtype, device=lse.device)
    rows = Rows.of(lse), Rows.of(delta)
    grid = -(-tokens // PREPARE_ROWS), batch * heads
    run(prepare_kernel, grid, *rows, values, heads, valid, tokens, queries.scale, SIZE=PREPARE_ROWS)
    return values


def grad_query(
    queries: BackwardQueries, keys: Keys | None, columns: Columns | None, row_values: Tensor, into: QueryGradient
) -> None:
    """Launch dQ of the block part, the column part, or both."""
    grad_out, valid = queries.grad_out, query_task(keys, columns).q_valid_tokens
    launch, grid, given = query_launch(tuning.GRAD_QS, queries.q, keys, columns)
    given["at"] = given["at"]._replace(grad_out=Strides.of(grad_out), out=Strides.of(into.target))
    goes_on = into.final is not None and into.add
    run(
        grad_q_kernel,
        grid,
        grad_out=source(grad_out, valid, launch.m, launch),
        grad_q=source(into.target, valid, launch.m, launch),
        prior=source(into.total, valid, launch.m, launch) if goes_on else None,
        row_values=Rows(row_values, 2 * queries.q.shape[2] * row_values.shape[1], 2 * row_values.shape[1]),
        scale=scale_of(queries),
        ADD=into.add and into.final is None,
        **given,
    )


def grad_key_value(queries: BackwardQueries, keys: Keys, row_values: Tensor, into: KeyGradients) -> None:
    """Launch dK and dV of the block part.

    Block masks: the first key tiles in the order of work by several programs each, then their sum, in a fixed order.
    """
    q, k, index = queries.q, keys.k, keys.index.data
    (batch, _, kv_heads, dim), block, tiles = k.shape, index.mask.block_size, len(index.k_side.blocks)
    pieces = _pieces(q, k, index)
    split = 0 if index.mask.is_toeplitz or pieces < 2 else min(SPLIT_ROWS, tiles)
    if split:
        shape = (2, batch * kv_heads * split * pieces, block, dim)
        parts = torch.empty(shape, dtype=accumulator_dtype(q.dtype), device=q.device)
        shares = KeyGradients(k=parts[0], v=parts[1], add=False)
        _launch_key_value(queries, keys, row_values, shares, first=0, rows=split, pieces=pieces)
        step, join = min(block, JOIN_ROWS), {"PIECES": pieces, "BLOCK": block, "D": dim, "ADD": into.add}
        for part, grad in zip(parts, (into.k, into.v), strict=True):
            given = part, grad, Strides.of(grad), index.keys.order, kv_heads, split, index.k_valid_tokens
            run(join_split_kernel, (split, kv_heads * batch, block // step), *given, ROWS=step, **join)
    if tiles > split:
        _launch_key_value(queries, keys, row_values, into, first=split, rows=tiles - split, pieces=0)


def _pieces(q: Tensor, k: Tensor, index: BlockTask) -> int:
    """In how many pieces the longest lists are cut: no piece of less than two entries, none that memory has not."""
    rows = k.shape[0] * k.shape[2] * SPLIT_ROWS * index.mask.block_size
    piece_bytes = 2 * rows * k.shape[3] * accumulator_dtype(q.dtype).itemsize
    longest = q.shape[2] // k.shape[2] * len(index.q_side.blocks)
    return min(SPLIT_PIECES, longest // 2, SPLIT_BYTES // piece_bytes)


def _launch_key_value(
    queries: BackwardQueries,
    keys: Keys,
    row_values: Tensor,
    into: KeyGradients,
    *,
    first: int,
    rows: int,
    pieces: int,
) -> None:
    """dK and dV of `rows` key tiles from `first` on in the order of work; pieces > 0: shares of so many programs."""
    q, k, v, index = queries.q, keys.k, keys.v, keys.index.data
    launch, common = settings(tuning.GRAD_KV, q, index.mask)
    lists, valid, block, dim = index.keys, index.k_valid_tokens, index.mask.block_size, k.shape[3]

    def target(grad: Tensor) -> Source:
        return box_source(grad, [1, launch.n, dim], launch) if pieces else source(grad, valid, launch.n, launch)

    run(
        grad_kv_kernel,
        (k.shape[0] * k.shape[2] * rows * max(pieces, 1) * (block // launch.n),),
        k=source(k, valid, launch.n, launch),
        v=source(v, valid, launch.n, launch),
        grad_k=target(into.k),
        grad_v=target(into.v),
        at=strides_of(q=q, k=k, v=v, grad_out=queries.grad_out, grad_k=into.k, grad_v=into.v),
        blocks=BlockLists(lists.rows, lists.entries, index.k_documents, valid, index.key_edges),
        rows=KeyRows(lists.order, first, rows, len(index.k_side.blocks), k.shape[2]),
        GROUP=q.shape[2] // k.shape[2],
        SIGN=lists.sign,
        SPLIT=pieces,
        ADD=into.add,
        **_query_arguments(queries, index, row_values, launch),
        **common,
    )


def _query_arguments(queries: BackwardQueries, task: Task, row_values: Tensor, launch: tuning.Launch) -> dict[str, Any]:
    """What launches with one program per key or column tile read of the queries."""
    return {
        "q": source(queries.q, task.q_valid_tokens, launch.m, launch),
        "grad_out": source(queries.grad_out, task.q_valid_tokens, launch.m, launch),
        "row_values": box_source(row_values, [1, launch.m], launch),
        "padded": row_values.shape[1],
        "queries": query_tiles(queries.q, task),
        "scale": scale_of(queries),
    }


def grad_columns(queries: BackwardQueries, columns: Columns, row_values: Tensor) -> Partial:
    """Launch dK and dV [B, H, C, D] of the columns: sums over chunks of query tiles, added in a fixed order."""
    q, index = queries.q, columns.index.data
    launch, common = settings(tuning.COLUMN_GRAD_KV, q, index.mask)
    assert COLUMN_TILE % launch.n == 0, f"column tile {COLUMN_TILE} is no multiple of {launch.n}"
    batch, heads, capacity, dim = columns.k.shape
    chunks = -(-len(index.q_side.blocks) // COLUMN_CHUNK_TILES)
    column_tiles = -(-capacity // launch.n)
    first_tile = index.first_tile
    if launch.n != COLUMN_TILE:
        first_tile = first_tile.repeat_interleave(COLUMN_TILE // launch.n, 1)[:, :column_tiles].contiguous()
    parts = torch.empty(2, chunks * batch * heads, capacity, dim, dtype=accumulator_dtype(q.dtype), device=q.device)
    kv, box = by_token(columns), [1, launch.n, dim]
    run(
        column_grad_kv_kernel,
        (column_tiles, batch * heads, chunks),
        **{name: source(x, capacity, launch.n, launch) for name, x in kv.items()},
        grad_k=box_source(parts[0], box, launch),
        grad_v=box_source(parts[1], box, launch),
        at=strides_of(q=q, grad_out=queries.grad_out, **kv),
        # With the loop for columns of own blocks compiled in, if never entered, an H200 takes 2.5 ms, without it 3.5.
        columns=column_lists(columns, own=True),
        chunks=ColumnChunks(first_tile, index.has_own, column_tiles, COLUMN_CHUNK_TILES),
        **_query_arguments(queries, index, row_values, launch),
        **common,
    )
    grad_k, grad_v = parts.view(2, chunks, batch, heads, capacity, dim).sum(1)
    return grad_k, grad_v
