"""Backward of the block part, split in two kernels so that nothing needs atomics.

dQ: one program per query tile walks the same list as the forward. dK and dV: one program per key tile walks the
transposed lists of all query heads of its KV head, keys along the rows of every tile so that weights come out already
transposed. Both add into accumulators that one program alone owns: bitwise repeatable.
Shape legend: see forward.py. delta = rowsum(grad_out * out); lse in natural log, -inf for rows that attend nothing.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOG2_E, load_tile


@triton.jit
def load_row_values(values, batch, head, rows, limit, stride_b, stride_h, OTHER: tl.constexpr):
    """values[batch, head, rows], OTHER from `limit` on."""
    pointers = values + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + rows
    return tl.load(pointers, mask=rows < limit, other=OTHER)


@triton.jit
def load_lse(lse, batch, head, rows, limit, stride_b, stride_h):
    """lse in base 2; +inf where a row attends nothing, so that exp2(score - lse) is 0."""
    values = load_row_values(lse, batch, head, rows, limit, stride_b, stride_h, float("-inf"))
    return tl.where(values == float("-inf"), float("inf"), values * LOG2_E)


@triton.jit
def add_tile(target, values, batch, head, rows, limit, stride_b, stride_s, stride_h, D: tl.constexpr):
    """target[batch, rows, head, :] += values [ROWS, D]."""
    pointers = target + batch.to(tl.int64) * stride_b + head * stride_h
    pointers = pointers + rows.to(tl.int64)[:, None] * stride_s + tl.arange(0, D)[None, :]
    mask = (rows < limit)[:, None]
    tl.store(pointers, (tl.load(pointers, mask=mask, other=0.0) + values).to(target.dtype.element_ty), mask=mask)


@triton.jit
def grad_q_step(acc, q, k, v, grad_out, lse, delta, allowed, scale_log2, MASKED: tl.constexpr, ACC: tl.constexpr,
                PRECISION: tl.constexpr):
    """acc [M, D] plus dS k of one key tile (unscaled)."""
    scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad_weights = tl.dot(grad_out, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
    grad_scores = (weights * (grad_weights - delta[:, None])).to(k.dtype)
    return tl.dot(grad_scores, k, acc, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def grad_q_kernel(
    q, k, v, grad_out, lse, delta, grad_q, row_fields, entries, order, q_documents, k_documents, scale, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, lse_b, lse_h, delta_b, delta_h, dq_b, dq_s, dq_h,
    heads, tiles, q_valid, k_valid,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
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
    row_lse = load_lse(lse, batch, head, rows, q_valid, lse_b, lse_h)
    row_delta = load_row_values(delta, batch, head, rows, q_valid, delta_b, delta_h, 0.0)
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
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale_log2, True, ACC,
                              PRECISION)
    for step in range(0, count * (BLOCK // N)):
        entry = tl.load(entries + start + step // (BLOCK // N))
        key = (base + SIGN * entry) * BLOCK + (step % (BLOCK // N)) * N
        k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, False)
        v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, False)
        if DOCUMENTS:
            k_document = tl.load(k_documents + key + columns)
            allowed = q_document[:, None] == k_document[None, :]
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, allowed, scale_log2, True, ACC,
                              PRECISION)
        else:
            acc = grad_q_step(acc, q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, True, scale_log2, False, ACC,
                              PRECISION)
    add_tile(grad_q, acc * scale, batch, head, rows, q_valid, dq_b, dq_s, dq_h, D)


@triton.jit
def grad_kv_step(grad_k, grad_v, k, v, q, grad_out, lse, delta, allowed, scale_log2, MASKED: tl.constexpr,
                 ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(grad_k, grad_v) [N, D] plus one query tile's share, grad_k unscaled; `allowed` bool [N, M] where MASKED."""
    scores = tl.dot(k, tl.trans(q), out_dtype=ACC, input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASKED:
        weights = tl.where(allowed, weights, 0.0)
    grad_v = tl.dot(weights.to(q.dtype), grad_out, grad_v, out_dtype=ACC, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad_out), out_dtype=ACC, input_precision=PRECISION)
    grad_scores = (weights * (grad_weights - delta[None, :])).to(q.dtype)
    grad_k = tl.dot(grad_scores, q, grad_k, out_dtype=ACC, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def grad_kv_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, row_fields, entries, order, q_documents, k_documents, scale,
    scale_log2, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, lse_b, lse_h, delta_b, delta_h,
    dk_b, dk_s, dk_h, dv_b, dv_s, dv_h, kv_heads, tiles, q_valid, k_valid,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
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
        fields = row_fields + (head * tiles + tile) * 4
        start, count, base, diagonal = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
        if diagonal >= 0:
            # Query parts before this key part see none of it.
            for m in range((part * N) // M, BLOCK // M):
                query = diagonal * BLOCK + m * M
                q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
                do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
                row_lse = load_lse(lse, batch, head, query + queries, q_valid, lse_b, lse_h)
                row_delta = load_row_values(delta, batch, head, query + queries, q_valid, delta_b, delta_h, 0.0)
                allowed = (part * N + tl.arange(0, N))[:, None] <= (m * M + queries)[None, :]
                if DOCUMENTS:
                    q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
                    allowed = allowed & (q_document[None, :] == k_document[:, None])
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, allowed,
                                            scale_log2, True, ACC, PRECISION)
        for step in range(0, count * (BLOCK // M)):
            entry = tl.load(entries + start + step // (BLOCK // M))
            query = (base + SIGN * entry) * BLOCK + (step % (BLOCK // M)) * M
            q_tile = load_tile(q, batch, head, query, q_valid, q_b, q_h, q_s, M, D, TMA, True)
            do_tile = load_tile(grad_out, batch, head, query, q_valid, do_b, do_h, do_s, M, D, TMA, True)
            row_lse = load_lse(lse, batch, head, query + queries, q_valid, lse_b, lse_h)
            row_delta = load_row_values(delta, batch, head, query + queries, q_valid, delta_b, delta_h, 0.0)
            if DOCUMENTS:
                q_document = tl.load(q_documents + query + queries, mask=query + queries < q_valid, other=-1)
                allowed = q_document[None, :] == k_document[:, None]
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, allowed,
                                            scale_log2, True, ACC, PRECISION)
            else:
                k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q_tile, do_tile, row_lse, row_delta, True,
                                            scale_log2, False, ACC, PRECISION)
    add_tile(grad_k, k_acc * scale, batch, kv_head, rows, k_valid, dk_b, dk_s, dk_h, D)
    add_tile(grad_v, v_acc, batch, kv_head, rows, k_valid, dv_b, dv_s, dv_h, D)
