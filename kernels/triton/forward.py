"""Forward: one program per query tile walks its list of key tiles, and its columns, with one online softmax.

Only the row's own block needs an element mask (causality), blocks that a window cuts, and documents. A launch computes
the block part, the column part, or both: that for which it is given lists. Shape legend: see tiles.py.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from ..index import edges
from .columns import walk_columns
from .tiles import load_documents, load_pair, load_tile, query_step, start_partial, store_partial

EDGES, EDGE_FIELDS = tl.constexpr(edges.EDGES), tl.constexpr(edges.EDGE_FIELDS)


@triton.jit
def place_of(queries, BLOCK: tl.constexpr, M: tl.constexpr):
    """(batch, head, tile, part of the tile) of a program: all tiles of a head together, long rows first."""
    program = tl.program_id(0)
    part = program % (BLOCK // M)
    program = program // (BLOCK // M)
    tile = tl.load(queries.order + program % queries.tiles)
    head = (program // queries.tiles) % queries.heads
    return program // (queries.tiles * queries.heads), head, tile, part


@triton.jit
def walk_keys(state, query, place, k, v, column_k, column_v, at, queries, blocks, columns, scale, GROUP: tl.constexpr,
              BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
              TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The state (see query_step) after all keys of the query tile at `place`: its own block, its list, its columns."""
    AHEAD: tl.constexpr = len(query) == 1  # the forward reads entries one step ahead
    batch, head, tile, part = place
    kv_head, keys = head // GROUP, tl.arange(0, N)
    line = head * queries.tiles + tile
    q_document = tile
    if queries.documents is not None:
        q_document = load_documents(queries, tile * BLOCK + part * M, M, -1)
    if columns.positions is not None:
        # Read long before they are needed, like the entries and words below: nobody waits for them then.
        reach, earlier, end = tl.load(columns.limits + line * 3), 0, 0
        if columns.q_blocks is not None:
            earlier, end = tl.load(columns.limits + line * 3 + 1), tl.load(columns.limits + line * 3 + 2)
    if blocks.fields is not None:
        fields = blocks.fields + line * 4
        start, count, base, diagonal = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
        steps = count * (BLOCK // N)
        if AHEAD:
            entry = tl.load(blocks.entries + start, mask=steps > 0, other=0)
        if diagonal >= 0:
            for n in range(0, ((part + 1) * M + N - 1) // N):
                key = diagonal * BLOCK + n * N
                k_tile, v_tile = load_pair(k, v, at.k, at.v, batch, kv_head, key, blocks.valid, N, D, TMA, True)
                allowed = (n * N + keys)[None, :] <= (part * M + tl.arange(0, M))[:, None]
                if queries.documents is not None:
                    k_document = tl.load(blocks.documents + key + keys, mask=key + keys < blocks.valid, other=-2)
                    allowed = allowed & (q_document[:, None] == k_document[None, :])
                state = query_step(state, query, k_tile, v_tile, allowed, scale, True, ACC, PRECISION)
        if blocks.edges is not None:
            for step in tl.range(0, EDGES * (BLOCK // N), num_stages=1):
                edge = blocks.edges + (line * EDGES + step // (BLOCK // N)) * EDGE_FIELDS
                cut, n = tl.load(edge), step % (BLOCK // N)
                limit, floor = tl.load(edge + 1), tl.load(edge + 2)
                nearest, farthest = part * M - (n + 1) * N + 1, (part + 1) * M - 1 - n * N
                if (cut >= 0) & (nearest < limit) & (farthest >= floor):
                    key = cut * BLOCK + n * N
                    k_tile, v_tile = load_pair(k, v, at.k, at.v, batch, kv_head, key, blocks.valid, N, D, TMA, True)
                    apart = (part * M + tl.arange(0, M))[:, None] - (n * N + keys)[None, :]
                    allowed = (apart >= floor) & (apart < limit)
                    if queries.documents is not None:
                        k_document = tl.load(blocks.documents + key + keys, mask=key + keys < blocks.valid, other=-2)
                        allowed = allowed & (q_document[:, None] == k_document[None, :])
                    state = query_step(state, query, k_tile, v_tile, allowed, scale, True, ACC, PRECISION)
        for step in range(0, steps):
            if not AHEAD:
                entry = tl.load(blocks.entries + start + step // (BLOCK // N))
            key = (base + SIGN * entry) * BLOCK + (step % (BLOCK // N)) * N
            if AHEAD:
                entry = tl.load(blocks.entries + start + (step + 1) // (BLOCK // N), mask=step + 1 < steps, other=0)
            k_tile, v_tile = load_pair(k, v, at.k, at.v, batch, kv_head, key, blocks.valid, N, D, TMA, False)
            allowed = True
            if queries.documents is not None:
                k_document = tl.load(blocks.documents + key + keys)
                allowed = q_document[:, None] == k_document[None, :]
            state = query_step(state, query, k_tile, v_tile, allowed, scale, queries.documents is not None, ACC,
                               PRECISION)
    if columns.positions is not None:
        state = walk_columns(state, query, q_document, column_k, column_v, at, columns, (reach, earlier, end), batch,
                             head, tile, line, part * M, scale, BLOCK, M, N, D, TMA, ACC, PRECISION)
    return state


@triton.jit
def forward_kernel(
    q, k, v, out, prior, column_k, column_v, lse, at, queries, blocks, columns, scale, q_tokens,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Grid (B * H * T * BLOCK / M), see place_of.

    prior, if given: goes on from the partial there (strides of out; may be out itself) and in lse. The rest is in
    views.py: lse Rows, at TileStrides, queries QueryTiles, blocks BlockLists, columns ColumnLists, scale Scale.
    """
    place = place_of(queries, BLOCK, M)
    batch, head, tile, part = place
    first = tile * BLOCK + part * M
    rows = first + tl.arange(0, M)
    q_tile = load_tile(q, at.q, batch, head, first, queries.valid, M, D, TMA, True)
    state = start_partial(prior, at.out, lse, batch, head, first, rows, q_tokens, M, D, TMA, ACC)
    acc, peak, total = walk_keys(state, (q_tile,), place, k, v, column_k, column_v, at, queries, blocks, columns,
                                 scale, GROUP, BLOCK, M, N, D, SIGN, TMA, ACC, PRECISION)
    store_partial(out, at.out, lse, acc, peak, total, batch, head, first, rows, q_tokens, queries.valid, M, D, TMA)
