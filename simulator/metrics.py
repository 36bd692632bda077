"""What a timeline says, simulated or measured alike: imbalance, exposed communication, and a table of its phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..planner.cost.evaluation import imbalance
from ..planner.schedule.schedule import DIRECTIONS
from ..traces.errors import InputError
from ..traces.timeline import COMPUTE_STREAM, Span, Timeline

PICOSECOND_DIGITS = 6  # of a microsecond: what differences of floats leave below is noise


@dataclass(frozen=True)
class PhaseMetrics:
    """One phase over all ranks. exposed: a rank's compute stream stood still before and within the phase.

    transfer_us: the longest group call that was launched in the phase, from its turn to its end.
    """

    phase: int
    compute_mean_us: float
    compute_max_us: float
    exposed_mean_us: float
    transfer_us: float


@dataclass(frozen=True, kw_only=True)
class DirectionMetrics:
    """One direction of a timeline; makespan = compute + exposed on every rank, so it holds for their means too."""

    direction: str
    makespan_us: float
    compute_mean_us: float
    compute_max_us: float
    exposed_mean_us: float
    tail_mean_us: float
    worker_imbalance: float
    step_imbalance: float
    sent_and_received_bytes: int
    phases: tuple[PhaseMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def timeline_metrics(timeline: Timeline) -> list[DirectionMetrics]:
    """Return the metrics of each direction that the timeline holds; InputError when it holds nothing."""
    found = []
    for direction in DIRECTIONS:
        spans = [span for span in timeline.spans if span.direction == direction]
        if spans:
            found.append(_direction_metrics(direction, spans, timeline.world_size))
    if not found:
        raise InputError("the timeline holds no spans", field="spans")
    return found


def _direction_metrics(direction: str, spans: Sequence[Span], world_size: int) -> DirectionMetrics:
    begin, end = min(span.start_us for span in spans), max(span.end_us for span in spans)
    shape = world_size, 1 + max(span.phase for span in spans)
    compute, ends = np.zeros(shape), np.full(shape, begin)  # of every phase; when the last compute up to it ended
    transfer = np.zeros(shape[1])
    for span in spans:
        if span.stream == COMPUTE_STREAM:
            compute[span.rank, span.phase] += span.duration_us
            ends[span.rank, span.phase] = max(ends[span.rank, span.phase], span.end_us)
        else:
            transfer[span.phase] = max(transfer[span.phase], span.duration_us)
    ends = np.maximum.accumulate(ends, axis=1)
    exposed = np.round(np.diff(ends, axis=1, prepend=begin) - compute, PICOSECOND_DIGITS) + 0.0  # no -0.0
    per_rank, mean = compute.sum(axis=1), compute.mean(axis=0)
    of_phases = np.stack([mean, compute.max(axis=0), [column.mean() for column in exposed.T], transfer])
    return DirectionMetrics(
        direction=direction,
        makespan_us=end - begin,
        compute_mean_us=float(per_rank.mean()),
        compute_max_us=float(per_rank.max()),
        exposed_mean_us=float((end - begin - per_rank).mean()),
        tail_mean_us=float((end - ends[:, -1]).mean()),
        worker_imbalance=imbalance(per_rank),
        step_imbalance=float(compute.max(axis=0).sum() / mean.sum()) if mean.sum() else 1.0,
        sent_and_received_bytes=sum(span.nbytes for span in spans),
        phases=tuple(PhaseMetrics(number, *values) for number, values in enumerate(of_phases.T.tolist())),
    )
