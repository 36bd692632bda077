"""Which (query shard, key shard) pairs can have work at all: the others are neither computed nor sent.

Block pairs that no head of any recorded layer activates (windows), that lie in different documents, or whose keys all
come after their queries, leave whole pairs of shards without work. The pairs belong to the plan, since the schedule
follows from them; whoever replays other patterns is refused when they need more. Columns are gathered apart and do not
count here.

Shape legend: W ranks, N mask blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError
from ...traces.pattern import LayerPattern, VerticalSlash, num_blocks
from .placement import Placement

Bits = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """rows[query part][key part] is "1" where the pair may have work, else "0". A part's own pair is always one."""

    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        world = len(self.rows)
        for query, row in enumerate(self.rows):
            if len(row) != world or set(row) - {"0", "1"}:
                raise InputError(f"row {query} is not {world} times 0 or 1", field="pairs")
            if row[query] != "1":
                raise InputError(f"part {query} must be paired with itself", field="pairs")

    @classmethod
    def of(cls, active: Bits) -> Pairs:
        """Return the pairs that are true in `active` bool [W, W], and every part with itself."""
        digits = (active | np.eye(len(active), dtype=bool)).astype(np.uint8) + ord("0")
        return cls(rows=tuple(row.tobytes().decode() for row in digits))

    @classmethod
    def all_of(cls, world_size: int) -> Pairs:
        """Return every pair of so many parts."""
        return cls(rows=("1" * world_size,) * world_size)

    @property
    def world_size(self) -> int:
        """Number of parts."""
        return len(self.rows)

    @property
    def complete(self) -> bool:
        """Whether no pair is left out."""
        return not any("0" in row for row in self.rows)

    @cached_property
    def matrix(self) -> Bits:
        """bool [query part, key part]."""
        digits = np.frombuffer("".join(self.rows).encode(), dtype=np.uint8)
        return (digits == ord("1")).reshape(self.world_size, self.world_size)

    @cached_property
    def distances(self) -> Bits:
        """bool [key part, d]: whether part (key + d) mod W needs that key part. Rings turn in this direction."""
        key, distance = np.indices((self.world_size,) * 2)
        return self.matrix[(key + distance) % self.world_size, key]

    def between_nodes(self, ranks_per_node: int) -> Bits:
        """bool [query part, key part]: the pairs whose parts lie on different nodes."""
        node = np.arange(self.world_size) // ranks_per_node
        return np.logical_and(self.matrix, node[:, None] != node[None, :])

    def of_nodes(self, ranks_per_node: int) -> Bits:
        """bool [node, key part]: the parts of other nodes that some rank of a node needs."""
        by_node = self.between_nodes(ranks_per_node).reshape(-1, ranks_per_node, self.world_size)
        return np.any(by_node, axis=1)

    def period(self, step: int) -> int:
        """Return the least multiple of `step` by which all parts can be moved on without a change; all, if none."""
        world = self.world_size
        for shift in (one for one in range(step, world, step) if world % one == 0):
            if np.array_equal(self.matrix, np.roll(self.matrix, (shift, shift), axis=(0, 1))):
                return shift
        return world

    def closed(self, step: int) -> Pairs:
        """Return the pairs with all that they are when parts are moved on by multiples of `step`; see `period`."""
        if self.complete:
            return self
        every = np.zeros_like(self.matrix)
        for shift in range(0, self.world_size, step):
            every |= np.roll(self.matrix, (shift, shift), axis=(0, 1))
        return Pairs.of(every)

    def left_out(self) -> frozenset[tuple[int, int]]:
        """Return the (query part, key part) pairs that never have work."""
        return frozenset((int(query), int(key)) for query, key in np.argwhere(~self.matrix))

    def covers(self, needed: Pairs) -> bool:
        """Whether all pairs that `needed` has are here."""
        return not (needed.matrix & ~self.matrix).any()

    def require(self, needed: Pairs, *, about: str) -> None:
        """Raise InputError unless all pairs that `needed` has are here; it names the first that is not."""
        missing = np.argwhere(needed.matrix & ~self.matrix)
        if len(missing):
            query, key = missing[0]
            raise InputError(
                f"{about} activates the queries of rank {query} against the keys of rank {key}, "
                "a pair that the plan leaves out",
                field="pairs",
            )


def causal_pairs(placement: Placement) -> Pairs:
    """Return the pairs in which some key does not come after all queries: what any pattern is bound to."""
    first, last = np.zeros((2, placement.world_size), dtype=np.int64)
    for rank in range(placement.world_size):
        valid = placement.valid_positions(rank)
        first[rank], last[rank] = (valid[0], valid[-1]) if valid.size else (placement.padded_tokens, -1)
    return Pairs.of(first[None, :] <= last[:, None])


def pairs_of_blocks(active: Bits, placement: Placement, *, block_size: int) -> Pairs:
    """Return the pairs that hold an active block pair. active: bool [query block, key block]."""
    owned = np.zeros((placement.world_size, len(active)), dtype=bool)
    for rank in range(placement.world_size):
        owned[rank, placement.valid_positions(rank) // block_size] = True
    reached = np.stack([active[blocks].any(axis=0) for blocks in owned])  # [W, N] key blocks of each rank's queries
    # Counts are whole numbers of at most N, which float32 holds; only of floats are products quick.
    return Pairs.of((reached.astype(np.float32) @ owned.T.astype(np.float32) > 0) & causal_pairs(placement).matrix)


def pattern_pairs(pattern: LayerPattern, placement: Placement) -> Pairs:
    """Return the pairs that a layer's patterns need under a placement."""
    return pairs_of_blocks(active_blocks(pattern), placement, block_size=pattern.block_size)


def active_blocks(pattern: LayerPattern) -> Bits:
    """Return bool [N, N]: the block pairs that any head of the layer activates and that share a document."""
    diagonals = np.zeros(pattern.num_blocks, dtype=bool)
    rows = None  # of bits, eight a byte
    for head in dict.fromkeys(pattern.heads):  # synthetic patterns repeat one head object
        if isinstance(head, VerticalSlash):
            diagonals[head.diagonals] = True
        else:
            rows = head.rows.copy() if rows is None else np.bitwise_or(rows, head.rows, out=rows)
    any_head = bits_of_diagonals(diagonals)
    if rows is not None:
        bits = np.unpackbits(rows, axis=1, count=pattern.num_blocks).view(bool)
        any_head = np.logical_or(bits, any_head, out=bits) if diagonals.any() else bits
    return documents_share(pattern.documents, pattern.block_size, pattern.seq_len_tokens, any_head)


def documents_share(documents: NDArray[np.integer] | None, block_size: int, seq_len_tokens: int, bits: Bits) -> Bits:
    """Return the block pairs of `bits` bool [N, N] that lie in a common document; documents: int [S], or None."""
    if documents is None:
        return bits
    first_token = np.arange(num_blocks(seq_len_tokens, block_size)) * block_size
    last_token = np.minimum(first_token + block_size, seq_len_tokens) - 1
    return bits & (documents[last_token][None, :] >= documents[first_token][:, None])


def bits_of_diagonals(diagonals: Bits) -> Bits:
    """Return bool [N, N], a view, with the block diagonals that are true in `diagonals` bool [N]."""
    blocks = len(diagonals)
    distances = np.concatenate([diagonals[::-1], np.zeros(blocks - 1, dtype=bool)])
    return np.lib.stride_tricks.sliding_window_view(distances, blocks)[::-1]
