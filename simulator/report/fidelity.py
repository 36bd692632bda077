"""The page of `sparsering validate`: measured against predicted, on one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from ...traces.files import write_atomically
from ..comparisons import Comparison, Quantity
from ..validate import Verdict
from .figures import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, html_of, styled
from .page import rendered_page

TEMPLATE = "fidelity.html"
TITLE = "<title>sparsering validate</title>"
BAND = 0.05
COLOURS: dict[Quantity, str] = {"forward": BLUE, "backward": ORANGE, "step": GREEN, "phase": PURPLE, "memory": INK}
TIMES: tuple[Quantity, ...] = ("phase", "forward", "backward", "step")


def write_fidelity_page(
    path: Path, rows: Sequence[Comparison], verdicts: Mapping[Quantity, Verdict], missed: Sequence[str]
) -> None:
    """Write the page, atomically. missed: a line for each tolerance that is."""
    times = [row for row in rows if row.quantity != "memory"]
    memory = [row for row in rows if row.quantity == "memory"]
    figures = {}
    if times:
        figures["times"] = html_of("times", fidelity_figure(times, unit="ms", scale=1e-3))
    if memory:
        figures["memory"] = html_of("memory", fidelity_figure(memory, unit="GB", scale=1e-9))
    page = rendered_page(TEMPLATE, figures, verdicts=verdicts, missed=missed, files=sorted({r.source for r in rows}))
    write_atomically(path, page.encode())


def fidelity_figure(rows: Sequence[Comparison], *, unit: str, scale: float) -> go.Figure:
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
        fillcolor="rgba(46,139,102,0.14)",
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
    figure.update_xaxes(type="log", title=f"measured, {unit}")
    figure.update_yaxes(type="log", title=f"predicted, {unit}")
    return styled(figure, height=620, hovermode="closest")


def _points(
    rows: Sequence[Comparison], quantity: Quantity, calibration: bool, *, scale: float, unit: str
) -> go.Scatter:
    colour = COLOURS[quantity]
    return go.Scatter(
        x=[row.measured * scale for row in rows],
        y=[row.predicted * scale for row in rows],
        mode="markers",
        name=f"{quantity}, calibrated on" if calibration else quantity,
        marker={
            "color": colour,
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
