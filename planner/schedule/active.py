"""Which block pairs of a head are active, counted by query block, listed, or shared out over ranks.

Block pairs that a window's edge cuts are whole pairs here. Shape legend: W ranks, N mask blocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...traces.pattern import HeadPattern, LayerPattern, VerticalSlash

CONVOLVED_RANKS = 32  # with more of them, a transform each takes longer than going along the diagonals
MOST_COUNTED_PAIRS = 1 << 19  # at a time: 4 MB of places, which stay in a cache
MOST_KEPT_PAIRS = 1 << 20  # of a head: 8 MB
# Pairs of listed heads, kept with their layer: reading a mask's bits takes ten times as long as counting its pairs.
_LISTED: WeakKeyDictionary[LayerPattern, dict[HeadPattern, tuple[NDArray[np.int32], NDArray[np.int32]]]]
_LISTED = WeakKeyDictionary()


def keys_of_queries(pattern: LayerPattern, head: HeadPattern) -> NDArray[np.int64]:
    """Return int64 [N]: how many key blocks of each query block are active and share a document with it.

    Of diagonals without listing any pair: a query block has those that stay in the sequence and in its documents.
    """
    reach = reach_of_queries(pattern)
    if isinstance(head, VerticalSlash):
        return np.searchsorted(head.diagonals, reach, side="right")
    if pattern.documents is None:
        return head.keys_of_queries()
    block = np.arange(pattern.num_blocks)
    return (head.bits & (block[None, :] >= (block - reach)[:, None])).sum(axis=1)


def reach_of_queries(pattern: LayerPattern) -> NDArray[np.int64]:
    """Return int64 [N]: the largest block diagonal on which each query block shares a document with its key block."""
    blocks = np.arange(pattern.num_blocks)
    if pattern.documents is None:
        return blocks
    last_token = np.minimum((blocks + 1) * pattern.block_size, pattern.seq_len_tokens) - 1
    first_document = pattern.documents[blocks * pattern.block_size]
    return blocks - np.searchsorted(pattern.documents[last_token], first_document)


def contents_of(pattern: LayerPattern) -> Hashable:
    """Return what is equal for patterns of one length and block size that make the same work, whatever the placement.

    Diagonals, columns and documents are compared by content; masks that list their blocks are as objects.
    """
    heads = [
        (head.diagonals.tobytes(), head.columns.tobytes()) if isinstance(head, VerticalSlash) else head
        for head in pattern.heads
    ]
    documents = None if pattern.documents is None else reach_of_queries(pattern).tobytes()
    return tuple(heads), documents


def active_pairs(pattern: LayerPattern, head: HeadPattern) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (query blocks, key blocks) of a head's active pairs that share at least one document."""
    reach = reach_of_queries(pattern)
    if isinstance(head, VerticalSlash):
        counts = np.searchsorted(head.diagonals, reach, side="right")
        query = np.repeat(np.arange(pattern.num_blocks), counts)
        nth = np.arange(query.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return query, query - head.diagonals[nth]
    known = _LISTED.setdefault(pattern, {})
    if head not in known:
        query, key = head.active_block_pairs(pattern.num_blocks)
        if pattern.documents is not None:
            shared = query - key <= reach[query]
            query, key = query[shared], key[shared]
        if query.size > MOST_KEPT_PAIRS:
            return query, key
        known[head] = query.astype(np.int32), key.astype(np.int32)
    query, key = known[head]
    return query.astype(np.int64), key.astype(np.int64)


def convolved(
    diagonals: NDArray[np.int32], owner: NDArray[np.int64], *, blocks: int, world: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, of diagonals, int64 [padded N, W] twice: keys on each rank by query block, queries on each by key block.

    Which of a query's keys a rank has is a convolution of the diagonals with the rank's blocks: listing all pairs takes
    several times as long. Sums of ones below 2^20 come out of the transforms whole but for less than a half.
    """
    size = 1 << (2 * blocks - 1).bit_length()
    active = np.zeros(blocks)
    active[diagonals] = 1
    owned = (owner[None, :blocks] == np.arange(world)[:, None]).astype(np.float64)
    spectrum, spectra = np.fft.rfft(active, size), np.fft.rfft(owned, size)
    found = np.zeros((2, len(owner), world), dtype=np.int64)
    found[0, :blocks] = np.rint(np.fft.irfft(spectra * spectrum, size)[:, :blocks]).T
    found[1, :blocks] = np.rint(np.fft.irfft(spectra * spectrum.conj(), size)[:, :blocks]).T
    return found[0], found[1]


def counted_along(
    diagonals: NDArray[np.int32], owner: NDArray[np.int64], *, blocks: int, world: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what `convolved` returns, counted pair by pair.

    The pairs of a diagonal are two slices of the blocks, so their places in a table of (block, rank) are a sum of
    slices: that takes an eighth of what listing them by query does.
    """
    table, rank = np.arange(blocks) * world, owner[:blocks]
    found = np.zeros((2, len(owner) * world), dtype=np.int64)
    for several in _cut(diagonals, blocks):
        places = np.empty((2, int((blocks - several.astype(np.int64)).sum())), dtype=np.int64)
        end = 0
        for diagonal in several.tolist():
            begin, end = end, end + blocks - diagonal
            np.add(table[diagonal:], rank[: blocks - diagonal], out=places[0, begin:end])
            np.add(table[: blocks - diagonal], rank[diagonal:], out=places[1, begin:end])
        for counts, of_them in zip(found, places, strict=True):
            counts += np.bincount(of_them, minlength=counts.size)
    by_query, by_key = found.reshape(2, len(owner), world)
    return by_query, by_key


def _cut(diagonals: NDArray[np.int32], blocks: int) -> list[NDArray[np.int32]]:
    """Cut diagonals into runs of no more than MOST_COUNTED_PAIRS pairs and one diagonal's."""
    pairs = np.cumsum(blocks - diagonals.astype(np.int64))
    return np.split(diagonals, np.flatnonzero(np.diff(pairs // MOST_COUNTED_PAIRS)) + 1)
