"""Predicted over measured values as a scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from ...comparisons import Comparison, Quantity
from .theme import BLUE, FAINT, GREEN, INK, NAVY, PURPLE, SOFT_GREEN, Figure, styled

BAND = 0.05
COLOURS: dict[Quantity, str] = {"forward": BLUE, "backward": NAVY, "step": GREEN, "phase": PURPLE, "memory": INK}
TIMES: tuple[Quantity, ...] = ("phase", "forward", "backward", "step")


def fidelity_figure(rows: Sequence[Comparison], *, unit: str, scale: float) -> Figure:
    """Return a scatter of predicted over measured values on logarithmic axes, with a band of 5 % either way.

    unit: of the axes, `scale` of a row's microseconds or bytes. Rows of a calibration are open circles.
    """
    values = [value * scale for row in rows for value in (row.measured, row.predicted)]
    low, high = min(values) / 1.3, max(values) * 1.3
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high, high, low],
        y=[low * (1 - BAND), high * (1 - BAND), high * (1 + BAND), low * (1 + BAND)],
        mode="lines",
        fill="toself",
        fillcolor=SOFT_GREEN,
        line={"width": 0},
        name=f"within {BAND:.0%}",
        hoverinfo="skip",
    )
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", line={"color": FAINT, "width": 1, "dash": "dot"},
                       name="as measured", hoverinfo="skip")  # fmt: skip
    for quantity in (*TIMES, "memory"):
        for calibration in (False, True):
            own = [row for row in rows if row.quantity == quantity and row.calibration == calibration]
            if own:
                figure.add_trace(_points(own, quantity, calibration, scale=scale, unit=unit))
    values = round_numbers(low, high)
    axis = {"type": "log", "tickvals": values, "ticktext": [f"{value:g}" for value in values]}
    figure.update_xaxes(title=f"measured, {unit}", **axis)
    figure.update_yaxes(title=f"predicted, {unit}", **axis)
    return styled(figure, height=460, hovermode="closest", margin={"l": 8, "r": 16, "t": 10, "b": 8})


def round_numbers(low: float, high: float) -> list[float]:
    """Return powers of ten in a range, and twice and five times these where it spans less than three of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [value for decade in decades for step in steps if low <= (value := step * 10.0**decade) <= high]


def quantities_of(rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Return (name, colour) of the quantities that rows are about, for the legend."""
    present = {row.quantity for row in rows}
    return [(name, COLOURS[name]) for name in (*TIMES, "memory") if name in present]


def _points(
    rows: Sequence[Comparison], quantity: Quantity, calibration: bool, *, scale: float, unit: str
) -> go.Scatter:
    return go.Scatter(
        x=[row.measured * scale for row in rows],
        y=[row.predicted * scale for row in rows],
        mode="markers",
        name=f"{quantity}, calibrated on" if calibration else quantity,
        marker={
            "color": COLOURS[quantity],
            "size": 5 if quantity == "phase" else 9,
            "symbol": "circle-open" if calibration else "circle",
            "opacity": 0.8,
        },
        customdata=[[_name(row), row.error, escape(row.source)] for row in rows],
        hovertemplate=f"%{{customdata[0]}}<br>measured %{{x:.4g}} {unit}, predicted %{{y:.4g}} {unit} "
        "(%{customdata[1]:+.1%})<br>%{customdata[2]}<extra></extra>",
    )


def _name(row: Comparison) -> str:
    place = "" if row.rank is None else f", {row.direction or ''} rank {row.rank}, phase {row.phase}"
    group = "" if row.group is None else f"<br>{escape(row.group)}"
    return f"<b>{escape(row.configuration)}</b>{place}{group}"
