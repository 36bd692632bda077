"""Drawn block masks: seeded, causal, as dense as asked; packed and checked without a copy of half the mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsering.traces.blocks.draws import STRIP_ROWS, gated_blocks, wanted_blocks
from sparsering.traces.blocks.mask import CHECKED_ROWS, BlockMask
from sparsering.traces.blocks.triangle import pack_bits, packed_bytes, unpack_bits
from sparsering.traces.errors import InputError


@pytest.mark.parametrize("blocks", [1, 2, STRIP_ROWS - 1, STRIP_ROWS, STRIP_ROWS + 1, 3 * STRIP_ROWS + 5])
@pytest.mark.parametrize("draw", [wanted_blocks, lambda n, d, rng: gated_blocks(n, d, rng, chunk_blocks=3)])
def test_any_length_is_causal_and_seeded(blocks: int, draw) -> None:
    first, again, other = (draw(blocks, 0.2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (blocks, blocks) and first.dtype == bool
    assert np.diag(first).all() and not np.triu(first, 1).any()
    np.testing.assert_array_equal(first, again)
    assert blocks < STRIP_ROWS or not np.array_equal(first, other)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
def test_wanted_blocks_are_as_dense_as_asked_in_the_mean(density: float) -> None:
    blocks = 512
    drawn = [wanted_blocks(blocks, density, np.random.default_rng(seed)).sum() for seed in range(8)]
    assert np.mean(drawn) / (blocks * (blocks + 1) / 2) == pytest.approx(density, rel=0.12)


def test_a_gate_takes_each_chunk_by_its_rate_and_whole() -> None:
    """Every chunk that lies wholly before a query block is kept or left as one, equally many of them in all rows."""
    bits = gated_blocks(400, 0.15, np.random.default_rng(5), chunk_blocks=4)
    chunks = bits.reshape(400, 100, 4)
    before = np.arange(100)[None, :] < (np.arange(400) // 4)[:, None]
    assert (chunks.any(2) == chunks.all(2))[before].all()
    kept = chunks.any(2).sum(1)
    np.testing.assert_array_equal(kept, np.minimum(kept.max(), np.arange(400) // 4 + 1))
    popular = chunks[200:, :50].any(2).mean(0)
    assert popular.std() > 3 * np.sqrt(popular.mean() / 200), "some chunks are wanted far more than others"


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packed_bits_come_back(blocks: int, seed: int) -> None:
    bits = np.tri(blocks, dtype=bool) & (np.random.default_rng(seed).random((blocks, blocks)) < 0.4)
    packed = pack_bits(bits)
    assert len(packed) == packed_bytes(blocks)
    assert packed == np.packbits(bits[np.tri(blocks, dtype=bool)]).tobytes()
    np.testing.assert_array_equal(unpack_bits(packed, blocks), bits)


@pytest.mark.parametrize("query, key", [(0, 1), (CHECKED_ROWS - 1, CHECKED_ROWS), (3, 150), (100, 101), (148, 149)])
def test_a_later_key_block_is_found_wherever_it_is(query: int, key: int) -> None:
    bits = np.tri(151, dtype=bool)
    BlockMask(bits=bits)
    bits[query, key] = True
    with pytest.raises(InputError, match=f"query block {query} must not attend the later key block {key}"):
        BlockMask(bits=bits)
