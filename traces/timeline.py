"""Timelines: spans of (rank, stream) in one schema, whether simulated or measured.

On disk a timeline is Chrome/Perfetto trace JSON (`.json` or `.json.gz`): pid = rank, one tid per stream, `phase` as an
argument, flow arrows from a send to its receive, times in microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import MAX_SHOWN_CHARACTERS, InputError, shortened, shown
from .files import read_json, require_output, write_json

TIMELINE_SCHEMA_VERSION = 1
COMPUTE_STREAM = "compute"
SOURCES = ("simulated", "measured")
MAX_RANKS = MAX_PHASES = 1 << 14
MAX_CELLS = 1 << 22  # ranks × phases: those who compare timelines keep a few numbers for each
MAX_NAME_CHARACTERS = 1024
MAX_BYTES = 1 << 50
MAX_MICROSECONDS = 1e15


@dataclass(frozen=True, kw_only=True)
class Span:
    """One piece of work on one stream of one rank. Times in microseconds since the timeline began.

    stream: "compute" or the communicator's name; direction: "forward" or "backward"; category: "compute" or
    the transfer kind; nbytes: bytes that this rank sent and received in the span (0 for compute).
    """

    rank: int
    stream: str
    name: str
    category: str
    direction: str
    phase: int
    start_us: float
    duration_us: float
    nbytes: int = 0

    @property
    def end_us(self) -> float:
        """When the span ends."""
        return self.start_us + self.duration_us


@dataclass(frozen=True, kw_only=True)
class FlowEnd:
    """A moment within a span, in microseconds since the timeline began."""

    rank: int
    stream: str
    time_us: float


@dataclass(frozen=True, kw_only=True)
class Flow:
    """An arrow from the span that sent data to the span that received it."""

    name: str
    source: FlowEnd
    destination: FlowEnd


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Spans and flows of one layer's forward and backward on all ranks, with where they come from.

    metadata: what else is known; its "plan_digest", if any, is the digest of the plan whose timeline this is.
    """

    source: str
    world_size: int
    spans: tuple[Span, ...]
    flows: tuple[Flow, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InputError(f"must be one of {SOURCES}, not {shown(self.source)}", field="source")
        if not isinstance(self.metadata, dict):
            raise InputError(f"an object is expected, not {shown(self.metadata)}", field="metadata")
        if not isinstance(digest := self.metadata.get("plan_digest"), str | None):
            raise InputError(f"a text is expected, not {shown(digest)}", field="metadata.plan_digest")
        for span in self.spans:
            if not 0 <= span.rank < self.world_size or span.duration_us < 0:
                raise InputError(f"{shortened(str(span), 300)} does not fit {self.world_size} ranks", field="spans")

    @property
    def plan_digest(self) -> str | None:
        """The digest of the plan whose timeline this is; None where nothing says."""
        return self.metadata.get("plan_digest")

    @property
    def makespan_us(self) -> float:
        """From the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(span.end_us for span in self.spans) - min(span.start_us for span in self.spans)

    @staticmethod
    def require_writable(path: Path) -> None:
        """Refuse, before any work, to write a timeline in the place of something else: InputError."""
        require_output(path, kind="timeline", key="traceEvents")

    def save(self, path: Path) -> None:
        """Write Chrome trace JSON, atomically."""
        write_json(path, to_chrome(self))

    @staticmethod
    def load(path: Path) -> Timeline:
        """Read Chrome trace JSON written by `save`; InputError names the file and what is wrong."""
        return from_chrome(read_json(path), source=path)


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """Return the timeline as a Chrome trace object."""
    names = sorted({span.stream for span in timeline.spans} - {COMPUTE_STREAM})
    tids = {name: tid for tid, name in enumerate([COMPUTE_STREAM, *names])}
    events: list[dict[str, Any]] = []
    for rank in range(timeline.world_size):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for stream, tid in tids.items():
            events.append({"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": stream}})
    for span in timeline.spans:
        place = {"ph": "X", "pid": span.rank, "tid": tids[span.stream], "name": span.name, "cat": span.category}
        arguments = {"phase": span.phase, "direction": span.direction, "nbytes": span.nbytes}
        events.append(place | {"ts": span.start_us, "dur": span.duration_us, "args": arguments})
    for number, flow in enumerate(timeline.flows):
        common = {"cat": "flow", "id": number, "name": flow.name}
        for kind, end in (({"ph": "s"}, flow.source), ({"ph": "f", "bp": "e"}, flow.destination)):
            events.append(common | kind | {"pid": end.rank, "tid": tids[end.stream], "ts": end.time_us})
    header = {"schema_version": TIMELINE_SCHEMA_VERSION, "source": timeline.source, "world_size": timeline.world_size}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": header | {"metadata": timeline.metadata}}


def from_chrome(document: Any, *, source: str | Path) -> Timeline:
    """Build a Timeline from a Chrome trace object written by `to_chrome`; InputError when it is none or cannot be.

    At most MAX_RANKS ranks, MAX_PHASES phases and MAX_CELLS of both together are taken.
    """
    if not isinstance(document, dict) or not {"otherData", "traceEvents"} <= document.keys():
        raise InputError("is not a timeline of this tool: traceEvents and otherData are missing", source=source)
    try:
        header = document["otherData"]
        version = header["schema_version"]
        if version != TIMELINE_SCHEMA_VERSION:
            raise InputError(
                f"is {shown(version)}; this version reads {TIMELINE_SCHEMA_VERSION}",
                source=source,
                field="schema_version",
            )
        events = document["traceEvents"]
        streams = {e["tid"]: _text(e["args"]["name"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        timeline = Timeline(
            source=_text(header["source"]),
            world_size=_whole(header["world_size"], MAX_RANKS),
            spans=tuple(_span_of(event, streams) for event in events if event["ph"] == "X"),
            flows=tuple(_flows_of(events, streams)),
            metadata=header["metadata"],
        )
        _require_few_cells(timeline)
        return timeline
    except InputError as error:
        raise InputError(str(error), source=None if error.source else source) from error
    except KeyError as error:
        missing = shown(error.args[0])
        raise InputError(f"is not a timeline of this tool: {missing} is missing", source=source) from error
    except (TypeError, AttributeError, IndexError) as error:
        told = shortened(str(error), 2 * MAX_SHOWN_CHARACTERS)
        raise InputError(f"is not a timeline of this tool ({told})", source=source) from error


def _require_few_cells(timeline: Timeline) -> None:
    phases = 1 + max((span.phase for span in timeline.spans), default=0)
    if timeline.world_size * phases > MAX_CELLS:
        problem = f"{timeline.world_size} ranks × {phases} phases are more than the {MAX_CELLS} that are read"
        raise InputError(problem, field="traceEvents")


def _span_of(event: dict[str, Any], streams: dict[int, str]) -> Span:
    arguments = event["args"]
    return Span(
        rank=_whole(event["pid"], MAX_RANKS),
        stream=streams[event["tid"]],
        name=_text(event["name"]),
        category=_text(event["cat"]),
        direction=_text(arguments["direction"]),
        phase=_whole(arguments["phase"], MAX_PHASES),
        start_us=_microseconds(event["ts"]),
        duration_us=_microseconds(event["dur"]),
        nbytes=_whole(arguments["nbytes"], MAX_BYTES),
    )


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_NAME_CHARACTERS:
        problem = f"text of at most {MAX_NAME_CHARACTERS} characters is expected, not {shown(value)}"
        raise InputError(problem, field="traceEvents")
    return value


def _whole(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise InputError(f"a whole number from 0 to {most} is expected, not {shown(value)}", field="traceEvents")
    return value


def _microseconds(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= MAX_MICROSECONDS:
        raise InputError(f"microseconds are expected, not {shown(value)}", field="traceEvents")
    return float(value)


def _flows_of(events: list[dict[str, Any]], streams: dict[int, str]) -> list[Flow]:
    ends, names = {}, {}
    for event in events:
        if event["ph"] in ("s", "f"):
            place = {"rank": _whole(event["pid"], MAX_RANKS), "stream": streams[event["tid"]]}
            ends[event["id"], event["ph"]] = FlowEnd(**place, time_us=_microseconds(event["ts"]))
        if event["ph"] == "s":
            names[event["id"]] = _text(event["name"])
    return [Flow(name=names[id], source=ends[id, "s"], destination=ends[id, "f"]) for id in sorted(names)]
