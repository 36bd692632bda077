"""What selectors need of packed documents, found out before any work: where they begin, and room for their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...kernels.select.registry import Selector
from ...traces.errors import UnsupportedError

# Of each packed document of the data: its sequence, its first token in that, and how many tokens; int64 [documents].
Packed: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

FIELD = "data.documents.attention"


def require_blocks(selectors: Sequence[Selector], packed: Packed, *, block_size: int) -> None:
    """Raise UnsupportedError, naming the first, where a document must begin with a mask block and does not."""
    for one in selectors:
        limit = one.most_tokens_anywhere(block_size)
        if limit is None:
            continue
        wrong = np.flatnonzero((packed[1] % block_size != 0) & (packed[2] > limit))
        if wrong.size:
            sequence, first, tokens = (int(values[wrong[0]]) for values in packed)
            raise UnsupportedError(
                f"{one.name!r} chooses for a document as if it were alone, which needs whole blocks of {block_size}; "
                f"{wrong.size:,} begin within one, the first, of {tokens:,} tokens, at token {first:,} of sequence "
                f"{sequence}: write the data with `sparsering data --align {block_size}`",
                field=FIELD,
            )


def columns_needed(selectors: Sequence[Selector], packed: Packed, *, block_size: int) -> int:
    """Return the most columns that any selector may choose for a head in any of the packed sequences."""
    return max((int(_by_sequence(one, packed, block_size).max(initial=0)) for one in selectors), default=0)


def require_columns(selectors: Sequence[Selector], packed: Packed, *, block_size: int, columns_capacity: int) -> None:
    """Raise UnsupportedError, naming the first sequence, where columns of its documents might not have room."""
    for one in selectors:
        needed = _by_sequence(one, packed, block_size)
        wrong = np.flatnonzero(needed > columns_capacity)
        if wrong.size:
            raise UnsupportedError(
                f"{one.name!r} may choose {int(needed[wrong[0]]):,} columns for the documents of sequence {wrong[0]}; "
                f"the plan has room for {columns_capacity:,} (columns_capacity)",
                field=FIELD,
            )


def _by_sequence(selector: Selector, packed: Packed, block_size: int) -> NDArray[np.int64]:
    """Return int64 [sequences]: how many columns a head may get at most."""
    sequence, first, tokens = packed
    return np.bincount(sequence, weights=selector.most_columns_of(first, tokens, block_size)).astype(np.int64)
