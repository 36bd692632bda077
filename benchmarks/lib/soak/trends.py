"""Whether what a process holds stays flat: the slope over time after a warm-up, and its bound.

Memory goes up and down with what was played last: the median of the slopes between all pairs of samples (Theil and Sen:
Sen 1968, J. Am. Stat. Assoc. 63:1379) is not moved by samples taken in a busy moment. Counts stand still or grow in
steps, which that median does not see: theirs is the slope of least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WARM_UP_SHARE = 0.25  # of the time that was watched
LEAST_SAMPLES = 4  # after the warm-up: fewer say nothing
# What a process may gain an hour. Counts are whole: half a one an hour is one more in two hours.
BOUNDS_AN_HOUR = {
    "memory_bytes": 24 * 2.0**20, "descriptors": 0.5, "threads": 0.5, "listening": 0.5, "children": 0.5,
    "shared_memory": 0.5, "files": 0.5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trend:
    """One quantity of one process. first, last, most: after the warm-up; slope: gained an hour, None: too short."""

    process: str
    quantity: str
    samples: int
    first: int
    last: int
    most: int
    slope: float | None

    @property
    def bound(self) -> float:
        """The largest slope that is called flat."""
        return BOUNDS_AN_HOUR[self.quantity]

    @property
    def flat(self) -> bool:
        """Whether it gains no more than the bound; what was too short to say is."""
        return self.slope is None or self.slope <= self.bound

    def row(self) -> dict[str, object]:
        """Return it as a row of a result."""
        return {
            "row": "trend", "process": self.process, "quantity": self.quantity, "samples": self.samples,
            "first": self.first, "last": self.last, "most": self.most, "slope_an_hour": self.slope,
            "bound_an_hour": self.bound, "flat": self.flat,
        }  # fmt: skip


def trend_of(process: str, quantity: str, times_s: Sequence[float], values: Sequence[int]) -> Trend:
    """Return the trend of samples, oldest first. times_s: on any clock, seconds."""
    at, held = np.asarray(times_s, float), np.asarray(values, float)
    kept = at >= at[0] + WARM_UP_SHARE * (at[-1] - at[0])
    at, held = at[kept], held[kept]
    slope = None
    if at.size >= LEAST_SAMPLES:
        slope = 3600 * (_median_slope(at, held) if quantity == "memory_bytes" else float(np.polyfit(at, held, 1)[0]))
    return Trend(process=process, quantity=quantity, samples=int(at.size), first=int(held[0]), last=int(held[-1]),
                 most=int(held.max()), slope=slope)  # fmt: skip


def _median_slope(at: NDArray[np.float64], held: NDArray[np.float64]) -> float:
    later, earlier = np.triu_indices(at.size, 1)[::-1]
    return float(np.median((held[later] - held[earlier]) / (at[later] - at[earlier])))
