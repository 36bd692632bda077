"""The column part: dense tiles over the gathered columns, without those that an active block already covers.

A query tile lies in one mask block, so whether a column of an earlier block is *usable* is one bit for the whole tile;
index/usable.py packs these bits once per choice of columns. Those inside the tile's own block need causality element by
element, but only where the diagonal pair is not active: a second loop, left out (OWN) where the host knows that every
own block is active, as after every selector. The loops are fused behind the block part or run alone. dK/dV: programs
own (head, column tile, chunk of query tiles) and write partial sums that are added up afterwards in a fixed order: no
atomics. Shape legend: see tiles.py.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import grad_kv_step, grad_q_step, load_tile, softmax_step, store_part

# Bits of a word of `usable` (index/usable.py): 64, written out in the kernels.




@triton.jit
def usable_columns(word, start, N: tl.constexpr):
    """bool [N]: the usable ones of columns start .. start + N (N divides 64), of which word holds the bits."""
    word = word >> tl.cast(start % 64, tl.int64)
    lane = tl.arange(0, N)
    half = tl.where(lane < 32, word.to(tl.int32), (word >> 32).to(tl.int32))
    # In a score tile a thread holds columns 8 i + 2 t and the next: one shift by 2 t, then constant masks.
    return ((half >> (lane & 6)) & (1 << ((lane & 24) | (lane & 1)))) != 0


@triton.jit
def columns_up_to(columns, low, high, position):
    """int32, as position: how many of the sorted columns [0, high) are at or before each position (at least low)."""
    below, above = tl.zeros_like(position) + low, tl.zeros_like(position) + high
    for _ in range(0, 32):
        middle = (below + above) // 2
        inside = tl.load(columns + middle, mask=middle < above, other=2147483647) <= position
        above = tl.where(inside, above, middle)
        below = tl.where(inside, tl.minimum(middle + 1, above), below)
    return below


@triton.jit
def forward_columns(acc, peak, total, q_tile, q_position, q_document, column_k, column_v, columns, usable, reach,
                    earlier, end, column_documents, batch, head, line, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s, capacity,
                    words, scale_log2, N: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, DOCUMENTS: tl.constexpr,
                    TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(acc, peak, total) after the head's columns that this query tile may attend.

    line: that of the head and tile in `usable` and `limits`; reach, earlier, end: the limits there.
    """
    bits = usable + line.to(tl.int64) * words
    word = tl.load(bits)
    for start in range(0, reach, N):
        k_tile = load_tile(column_k, batch, head, start, capacity, ck_b, ck_h, ck_s, N, D, TMA, True)
        v_tile = load_tile(column_v, batch, head, start, capacity, cv_b, cv_h, cv_s, N, D, TMA, True)
        allowed = usable_columns(word, start, N)[None, :]
        word = tl.load(bits + (start + N) // 64)
        if DOCUMENTS:
            allowed = allowed & same_document(column_documents, head, start, capacity, q_document, N)
        acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True, ACC,
                                        PRECISION)
    if OWN:
        acc, peak, total = forward_own_columns(
            acc, peak, total, q_tile, q_position, q_document, column_k, column_v, columns + head * capacity, earlier,
            end, column_documents, batch, head, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s, capacity, scale_log2, N, D,
            DOCUMENTS, TMA, ACC, PRECISION)
    return acc, peak, total


@triton.jit
def forward_own_columns(acc, peak, total, q_tile, q_position, q_document, column_k, column_v, positions, earlier, end,
                        column_documents, batch, head, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s, capacity, scale_log2,
                        N: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
                        ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The same after columns earlier .. end, those of the tile's own block: causal element by element."""
    if end > earlier:
        bound = columns_up_to(positions, earlier, end, q_position)
        for start in tl.range(earlier // N * N, end, N, num_stages=1):
            k_tile = load_tile(column_k, batch, head, start, capacity, ck_b, ck_h, ck_s, N, D, TMA, True)
            v_tile = load_tile(column_v, batch, head, start, capacity, cv_b, cv_h, cv_s, N, D, TMA, True)
            slots = start + tl.arange(0, N)
            allowed = (slots >= earlier)[None, :] & (slots[None, :] < bound[:, None])
            if DOCUMENTS:
                allowed = allowed & same_document(column_documents, head, start, capacity, q_document, N)
            acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True, ACC,
                                            PRECISION)
    return acc, peak, total


@triton.jit
def same_document(column_documents, head, start, capacity, q_document, N: tl.constexpr):
    """bool [M, N]: the column is of the row's document."""
    slots = start + tl.arange(0, N)
    documents = tl.load(column_documents + head * capacity + slots, mask=slots < capacity, other=-2)
    return q_document[:, None] == documents[None, :]


@triton.jit
def grad_q_columns(acc, q_tile, do_tile, row_lse, row_delta, q_position, q_document, column_k, column_v, columns,
                   usable, reach, earlier, end, column_documents, batch, head, line, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s,
                   capacity, words, scale, scale_log2, N: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr,
                   DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dQ acc [M, D] plus the columns' share: the same walk as forward_columns."""
    bits = usable + line.to(tl.int64) * words
    word = tl.load(bits)
    for start in range(0, reach, N):
        k_tile = load_tile(column_k, batch, head, start, capacity, ck_b, ck_h, ck_s, N, D, TMA, True)
        v_tile = load_tile(column_v, batch, head, start, capacity, cv_b, cv_h, cv_s, N, D, TMA, True)
        allowed = usable_columns(word, start, N)[None, :]
        word = tl.load(bits + (start + N) // 64)
        if DOCUMENTS:
            allowed = allowed & same_document(column_documents, head, start, capacity, q_document, N)
        acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale, scale_log2, True,
                          ACC, PRECISION)
    if OWN:
        acc = grad_q_own_columns(
            acc, q_tile, do_tile, row_lse, row_delta, q_position, q_document, column_k, column_v,
            columns + head * capacity, earlier, end, column_documents, batch, head, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s,
            capacity, scale, scale_log2, N, D, DOCUMENTS, TMA, ACC, PRECISION)
    return acc


@triton.jit
def grad_q_own_columns(acc, q_tile, do_tile, row_lse, row_delta, q_position, q_document, column_k, column_v, positions,
                       earlier, end, column_documents, batch, head, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s, capacity,
                       scale, scale_log2, N: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr,
                       TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The same walk as forward_own_columns."""
    if end > earlier:
        bound = columns_up_to(positions, earlier, end, q_position)
        for start in tl.range(earlier // N * N, end, N, num_stages=1):
            k_tile = load_tile(column_k, batch, head, start, capacity, ck_b, ck_h, ck_s, N, D, TMA, True)
            v_tile = load_tile(column_v, batch, head, start, capacity, cv_b, cv_h, cv_s, N, D, TMA, True)
            slots = start + tl.arange(0, N)
            allowed = (slots >= earlier)[None, :] & (slots[None, :] < bound[:, None])
            if DOCUMENTS:
                allowed = allowed & same_document(column_documents, head, start, capacity, q_document, N)
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale, scale_log2,
                              True, ACC, PRECISION)
    return acc


@triton.jit
def column_grad_kv_kernel(
    q, column_k, column_v, grad_out, row_values, grad_k, grad_v, columns, usable, limits, first_tile, has_own,
    q_blocks, q_documents, column_documents, scale, scale_log2, q_b, q_s, q_h, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s,
    do_b, do_s, do_h, heads, tiles, padded, q_valid, capacity, words, column_tiles, chunk_tiles,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (column tiles, B * H, chunks): writes grad_k, grad_v [chunks * B * H, C, D], unshared."""
    column_tile = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    chunk = tl.program_id(2)

    start = column_tile * N
    slots = start + tl.arange(0, N)
    k_tile = load_tile(column_k, batch, head, start, capacity, ck_b, ck_h, ck_s, N, D, TMA, True)
    v_tile = load_tile(column_v, batch, head, start, capacity, cv_b, cv_h, cv_s, N, D, TMA, True)
    document = slots
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
        tile = tl.cast(head * tiles + step // (BLOCK // M), tl.int64)
        word = tl.load(usable + tile * words + start // 64)
        q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
        do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
        allowed = usable_columns(word, start, N)[:, None]
        if DOCUMENTS:
            q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
            allowed = allowed & (q_document[None, :] == document[:, None])
        k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_values, line, query, padded,
                                    allowed, scale, scale_log2, True, M, TMA, ACC, PRECISION)
    if OWN:
        # Few heads, if any, have such columns.
        low = chunk * chunk_tiles
        last = tl.where(tl.load(has_own + head) != 0, high, low)
        k_acc, v_acc = grad_kv_own_columns(
            k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, line, padded, limits, columns, q_blocks, q_documents,
            document, batch, head, heads, tiles, start, low, last, capacity, q_valid, q_b, q_h, q_s, do_b, do_h, do_s,
            scale, scale_log2, BLOCK, M, N, D, DOCUMENTS, TMA, ACC, PRECISION)
    part = (chunk * (tl.num_programs(1) // heads) + batch) * heads + head
    store_part(grad_k, k_acc, part, start, capacity, N, D, TMA)
    store_part(grad_v, v_acc, part, start, capacity, N, D, TMA)


@triton.jit
def grad_kv_own_columns(k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, line, padded, limits, columns, q_blocks,
                        q_documents, document, batch, head, heads, tiles, start, low, high, capacity, q_valid, q_b, q_h,
                        q_s, do_b, do_h, do_s, scale, scale_log2, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                        D: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr,
                        PRECISION: tl.constexpr):
    """(k_acc, v_acc) after query tiles low .. high, for columns in the tile's own block where that is inactive."""
    slots, queries = start + tl.arange(0, N), tl.arange(0, M)
    for step in tl.range(low * (BLOCK // M), high * (BLOCK // M), num_stages=1):
        limit = limits + (head * tiles + step // (BLOCK // M)) * 3
        earlier, end = tl.load(limit + 1), tl.load(limit + 2)
        if (end > earlier) & (end > start) & (earlier < start + N):
            query = step * M
            position = tl.load(columns + head * capacity + slots, mask=(slots >= earlier) & (slots < end),
                               other=2147483647)
            first = tl.load(q_blocks + step // (BLOCK // M)) * BLOCK + (step % (BLOCK // M)) * M
            q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
            do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
            allowed = position[:, None] <= (first + queries)[None, :]
            if DOCUMENTS:
                q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
                allowed = allowed & (q_document[None, :] == document[:, None])
            k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_values, line, query, padded,
                                        allowed, scale, scale_log2, True, M, TMA, ACC, PRECISION)
    return k_acc, v_acc
