"""How far a shard travels around a ring: to the last place that needs it, its gradients home from there.

A ring has L places. A shard starts at its own place; at distance d it is at place (own + d) mod L.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Tour:
    """One ring. needed: bool [shard, distance], whether the place at that distance computes with the shard.

    first, last: int64 [shard], the least and the largest distance from 1 on that needs it; 0 where none does.
    """

    needed: NDArray[np.bool_]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @classmethod
    def of(cls, needed: NDArray[np.bool_]) -> Tour:
        """Return the tour of a ring of len(needed) places."""
        away = needed.copy()
        away[:, 0] = False
        somewhere = away.any(axis=1)
        return cls(
            needed=needed,
            first=np.where(somewhere, away.argmax(axis=1), 0),
            last=np.where(somewhere, len(away) - 1 - away[:, ::-1].argmax(axis=1), 0),
        )

    @property
    def places(self) -> int:
        """L."""
        return len(self.needed)

    @property
    def longest(self) -> int:
        """The largest distance that any shard travels."""
        return int(self.last.max())

    def passed_on(self, place: int, distance: int) -> list[tuple[int, int, int]]:
        """Return (shard, source, destination) of what the place sends and receives when shards get to that distance."""
        sources = (place, (place - 1) % self.places)
        moves = [((source - distance + 1) % self.places, source, (source + 1) % self.places) for source in sources]
        return [move for move in moves if distance <= self.last[move[0]]]

    @property
    def grad_slots(self) -> int:
        """Slots for gradients on their way: of the shard that is computed with, and of the one before it."""
        return max(1, min(2, self.longest))

    def hops(self, place: int, step: int) -> list[tuple[int, int, int, bool]]:
        """Return what the place sends and receives when gradients leave distance step - 1: of its sums, then others'.

        A hop is a shard, its source, its destination and whether that is its home. Sums begin at the first place that
        adds to them and go home from the last one.
        """
        sent, received = (place - step + 1) % self.places, (place - step) % self.places
        hops = [self._hop(sent, step), self._hop(received, step)]
        if self.last[place] == step - 1 and step != self.places:  # the own shard's gradients come home early
            hops.append(self._hop(place, step))
        return [hop for hop in hops if hop is not None and place in hop[1:3]]

    def _hop(self, shard: int, step: int) -> tuple[int, int, int, bool] | None:
        """The move of the shard's gradients from distance step - 1, if there is one."""
        first, last = int(self.first[shard]), int(self.last[shard])
        if not 1 <= first <= step - 1 <= last:
            return None
        home = step - 1 == last
        source = (shard + step - 1) % self.places
        return shard, source, shard if home else (shard + step) % self.places, home

    @cached_property
    def crowded(self) -> bool:
        """Whether gradients come home to some place at the same time as others pass through it."""
        place = np.arange(self.places)
        step = self.last + 1  # when the own shard's gradients come home
        passing = (place - step) % self.places
        passes = (self.first[passing] >= 1) & (self.first[passing] < step) & (self.last[passing] >= step)
        return bool((passes & (self.last > 0)).any())
