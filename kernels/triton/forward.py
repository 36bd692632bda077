"""Forward: one program per query tile walks its list of key tiles, and its columns, with one online softmax.

Only the row's own block needs an element mask (causality), and documents. A launch computes the block part, the column
part, or both: that for which it is given lists. Shape legend: see tiles.py.
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
    q, k, v, out, prior, column_k, column_v, lse, at, queries, blocks, columns, scale_log2, q_tokens,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M): all of a head's tiles together, long rows first.

    prior, if given: goes on from the partial there (strides of out; may be out itself) and in lse. The rest is in
    views.py: lse Rows, at PartStrides, queries QueryTiles, blocks BlockLists, columns ColumnLists.
    """
    program = tl.program_id(0)
    part = program % (BLOCK // M)
    program = program // (BLOCK // M)
    tile = tl.load(queries.order + program % queries.tiles)
    head = (program // queries.tiles) % queries.heads
    batch = program // (queries.tiles * queries.heads)

    first = tile * BLOCK + part * M
    rows = first + tl.arange(0, M)
    keys = tl.arange(0, N)
    kv_head = head // GROUP
    q_tile = load_tile(q, at.q, batch, head, first, queries.valid, M, D, TMA, True)
    q_document = rows
    if queries.documents is not None:
        q_document = tl.load(queries.documents + rows, mask=rows < queries.valid, other=-1)
    if columns.positions is not None:
        # Read long before they are needed, like the entries and words below: nobody waits for them then.
        line = head * queries.tiles + tile
        reach, earlier, end = tl.load(columns.limits + line * 3), 0, 0
        if columns.q_blocks is not None:
            earlier, end = tl.load(columns.limits + line * 3 + 1), tl.load(columns.limits + line * 3 + 2)

    acc, peak, total = start_partial(prior, at.out, lse, batch, head, first, rows, q_tokens, M, D, TMA, ACC)
    if blocks.fields is not None:
        fields = blocks.fields + (head * queries.tiles + tile) * 4
        start, count, base, diagonal = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
        steps = count * (BLOCK // N)
        entry = tl.load(blocks.entries + start, mask=steps > 0, other=0)
        if diagonal >= 0:
            for n in range(0, ((part + 1) * M + N - 1) // N):
                key = diagonal * BLOCK + n * N
                k_tile = load_tile(k, at.k, batch, kv_head, key, blocks.valid, N, D, TMA, True)
                v_tile = load_tile(v, at.v, batch, kv_head, key, blocks.valid, N, D, TMA, True)
                allowed = (n * N + keys)[None, :] <= (part * M + tl.arange(0, M))[:, None]
                if queries.documents is not None:
                    k_document = tl.load(blocks.documents + key + keys, mask=key + keys < blocks.valid, other=-2)
                    allowed = allowed & (q_document[:, None] == k_document[None, :])
                acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True,
                                                ACC, PRECISION)
        for step in range(0, steps):
            key = (base + SIGN * entry) * BLOCK + (step % (BLOCK // N)) * N
            entry = tl.load(blocks.entries + start + (step + 1) // (BLOCK // N), mask=step + 1 < steps, other=0)
            k_tile = load_tile(k, at.k, batch, kv_head, key, blocks.valid, N, D, TMA, False)
            v_tile = load_tile(v, at.v, batch, kv_head, key, blocks.valid, N, D, TMA, False)
            if queries.documents is not None:
                k_document = tl.load(blocks.documents + key + keys)
                allowed = q_document[:, None] == k_document[None, :]
                acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, allowed, scale_log2, True,
                                                ACC, PRECISION)
            else:
                acc, peak, total = softmax_step(acc, peak, total, q_tile, k_tile, v_tile, True, scale_log2, False, ACC,
                                                PRECISION)
    if columns.positions is not None:
        q_position = rows
        if columns.q_blocks is not None:
            q_position = tl.load(columns.q_blocks + tile) * BLOCK + part * M + tl.arange(0, M)
        acc, peak, total = forward_columns(
            acc, peak, total, q_tile, q_position, q_document, column_k, column_v, at.column_k, at.column_v, columns,
            reach, earlier, end, batch, head, line, scale_log2, N, D, TMA, ACC, PRECISION)
    store_partial(out, at.out, lse, acc, peak, total, batch, head, first, rows, q_tokens, queries.valid, M, D, TMA)
