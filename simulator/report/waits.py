"""Where the time of a step goes: what ranks compute, and what their compute streams stand still for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...traces.timeline import COMPUTE_STREAM, Span, Timeline

Intervals = NDArray[np.float64]  # [n, 2], ascending, not overlapping: begin and end in microseconds


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Microseconds of a step, means over ranks; they add up to the timeline's makespan.

    communication_us: compute stood still while a transfer of the rank was in flight; waiting_us: the rank had nothing
    left to do in a direction, others had; other_us: neither: launches, the host, data that had not been sent.
    """

    forward_us: float
    backward_us: float
    communication_us: float
    waiting_us: float
    other_us: float

    @property
    def total_us(self) -> float:
        """The makespan."""
        return self.forward_us + self.backward_us + self.communication_us + self.waiting_us + self.other_us


def waits_of(timeline: Timeline) -> Waits:
    """Return where the time goes, averaged over all ranks of the timeline."""
    begin = min((span.start_us for span in timeline.spans), default=0.0)
    window = begin, begin + timeline.makespan_us
    of_rank: dict[int, list[Span]] = {rank: [] for rank in range(timeline.world_size)}
    for span in timeline.spans:
        of_rank[span.rank].append(span)
    mean = np.array([_rank_waits(spans, window) for spans in of_rank.values()]).mean(axis=0)
    forward, backward, communication, waiting, other = (float(value) for value in mean)
    return Waits(
        forward_us=forward, backward_us=backward, communication_us=communication, waiting_us=waiting, other_us=other
    )


def _rank_waits(spans: Sequence[Span], window: tuple[float, float]) -> tuple[float, float, float, float, float]:
    compute = _union([span for span in spans if span.stream == COMPUTE_STREAM])
    backward = _length(_union([s for s in spans if s.stream == COMPUTE_STREAM and s.direction == "backward"]))
    transfers = _union([span for span in spans if span.stream != COMPUTE_STREAM])
    idle = _without(np.array([window]), compute)
    quiet = _without(idle, transfers)
    waiting = _length(quiet) - _length(_without(quiet, _nothing_left(spans, window)))
    exposed = _length(idle) - _length(quiet)
    return _length(compute) - backward, backward, exposed, waiting, _length(quiet) - waiting


def _nothing_left(spans: Sequence[Span], window: tuple[float, float]) -> Intervals:
    """Return the times from the end of a rank's last span of a direction to its first of the next, or to the end."""
    ends = {}
    for direction in ("forward", "backward"):
        own = [span for span in spans if span.direction == direction]
        if own:
            ends[direction] = min(span.start_us for span in own), max(span.end_us for span in own)
    edges = [*sorted(ends.values()), (window[1], window[1])]
    pairs = [(edges[n][1], edges[n + 1][0]) for n in range(len(edges) - 1) if edges[n + 1][0] > edges[n][1]]
    return np.array(pairs or [window] if not ends else pairs, dtype=np.float64).reshape(-1, 2)


def _union(spans: Sequence[Span]) -> Intervals:
    """Return the times in which any of the spans runs."""
    merged: list[list[float]] = []
    for start, end in sorted((span.start_us, span.end_us) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return np.array(merged, dtype=np.float64).reshape(-1, 2)


def _without(times: Intervals, taken: Intervals) -> Intervals:
    """Return `times` less `taken`."""
    found = []
    for start, end in times:
        first = int(np.searchsorted(taken[:, 1], start, side="right"))
        for begin, stop in taken[first:]:
            if begin >= end:
                break
            if begin > start:
                found.append((start, begin))
            start = max(start, stop)
        if end > start:
            found.append((start, end))
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def _length(times: Intervals) -> float:
    return float((times[:, 1] - times[:, 0]).sum())
