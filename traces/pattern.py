"""What a query head may attend to: the one definition that reference, kernels, simulator and statistics share.

Query token i (block I = i // block_size) attends key token j (block J) iff both are valid (< seq_len_tokens), j <= i,
document(j) == document(i) where documents are given, and one of these holds for that head: the block pair (I, J) is
active and not cut, i - j is less than its window, or j is one of its columns. A `VerticalSlash` activates (I, J) when
I - J is one of its diagonals, and cuts it when it is one of `cut`; a `BlockMask` activates by a bit, and has no window.
Columns obey documents: a column is attended by later tokens of its own. The layer's anchors, first tokens that are
columns of every head, are attended from all documents.

Block pairs that are cut count as active ones wherever work is counted: kernels compute them whole and mask them.

Shape legend: N mask blocks of the sequence, S tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .blocks.mask import NOTHING, BlockMask
from .blocks.sorted import sorted_unique
from .errors import InputError

BLOCK_SIZES = (64, 128)
MOST_EDGES = 2  # block diagonals that a window's edge can cross
MAX_WINDOW_TOKENS = int(np.iinfo(np.int32).max)


def num_blocks(seq_len_tokens: int, block_size: int) -> int:
    """Return how many mask blocks cover the sequence; the last one may be ragged."""
    return -(-seq_len_tokens // block_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class VerticalSlash:
    """Token columns, block diagonals and a sliding window of one head; `windowed` makes those with a window.

    columns:       int32 [number of columns], key token positions that every later query attends
    diagonals:     int32 [number of diagonals], values of (query block - key block): all that are computed
    window_tokens: query i attends key j where 0 <= i - j < window_tokens; 0: no window
    cut:           int32 [at most 2], those of `diagonals` that are there for the window's edge alone: on them
                   only pairs nearer than window_tokens are attended
    All lists are sorted and without repeats. Heads are compared as objects, never by some of their contents.
    """

    columns: NDArray[np.int32]
    diagonals: NDArray[np.int32]
    window_tokens: int = 0
    cut: NDArray[np.int32] = field(default_factory=lambda: NOTHING)

    def __post_init__(self) -> None:
        for name in ("columns", "diagonals", "cut"):
            object.__setattr__(self, name, sorted_unique(getattr(self, name), name))
        object.__setattr__(self, "window_tokens", _checked_window(self.window_tokens))

    @property
    def whole(self) -> NDArray[np.int32]:
        """The diagonals whose blocks are attended whole: all that are not cut."""
        return np.setdiff1d(self.diagonals, self.cut, assume_unique=True)

    def block_bits(self, blocks: int) -> NDArray[np.bool_]:
        """Return bool [N, N]: active block pairs (columns excluded, cut ones included), causal half only."""
        distance = np.arange(blocks)[:, None] - np.arange(blocks)[None, :]
        active = np.zeros(blocks + 1, dtype=bool)
        active[self.diagonals[self.diagonals < blocks]] = True
        return active[np.where(distance >= 0, distance, blocks)]

    def count_active_blocks(self, blocks: int) -> int:
        """Return the number of active causal block pairs."""
        return int(np.maximum(blocks - self.diagonals.astype(np.int64), 0).sum())


HeadPattern: TypeAlias = VerticalSlash | BlockMask


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPattern:
    """The patterns of all query heads of one layer over one sequence.

    seq_len_tokens: valid tokens (may end inside a block)
    block_size:     tokens of a mask block
    heads:          one pattern per query head
    documents:      int32 [S] document of each token, or None; non-decreasing
    anchor_tokens:  how many of the first document's first tokens are attended from all documents; columns of every head
    """

    seq_len_tokens: int
    block_size: int
    heads: tuple[HeadPattern, ...]
    documents: NDArray[np.int32] | None = None
    anchor_tokens: int = 0

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
        self._check_anchors()

    def _check_anchors(self) -> None:
        anchors, ids = self.anchor_tokens, self.documents
        first = 0 if ids is None else int(np.searchsorted(ids, ids[0], side="right"))
        if not 0 <= anchors <= first:
            raise InputError(f"is {anchors}; the first packed document has {first} tokens", field="anchor_tokens")
        for number, head in enumerate(self.heads):
            if not np.array_equal(head.columns[:anchors], np.arange(anchors)):
                raise InputError(f"is {anchors}, which are not all columns of head {number}", field="anchor_tokens")

    def _check_head(self, number: int, head: HeadPattern) -> None:
        limits = {"column": (self.seq_len_tokens, "tokens")}
        if isinstance(head, BlockMask):
            head.check_blocks(self.num_blocks)
        else:
            limits["diagonal"] = (self.num_blocks, "blocks")
        for name, (limit, unit) in limits.items():
            values = getattr(head, f"{name}s")
            if values.size and values[-1] >= limit:
                raise InputError(f"head {number} has {name} {values[-1]} in {limit} {unit}", field=f"{name}s")
        if isinstance(head, BlockMask):
            return
        if problem := window_problem(
            head.window_tokens, head.diagonals, head.cut, block_size=self.block_size, blocks=self.num_blocks
        ):
            raise InputError(f"head {number} {problem.told}", field=problem.field)

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


def has_windows(pattern: LayerPattern) -> bool:
    """Whether any head has a sliding window, exact to the token."""
    return any(head.window_tokens for head in pattern.heads)


def lists_blocks(pattern: LayerPattern) -> bool:
    """Whether any head's active blocks are no diagonals, but listed one by one."""
    return any(isinstance(head, BlockMask) for head in pattern.heads)


def element_mask(pattern: LayerPattern, head: int) -> NDArray[np.bool_]:
    """Return bool [S, S], the definition above written out for one head. For small sequences: it is quadratic."""
    of_head, tokens = pattern.heads[head], np.arange(pattern.seq_len_tokens)
    block, distance = tokens // pattern.block_size, tokens[:, None] - tokens[None, :]
    allowed = of_head.block_bits(pattern.num_blocks)[block[:, None], block[None, :]]
    allowed &= ~np.isin(block[:, None] - block[None, :], of_head.cut)
    allowed |= distance < of_head.window_tokens
    allowed[:, of_head.columns] = True
    allowed &= distance >= 0
    if pattern.documents is not None:
        allowed &= pattern.documents[:, None] == pattern.documents[None, :]
        allowed[:, : pattern.anchor_tokens] |= distance[:, : pattern.anchor_tokens] >= 0
    return allowed


def dense(*, seq_len_tokens: int, block_size: int, heads: int) -> LayerPattern:
    """Return full causal attention: every diagonal active, no columns."""
    diagonals = np.arange(num_blocks(seq_len_tokens, block_size), dtype=np.int32)
    head = VerticalSlash(columns=np.zeros(0, np.int32), diagonals=diagonals)
    return LayerPattern(seq_len_tokens=seq_len_tokens, block_size=block_size, heads=(head,) * heads)


def window_diagonals(window_tokens: int, block_size: int, blocks: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the diagonals of a sequence of so many blocks that lie wholly in a window, and those its edge cuts.

    Diagonal d of blocks of b tokens holds tokens d * b - (b - 1) to d * b + b - 1 apart, so the edge cuts at most
    MOST_EDGES from w // b on. kernels/window.py has the same in torch's tensors: kernels take none of our types.
    """
    if not window_tokens:
        return np.arange(0, dtype=np.int32), np.arange(0, dtype=np.int32)
    inside = min(window_tokens // block_size, blocks)
    end = min((window_tokens + block_size - 2) // block_size + 1, blocks)
    return np.arange(inside, dtype=np.int32), np.arange(inside, end, dtype=np.int32)


def windowed(
    window_tokens: int,
    *,
    block_size: int,
    blocks: int,
    columns: Sequence[int] | NDArray[np.integer] = (),
    diagonals: Sequence[int] | NDArray[np.integer] = (),
) -> VerticalSlash:
    """Return a head with a sliding window, and columns and whole block diagonals beside it, in normal form.

    Its `diagonals` are those given and all that the window touches; its `cut` those at the window's edge that were not
    given, for those are attended whole. A window beyond the last block is one up to it, which means the same.
    """
    window_tokens = min(_checked_window(window_tokens), blocks * block_size)
    whole, edges = window_diagonals(window_tokens, block_size, blocks)
    given = sorted_unique(diagonals, "diagonals")
    return VerticalSlash(
        columns=sorted_unique(columns, "columns"),
        diagonals=np.union1d(given, np.concatenate([whole, edges])),
        window_tokens=window_tokens,
        cut=np.setdiff1d(edges, given),
    )


class WindowProblem(NamedTuple):
    """Which field of a head does not fit its window, and how."""

    field: str
    told: str


def window_problem(
    window_tokens: int, diagonals: NDArray[np.int32], cut: NDArray[np.int32], *, block_size: int, blocks: int
) -> WindowProblem | None:
    """Return the first thing that does not fit between a head's window, diagonals and cut; None where all do."""
    if not window_tokens and not cut.size:  # most heads: none of what follows is worked out for them
        return None
    if window_tokens > blocks * block_size:
        return WindowProblem("window_tokens", f"has {window_tokens}, which {blocks} blocks of {block_size} do not hold")
    whole, edges = window_diagonals(window_tokens, block_size, blocks)
    if (odd := np.setdiff1d(cut, edges)).size:
        why = (
            f"which the edge of a window of {window_tokens} tokens does not cross" if window_tokens else "but no window"
        )
        return WindowProblem("cut", f"has {odd[0]}, {why}")
    if (odd := np.setdiff1d(cut, diagonals)).size:
        return WindowProblem("cut", f"has {odd[0]}, which is none of its diagonals")
    if (missing := np.setdiff1d(np.concatenate([whole, edges]), diagonals)).size:
        return WindowProblem("diagonals", f"lacks {missing[0]}, which a window of {window_tokens} tokens reaches")
    return None


def _checked_window(window_tokens: int) -> int:
    """Return the window as an int. InputError unless it is a whole number that int32 holds and not negative."""
    if isinstance(window_tokens, bool) or not isinstance(window_tokens, int | np.integer):
        raise InputError(f"must be a whole number, not {window_tokens!r}", field="window_tokens")
    if not 0 <= window_tokens <= MAX_WINDOW_TOKENS:
        raise InputError(f"must be from 0 to {MAX_WINDOW_TOKENS}, not {window_tokens}", field="window_tokens")
    return int(window_tokens)


def _checked_documents(documents: NDArray[np.integer], seq_len_tokens: int) -> NDArray[np.int32]:
    array = np.asarray(documents)
    if array.shape != (seq_len_tokens,):
        raise InputError(f"needs one entry per token ({seq_len_tokens}), has shape {array.shape}", field="documents")
    if not np.issubdtype(array.dtype, np.integer) or (np.diff(array) < 0).any():
        raise InputError("must be whole numbers that never decrease along the sequence", field="documents")
    return array.astype(np.int32)
