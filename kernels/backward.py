"""Backward of the block part, split in two kernels so that nothing needs atomics.

dQ: one program per query tile walks the same list as the forward. dK and dV: one program per key tile walks the
transposed lists of all query heads of its KV head, keys along the rows of every tile so that weights come out already
transposed. Both add into accumulators that one program alone owns: bitwise repeatable.
Shape legend: see forward.py. delta = rowsum(grad_out * out). lse and delta come from prepare_kernel: padded to whole
tiles, lse in base 2 and +inf for rows that attend nothing.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOG2_E, load_tile


@triton.jit
def prepare_kernel(lse, delta, row_values, lse_b, lse_h, delta_b, delta_h, heads, q_valid, padded, scale,
                   SIZE: tl.constexpr):
    """row_values [B * H * 2, padded], as the backward kernels read them: nothing to mask there.

    Even lines: lse in base 2, +inf for rows that attend nothing and from q_valid on (exp2(score - lse) is 0 there).
    Odd lines: scale * delta, 0 for those rows.
    """
    pair = tl.program_id(1)
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = rows < q_valid
    values = tl.load(lse + batch * lse_b + head.to(tl.int64) * lse_h + rows, mask=valid, other=0.0)
    alive = valid & (values > float("-inf"))
    deltas = tl.load(delta + batch * delta_b + head.to(tl.int64) * delta_h + rows, mask=alive, other=0.0)
    at = row_values + pair.to(tl.int64) * 2 * padded + rows
    tl.store(at, tl.where(alive, values * LOG2_E, float("inf")), mask=rows < padded)
    tl.store(at + padded, tl.where(alive, deltas * scale, 0.0), mask=rows < padded)


@triton.jit
def prepare_from_out_kernel(out, grad_out, lse, row_values, out_b, out_s, out_h, do_b, do_s, do_h, lse_b, lse_h, heads,
                            q_valid, padded, scale, SIZE: tl.constexpr, D: tl.constexpr):
    """The same from out and grad_out [B, S, H, D]: delta = rowsum(grad_out * out)."""
    pair = tl.program_id(1)
    head, batch = (pair % heads).to(tl.int64), (pair // heads).to(tl.int64)
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    valid = rows < q_valid
    values = tl.load(lse + batch * lse_b + head * lse_h + rows, mask=valid, other=0.0)
    alive = valid & (values > float("-inf"))
    long_rows, dims = rows.to(tl.int64)[:, None], tl.arange(0, D)[None, :]
    outs = tl.load(out + batch * out_b + head * out_h + long_rows * out_s + dims, mask=alive[:, None], other=0.0)
    grads = tl.load(grad_out + batch * do_b + head * do_h + long_rows * do_s + dims, mask=alive[:, None], other=0.0)
    deltas = tl.sum(outs.to(values.dtype) * grads.to(values.dtype), 1)
    at = row_values + pair.to(tl.int64) * 2 * padded + rows
    tl.store(at, tl.where(alive, values * LOG2_E, float("inf")), mask=rows < padded)
    tl.store(at + padded, deltas * scale, mask=rows < padded)


@triton.jit
def load_row_values(row_values, line, first, padded, M: tl.constexpr, TMA: tl.constexpr):
    """M values of one line of row_values [B * H * 2, padded]: even lines hold lse, odd ones delta."""
    if TMA:
        # In the layout of a transposed tile every thread needs them: one bulk copy instead of a copy per thread.
        values = row_values.load([line, first]).reshape([M])
    else:
        values = tl.load(row_values + tl.cast(line, tl.int64) * padded + first + tl.arange(0, M))
    return values


@triton.jit
def write_tile(target, values, batch, head, first, limit, stride_b, stride_s, stride_h, ROWS: tl.constexpr,
               D: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr):
    """target[batch, first + 0 .. ROWS, head, :] = (ADD: +=) values [ROWS, D], rows from `limit` on excepted.

    Only one program owns these rows, so that the copy engine's addition (TMA) is as repeatable as loads and stores.
    """
    if TMA:
        tile = values.to(target.dtype).reshape([1, 1, ROWS, D])
        if ADD:
            target.atomic_add([batch, head, first, 0], tile)
        else:
            target.store([batch, head, first, 0], tile)
    else:
        start = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_s
        rows = tl.arange(0, ROWS)
        pointers = target + start + rows[:, None] * stride_s + tl.arange(0, D)[None, :]
        mask = (first + rows < limit)[:, None]
        if ADD:
            values += tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def grad_q_step(acc, q, k, v, grad_out, lse, delta, allowed, scale, scale_log2, MASKED: tl.constexpr, ACC: tl.constexpr,
                PRECISION: tl.constexpr):
    """acc [M, D] plus scale * dS k of one key tile; delta is scaled already."""
    scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
    grad_scores = (weights * (grad_weights * scale - delta[:, None])).to(k.dtype)
    return tl.dot(grad_scores, k, acc, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def grad_q_kernel(
    q, k, v, grad_out, row_values, grad_q, row_fields, entries, order, q_documents, k_documents, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, dq_b, dq_s, dq_h,
    heads, tiles, padded, q_valid, k_valid,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M), as the forward."""
    program = tl.program_id(0)
    part = program % (BLOCK // M)
    program = program // (BLOCK // M)
    tile = tl.load(order + program % tiles)
    head = (program // tiles) % heads
    batch = program // (tiles * heads)

    fields = row_fields + (head * tiles + tile) * 4
    start, count, base, diagonal = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    first = tile * BLOCK + part * M
    rows = first + tl.arange(0, M)
    columns = tl.arange(0, N)
    kv_head = head // GROUP
    q_tile = load_tile(q, batch, head, first, q_valid, q_b, q_h, q_s, M, D, TMA, True)
    do_tile = load_tile(grad_out, batch, head, first, q_valid, do_b, do_h, do_s, M, D, TMA, True)
    lines = row_values + (batch * heads + head).to(tl.int64) * 2 * padded + rows
    row_lse, row_delta = tl.load(lines), tl.load(lines + padded)
    if DOCUMENTS:
        q_document = tl.load(q_documents + rows, mask=rows < q_valid, other=-1)

    acc = tl.zeros([M, D], ACC)
    if diagonal >= 0:
        for n in range(0, ((part + 1) * M + N - 1) // N):
            key = diagonal * BLOCK + n * N
            k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, True)
            v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, True)
            allowed = (n * N + columns)[None, :] <= (part * M + tl.arange(0, M))[:, None]
            if DOCUMENTS:
                k_document = tl.load(k_documents + key + columns, mask=key + columns < k_valid, other=-2)
                allowed = allowed & (q_document[:, None] == k_document[None, :])
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale, scale_log2, True, ACC,
                              PRECISION)
    for step in range(0, count * (BLOCK // N)):
        entry = tl.load(entries + start + step // (BLOCK // N))
        key = (base + SIGN * entry) * BLOCK + (step % (BLOCK // N)) * N
        k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, False)
        v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, False)
        if DOCUMENTS:
            k_document = tl.load(k_documents + key + columns)
            allowed = q_document[:, None] == k_document[None, :]
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale, scale_log2, True, ACC,
                              PRECISION)
        else:
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, True, scale, scale_log2, False, ACC,
                              PRECISION)
    write_tile(grad_q, acc, batch, head, first, q_valid, dq_b, dq_s, dq_h, M, D, TMA, ADD)


@triton.jit
def grad_kv_step(grad_k, grad_v, k, v, q, grad_out, row_values, line, query, padded, allowed, scale,
                 scale_log2, MASKED: tl.constexpr, M: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr,
                 PRECISION: tl.constexpr):
    """(grad_k, grad_v) [N, D] plus one query tile's share; `allowed` bool [N, M] where MASKED.

    lse and delta of the tile's queries are read just before use, to hold fewer registers.
    """
    scores = tl.dot(k, tl.trans(q), out_dtype=ACC, input_precision=PRECISION)
    lse = load_row_values(row_values, line, query, padded, M, TMA)
    weights = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad_v = tl.dot(weights.to(q.dtype), grad_out, grad_v, out_dtype=ACC, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad_out), out_dtype=ACC, input_precision=PRECISION)
    delta = load_row_values(row_values, line + 1, query, padded, M, TMA)
    grad_scores = (weights * (grad_weights * scale - delta[None, :])).to(q.dtype)
    grad_k = tl.dot(grad_scores, q, grad_k, out_dtype=ACC, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def grad_kv_kernel(
    q, k, v, grad_out, row_values, grad_k, grad_v, row_fields, entries, order, q_documents, k_documents, scale,
    scale_log2, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    dk_b, dk_s, dk_h, dv_b, dv_s, dv_h, kv_heads, tiles, padded, q_valid, k_valid,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H_kv * T * BLOCK / N): one program per part of a key tile, all query heads of its KV head."""
    program = tl.program_id(0)
    part = program % (BLOCK // N)
    program = program // (BLOCK // N)
    tile = tl.load(order + program % tiles)
    kv_head = (program // tiles) % kv_heads
    batch = program // (tiles * kv_heads)

    first = tile * BLOCK + part * N
    rows = first + tl.arange(0, N)
    queries = tl.arange(0, M)
    k_tile = load_tile(k, batch, kv_head, first, k_valid, k_b, k_h, k_s, N, D, TMA, True)
    v_tile = load_tile(v, batch, kv_head, first, k_valid, v_b, v_h, v_s, N, D, TMA, True)
    if DOCUMENTS:
        k_document = tl.load(k_documents + rows, mask=rows < k_valid, other=-2)

    k_acc = tl.zeros([N, D], ACC)
    v_acc = tl.zeros([N, D], ACC)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        line = (batch * kv_heads * GROUP + head) * 2
        fields = row_fields + (head * tiles + tile) * 4
        start, count, base, diagonal = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
        if diagonal >= 0:
            # Query parts before this key part see none of it.
            for m in tl.range((part * N) // M, BLOCK // M, num_stages=1):
                query = diagonal * BLOCK + m * M
                q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
                do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
                allowed = (part * N + tl.arange(0, N))[:, None] <= (m * M + queries)[None, :]
                if DOCUMENTS:
                    q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
                    allowed = allowed & (q_document[None, :] == k_document[:, None])
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_values, line, query,
                                            padded, allowed, scale, scale_log2, True, M, TMA, ACC, PRECISION)
        for step in range(0, count * (BLOCK // M)):
            entry = tl.load(entries + start + step // (BLOCK // M))
            query = (base + SIGN * entry) * BLOCK + (step % (BLOCK // M)) * M
            q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
            do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
            if DOCUMENTS:
                q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
                allowed = q_document[None, :] == k_document[:, None]
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_values, line, query,
                                            padded, allowed, scale, scale_log2, True, M, TMA, ACC, PRECISION)
            else:
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_values, line, query,
                                            padded, True, scale, scale_log2, False, M, TMA, ACC, PRECISION)
    write_tile(grad_k, k_acc, batch, kv_head, first, k_valid, dk_b, dk_s, dk_h, N, D, TMA, ADD)
    write_tile(grad_v, v_acc, batch, kv_head, first, k_valid, dv_b, dv_s, dv_h, N, D, TMA, ADD)
