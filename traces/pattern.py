"""What a query head may attend to: the one definition that reference, kernels, simulator and statistics share.

Query token i (block I = i // block_size) attends key token j (block J) iff both are valid (< seq_len_tokens), j <= i,
document(j) == document(i) where documents are given, and either the block pair (I, J) is active or j is an active
column of that head. A `VerticalSlash` activates (I, J) when I - J is one of its diagonals; a `BlockMask` by a bit.

Shape legend: N mask blocks of the sequence, S tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

BLOCK_SIZES = (64, 128)
CHECKED_ROWS = 64
ONES_IN_A_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def num_blocks(seq_len_tokens: int, block_size: int) -> int:
    """Return how many mask blocks cover the sequence; the last one may be ragged."""
    return -(-seq_len_tokens // block_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class VerticalSlash:
    """Token columns and block diagonals of one head, both sorted and without repeats.

    columns:   int32 [number of columns], key token positions that every later query attends
    diagonals: int32 [number of diagonals], values of (query block - key block)
    """

    columns: NDArray[np.int32]
    diagonals: NDArray[np.int32]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _sorted_unique(self.columns, "columns"))
        object.__setattr__(self, "diagonals", _sorted_unique(self.diagonals, "diagonals"))

    def block_bits(self, blocks: int) -> NDArray[np.bool_]:
        """Return bool [N, N]: active block pairs (columns excluded), causal half only."""
        distance = np.arange(blocks)[:, None] - np.arange(blocks)[None, :]
        active = np.zeros(blocks + 1, dtype=bool)
        active[self.diagonals[self.diagonals < blocks]] = True
        return active[np.where(distance >= 0, distance, blocks)]

    def active_block_pairs(self, blocks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (query blocks, key blocks) of all active causal pairs, columns excluded."""
        counts = np.maximum(blocks - self.diagonals.astype(np.int64), 0)
        diagonal = np.repeat(self.diagonals.astype(np.int64), counts)
        key = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return key + diagonal, key

    def count_active_blocks(self, blocks: int) -> int:
        """Return the number of active causal block pairs."""
        return int(np.maximum(blocks - self.diagonals.astype(np.int64), 0).sum())


class BlockMask:
    """Any causal set of block pairs of one head. bits: bool [N, N], bits[I, J] for query block I and key block J.

    It is kept at a bit for each pair: layers of many heads over long sequences would take gigabytes otherwise.
    """

    __slots__ = ("_blocks", "_rows")

    def __init__(self, *, bits: NDArray[np.bool_]) -> None:
        bits = np.asarray(bits, dtype=bool)
        if bits.ndim != 2 or bits.shape[0] != bits.shape[1]:
            raise InputError(f"block bits must be square, not of shape {bits.shape}", field="bits")
        if _attends_later_blocks(bits):
            query, key = np.argwhere(np.triu(bits, 1))[0]
            raise InputError(f"query block {query} must not attend the later key block {key}", field="bits")
        self._blocks, self._rows = bits.shape[0], np.packbits(bits, axis=1)

    @property
    def bits(self) -> NDArray[np.bool_]:
        """Active block pairs, bool [N, N]: an array of its own each time."""
        return np.unpackbits(self._rows, axis=1, count=self._blocks).view(bool)

    @property
    def columns(self) -> NDArray[np.int32]:
        """A block mask has no columns: always empty."""
        return np.zeros(0, dtype=np.int32)

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
        query, key = np.nonzero(self.block_bits(blocks))
        return query, key

    def count_active_blocks(self, blocks: int) -> int:
        """Return the number of active causal block pairs."""
        self.check_blocks(blocks)
        return int(ONES_IN_A_BYTE[self._rows].sum(dtype=np.int64))


HeadPattern: TypeAlias = VerticalSlash | BlockMask


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPattern:
    """The patterns of all query heads of one layer over one sequence.

    seq_len_tokens: valid tokens (may end inside a block)
    block_size:     tokens of a mask block
    heads:          one pattern per query head
    documents:      int32 [S] document of each token, or None; non-decreasing
    """

    seq_len_tokens: int
    block_size: int
    heads: tuple[HeadPattern, ...]
    documents: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"must be at least 1, not {getattr(self, name)}", field=name)
        if not self.heads:
            raise InputError("a layer needs at least one head", field="heads")
        for number, head in enumerate(self.heads):
            self._check_head(number, head)
        if self.documents is not None:
            object.__setattr__(self, "documents", _checked_documents(self.documents, self.seq_len_tokens))

    def _check_head(self, number: int, head: HeadPattern) -> None:
        if isinstance(head, BlockMask):
            head.check_blocks(self.num_blocks)
            return
        limits = {"column": (self.seq_len_tokens, "tokens"), "diagonal": (self.num_blocks, "blocks")}
        for name, (limit, unit) in limits.items():
            values = getattr(head, f"{name}s")
            if values.size and values[-1] >= limit:
                raise InputError(f"head {number} has {name} {values[-1]} in {limit} {unit}", field=f"{name}s")

    @property
    def num_blocks(self) -> int:
        """Mask blocks of the sequence."""
        return num_blocks(self.seq_len_tokens, self.block_size)

    @property
    def num_heads(self) -> int:
        """Query heads of the layer."""
        return len(self.heads)

    @property
    def max_columns(self) -> int:
        """The largest number of columns of any head."""
        return max(head.columns.size for head in self.heads)

    @property
    def density(self) -> float:
        """Active causal blocks, diagonal blocks whole, over heads * N(N+1)/2; columns excluded."""
        blocks = self.num_blocks
        active = sum(head.count_active_blocks(blocks) for head in self.heads)
        return active / (self.num_heads * blocks * (blocks + 1) / 2)


def lists_blocks(pattern: LayerPattern) -> bool:
    """Whether any head's active blocks are no diagonals, but listed one by one."""
    return any(isinstance(head, BlockMask) for head in pattern.heads)


def element_mask(pattern: LayerPattern, head: int) -> NDArray[np.bool_]:
    """Return bool [S, S], the definition above written out for one head. For small sequences: it is quadratic."""
    tokens = np.arange(pattern.seq_len_tokens)
    block = tokens // pattern.block_size
    allowed = pattern.heads[head].block_bits(pattern.num_blocks)[block[:, None], block[None, :]]
    allowed[:, pattern.heads[head].columns] = True
    allowed &= tokens[None, :] <= tokens[:, None]
    if pattern.documents is not None:
        allowed &= pattern.documents[:, None] == pattern.documents[None, :]
    return allowed


def dense(*, seq_len_tokens: int, block_size: int, heads: int) -> LayerPattern:
    """Return full causal attention: every diagonal active, no columns."""
    diagonals = np.arange(num_blocks(seq_len_tokens, block_size), dtype=np.int32)
    head = VerticalSlash(columns=np.zeros(0, np.int32), diagonals=diagonals)
    return LayerPattern(seq_len_tokens=seq_len_tokens, block_size=block_size, heads=(head,) * heads)


def _attends_later_blocks(bits: NDArray[np.bool_]) -> bool:
    """Say whether anything above the diagonal is set; strip by strip, since a copy of the half would take longer."""
    strips = range(0, bits.shape[0], CHECKED_ROWS)
    beside = any(bits[first : first + CHECKED_ROWS, first + CHECKED_ROWS :].any() for first in strips)
    return beside or any(
        np.triu(bits[first : first + CHECKED_ROWS, first : first + CHECKED_ROWS], 1).any() for first in strips
    )


def _sorted_unique(values: Sequence[int] | NDArray[np.integer], field: str) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"must be a list of integers, not {array.dtype} of shape {array.shape}", field=field)
    if array.size and array.min() < 0:
        raise InputError(f"must not be negative, found {array.min()}", field=field)
    unique = np.unique(array)
    if unique.size != array.size:
        raise InputError(f"must not repeat, found {array.size - unique.size} repeats", field=field)
    result = unique.astype(np.int32)
    result.flags.writeable = False
    return result


def _checked_documents(documents: NDArray[np.integer], seq_len_tokens: int) -> NDArray[np.int32]:
    array = np.asarray(documents)
    if array.shape != (seq_len_tokens,):
        raise InputError(f"needs one entry per token ({seq_len_tokens}), has shape {array.shape}", field="documents")
    if not np.issubdtype(array.dtype, np.integer) or (np.diff(array) < 0).any():
        raise InputError("must be whole numbers that never decrease along the sequence", field="documents")
    return array.astype(np.int32)
