"""What all drawings share: colours for light and dark, type, and how a figure becomes HTML without a network.

A figure is made in the light colours of `PALETTE`. The page's script replaces them by the values that the reader's
setting gives the CSS variables of the same names, and does so again when the setting changes.
"""

from __future__ import annotations

from html import escape
from typing import Any, TypeAlias

import plotly.graph_objects as go
import plotly.io as pio

Figure: TypeAlias = go.Figure

# role: (light, dark). No light colour stands twice: it is the key by which the script finds the role.
PALETTE = {
    "ink": ("#17202a", "#e8ecf1"),
    "faint": ("#556170", "#a7b1bd"),
    "rule": ("#e3e7ec", "#333d48"),
    "tint": ("#f3f5f8", "#1e262f"),
    "paper": ("#ffffff", "#12171d"),
    "blue": ("#2563a8", "#6aa9e9"),
    "navy": ("#123f73", "#b4d6f7"),
    "orange": ("#c9671d", "#f0994f"),
    "purple": ("#7a5ea8", "#b69be0"),
    "rose": ("#b5487f", "#ec8fbb"),
    "green": ("#2e8b66", "#4fc294"),
    "slate": ("#46566a", "#9fb0c3"),
    "grey": ("#aeb7c2", "#66717e"),
    "good": ("#1f7a55", "#5cc99a"),
    "bad": ("#b3261e", "#ff8a80"),
    "band": ("#dcefe7", "#1d3a2f"),
    "column-few": ("#fbe3cf", "#4a2f1a"),
    "column-some": ("#f0b27e", "#a8652c"),
    "load-0": ("#f4f7fb", "#1a222b"),
    "load-1": ("#c3d8ec", "#20415f"),
    "load-2": ("#7fadd6", "#2f6ca3"),
    "load-3": ("#3a78b5", "#69a8e8"),
    "load-4": ("#123f74", "#d3e7fb"),
}
INK, FAINT, RULE, PAPER = (PALETTE[role][0] for role in ("ink", "faint", "rule", "paper"))
BLUE, NAVY, ORANGE, PURPLE, ROSE = (PALETTE[role][0] for role in ("blue", "navy", "orange", "purple", "rose"))
GREEN, SLATE, GREY, SOFT_GREEN = (PALETTE[role][0] for role in ("green", "slate", "grey", "band"))
COLUMN_SCALE = [[0.0, PALETTE["column-few"][0]], [0.2, PALETTE["column-some"][0]], [1.0, ORANGE]]
LOAD_SCALE = [[step / 4, PALETTE[f"load-{step}"][0]] for step in range(5)]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def styled(figure: Figure, *, height: int, **layout: Any) -> Figure:
    """Give a figure the page's look. height: pixels; titles and legends of figures stand in the page's own text."""
    axis = {
        "gridcolor": RULE,
        "linecolor": RULE,
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 12, "color": FAINT},
        "title": {"font": {"size": 13, "color": FAINT}, "standoff": 8},
    }
    figure.update_layout(
        height=height,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 56, "r": 16, "t": 12, "b": 44},
        hoverlabel={"font": {"family": FONT, "size": 13, "color": INK}, "bgcolor": PAPER, "bordercolor": GREY},
        showlegend=False,
        dragmode=False,
    )
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(**layout)
    figure.update_annotations(font={"size": 12, "color": INK})
    return figure


def html_of(name: str, figure: Figure, label: str = "") -> str:
    """Return the figure as a <div> and its data; the page brings plotly and the script that draws it, each once.

    label: what it shows, for those who do not see it.
    """
    data = (pio.to_json(figure) or "{}").replace("<", "\\u003c")
    place = f'id="figure-{escape(name)}" class="plot" role="img" aria-label="{escape(label or name)}"'
    height = f'style="height:{figure.layout.height or 300}px"'  # pyright: ignore[reportAttributeAccessIssue]
    return (
        f"<div {place} {height}></div>"
        f'<script type="application/json" data-figure="figure-{escape(name)}">{data}</script>'
    )
