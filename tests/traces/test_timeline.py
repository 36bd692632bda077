"""Timelines: what is written comes back, and a file that says what cannot be is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsering.traces.errors import InputError
from sparsering.traces.timeline import Flow, FlowEnd, Span, Timeline

TIMELINE = Timeline(
    source="measured",
    world_size=2,
    spans=tuple(
        Span(rank=rank, stream=stream, name="x", category="kv", direction="backward", phase=3, start_us=1.5,
             duration_us=2.0, nbytes=7)
        for rank in range(2)
        for stream in ("compute", "ring")
    ),
    flows=(
        Flow(
            name="kv",
            source=FlowEnd(rank=0, stream="ring", time_us=1.5),
            destination=FlowEnd(rank=1, stream="ring", time_us=3.5),
        ),
    ),
    metadata={"plan_digest": "0"},
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    TIMELINE.save(tmp_path / "timeline.json")
    return tmp_path / "timeline.json"


def test_what_is_written_comes_back(saved: Path) -> None:
    assert Timeline.load(saved) == TIMELINE
    TIMELINE.save(saved.with_suffix(".json.gz"))
    assert Timeline.load(saved.with_suffix(".json.gz")) == TIMELINE


def span_with(**changes: Any):
    def change(document: dict[str, Any]) -> None:
        span = next(event for event in document["traceEvents"] if event["ph"] == "X")
        span["args"].update({name: changes.pop(name) for name in list(changes) if name in span["args"]})
        span.update(changes)

    return change


CHANGES = {
    "schema_version: is 2": lambda document: document["otherData"].update(schema_version=2),
    "source: must be one of": lambda document: document["otherData"].update(source="dreamt"),
    "from 0 to 16384 is expected, not 1000000000000": lambda document: document["otherData"].update(world_size=10**12),
    "does not fit 1 ranks": lambda document: document["otherData"].update(world_size=1),
    "from 0 to 16384 is expected, not 'x'": span_with(phase="x"),
    "from 0 to 16384 is expected, not -1": span_with(phase=-1),
    "from 0 to 16384 is expected, not 0.5": span_with(phase=0.5),
    "from 0 to 16384 is expected, not 10000000000000": span_with(phase=10**13),
    "from 0 to 16384 is expected, not 'a'": span_with(pid="a"),
    "is expected, not [7]": span_with(nbytes=[7]),
    "microseconds are expected, not 'now'": span_with(ts="now"),
    "'1e400' is no finite number": span_with(dur=float("inf")),
    "does not fit 2 ranks": span_with(dur=-1.0),
    "is not a timeline of this tool: 99 is missing": span_with(tid=99),
    "is not a timeline of this tool (": span_with(args=3),
    "metadata: an object is expected, not [3]": lambda document: document["otherData"].update(metadata=[3]),
    "metadata.plan_digest: a text is expected, not ['0']": lambda document: document["otherData"]["metadata"].update(
        plan_digest=["0"]
    ),
    "is not a timeline of this tool: (0, 'f') is missing": lambda document: document["traceEvents"].pop(),
}


@pytest.mark.parametrize("message", list(CHANGES))
def test_a_timeline_that_cannot_be(saved: Path, message: str) -> None:
    document = json.loads(saved.read_text())
    CHANGES[message](document)
    saved.write_text(json.dumps(document).replace("Infinity", "1e400"))
    with pytest.raises(InputError) as caught:
        Timeline.load(saved)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{saved}: ")
