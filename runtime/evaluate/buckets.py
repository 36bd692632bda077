"""Values of tokens as means by position, with standard errors over sequences.

Shape legend: N sequences, S tokens of each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .result import Arm, Bucket, Quantity, Reading

FIRST_BUCKET_TOKENS = 1024


def bucket_edges(seq_len_tokens: int, *, first: int = FIRST_BUCKET_TOKENS) -> list[int]:
    """Return where buckets of positions begin, and the end of the last: 0, 1K, 2K, 4K, …, beyond the sequence."""
    edges = [0, first]
    while edges[-1] < seq_len_tokens:
        edges.append(2 * edges[-1])
    return edges


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Which tokens count, and where they stand.

    valid: bool [N, S]; seen: int64 [N, S], how many tokens each could see before it.
    """

    valid: Tensor
    seen: Tensor

    def reading(self, quantity: Quantity, arm: Arm, values: Tensor) -> Reading:
        """Return the mean of values [N, S] over what counts, in all and by bucket of what was seen."""
        edges = bucket_edges(int(self.seen.max()) + 1)
        buckets = []
        for first, until in itertools.pairwise(edges):
            inside = self.valid & (self.seen >= first) & (self.seen < until)
            if inside.any():
                mean, error = _mean(values, inside)
                buckets.append(Bucket(first=first, until=until, tokens=int(inside.sum()), mean=mean, error=error))
        mean, error = _mean(values, self.valid)
        return Reading(quantity=quantity, arm=arm, tokens=int(self.valid.sum()), mean=mean, error=error,
                       buckets=tuple(buckets))  # fmt: skip


def _mean(values: Tensor, inside: Tensor) -> tuple[float, float | None]:
    """Return the mean over what is inside, and its standard error: sequences are what was drawn, tokens are not.

    The error of a ratio of sums over sequences, which may have different numbers of tokens; None for one sequence.
    """
    counts = inside.sum(1).double()
    sums = torch.where(inside, values, 0.0).double().sum(1)
    mean = sums.sum() / counts.sum()
    drawn = int((counts > 0).sum())
    if drawn < 2:
        return float(mean), None
    spread = ((sums - mean * counts) ** 2).sum() * drawn / (drawn - 1)
    return float(mean), float(spread.sqrt() / counts.sum())
