"""Counts and pairs of block masks as they are kept, packed, against those of their bits."""

from __future__ import annotations

import numpy as np
import pytest

from sparsering.traces.blocks.mask import BlockMask
from sparsering.traces.blocks.triangle import pack_bits


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 64, 101])
def test_masks_are_counted_as_their_bits_are(blocks: int, share: float) -> None:
    bits = np.tril(np.random.default_rng(blocks).random((blocks, blocks)) < share)
    for mask in (BlockMask(bits=bits), BlockMask.of_triangle(pack_bits(bits), blocks)):
        assert mask.count_active_blocks(blocks) == bits.sum()
        assert np.array_equal(mask.keys_of_queries(), bits.sum(axis=1))
        pairs = mask.active_block_pairs(blocks)
        assert np.array_equal(np.stack(pairs), np.stack(np.nonzero(bits)))
        assert np.array_equal(mask.keys_of_queries(), bits.sum(axis=1))  # now that the rows are there
