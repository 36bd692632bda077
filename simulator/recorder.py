"""What happened in a simulated run, as an Evaluation and, on request, as a Timeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..planner.cost.evaluation import Evaluation
from ..planner.cost.timing import NS_PER_US, legs_of
from ..planner.schedule.launches import launch_name
from ..planner.schedule.schedule import Direction, GroupCall, Task
from ..traces.timeline import COMPUTE_STREAM, Flow, FlowEnd, Span, Timeline

TransferTimes = Mapping[tuple[str, str], tuple[int, int]]  # (communicator, transfer id) -> began to move, arrived


class Recorder:
    """Collects what every rank computed and transferred. Times in nanoseconds. shape: ranks, and phases of the longest.

    keeps_spans: for a timeline; without, only sums are kept.
    """

    def __init__(self, direction: Direction, shape: tuple[int, int], *, keeps_spans: bool) -> None:
        self._direction, self.keeps_spans = direction, keeps_spans
        self._phase_ns = [[0] * shape[1] for _ in range(shape[0])]
        self._launches: list[tuple[int, int, tuple[Task, ...], int, int]] = []
        self._calls: list[tuple[int, int, GroupCall, tuple[int, ...], int, int]] = []
        self._end_ns = 0

    def computed(self, rank: int, phase: int, tasks: tuple[Task, ...], start_ns: int, end_ns: int) -> None:
        """Note the tasks of one launch."""
        self._phase_ns[rank][phase] += end_ns - start_ns
        if self.keeps_spans:
            self._launches.append((rank, phase, tasks, start_ns, end_ns))

    def transferred(
        self, rank: int, phase: int, call: GroupCall, group: tuple[int, ...], start_ns: int, end_ns: int
    ) -> None:
        """Note a group call, from its turn on its communicator to its end."""
        if self.keeps_spans:
            self._calls.append((rank, phase, call, group, start_ns, end_ns))
        self.ended(end_ns)

    def ended(self, time_ns: int) -> None:
        """Note that something ended."""
        if time_ns > self._end_ns:
            self._end_ns = time_ns

    def evaluation(self, buffer_bytes: int, transfers: TransferTimes | None) -> Evaluation:
        """Return the run; with a timeline when the times of its transfers are given."""
        phase_ns = np.array(self._phase_ns, dtype=np.int64)
        return Evaluation(
            makespan_us=self._end_ns / NS_PER_US,
            compute_us=phase_ns.sum(axis=1) / NS_PER_US,
            phase_us=phase_ns / NS_PER_US,
            peak_buffer_bytes=buffer_bytes,
            timeline=None if transfers is None else self._timeline(transfers),
        )

    def _timeline(self, transfers: TransferTimes) -> Timeline:
        launches = [
            self._span(rank, phase, begin, end, stream=COMPUTE_STREAM, name=launch_name(tasks), category="compute")
            for rank, phase, tasks, begin, end in self._launches
        ]
        spans = [*launches, *(self._call_span(*record) for record in self._calls)]
        return Timeline(
            source="simulated",
            world_size=len(self._phase_ns),
            spans=tuple(sorted(spans, key=lambda span: (span.start_us, span.rank, span.stream))),
            flows=tuple(flow for rank, _, call, *_ in self._calls for flow in _sends(rank, call, transfers)),
        )

    def _span(self, rank: int, phase: int, start_ns: int, end_ns: int, **what: Any) -> Span:
        times = {"start_us": start_ns / NS_PER_US, "duration_us": (end_ns - start_ns) / NS_PER_US}
        return Span(rank=rank, phase=phase, direction=self._direction, **times, **what)

    def _call_span(
        self, rank: int, phase: int, call: GroupCall, group: tuple[int, ...], start_ns: int, end_ns: int
    ) -> Span:
        legs = [leg for transfer in call.transfers for leg in legs_of(transfer, group)]
        nbytes = sum(leg.nbytes for leg in legs for end in (leg.source, leg.destination) if end == rank)
        what = {"name": _call_name(rank, call), "category": call.transfers[0].kind, "nbytes": nbytes}
        return self._span(rank, phase, start_ns, end_ns, stream=call.communicator, **what)


def _call_name(rank: int, call: GroupCall) -> str:
    count = len(call.transfers)
    if count > 2:
        return f"{call.transfers[0].kind} {count} transfers"
    parts = []
    for transfer in call.transfers:
        verb = "sum" if transfer.transport == "all_reduce" else "send" if transfer.source == rank else "receive"
        parts.append(f"{verb} {transfer.shard}" if transfer.shard else verb)
    return f"{call.transfers[0].kind} {', '.join(parts)}"


def _sends(rank: int, call: GroupCall, transfers: TransferTimes) -> Iterator[Flow]:
    """Yield an arrow for everything that the call sends: from its first byte to the last nanosecond of its arrival."""
    for transfer in call.transfers:
        if transfer.source == rank:
            began_ns, arrived_ns = transfers[transfer.communicator, transfer.id]
            end_ns = max(began_ns, arrived_ns - 1)  # an end bound to a slice lies inside it
            ends = (rank, began_ns), (transfer.destination, end_ns)
            source, destination = (FlowEnd(rank=r, stream=call.communicator, time_us=ns / NS_PER_US) for r, ns in ends)
            yield Flow(name=transfer.id, source=source, destination=destination)


def followed_by(first: Timeline, second: Timeline, *, start_us: float) -> Timeline:
    """Return one timeline in which `second` begins at `start_us` of `first`."""
    spans = tuple(replace(span, start_us=span.start_us + start_us) for span in second.spans)
    flows = tuple(
        replace(flow, source=_later(flow.source, start_us), destination=_later(flow.destination, start_us))
        for flow in second.flows
    )
    return replace(first, spans=first.spans + spans, flows=first.flows + flows)


def _later(end: FlowEnd, by_us: float) -> FlowEnd:
    return replace(end, time_us=end.time_us + by_us)
