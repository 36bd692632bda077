"""Block masks: what one head attends to, one bit for every pair of blocks.

Shape legend: N mask blocks of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .sorted import sorted_unique
from .triangle import BITS_SET, Bytes, checked_triangle, ones_of, ones_of_rows, rows_of_triangle

CHECKED_ROWS = 64
NOTHING = np.zeros(0, dtype=np.int32)
NOTHING.flags.writeable = False


class BlockMask:
    """Any causal set of block pairs of one head, and token columns. It has no window.

    bits:    bool [N, N], bits[I, J] for query block I and key block J
    columns: int32 [number of columns], as those of a `VerticalSlash`

    It is kept at a bit for each pair: layers of many heads over long sequences would take gigabytes otherwise.
    """

    __slots__ = ("_blocks", "_counts", "_ones", "_packed_rows", "_triangle", "columns")

    def __init__(self, *, bits: NDArray[np.bool_], columns: Sequence[int] | NDArray[np.integer] = NOTHING) -> None:
        bits = np.asarray(bits, dtype=bool)
        if bits.ndim != 2 or bits.shape[0] != bits.shape[1]:
            raise InputError(f"block bits must be square, not of shape {bits.shape}", field="bits")
        if _attends_later_blocks(bits):
            query, key = np.argwhere(np.triu(bits, 1))[0]
            raise InputError(f"query block {query} must not attend the later key block {key}", field="bits")
        self._blocks, self._packed_rows = bits.shape[0], np.packbits(bits, axis=1)
        self._counts: NDArray[np.int64] | None = None  # of ones in each row, once somebody asked
        self._ones: int | None = None  # of all rows, once somebody asked
        self._triangle: Bytes | None = None
        self.columns: NDArray[np.int32] = sorted_unique(columns, "columns")

    @classmethod
    def of_triangle(cls, data: bytes, blocks: int, columns: Sequence[int] | NDArray[np.integer] = NOTHING) -> BlockMask:
        """Return the mask of bits that `triangle.pack_bits` packed; InputError where there are too few or too many.

        Rows are made of it when they are first asked for: of most masks of a trace only the count is.
        """
        mask = cls.__new__(cls)
        mask._blocks, mask._packed_rows, mask._counts, mask._ones = blocks, None, None, None
        mask._triangle = checked_triangle(data, blocks)
        mask.columns = sorted_unique(columns, "columns")
        return mask

    @property
    def rows(self) -> Bytes:
        """Active block pairs, uint8 [N, bytes]: eight keys of a query block a byte, the first in the highest bit."""
        if self._packed_rows is None:
            assert self._triangle is not None
            self._packed_rows = rows_of_triangle(self._triangle, self._blocks)
        return self._packed_rows

    @property
    def bits(self) -> NDArray[np.bool_]:
        """Active block pairs, bool [N, N]: an array of its own each time."""
        return np.unpackbits(self.rows, axis=1, count=self._blocks).view(bool)

    @property
    def window_tokens(self) -> int:
        """A block mask has no window: always 0."""
        return 0

    @property
    def cut(self) -> NDArray[np.int32]:
        """A block mask has no window whose edge could cut blocks: always empty."""
        return NOTHING

    def check_blocks(self, blocks: int) -> None:
        """Raise InputError unless it is a mask of so many blocks."""
        if self._blocks != blocks:
            raise InputError(f"the mask has {self._blocks} blocks where the sequence has {blocks}", field="bits")

    def block_bits(self, blocks: int) -> NDArray[np.bool_]:
        """Return bool [N, N]: active block pairs."""
        self.check_blocks(blocks)
        return self.bits

    def active_block_pairs(self, blocks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (query blocks, key blocks) of all active causal pairs."""
        self.check_blocks(blocks)
        packed = self.rows.reshape(-1)
        places = np.flatnonzero(packed)  # bytes with any pair: of a sparse mask few
        nth = np.flatnonzero(np.unpackbits(packed[places]).view(bool))
        query, key = np.divmod(8 * places[nth // 8] + nth % 8, 8 * self.rows.shape[1])
        return query, key

    def keys_of_queries(self) -> NDArray[np.int64]:
        """Return int64 [N]: how many key blocks of each query block are active."""
        if self._counts is None:
            self._counts = self._counted_rows()
        return self._counts

    def _counted_rows(self) -> NDArray[np.int64]:
        if self._triangle is not None and self._packed_rows is None:
            return ones_of_rows(self._triangle, self._blocks)
        return BITS_SET(self.rows).sum(axis=1, dtype=np.int64)

    def count_active_blocks(self, blocks: int) -> int:
        """Return the number of active causal block pairs."""
        self.check_blocks(blocks)
        if self._ones is None:
            self._ones = ones_of(self.rows.reshape(-1) if self._triangle is None else self._triangle)
        return self._ones


def _attends_later_blocks(bits: NDArray[np.bool_]) -> bool:
    """Say whether anything above the diagonal is set; strip by strip, since a copy of the half would take longer."""
    strips = range(0, bits.shape[0], CHECKED_ROWS)
    beside = any(bits[first : first + CHECKED_ROWS, first + CHECKED_ROWS :].any() for first in strips)
    return beside or any(
        np.triu(bits[first : first + CHECKED_ROWS, first : first + CHECKED_ROWS], 1).any() for first in strips
    )
