"""Timelines: every shown rank's streams as bars on an axis of time; the simulated one above the measured one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from ....traces.timeline import COMPUTE_STREAM, Span, Timeline
from .theme import BLUE, GREY, NAVY, ORANGE, PAPER, PURPLE, ROSE, Figure, styled

LANE_PIXELS = 15
MOST_RANKS = 8
MOST_SPANS = 5_000


@dataclass(frozen=True)
class Kind:
    """What a bar is: its name and colour on the page, and the spans that it stands for."""

    name: str
    colour: str
    category: str
    direction: str | None = None

    def holds(self, span: Span) -> bool:
        """Return whether a span is of this kind."""
        return span.category == self.category and self.direction in (None, span.direction)


KINDS = (
    Kind("compute, forward", BLUE, "compute", "forward"),
    Kind("compute, backward", NAVY, "compute", "backward"),
    Kind("transfer of K/V", PURPLE, "kv"),
    Kind("transfer of dK/dV", ROSE, "dkv"),
    Kind("transfer of columns", ORANGE, "columns"),
)
OTHER = Kind("other transfers", GREY, "")


def kind_of(span: Span) -> Kind:
    """Return what a span is drawn as."""
    return next((kind for kind in KINDS if kind.holds(span)), OTHER)


def shown_ranks(timelines: Sequence[Timeline]) -> list[int]:
    """Return at most eight ranks, evenly spread, fewer where they would have too many spans to draw."""
    world = max(timeline.world_size for timeline in timelines)
    most = max(len(timeline.spans) for timeline in timelines)
    count = max(1, min(MOST_RANKS, world, MOST_SPANS * world // max(most, 1)))
    return sorted({int(rank) for rank in np.linspace(0, world - 1, count).round()})


def timeline_figure(
    timeline: Timeline, *, ranks: Sequence[int], streams: Sequence[str], until_us: float, height: int | None = None
) -> Figure:
    """Return the lanes of these ranks and streams from the first span on. until_us: where the axis ends."""
    scale, unit = (1e6, "s") if until_us >= 1e7 else (1e3, "ms") if until_us >= 1e4 else (1.0, "µs")
    begin = min((span.start_us for span in timeline.spans), default=0.0)
    shown = [span for span in timeline.spans if span.rank in set(ranks)]
    lanes = {(rank, stream): _lane(place, stream, streams) for place, rank in enumerate(ranks) for stream in streams}
    figure = go.Figure()
    for kind in (*KINDS, OTHER):
        spans = [span for span in shown if kind_of(span) is kind]
        if spans:
            heights = [lanes[span.rank, span.stream] for span in spans]
            figure.add_trace(_bars(kind, spans, heights, begin, scale, unit))
    labels = [f"rank {rank}" for rank in ranks]
    middles = [(lanes[rank, streams[0]] + lanes[rank, streams[-1]]) / 2 for rank in ranks]
    most = len(ranks) * (len(streams) + 1) - 1
    figure.update_yaxes(tickvals=middles, ticktext=labels, range=[most - 0.3, -0.7], showgrid=False)
    figure.update_xaxes(title=f"time since the layer began, {unit}", range=[0, until_us / scale * 1.01])
    drawn = styled(figure, height=height or LANE_PIXELS * most + 64, barmode="overlay")
    return drawn.update_layout(margin={"l": 8, "r": 14, "t": 6, "b": 8})


def streams_of(timelines: Sequence[Timeline]) -> list[str]:
    """Return the streams of all timelines, compute first."""
    others = {span.stream for timeline in timelines for span in timeline.spans} - {COMPUTE_STREAM}
    return [COMPUTE_STREAM, *sorted(others)]


def kinds_of(timelines: Sequence[Timeline]) -> list[Kind]:
    """Return the kinds of bars that the timelines have, for the legend."""
    present = {kind_of(span) for timeline in timelines for span in timeline.spans}
    return [kind for kind in (*KINDS, OTHER) if kind in present]


def _lane(place: int, stream: str, streams: Sequence[str]) -> float:
    """Return the height of a lane; a gap of one lane lies between ranks."""
    return float(place * (len(streams) + 1) + streams.index(stream))


def _bars(
    kind: Kind, spans: Sequence[Span], heights: Sequence[float], begin_us: float, scale: float, unit: str
) -> go.Bar:
    return go.Bar(
        name=kind.name,
        orientation="h",
        base=[round((span.start_us - begin_us) / scale, 4) for span in spans],
        x=[round(span.duration_us / scale, 4) for span in spans],
        y=heights,
        width=0.86,
        marker={"color": kind.colour, "line": {"width": 0.6, "color": PAPER}},
        customdata=[
            [span.rank, span.stream, span.name, span.phase, span.direction, span.nbytes / 1e6] for span in spans
        ],
        hovertemplate="rank %{customdata[0]}, %{customdata[1]}: %{customdata[2]}<br>%{customdata[4]}, phase "
        f"%{{customdata[3]}}<br>from %{{base:.2f}} {unit}, %{{x:.2f}} {unit} long<br>"
        "%{customdata[5]:.2f} MB sent and received<extra></extra>",
    )
