"""Toeplitz lists where blocks are owned in stripes: a few lists per head, whatever the number of rows and shards.

Blocks repeat with a period of P: a shard (or several gathered ones, laid one after the other) holds, of every period,
the same `step` blocks, so that local tile(J) = offset[J mod P] + step * (J div P). A query block I = P a + x sees, d
diagonals back, J = I - d, whose residue depends on (x, d) alone; so does tile(J) - step * a. Rows with the same x share
one list of these constants, sorted by d, and each visits a prefix of it: the diagonals d <= I. For keys (transposed)
the same with I = J + d, and the prefix d < blocks - J.

Of several gathered shards a row should visit one after the other. Rows computed at the same time are neighbours in a
shard, P blocks apart: what one of them reads of a key shard, another one reads a step later where the list goes on in
the same shard, and some P steps later where it goes by d, long after the L2 cache has lost it (a fifth of the forward
at 512K tokens, docs/measured/rank.md). But then a row's diagonals d <= I are no prefix. So there is a list for each of
several stretches of queries: first, shard by shard, all diagonals that reach no further back than to the beginning
of the stretch, which all its rows visit; then the others by d, of which each row visits a prefix. Shards come in the
opposite of their order in memory, so that tiles fall throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SECTIONS = 16  # stretches, where rows are of one class
FEWEST_SECTIONS = 4


@dataclass(frozen=True, kw_only=True)
class PeriodicTables:
    """What does not depend on the mask. C classes: the distinct residues of the rows' blocks; N blocks.

    constant int32 [C, N]: tile - step * a of the block that diagonal d leads to; present bool [C, N]: whether it is
    here, d = 0 excepted; row_class, base int32 [T]: each row's class, and step * a. by_shard int32 [C, N]: all
    diagonals, shard after shard, and by d in each; None for lists by d alone.
    """

    constant: Tensor
    present: Tensor
    row_class: Tensor
    base: Tensor
    by_shard: Tensor | None

    @property
    def sections(self) -> int:
        """Stretches of rows that have lists of their own."""
        return 1 if self.by_shard is None else sections_of(self.constant.shape[0])


def sections_of(classes: int) -> int:
    """Return how many stretches of gathered rows have lists: fewer of many classes, whose lists take as much each."""
    return max(SECTIONS // classes, FEWEST_SECTIONS)


def periodic_tables(
    rows: np.ndarray, others: np.ndarray, *, blocks: int, transposed: bool, device: torch.device
) -> PeriodicTables | None:
    """Return the tables for rows and others (int64 mask blocks of local tiles), or None where there is no period.

    blocks: N of the mask; rows beyond are padding. Reads no device memory.
    """
    found = _period(others, blocks)
    if found is None or not len(rows):
        return None
    period, step, offset = found
    residues, row_class = np.unique(rows % period, return_inverse=True)
    diagonals = np.arange(blocks)
    distance = residues[:, None] + (diagonals if transposed else -diagonals)
    residue = distance % period
    constant = offset[residue] + step * ((distance - residue) // period)
    present = (offset[residue] >= 0) & (diagonals > 0)
    gathered = not transposed and bool((np.diff(others) <= 0).any())
    # Tiles of a shard are neighbours, and fall with d.
    by_shard = np.argsort(-constant, axis=1, kind="stable").astype(np.int32) if gathered else None
    return PeriodicTables(
        constant=torch.from_numpy(constant.astype(np.int32)).to(device),
        present=torch.from_numpy(present).to(device),
        row_class=torch.from_numpy(row_class.reshape(-1).astype(np.int32)).to(device),
        base=torch.from_numpy((step * (rows // period)).astype(np.int32)).to(device),
        by_shard=None if by_shard is None else torch.from_numpy(by_shard).to(device),
    )


def _period(others: np.ndarray, blocks: int) -> tuple[int, int, np.ndarray] | None:
    """Return (period, step, first tile of each residue, -1 where absent), proved for every tile; None if there is none.

    Every residue that is here must be here up to the end of the sequence.
    """
    if not len(others):
        return None
    period = _candidate(others)
    if period is None:
        return None
    offset = np.full(period, -1)
    low = others < period
    offset[others[low]] = np.flatnonzero(low)
    turn, residue = np.divmod(others, period)
    second = np.flatnonzero(turn == 1)
    step = int(second[0] - offset[residue[second[0]]]) if len(second) else 1
    proved = (offset[residue] >= 0).all() and (offset[residue] + step * turn == np.arange(len(others))).all()
    held = np.bincount(residue, minlength=period)
    needed = -(-(blocks - np.arange(period)) // period)  # blocks of each residue in the sequence
    whole = (held[offset >= 0] >= needed[offset >= 0]).all()
    return (period, step, offset) if proved and whole else None


def _candidate(others: np.ndarray) -> int | None:
    """Return the distance after which the first tile's residue comes again in its run of tiles."""
    rising = np.flatnonzero(np.diff(others, append=-1) <= 0)[0] + 1  # the first shard's tiles
    first = others[:rising]
    gaps = np.flatnonzero(np.diff(first) != 1) + 1  # where a stripe ends
    return int(first[gaps[0]] - first[0]) if len(gaps) else None
