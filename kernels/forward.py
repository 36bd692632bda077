"""Forward of the block part: one program per query tile walks its list of key tiles with an online softmax.

Shape legend: M query rows and N keys of a Triton tile, BLOCK tokens of a mask block (M and N divide it), D head dim,
GROUP query heads per KV head. Only the row's own block needs an element mask (causality), and documents.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(source, batch, head, first, limit, stride_b, stride_h, stride_s, ROWS: tl.constexpr, D: tl.constexpr,
              TMA: tl.constexpr, MASKED: tl.constexpr):
    """Rows first .. first + ROWS of one head, [ROWS, D]; rows from `limit` on are zero (TMA: the descriptor's own end)."""
    if TMA:
        tile = source.load([batch, head, first, 0]).reshape([ROWS, D])
    else:
        start = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_s
        rows = tl.arange(0, ROWS)
        pointers = source + start + rows[:, None] * stride_s + tl.arange(0, D)[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=(first + rows < limit)[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def softmax_step(acc, peak, total, q, k, v, allowed, scale_log2, MASKED: tl.constexpr, ACC: tl.constexpr,
                 PRECISION: tl.constexpr):
    """One online-softmax step in base 2: (acc, peak, total) after the keys k, v; `allowed` bool [M, N] where MASKED."""
    scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(allowed, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        # A row with nothing allowed so far keeps peak -inf: shift by 0, so that exp2 gives 0, not NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        shift = new_peak
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, out_dtype=ACC, input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def store_partial(out, lse, acc, peak, total, batch, head, rows, q_tokens, q_valid, out_b, out_s, out_h, lse_b, lse_h,
                  D: tl.constexpr, MERGE: tl.constexpr):
    """Write out = acc / total and the natural-log lse; with MERGE, into what `out` and `lse` already hold."""
    alive = (total > 0.0) & (rows < q_valid)
    row_lse = tl.where(alive, (peak + tl.log2(tl.where(alive, total, 1.0))) * LN_2, float("-inf"))
    weight = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    lse_pointers = lse + batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + rows
    dims = tl.arange(0, D)
    pointers = out + batch.to(tl.int64) * out_b + head * out_h + rows.to(tl.int64)[:, None] * out_s + dims[None, :]
    written = rows < q_tokens
    # Padding rows of a 16-bit input may hold NaN: what they computed never counts.
    values = tl.where(alive[:, None], acc * weight[:, None], 0.0)
    if MERGE:
        old_lse = tl.load(lse_pointers, mask=written, other=float("-inf"))
        old = tl.load(pointers, mask=written[:, None], other=0.0)
        top = tl.maximum(old_lse, row_lse)
        shift = tl.where(top == float("-inf"), 0.0, top)
        old_weight, new_weight = tl.exp2((old_lse - shift) * LOG2_E), tl.exp2((row_lse - shift) * LOG2_E)
        both = old_weight + new_weight
        both = tl.where(both > 0.0, both, 1.0)
        values = old * (old_weight / both)[:, None] + values * (new_weight / both)[:, None]
        row_lse = tl.where(top == float("-inf"), top, shift + tl.log2(both) * LN_2)
    tl.store(lse_pointers, row_lse.to(lse.dtype.element_ty), mask=written)
    tl.store(pointers, values.to(out.dtype.element_ty), mask=written[:, None])


@triton.jit
def forward_kernel(
    q, k, v, out, lse, row_fields, entries, order, q_documents, k_documents, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, out_b, out_s, out_h, lse_b, lse_h,
    heads, tiles, q_tokens, q_valid, k_valid,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, MERGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M): all of a head's tiles together, long rows first."""
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
    if DOCUMENTS:
        q_document = tl.load(q_documents + rows, mask=rows < q_valid, other=-1)

    acc = tl.zeros([M, D], ACC)
    peak = tl.full([M], float("-inf"), ACC)
    total = tl.zeros([M], ACC)
    if diagonal >= 0:
        for n in range(0, ((part + 1) * M + N - 1) // N):
            key = diagonal * BLOCK + n * N
            k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, True)
            v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, True)
            allowed = (n * N + columns)[None, :] <= (part * M + tl.arange(0, M))[:, None]
            if DOCUMENTS:
                k_document = tl.load(k_documents + key + columns, mask=key + columns < k_valid, other=-2)
                allowed = allowed & (q_document[:, None] == k_document[None, :])
            acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True, ACC,
                                            PRECISION)
    for step in range(0, count * (BLOCK // N)):
        entry = tl.load(entries + start + step // (BLOCK // N))
        key = (base + SIGN * entry) * BLOCK + (step % (BLOCK // N)) * N
        k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, False)
        v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, False)
        if DOCUMENTS:
            k_document = tl.load(k_documents + key + columns)
            allowed = q_document[:, None] == k_document[None, :]
            acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True, ACC,
                                            PRECISION)
        else:
            acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, True, scale_log2, False, ACC,
                                            PRECISION)
    store_partial(out, lse, acc, peak, total, batch, head, rows, q_tokens, q_valid, out_b, out_s, out_h, lse_b, lse_h,
                  D, MERGE)
