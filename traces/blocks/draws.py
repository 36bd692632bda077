"""Drawing synthetic block masks: a few rows of blocks at a time, the causal half alone, so that 4,096 blocks are quick.

Shape legend: N mask blocks of the sequence, C key chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

STRIP_ROWS = 128
WEIGHED_ROWS = 128  # rows that the asked density is fitted on
FITTING_ROUNDS = 4
UINT16_VALUES, UINT32_MAX, UINT64_MAX = 1 << 16, (1 << 32) - 1, (1 << 64) - 1


def wanted_blocks(blocks: int, density: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return bool [N, N] as a cumulative threshold leaves it (XAttention, arXiv 2503.16428); `density` of it is active.

    Key blocks differ in how often they are wanted (heavy tail), query blocks in how many they want, near ones are
    wanted more; the first block and the diagonal always stay.
    """
    wanted = rng.pareto(1.5, blocks).astype(np.float32) + np.float32(0.05)
    rows = rng.lognormal(0.0, 0.5, blocks).astype(np.float32)
    rows *= np.float32(_scale(wanted, rows, density * blocks * (blocks + 1) / 2))
    bits = np.zeros((blocks, blocks), dtype=bool)
    for first, stop in _strips(blocks):
        drawn = _drawn_uint16(rng, stop - first, stop)
        # A share above one is always drawn, since the largest value is below UINT16_VALUES.
        share = _nearness(blocks)[first:stop, :stop] * wanted[:stop]
        share *= rows[first:stop, None] * np.float32(UINT16_VALUES)
        np.less(drawn.astype(np.float32), share, out=bits[first:stop, :stop])
    bits[:, 0] = True
    np.fill_diagonal(bits, True)
    return bits


def _drawn_uint16(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint16]:
    """Return uint16 [rows, columns], all values alike likely: four of a drawn number of 64 bits."""
    words = rng.integers(0, UINT64_MAX, -(-rows * columns // 4), dtype=np.uint64, endpoint=True)
    return words.view(np.uint16)[: rows * columns].reshape(rows, columns)


def _scale(wanted: NDArray[np.float32], rows: NDArray[np.float32], asked_pairs: float) -> float:
    """Return the factor under which the probabilities of all pairs, cut at 1, add up to about `asked_pairs`.

    Fitted on some rows, evenly spread. What the cut takes away is given to the other pairs, round by round.
    """
    blocks = rows.size
    some = np.arange(blocks - 1, -1, -max(1, blocks // WEIGHED_ROWS))
    weight = _nearness(blocks)[some] * wanted * rows[some, None]
    pairs_in_all, pairs_weighed = blocks * (blocks + 1) / 2, float((some + 1).sum())
    asked = asked_pairs * pairs_weighed / pairs_in_all
    scale = asked / float(weight.sum())
    for _ in range(FITTING_ROUNDS):
        scale *= asked / float(np.minimum(weight * np.float32(scale), 1).sum())
    return scale


@cache
def _nearness(blocks: int) -> NDArray[np.float32]:
    """Return float32 [N, N]: one over the root of 1 + the distance in blocks; 0 where the key is later. A view."""
    distance = np.arange(blocks - 1, -blocks, -1)
    fall = np.where(distance >= 0, 1 / np.sqrt(1 + np.maximum(distance, 0)), 0).astype(np.float32)
    return np.lib.stride_tricks.sliding_window_view(fall, blocks)[::-1]


def gated_blocks(blocks: int, density: float, rng: np.random.Generator, *, chunk_blocks: int) -> NDArray[np.bool_]:
    """Return bool [N, N] of a gate that keeps the same number of key chunks for every query block, its own among them.

    MoBA's idea (arXiv 2502.13189), by blocks of queries rather than by token. chunk_blocks: mask blocks of a chunk.
    """
    own = np.arange(blocks) // chunk_blocks
    chunks = int(own[-1]) + 1
    kept = _kept_chunks(own, chunk_blocks, density * blocks * (blocks + 1) / 2)
    # The smallest of exponential times, each at a rate of its own: chunks drawn by weight without replacement.
    rates = np.exp(rng.gumbel(size=chunks)).astype(np.float32)
    bits = np.zeros((blocks, chunks * chunk_blocks), dtype=bool)
    for first, stop in _strips(blocks):
        seen = int(own[stop - 1]) + 1
        chosen = _earliest(rng.standard_exponential((stop - first, seen), dtype=np.float32) / rates[:seen],
                           own[first:stop], kept)  # fmt: skip
        whole = seen * chunk_blocks
        bits[first:stop, :whole] = np.repeat(chosen, chunk_blocks, axis=1)
        bits[first:stop, first:whole] &= np.tri(stop - first, whole - first, dtype=bool)
    return bits[:, :blocks]


def _earliest(times: NDArray[np.float32], own: NDArray[np.int64], kept: int) -> NDArray[np.bool_]:
    """Return bool [rows, C]: the own chunk of each row and the earliest of those before it, `kept` together."""
    chunks = np.arange(times.shape[1], dtype=np.uint32)
    causal = chunks <= own[:, None]
    if kept >= chunks.size:
        return causal
    times[np.arange(own.size), own] = 0
    # As whole numbers positive floats keep their order; a chunk's number in the last bits keeps two from being alike.
    number_bits = np.uint32((1 << int(chunks.size - 1).bit_length()) - 1)
    order = (times.view(np.uint32) & ~number_bits) | chunks
    order[~causal] = UINT32_MAX
    last = np.partition(order, kept - 1, axis=1)[:, kept - 1 : kept]
    return (order <= last) & causal


def _kept_chunks(own: NDArray[np.int64], chunk_blocks: int, asked_pairs: float) -> int:
    """Return how many chunks every query block keeps for all of them to have `asked_pairs`, chunks counted whole."""
    alike = np.bincount(own)  # query blocks whose own chunk is the first, the second and so on
    later = alike[::-1].cumsum()[::-1]  # those that have that many chunks or more: what one more chunk adds
    return 1 + int(np.searchsorted(later.cumsum()[:-1] * chunk_blocks, asked_pairs))


def _strips(blocks: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last but one row of each strip."""
    return ((first, min(first + STRIP_ROWS, blocks)) for first in range(0, blocks, STRIP_ROWS))
