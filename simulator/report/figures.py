"""What the report's figures share: colours, type, sizes, and how a figure becomes HTML without a network."""

from __future__ import annotations

from typing import Any, TypeAlias

import plotly.graph_objects as go
import plotly.io as pio

Figure: TypeAlias = go.Figure

INK = "#17202a"
FAINT = "#5f6b7a"
BLUE = "#2563a8"
ORANGE = "#d9772b"
GREEN = "#2e8b66"
PURPLE = "#7a5ea8"
GREY = "#b8c0ca"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LOAD_SCALE = [[0.0, "#f4f7fb"], [0.25, "#c3d8ec"], [0.5, "#7fadd6"], [0.75, "#3a78b5"], [1.0, "#123f73"]]
CONFIG: dict[str, Any] = {"displayModeBar": False, "responsive": True}


def styled(figure: Figure, *, height: int, **layout: Any) -> Figure:
    """Give a figure the page's look. height: pixels."""
    figure.update_layout(
        height=height,
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 64, "r": 24, "t": 44, "b": 52},
        hoverlabel={"font": {"family": FONT, "size": 13}},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0},
    )
    figure.update_layout(**layout)
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def html_of(name: str, figure: Figure) -> str:
    """Return the figure as a <div>; the page brings plotly itself, once."""
    return pio.to_html(figure, full_html=False, include_plotlyjs=False, config=CONFIG, div_id=f"figure-{name}")
