"""The simulated timeline above the measured one: every rank's streams, in one unit and on one axis."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...traces.timeline import COMPUTE_STREAM, Span, Timeline
from .figures import BLUE, GREEN, ORANGE, PURPLE, styled

LANE_PIXELS = 15
# (what it is called, which spans, colour), in the order of the legend
KINDS = (
    ("compute, forward", lambda span: span.stream == COMPUTE_STREAM and span.direction == "forward", BLUE),
    ("compute, backward", lambda span: span.stream == COMPUTE_STREAM and span.direction == "backward", "#123f73"),
    ("K/V", lambda span: span.category == "kv", ORANGE),
    ("dK/dV", lambda span: span.category == "dkv", PURPLE),
    ("columns", lambda span: span.category == "columns", GREEN),
)


def timelines_figure(simulated: Timeline, measured: Timeline) -> go.Figure:
    """Return both timelines with a common time axis in milliseconds. Both have the same ranks and streams."""
    others = {span.stream for span in (*simulated.spans, *measured.spans)} - {COMPUTE_STREAM}
    streams = [COMPUTE_STREAM, *sorted(others)]
    titles = [
        f"<b>{timeline.source}</b>: {timeline.makespan_us / 1e3:,.0f} ms for one layer, forward and backward"
        for timeline in (simulated, measured)
    ]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1, subplot_titles=titles)
    for row, timeline in enumerate((simulated, measured), start=1):
        for name, wanted, colour in KINDS:
            spans = [span for span in timeline.spans if wanted(span)]
            if spans:
                figure.add_trace(_bars(name, spans, colour, streams, show=row == 1), row=row, col=1)
        lanes = [(rank, stream) for rank in range(timeline.world_size) for stream in streams]
        ticks = [_lane(rank, stream, streams) for rank, stream in lanes]
        labels = [f"<b>rank {rank}</b> {stream}" if stream == COMPUTE_STREAM else stream for rank, stream in lanes]
        figure.update_yaxes(tickvals=ticks, ticktext=labels, autorange="reversed", showgrid=False, zeroline=False,
                            tickfont={"size": 11}, row=row, col=1)  # fmt: skip
    figure.update_xaxes(rangemode="tozero", showticklabels=True)
    figure.update_xaxes(title="time since the layer began, ms", row=2)
    return styled(figure, height=2 * LANE_PIXELS * simulated.world_size * (len(streams) + 1) + 190, barmode="overlay",
                  margin={"l": 120, "r": 24, "t": 84, "b": 52},
                  legend={"orientation": "h", "yref": "container", "y": 1.0, "yanchor": "top", "x": 0.0})  # fmt: skip


def _lane(rank: int, stream: str, streams: Sequence[str]) -> float:
    """Return the height of a lane; a gap of one lane lies between ranks."""
    return float(rank * (len(streams) + 1) + streams.index(stream))


def _bars(name: str, spans: Sequence[Span], colour: str, streams: Sequence[str], *, show: bool) -> go.Bar:
    return go.Bar(
        name=name,
        legendgroup=name,
        showlegend=show,
        orientation="h",
        base=[round(span.start_us / 1e3, 4) for span in spans],
        x=[round(span.duration_us / 1e3, 4) for span in spans],
        y=[_lane(span.rank, span.stream, streams) for span in spans],
        width=0.86,
        marker={"color": colour, "line": {"width": 0.6, "color": "white"}},
        customdata=[
            [span.rank, span.stream, span.name, span.phase, span.direction, span.nbytes / 1e6] for span in spans
        ],
        hovertemplate="rank %{customdata[0]}, %{customdata[1]}: %{customdata[2]}<br>%{customdata[4]}, phase "
        "%{customdata[3]}<br>from %{base:.2f} ms, %{x:.2f} ms long<br>%{customdata[5]:.2f} MB sent and received"
        "<extra></extra>",
    )
