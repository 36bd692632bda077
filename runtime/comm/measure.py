"""Measuring a run in the schema of the simulator's timelines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from ...traces.timeline import COMPUTE_STREAM, Span, Timeline
from .mesh import Mesh


class Marks(Protocol):
    """Where a span's two clock marks are, once it is over: host nanoseconds, or CUDA events.

    A pending communication fills them in as it goes.
    """

    started: Any
    ended: Any


@dataclass(kw_only=True, eq=False)
class _Fixed:
    started: Any
    ended: Any


@dataclass(eq=False)
class Recorder:
    """Collects what one rank did in one layer. Marks cost no synchronisation; they are read by `spans`."""

    device: torch.device
    records: list[tuple[dict[str, Any], Marks]] = field(default_factory=list)  # fields of Span but times and rank
    origin: Any = None

    def mark(self) -> Any:
        """Return the present: host nanoseconds, or an event on the current stream."""
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Forget what was recorded and start the clock."""
        self.records.clear()
        self.origin = self.mark()

    def add(self, marks: Marks, **what: Any) -> None:
        """Record a span between two marks, which may be set later. what: its fields, but for times and rank."""
        self.records.append((what, marks))

    def add_compute(self, started: Any, **what: Any) -> None:
        """Record compute that began at `started` and ends now."""
        self.add(_Fixed(started=started, ended=self.mark()), stream=COMPUTE_STREAM, category="compute", **what)

    def spans(self, rank: int) -> list[Span]:
        """Return the spans in microseconds since `begin`; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans = []
        for what, marks in self.records:
            started_us, ended_us = self._since(marks.started), self._since(marks.ended)
            spans.append(Span(rank=rank, start_us=started_us, duration_us=max(ended_us - started_us, 0.0), **what))
        return spans

    def _since(self, mark: Any) -> float:
        if self.device.type == "cuda":
            return self.origin.elapsed_time(mark) * 1e3
        return (mark - self.origin) / 1e3


def collect_timeline(mesh: Mesh, spans: Sequence[Span], *, topic: str, metadata: dict[str, Any]) -> Timeline | None:
    """Bring all ranks' spans to rank 0 through the store; None on the others. `topic` must be new for every call."""
    collected = mesh.collect(topic, [asdict(span) for span in spans])
    if collected is None:
        return None
    everyone = [Span(**fields) for rank_spans in collected for fields in rank_spans]
    return Timeline(source="measured", world_size=mesh.world_size, spans=tuple(everyone), metadata=metadata)
