"""Measuring a run in the schema of the simulator's timelines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ...traces.timeline import COMPUTE_STREAM, Span, Timeline
from .mesh import Mesh


@dataclass(eq=False)
class Marker:
    """Marks on a device's current stream (host time on CPUs). They cost no synchronisation until they are read."""

    device: torch.device

    def mark(self) -> Any:
        """Return the present: host nanoseconds, or an event on the current stream."""
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, started: Any, ended: Any) -> float:
        """Return the milliseconds between two marks. Waits for the second."""
        if self.device.type != "cuda":
            return (ended - started) / 1e6
        ended.synchronize()
        return started.elapsed_time(ended)


@dataclass(eq=False)
class Recorder(Marker):
    """Collects what one rank did in one layer. Marks are read by `spans`.

    records: fields of Span but times and rank, and what has the span's two marks once it is over, `started` and
    `ended`: a pending communication fills them in as it goes.
    """

    records: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    origin: Any = None

    def begin(self) -> None:
        """Forget what was recorded and start the clock."""
        self.records.clear()
        self.origin = self.mark()

    def add(self, marks: Any, **what: Any) -> None:
        """Record a span between the marks of e.g. a pending communication. what: its fields, but for times and rank."""
        self.records.append((what, marks))

    def add_compute(self, started: Any, **what: Any) -> None:
        """Record compute that began at `started` and ends now."""
        marks = SimpleNamespace(started=started, ended=self.mark())
        self.add(marks, stream=COMPUTE_STREAM, category="compute", **what)

    def spans(self, rank: int) -> list[Span]:
        """Return the spans in microseconds since `begin`; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans = []
        for what, marks in self.records:
            started_us, ended_us = (1e3 * self.between_ms(self.origin, at) for at in (marks.started, marks.ended))
            spans.append(Span(rank=rank, start_us=started_us, duration_us=max(ended_us - started_us, 0.0), **what))
        return spans


def collect_timeline(mesh: Mesh, spans: Sequence[Span], *, topic: str, metadata: dict[str, Any]) -> Timeline | None:
    """Bring all ranks' spans to rank 0 through the store; None on the others. `topic` must be new for every call."""
    collected = mesh.collect(topic, [asdict(span) for span in spans])
    if collected is None:
        return None
    everyone = [Span(**fields) for rank_spans in collected for fields in rank_spans]
    return Timeline(source="measured", world_size=mesh.world_size, spans=tuple(everyone), metadata=metadata)
