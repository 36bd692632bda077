"""Curves of training runs: speed and loss by optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ..training import TrainingRun
from .theme import GREEN, ORANGE, PURPLE, ROSE, SLATE, Figure, styled

RUN_COLOURS = (GREEN, ORANGE, PURPLE, ROSE)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity of a step. field: of a metrics line; title: with its unit."""

    field: str
    title: str
    from_zero: bool


SPEED = Curve(field="tokens_per_s", title="tokens per second", from_zero=True)
LOSS = Curve(field="loss", title="loss, nats per token", from_zero=False)


def run_colours(runs: Sequence[TrainingRun]) -> list[str]:
    """Return a colour for each run, as everywhere on the page: dense attention is a baseline, and slate."""
    sparse = iter(RUN_COLOURS * len(runs))
    return [next(sparse) if run.sparse else SLATE for run in runs]


def curve_figure(runs: Sequence[TrainingRun], curve: Curve) -> Figure:
    """Return one line a run over its optimizer steps; runs without the quantity have none."""
    figure = go.Figure()
    for run, colour in zip(runs, run_colours(runs), strict=True):
        points = [(line.step, getattr(line, curve.field)) for line in run.lines]
        points = [(step, value) for step, value in points if value is not None]
        if points:
            steps, values = zip(*points, strict=True)
            figure.add_scatter(
                x=list(steps),
                y=list(values),
                name=run.name,
                mode="lines+markers" if len(points) <= 60 else "lines",
                line={"color": colour, "width": 2},
                marker={"size": 5, "color": colour},
                hovertemplate="step %{x}: %{y:,.4g}<extra>%{fullData.name}</extra>",
            )
    figure.update_xaxes(title="optimizer step", rangemode="tozero", tickformat=",d")
    figure.update_yaxes(title=curve.title, rangemode="tozero" if curve.from_zero else "normal", nticks=6)
    return styled(figure, height=280, margin={"l": 8, "r": 14, "t": 10, "b": 8}, hovermode="x")
