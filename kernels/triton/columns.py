"""The column part: dense tiles over the gathered columns, without those that an active block already covers.

A query tile lies in one mask block, so whether a column of an earlier block is *usable* is one bit for the whole tile;
index/columns.py packs these bits, once per choice of columns. Those inside the tile's own block need causality element
by element, but only where the diagonal pair is not active: a second loop, left out (without q_blocks) where the host
knows that every own block is active, as after every selector. The loops are fused behind the block part or run alone.
dK/dV: programs own (head, column tile, chunk of query tiles) and write partial sums that are added up afterwards in a
fixed order: no atomics. Shape legend: see tiles.py.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import grad_kv_step, load_pair, query_step, store_part

# Bits of a word of `usable` (index/columns.py): 64, written out in the kernels.


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
def walk_columns(state, query, q_document, column_k, column_v, at, columns, limits, batch, head, tile, line, first,
                 scale, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
                 ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The state (see query_step) after the head's columns that this query tile may attend.

    columns: views.ColumnLists; line: that of the head and tile in `usable` and `limits`; limits: (reach, earlier, end)
    read there. The tile's rows are `first` and later ones of its mask block.
    """
    reach, earlier, end = limits
    bits = columns.usable + line.to(tl.int64) * columns.words
    word = tl.load(bits)
    for start in range(0, reach, N):
        k, v = load_pair(column_k, column_v, at.column_k, at.column_v, batch, head, start, columns.capacity, N, D, TMA,
                         True)
        allowed = usable_columns(word, start, N)[None, :]
        word = tl.load(bits + (start + N) // 64)
        if columns.documents is not None:
            same = same_document(columns, head, start, q_document, N)
            allowed = allowed & same
            if columns.anchors is not None:  # padding, whose document is negative, attends nothing
                anchor = (start + tl.arange(0, N)) < columns.anchors
                allowed = allowed | (anchor[None, :] & (q_document >= 0)[:, None] & (same == 0))
        state = query_step(state, query, k, v, allowed, scale, True, ACC, PRECISION)
    if columns.q_blocks is not None:
        positions = columns.positions + head * columns.capacity
        if end > earlier:  # columns of the tile's own block: causal element by element
            position = tl.load(columns.q_blocks + tile) * BLOCK + first + tl.arange(0, M)
            if columns.windows is not None:  # or of the blocks that its window cuts, those before the window
                position -= tl.load(columns.windows + head)
            bound = columns_up_to(positions, earlier, end, position)
            for start in tl.range(earlier // N * N, end, N, num_stages=1):
                k, v = load_pair(column_k, column_v, at.column_k, at.column_v, batch, head, start, columns.capacity, N,
                                 D, TMA, True)
                slots = start + tl.arange(0, N)
                allowed = (slots >= earlier)[None, :] & (slots[None, :] < bound[:, None])
                if columns.documents is not None:
                    allowed = allowed & same_document(columns, head, start, q_document, N)
                state = query_step(state, query, k, v, allowed, scale, True, ACC, PRECISION)
    return state


@triton.jit
def same_document(columns, head, start, q_document, N: tl.constexpr):
    """bool [M, N]: the column is of the row's document."""
    slots = start + tl.arange(0, N)
    documents = tl.load(columns.documents + head * columns.capacity + slots, mask=slots < columns.capacity, other=-2)
    return q_document[:, None] == documents[None, :]


@triton.jit
def column_grad_kv_kernel(
    q, column_k, column_v, grad_out, row_values, grad_k, grad_v, at, queries, columns, chunks, scale, padded,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (column tiles, B * H, chunks): writes grad_k, grad_v [chunks * B * H, C, D], unshared.

    at: views.TileStrides; queries: QueryTiles; columns: ColumnLists with q_blocks; chunks: ColumnChunks; scale: Scale.
    """
    column_tile = tl.program_id(0)
    head = tl.program_id(1) % queries.heads
    batch = tl.program_id(1) // queries.heads
    chunk = tl.program_id(2)

    start = column_tile * N
    slots = start + tl.arange(0, N)
    k_tile, v_tile = load_pair(column_k, column_v, at.column_k, at.column_v, batch, head, start, columns.capacity, N, D,
                               TMA, True)
    document = slots
    if columns.documents is not None:
        inside = slots < columns.capacity
        document = tl.load(columns.documents + head * columns.capacity + slots, mask=inside, other=-2)
    low = tl.maximum(chunk * chunks.chunk_tiles, tl.load(chunks.first_tile + head * chunks.column_tiles + column_tile))
    high = tl.minimum((chunk + 1) * chunks.chunk_tiles, queries.tiles)

    anchors = None
    if columns.anchors is not None:
        anchors = slots < columns.anchors
    k_acc = tl.zeros([N, D], ACC)
    v_acc = tl.zeros([N, D], ACC)
    for step in range(low * (BLOCK // M), high * (BLOCK // M)):
        tile = tl.cast(head * queries.tiles + step // (BLOCK // M), tl.int64)
        word = tl.load(columns.usable + tile * columns.words + start // 64)
        allowed = usable_columns(word, start, N)[:, None]
        k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, padded, at, queries, batch,
                                    head, step * M, document, allowed, scale, True, M, D, TMA, ACC, PRECISION, anchors)
    # Few heads, if any, have columns in own blocks that are inactive.
    low = chunk * chunks.chunk_tiles
    last = tl.where(tl.load(chunks.has_own + head) != 0, high, low)
    for step in tl.range(low * (BLOCK // M), last * (BLOCK // M), num_stages=1):
        limit = columns.limits + (head * queries.tiles + step // (BLOCK // M)) * 3
        earlier, end = tl.load(limit + 1), tl.load(limit + 2)
        if (end > earlier) & (end > start) & (earlier < start + N):
            position = tl.load(columns.positions + head * columns.capacity + slots,
                               mask=(slots >= earlier) & (slots < end), other=2147483647)
            first = tl.load(columns.q_blocks + step // (BLOCK // M)) * BLOCK + (step % (BLOCK // M)) * M
            if columns.windows is not None:
                first -= tl.load(columns.windows + head)
            allowed = position[:, None] <= (first + tl.arange(0, M))[None, :]
            k_acc, v_acc = grad_kv_step(k_acc, v_acc, k_tile, v_tile, q, grad_out, row_values, padded, at, queries,
                                        batch, head, step * M, document, allowed, scale, True, M, D, TMA, ACC,
                                        PRECISION)
    part = (chunk * (tl.num_programs(1) // queries.heads) + batch) * queries.heads + head
    store_part(grad_k, k_acc, part, start, columns.capacity, N, D, TMA)
    store_part(grad_v, v_acc, part, start, columns.capacity, N, D, TMA)
