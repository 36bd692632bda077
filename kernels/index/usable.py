"""Which gathered columns a query tile may use, as bits: the kernel behind columns.py.

A query tile lies in one mask block, so whether a column of an earlier block is *usable* is one bit for the whole tile.
Shape legend: H query heads, T query tiles, words of 64 columns each.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def usable_kernel(
    columns,
    active,
    q_blocks,
    usable,
    limits,
    tiles,
    capacity,
    words,
    seq_len,
    blocks,
    BLOCK: tl.constexpr,
    TOEPLITZ: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """usable int64 [H, T, words], and one word more that may be read, with a bit for each column of the head.

    Bit c % 64 of word c // 64 is set if column c lies in an earlier, inactive block. limits int32 [H, T, 3]: one
    past the last column with a bit; how many columns lie before the tile's block; how many before its end if the
    diagonal pair is inactive (else the same number again). Grid (T, H).
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(q_blocks + tile)
    valid_end = tl.where(block < blocks, seq_len, 0)
    reach, earlier, within = 0, 0, 0
    for start in range(0, words * 64, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        positions = tl.load(columns + head * capacity + slots, mask=slots < capacity, other=2147483647)
        column_block = positions // BLOCK
        valid = positions < valid_end
        before = valid & (column_block < block)
        if TOEPLITZ:
            offset = head * blocks + block - column_block
        else:
            offset = (head.to(tl.int64) * blocks + block) * blocks + column_block
        open_pair = tl.load(active + offset, mask=valid & (column_block <= block), other=1) == 0
        bits = tl.reshape((before & open_pair).to(tl.int64) << (slots % 64).to(tl.int64), [CHUNK // 64, 64])
        word = start // 64 + tl.arange(0, CHUNK // 64)
        packed = usable + (head.to(tl.int64) * tiles + tile) * words + word
        tl.store(packed, tl.sum(bits, 1), mask=word < words)
        reach = tl.maximum(reach, tl.max(tl.where(before & open_pair, slots + 1, 0), 0))
        earlier += tl.sum(before.to(tl.int32), 0)
        within += tl.sum((valid & (column_block == block) & open_pair).to(tl.int32), 0)
    line = limits + (head * tiles + tile) * 3
    tl.store(line, reach)
    tl.store(line + 1, earlier)
    tl.store(line + 2, earlier + within)
