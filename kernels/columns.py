"""The column part: dense tiles over the gathered columns, masked where a block already covers the pair.

A query tile lies in one mask block, so whether a block covers a column is one answer per column for the whole tile;
it is folded with causality into one comparison: a covered column is moved beyond every position. Columns are sorted,
so a tile stops at the last one before its end. dK/dV: programs own (head, column tile, chunk of query tiles) and write
partial sums that are added up afterwards in a fixed order: no atomics.
Shape legend: see forward.py; C column capacity.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .backward import grad_kv_step, grad_q_step, write_tile
from .forward import load_tile, softmax_step, store_partial

NEVER = tl.constexpr(2147483647)


@triton.jit
def uncovered_positions(columns, active, head, block, slots, capacity, seq_len, blocks, BLOCK: tl.constexpr,
                        TOEPLITZ: tl.constexpr):
    """Positions of the head's column slots; NEVER where the slot is empty, in the future, or covered by an active block."""
    positions = tl.load(columns + head * capacity + slots, mask=slots < capacity, other=NEVER)
    column_block = positions // BLOCK
    here = (positions < seq_len) & (column_block <= block)
    if TOEPLITZ:
        offset = head * blocks + block - column_block
    else:
        offset = (head.to(tl.int64) * blocks + block) * blocks + column_block
    covered = tl.load(active + offset, mask=here, other=1)
    return tl.where(covered != 0, NEVER, positions)


@triton.jit
def column_forward_kernel(
    q, k, v, out, lse, columns, reach, active, q_blocks, order, q_documents, column_documents, scale_log2,
    q_b, q_s, q_h, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_s, out_h, lse_b, lse_h,
    heads, tiles, q_tokens, q_valid, capacity, seq_len, blocks,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TOEPLITZ: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, MERGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M)."""
    program = tl.program_id(0)
    part = program % (BLOCK // M)
    program = program // (BLOCK // M)
    tile = tl.load(order + program % tiles)
    head = (program // tiles) % heads
    batch = program // (tiles * heads)

    block = tl.load(q_blocks + tile)
    reached = tl.load(reach + head * tiles + tile)
    first = tile * BLOCK + part * M
    rows = first + tl.arange(0, M)
    q_position = block * BLOCK + part * M + tl.arange(0, M)
    q_tile = load_tile(q, batch, head, first, q_valid, q_b, q_h, q_s, M, D, TMA, True)
    if DOCUMENTS:
        q_document = tl.load(q_documents + rows, mask=rows < q_valid, other=-1)

    acc = tl.zeros([M, D], ACC)
    peak = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    for start in range(0, reached, N):
        slots = start + tl.arange(0, N)
        positions = uncovered_positions(columns, active, head, block, slots, capacity, seq_len, blocks, BLOCK, TOEPLITZ)
        k_tile = load_tile(k, batch, head, start, capacity, k_b, k_h, k_s, N, D, TMA, True)
        v_tile = load_tile(v, batch, head, start, capacity, v_b, v_h, v_s, N, D, TMA, True)
        allowed = positions[None, :] <= q_position[:, None]
        if DOCUMENTS:
            document = tl.load(column_documents + head * capacity + slots, mask=slots < capacity, other=-2)
            allowed = allowed & (q_document[:, None] == document[None, :])
        acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True, ACC,
                                        PRECISION)
    store_partial(out, lse, acc, peak, total, batch, head, rows, q_tokens, q_valid, out_b, out_s, out_h, lse_b, lse_h,
                  D, MERGE)


@triton.jit
def column_grad_q_kernel(
    q, k, v, grad_out, row_values, grad_q, columns, reach, active, q_blocks, order, q_documents, column_documents,
    scale, scale_log2, q_b, q_s, q_h, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_s, do_h,
    dq_b, dq_s, dq_h, heads, tiles, padded, q_valid, capacity, seq_len, blocks,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TOEPLITZ: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M)."""
    program = tl.program_id(0)
    part = program % (BLOCK // M)
    program = program // (BLOCK // M)
    tile = tl.load(order + program % tiles)
    head = (program // tiles) % heads
    batch = program // (tiles * heads)

    block = tl.load(q_blocks + tile)
    reached = tl.load(reach + head * tiles + tile)
    first = tile * BLOCK + part * M
    rows = first + tl.arange(0, M)
    q_position = block * BLOCK + part * M + tl.arange(0, M)
    q_tile = load_tile(q, batch, head, first, q_valid, q_b, q_h, q_s, M, D, TMA, True)
    do_tile = load_tile(grad_out, batch, head, first, q_valid, do_b, do_h, do_s, M, D, TMA, True)
    lines = row_values + (batch * heads + head).to(tl.int64) * 2 * padded + rows
    row_lse, row_delta = tl.load(lines), tl.load(lines + padded)
    if DOCUMENTS:
        q_document = tl.load(q_documents + rows, mask=rows < q_valid, other=-1)

    acc = tl.zeros([M, D], ACC)
    for start in range(0, reached, N):
        slots = start + tl.arange(0, N)
        positions = uncovered_positions(columns, active, head, block, slots, capacity, seq_len, blocks, BLOCK, TOEPLITZ)
        k_tile = load_tile(k, batch, head, start, capacity, k_b, k_h, k_s, N, D, TMA, True)
        v_tile = load_tile(v, batch, head, start, capacity, v_b, v_h, v_s, N, D, TMA, True)
        allowed = positions[None, :] <= q_position[:, None]
        if DOCUMENTS:
            document = tl.load(column_documents + head * capacity + slots, mask=slots < capacity, other=-2)
            allowed = allowed & (q_document[:, None] == document[None, :])
        acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale, scale_log2, True, ACC,
                          PRECISION)
    write_tile(grad_q, acc, batch, head, first, q_valid, dq_b, dq_s, dq_h, M, D, TMA, True)


@triton.jit
def store_part(target, values, part, first, capacity, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """target[part, first + 0 .. ROWS, :] = values of a contiguous [parts, C, D]; rows from C on are left out."""
    if TMA:
        target.store([part, first, 0], values.reshape([1, ROWS, D]))
    else:
        rows = first + tl.arange(0, ROWS)
        pointers = target + part.to(tl.int64) * capacity * D + rows[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(pointers, values, mask=(rows < capacity)[:, None])


@triton.jit
def column_grad_kv_kernel(
    q, k, v, grad_out, row_values, grad_k, grad_v, columns, first_tile, active, q_blocks, q_documents,
    column_documents, scale, scale_log2, q_b, q_s, q_h, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_s, do_h,
    heads, tiles, padded, q_valid, capacity, seq_len, blocks, column_tiles, chunk_tiles,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TOEPLITZ: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (column tiles, B * H, chunks): writes grad_k, grad_v [chunks * B * H, C, D], unshared."""
    column_tile = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    chunk = tl.program_id(2)

    start = column_tile * N
    slots = start + tl.arange(0, N)
    k_tile = load_tile(k, batch, head, start, capacity, k_b, k_h, k_s, N, D, TMA, True)
    v_tile = load_tile(v, batch, head, start, capacity, v_b, v_h, v_s, N, D, TMA, True)
    if DOCUMENTS:
        document = tl.load(column_documents + head * capacity + slots, mask=slots < capacity, other=-2)
    queries = tl.arange(0, M)
    line = (batch * heads + head) * 2
    low = tl.maximum(chunk * chunk_tiles, tl.load(first_tile + head * column_tiles + column_tile))
    high = tl.minimum((chunk + 1) * chunk_tiles, tiles)

    k_acc = tl.zeros([N, D], ACC)
    v_acc = tl.zeros([N, D], ACC)
    for step in range(low * (BLOCK // M), high * (BLOCK // M)):
        query = step * M
        block = tl.load(q_blocks + step // (BLOCK // M))
        positions = uncovered_positions(columns, active, head, block, slots, capacity, seq_len, blocks, BLOCK, TOEPLITZ)
        q_position = block * BLOCK + (step % (BLOCK // M)) * M + queries
        q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
        do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
        allowed = positions[:, None] <= q_position[None, :]
        if DOCUMENTS:
            q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
            allowed = allowed & (q_document[None, :] == document[:, None])
        k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_values, line, query,
                                    padded, allowed, scale, scale_log2, True, M, TMA, ACC, PRECISION)
    part = (chunk * (tl.num_programs(1) // heads) + batch) * heads + head
    store_part(grad_k, k_acc, part, start, capacity, N, D, TMA)
    store_part(grad_v, v_acc, part, start, capacity, N, D, TMA)
