"""Forward: one program per query tile walks its list of key tiles, and its columns, with one online softmax.

Only the row's own block needs an element mask (causality), and documents. BLOCKS and COLUMNS say which of the two parts
a launch computes. Shape legend: see tiles.py.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .columns import forward_columns
from .tiles import load_tile, softmax_step, start_partial, store_partial


@triton.jit
def forward_kernel(
    q, k, v, out, prior, lse, row_fields, entries, order, q_documents, k_documents,
    column_k, column_v, columns, usable, limits, q_blocks, column_documents, scale_log2,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, out_b, out_s, out_h, lse_b, lse_h, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s,
    heads, tiles, q_tokens, q_valid, k_valid, capacity, words,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr, DOCUMENTS: tl.constexpr, TMA: tl.constexpr,
    MERGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M): all of a head's tiles together, long rows first.

    MERGE: goes on from the partial in `prior` (strides of out; may be out itself) and lse.
    """
    program = tl.program_id(0)
    part = program % (BLOCK // M)
    program = program // (BLOCK // M)
    tile = tl.load(order + program % tiles)
    head = (program // tiles) % heads
    batch = program // (tiles * heads)

    first = tile * BLOCK + part * M
    rows = first + tl.arange(0, M)
    keys = tl.arange(0, N)
    kv_head = head // GROUP
    q_tile = load_tile(q, batch, head, first, q_valid, q_b, q_h, q_s, M, D, TMA, True)
    q_document = rows
    if DOCUMENTS:
        q_document = tl.load(q_documents + rows, mask=rows < q_valid, other=-1)
    if COLUMNS:
        # Read long before they are needed, like the entries and words below: nobody waits for them then.
        line = head * tiles + tile
        reach, earlier, end = tl.load(limits + line * 3), 0, 0
        if OWN:
            earlier, end = tl.load(limits + line * 3 + 1), tl.load(limits + line * 3 + 2)

    acc, peak, total = start_partial(prior, lse, batch, head, first, rows, q_tokens, out_b, out_s, out_h, lse_b, lse_h,
                                     M, D, TMA, MERGE, ACC)
    if BLOCKS:
        fields = row_fields + (head * tiles + tile) * 4
        start, count, base, diagonal = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
        steps = count * (BLOCK // N)
        entry = tl.load(entries + start, mask=steps > 0, other=0)
        if diagonal >= 0:
            for n in range(0, ((part + 1) * M + N - 1) // N):
                key = diagonal * BLOCK + n * N
                k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, True)
                v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, True)
                allowed = (n * N + keys)[None, :] <= (part * M + tl.arange(0, M))[:, None]
                if DOCUMENTS:
                    k_document = tl.load(k_documents + key + keys, mask=key + keys < k_valid, other=-2)
                    allowed = allowed & (q_document[:, None] == k_document[None, :])
                acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True,
                                                ACC, PRECISION)
        for step in range(0, steps):
            key = (base + SIGN * entry) * BLOCK + (step % (BLOCK // N)) * N
            entry = tl.load(entries + start + (step + 1) // (BLOCK // N), mask=step + 1 < steps, other=0)
            k_tile = load_tile(k, batch, kv_head, key, k_valid, k_b, k_h, k_s, N, D, TMA, False)
            v_tile = load_tile(v, batch, kv_head, key, k_valid, v_b, v_h, v_s, N, D, TMA, False)
            if DOCUMENTS:
                k_document = tl.load(k_documents + key + keys)
                allowed = q_document[:, None] == k_document[None, :]
                acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True,
                                                ACC, PRECISION)
            else:
                acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, True, scale_log2, False, ACC,
                                                PRECISION)
    if COLUMNS:
        q_position = tl.load(q_blocks + tile) * BLOCK + part * M + tl.arange(0, M)
        acc, peak, total = forward_columns(
            acc, peak, total, q_tile, q_position, q_document, column_k, column_v, columns, usable, reach, earlier,
            end, column_documents, batch, head, line, ck_b, ck_h, ck_s, cv_b, cv_h, cv_s, capacity, words,
            scale_log2, N, D, OWN, DOCUMENTS, TMA, ACC, PRECISION)
    store_partial(out, lse, acc, peak, total, batch, head, first, rows, q_tokens, q_valid, out_b, out_s, out_h, lse_b,
                  lse_h, M, D, TMA)
