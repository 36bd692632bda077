"""Placements: which rank owns which tokens.

A placement permutes the sequence in units of `granularity_tokens`; every rank owns equally many units, the same for all
layers. The tail of the last unit may lie beyond the sequence: such padding positions attend nothing.
On a rank, tokens always lie in ascending order of position.

Shape legend: W ranks, U units per rank, S tokens per rank (U * granularity_tokens).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError
from .evening import evened


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Ownership of the sequence. units: int64 [W, U], ascending unit numbers of each rank."""

    name: str
    seq_len_tokens: int
    granularity_tokens: int
    units: NDArray[np.int64]

    def __post_init__(self) -> None:
        units = np.asarray(self.units, dtype=np.int64)
        if units.ndim != 2 or self.granularity_tokens < 1:
            raise InputError(f"needs units [ranks, units per rank], not shape {units.shape}", field="units")
        if not np.array_equal(np.sort(units, axis=None), np.arange(units.size)):
            raise InputError("every unit must be owned by exactly one rank", field="units")
        if units.size * self.granularity_tokens < self.seq_len_tokens:
            raise InputError(f"{units.size} units do not cover {self.seq_len_tokens} tokens", field="units")
        units = np.sort(units, axis=1)
        units.flags.writeable = False
        object.__setattr__(self, "units", units)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.units.shape[0]

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one shard, padding included."""
        return self.units.shape[1] * self.granularity_tokens

    @property
    def padded_tokens(self) -> int:
        """Tokens of the padded sequence."""
        return self.units.size * self.granularity_tokens

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Return int64 [S]: global token positions owned by `rank`, ascending; those >= seq_len_tokens are padding."""
        start = self.units[rank][:, None] * self.granularity_tokens
        return (start + np.arange(self.granularity_tokens)).reshape(-1)

    def valid_positions(self, rank: int) -> NDArray[np.int64]:
        """Return int64 [at most S]: the positions owned by `rank` without padding, ascending."""
        positions = self.positions(rank)
        return positions[positions < self.seq_len_tokens]

    def permutation(self) -> NDArray[np.int64]:
        """Return int64 [W * S]: the rank-major order of all token positions."""
        return np.concatenate([self.positions(rank) for rank in range(self.world_size)])

    def owner_of_units(self) -> NDArray[np.int64]:
        """Return int64 [W * U]: the rank that owns each unit."""
        owner = np.empty(self.units.size, dtype=np.int64)
        owner[self.units] = np.arange(self.world_size)[:, None]
        return owner

    def owner_of_tokens(self) -> NDArray[np.int64]:
        """Return int64 [padded_tokens]: the rank that owns each token position."""
        return np.repeat(self.owner_of_units(), self.granularity_tokens)


def contiguous(*, seq_len_tokens: int, world_size: int, granularity_tokens: int) -> Placement:
    """Rank r owns the r-th stretch of the sequence."""
    count = _units_per_rank(seq_len_tokens, world_size, granularity_tokens)
    units = np.arange(world_size * count).reshape(world_size, count)
    return Placement(
        name="contiguous", seq_len_tokens=seq_len_tokens, granularity_tokens=granularity_tokens, units=units
    )


def zigzag(*, seq_len_tokens: int, world_size: int, granularity_tokens: int) -> Placement:
    """Rank r owns stretches r and 2W-1-r of 2W: balanced for dense causal attention."""
    half = _units_per_rank(seq_len_tokens, 2 * world_size, granularity_tokens)
    stretch = np.arange(2 * world_size * half).reshape(2 * world_size, half)
    units = np.concatenate([stretch[:world_size], stretch[::-1][:world_size]], axis=1)
    return Placement(name="zigzag", seq_len_tokens=seq_len_tokens, granularity_tokens=granularity_tokens, units=units)


def striped(*, seq_len_tokens: int, world_size: int, granularity_tokens: int) -> Placement:
    """Rank r owns units r, r + W, r + 2W, …: token striping at granularity 1, block striping at the block size."""
    count = _units_per_rank(seq_len_tokens, world_size, granularity_tokens)
    units = np.arange(world_size * count).reshape(count, world_size).T
    return Placement(name="striped", seq_len_tokens=seq_len_tokens, granularity_tokens=granularity_tokens, units=units)


def balanced(
    *, seq_len_tokens: int, world_size: int, granularity_tokens: int, unit_load: NDArray[np.floating | np.integer]
) -> Placement:
    """Longest processing time first with equal counts: heaviest units first, each to the least loaded rank with room.

    Then units change ranks as long as the busiest gets less to do (`evened`). unit_load: work of each unit of the
    padded sequence as queries (any unit of work); missing tail units weigh 0. Ties go to the lower unit and the lower
    rank, so that the result is a function of the loads alone.
    """
    count = _units_per_rank(seq_len_tokens, world_size, granularity_tokens)
    load = np.zeros(world_size * count)
    if unit_load.size > load.size:
        raise InputError(f"has {unit_load.size} entries for {load.size} units", field="unit_load")
    load[: unit_load.size] = unit_load
    owned: list[list[int]] = [[] for _ in range(world_size)]
    heap = [(0.0, rank) for rank in range(world_size)]
    for unit in np.argsort(-load, kind="stable"):
        total, rank = heapq.heappop(heap)
        owned[rank].append(int(unit))
        if len(owned[rank]) < count:
            heapq.heappush(heap, (total + float(load[unit]), rank))
    return Placement(
        name="balanced",
        seq_len_tokens=seq_len_tokens,
        granularity_tokens=granularity_tokens,
        units=evened(np.array(owned, dtype=np.int64), load),
    )


REGULAR_PLACEMENTS: dict[str, Callable[..., Placement]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}


def _units_per_rank(seq_len_tokens: int, shares: int, granularity_tokens: int) -> int:
    if seq_len_tokens < 1 or shares < 1 or granularity_tokens < 1:
        raise InputError(
            f"needs positive numbers, not {seq_len_tokens} tokens, {shares} shares, granularity {granularity_tokens}",
            field="placement",
        )
    return -(-seq_len_tokens // (shares * granularity_tokens))
