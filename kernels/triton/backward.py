"""Backward, split in two kernels so that nothing needs atomics.

dQ: one program per query tile walks the same list and columns as the forward. dK and dV: one program per key tile walks
the transposed lists of all query heads of its KV head, keys along the rows of every tile so that weights come out
already transposed. Both write, or add into, what one program alone owns: bitwise repeatable. Block masks have a few key
tiles that almost every query attends (sinks): their query heads are split over programs, and their shares joined. lse
and delta = rowsum(grad_out * out) come from a prepare kernel: padded to whole tiles, lse in base 2 and +inf for rows
that attend nothing. Shape legend: see tiles.py.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .forward import EDGE_FIELDS, EDGES, place_of, walk_keys
from .tiles import LOG2_E, grad_kv_step, load_documents, load_pair, load_tile, store_part, write_tile


@triton.jit
def prepare_kernel(lse, delta, row_values, heads, q_valid, padded, scale, SIZE: tl.constexpr):
    """row_values [B * H * 2, padded], as the backward kernels read them: nothing to mask there. lse, delta: Rows.

    Even lines: lse in base 2, +inf for rows that attend nothing and from q_valid on (exp2(score - lse) is 0 there).
    Odd lines: scale * delta, 0 for those rows.
    """
    pair = tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = rows < q_valid
    values = tl.load(lse.data + batch * lse.b + head.to(tl.int64) * lse.h + rows, mask=valid, other=0.0)
    alive = valid & (values > float("-inf"))
    deltas = tl.load(delta.data + batch * delta.b + head.to(tl.int64) * delta.h + rows, mask=alive, other=0.0)
    at = row_values + pair.to(tl.int64) * 2 * padded + rows
    tl.store(at, tl.where(alive, values * LOG2_E, float("inf")), mask=rows < padded)
    tl.store(at + padded, tl.where(alive, deltas * scale, 0.0), mask=rows < padded)


@triton.jit
def grad_q_kernel(
    q, k, v, grad_out, grad_q, prior, column_k, column_v, row_values, at, queries, blocks, columns, scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    TMA: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M), as the forward.

    prior, if given: writes the sum with it (strides of grad_q, which is of another dtype). ADD: adds into grad_q. The
    rest is in views.py: row_values Rows of lse, each followed by that of delta, at TileStrides, queries QueryTiles,
    blocks BlockLists, columns ColumnLists, scale Scale.
    """
    place = place_of(queries, BLOCK, M)
    batch, head, tile, part = place
    first = tile * BLOCK + part * M
    q_tile, do_tile = load_pair(q, grad_out, at.q, at.grad_out, batch, head, first, queries.valid, M, D, TMA, True)
    line = row_values.data + batch.to(tl.int64) * row_values.b + head.to(tl.int64) * row_values.h
    line += first + tl.arange(0, M)
    query = (q_tile, do_tile, tl.load(line), tl.load(line + row_values.h // 2))
    state = walk_keys((tl.zeros([M, D], ACC),), query, place, k, v, column_k, column_v, at, queries, blocks, columns,
                      scale, GROUP, BLOCK, M, N, D, SIGN, TMA, ACC, PRECISION)
    acc = state[0]
    if prior is not None:
        acc += load_tile(prior, at.out, batch, head, first, queries.valid, M, D, TMA, True)
    write_tile(grad_q, at.out, acc, batch, head, first, queries.valid, M, D, TMA, ADD)


@triton.jit
def grad_kv_kernel(
    q, k, v, grad_out, row_values, grad_k, grad_v, at, queries, blocks, rows, scale, padded,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    TMA: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H_kv * rows.number * BLOCK / N): one program per part of a key tile, all query heads of its KV head.

    SPLIT > 0: so many programs share a part's lists of all query heads, laid end to end, in equal pieces, the last one
    with the own blocks; each writes its share into grad_k, grad_v [B * H_kv * rows.number * SPLIT, BLOCK, D]. In
    views.py: at TileStrides, queries QueryTiles, blocks BlockLists of key tiles, rows KeyRows, scale Scale; row_values
    are lines of `padded` values.
    """
    program = tl.program_id(0)
    part = program % (BLOCK // N)
    program = program // (BLOCK // N)
    line_of_part = program
    piece = 0
    if SPLIT > 0:
        piece = program % SPLIT
        program = program // SPLIT
    tile = tl.load(rows.order + rows.first + program % rows.number)
    kv_head = (program // rows.number) % rows.kv_heads
    batch = program // (rows.number * rows.kv_heads)

    first = tile * BLOCK + part * N
    k_tile, v_tile = load_pair(k, v, at.k, at.v, batch, kv_head, first, blocks.valid, N, D, TMA, True)
    k_document = tile
    if queries.documents is not None:
        k_document = load_documents(blocks, first, N, -2)

    k_acc = tl.zeros([N, D], ACC)
    v_acc = tl.zeros([N, D], ACC)
    entries, before = 0, 0
    if SPLIT > 0:
        for member in range(0, GROUP):
            entries += tl.load(blocks.fields + ((kv_head * GROUP + member) * rows.tiles + tile) * 4 + 1)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        fields = blocks.fields + (head * rows.tiles + tile) * 4
        start, count, base = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
        if SPLIT > 0:
            # The list is cut by its start and count: a loop that begins anywhere but at 0 is not pipelined.
            low = tl.minimum(tl.maximum(entries * piece // SPLIT - before, 0), count)
            high = tl.minimum(tl.maximum(entries * (piece + 1) // SPLIT - before, 0), count)
            before += count
            start += low
            count = high - low
        for step in range(0, count * (BLOCK // M)):
            entry = tl.load(blocks.entries + start + step // (BLOCK // M))
            query = (base + SIGN * entry) * BLOCK + (step % (BLOCK // M)) * M
            k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, padded, at, queries,
                                        batch, head, query, k_document, True, scale, False, M, D, TMA, ACC, PRECISION)
    # The own block of every head, in one loop over (head, query part). Query parts before this key part see none of it.
    parts = BLOCK // M - (part * N) // M
    members = GROUP
    if SPLIT > 0:
        members = tl.where(piece == SPLIT - 1, GROUP, 0)
    for step in tl.range(0, members * parts, num_stages=1, disable_licm=True):
        head = kv_head * GROUP + step // parts
        diagonal = tl.load(blocks.fields + (head * rows.tiles + tile) * 4 + 3)
        if diagonal >= 0:
            query_part = (part * N) // M + step % parts
            query = diagonal * BLOCK + query_part * M
            allowed = tl.arange(0, N)[:, None] - tl.arange(0, M)[None, :] <= query_part * M - part * N
            k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, padded, at, queries,
                                        batch, head, query, k_document, allowed, scale, True, M, D, TMA, ACC, PRECISION)
    if blocks.edges is not None:  # of every head, parts of the query tiles whose windows cut this one
        edge_parts = EDGES * (BLOCK // M)
        for step in tl.range(0, members * edge_parts, num_stages=1, disable_licm=True):
            head, nth = kv_head * GROUP + step // edge_parts, step % edge_parts
            edge = blocks.edges + ((head * rows.tiles + tile) * EDGES + nth // (BLOCK // M)) * EDGE_FIELDS
            cut, query_part = tl.load(edge), nth % (BLOCK // M)
            limit, floor = tl.load(edge + 1), tl.load(edge + 2)
            nearest, farthest = query_part * M - (part + 1) * N + 1, (query_part + 1) * M - 1 - part * N
            if (cut >= 0) & (nearest < limit) & (farthest >= floor):
                apart = (query_part * M + tl.arange(0, M))[None, :] - (part * N + tl.arange(0, N))[:, None]
                allowed = (apart >= floor) & (apart < limit)
                query = cut * BLOCK + query_part * M
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, padded, at, queries,
                                            batch, head, query, k_document, allowed, scale, True, M, D, TMA, ACC,
                                            PRECISION)
    if SPLIT > 0:
        store_part(grad_k, k_acc, line_of_part, part * N, BLOCK, N, D, TMA)
        store_part(grad_v, v_acc, line_of_part, part * N, BLOCK, N, D, TMA)
    else:
        write_tile(grad_k, at.grad_k, k_acc, batch, kv_head, first, blocks.valid, N, D, TMA, ADD)
        write_tile(grad_v, at.grad_v, v_acc, batch, kv_head, first, blocks.valid, N, D, TMA, ADD)


@triton.jit
def join_split_kernel(parts, grad, at, order, kv_heads, row_count, k_valid, PIECES: tl.constexpr, BLOCK: tl.constexpr,
                      D: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr):
    """grad [B, S_k, H_kv, D] (ADD: +=) the sum of its pieces. Grid (row_count, H_kv * B, BLOCK / ROWS)."""
    row, pair = tl.program_id(0), tl.program_id(1)
    kv_head, batch = pair % kv_heads, pair // kv_heads
    inside = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D)[None, :]
    share = parts + ((pair * row_count + row).to(tl.int64) * PIECES * BLOCK + inside[:, None]) * D + dims
    total = tl.load(share)
    for member in range(1, PIECES):
        total += tl.load(share + member * BLOCK * D)
    rows = tl.load(order + row) * BLOCK + inside
    target = grad + batch.to(tl.int64) * at.b + kv_head.to(tl.int64) * at.h + rows.to(tl.int64)[:, None] * at.s + dims
    valid = (rows < k_valid)[:, None]
    if ADD:
        total += tl.load(target, mask=valid, other=0.0)
    tl.store(target, total.to(grad.dtype.element_ty), mask=valid)
