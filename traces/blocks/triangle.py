"""Bits of causal block pairs as traces keep them: the lower triangle, row by row, eight pairs a byte.

Shape legend: N mask blocks of the sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

Bytes = NDArray[np.uint8]
ONES_IN_A_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
BITS_SET = getattr(np, "bitwise_count", ONES_IN_A_BYTE.__getitem__)  # numpy's own since 2.0, ten times as fast

WORD = np.dtype(np.uint64 if hasattr(np, "bitwise_count") else np.uint8)  # what ones are counted in at once


def ones_of(packed: Bytes) -> int:
    """Return how many bits are set."""
    whole = packed.size - packed.size % WORD.itemsize
    words, rest = packed[:whole].view(WORD), packed[whole:]
    return int(BITS_SET(words).sum(dtype=np.int64)) + int(BITS_SET(rest).sum(dtype=np.int64))


def ones_of_rows(triangle: Bytes, blocks: int) -> NDArray[np.int64]:
    """Return int64 [N], how many bits of each row are set, without taking the rows apart.

    Counted are the ones before every row: those of whole bytes, and of the bits that its first byte has from the row
    before.
    """
    row = np.arange(blocks + 1)
    first = row * (row + 1) // 2
    before = np.concatenate([[0], np.cumsum(BITS_SET(triangle), dtype=np.int64)])
    beginning = np.append(triangle, np.uint8(0))[first // 8] >> (8 - first % 8)
    return np.diff(before[first // 8] + BITS_SET(beginning.astype(np.uint8)))


def packed_bytes(blocks: int) -> int:
    """Return the bytes of one head's packed block bits."""
    return -(-(blocks * (blocks + 1) // 2) // 8)


def pack_bits(bits: NDArray[np.bool_]) -> bytes:
    """Return the lower triangle of bool [N, N], row by row, eight pairs a byte, the first in the highest bit."""
    return np.packbits(np.concatenate([row[: number + 1] for number, row in enumerate(bits)])).tobytes()


def checked_triangle(data: bytes, blocks: int) -> Bytes:
    """Return what `pack_bits` made as an array; InputError when the length or the unused last bits are wrong."""
    if len(data) != packed_bytes(blocks):
        problem = f"is {len(data)} bytes, {packed_bytes(blocks)} are needed for {blocks} blocks"
        raise InputError(problem, field="block_bits")
    pairs, triangle = blocks * (blocks + 1) // 2, np.frombuffer(data, dtype=np.uint8)
    if pairs % 8 and triangle[-1] & (0xFF >> pairs % 8):
        raise InputError(f"has bits beyond the {pairs} block pairs", field="block_bits")
    return triangle


def unpack_bits(data: bytes, blocks: int) -> NDArray[np.bool_]:
    """Return bool [N, N] from `pack_bits`; InputError as from `checked_triangle`."""
    return np.unpackbits(rows_of_triangle(checked_triangle(data, blocks), blocks), axis=1, count=blocks).view(bool)


def rows_of_triangle(triangle: Bytes, blocks: int) -> Bytes:
    """Return uint8 [N, bytes]: every row of pairs from a byte of its own on, zeros where the key is later.

    A row begins in the midst of a byte. The whole triangle is shifted to each of the eight places where one can begin,
    and every row is copied from the right one: expanding pairs to bytes would take several times as long.
    """
    shifted = np.zeros((8, triangle.size + 1), dtype=np.uint8)
    shifted[0, :-1] = triangle
    for shift in range(1, 8):
        np.left_shift(triangle, shift, out=shifted[shift, :-1])
        shifted[shift, :-2] |= triangle[1:] >> (8 - shift)
    rows = np.zeros((blocks, -(-blocks // 8)), dtype=np.uint8)
    for row in range(blocks):
        first, size = row * (row + 1) // 2, row // 8 + 1
        rows[row, :size] = shifted[first % 8, first // 8 : first // 8 + size]
    row = np.arange(blocks)
    rows[row, row // 8] &= (0xFF00 >> (row % 8 + 1)).astype(np.uint8)  # what follows in the triangle is the next row's
    return rows
