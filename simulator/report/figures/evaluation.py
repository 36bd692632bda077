"""Curves by position and maps of evaluations: losses, divergence, needles, and keys that no far query attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ..evaluation import Bucket, Cell, LayerReach, Reading, heads_of, short_tokens
from .theme import LOAD_SCALE, Figure, styled

DARK_FROM = 0.55  # of the scale: there text is light


@dataclass(frozen=True, kw_only=True)
class Line:
    """A reading, what the page calls it, its colour; dotted: with the context cut."""

    name: str
    reading: Reading
    colour: str
    dotted: bool = False


def position_figure(lines: Sequence[Line], title: str) -> Figure:
    """Return means by how much a token could see, with bars of two standard errors either way."""
    figure = go.Figure()
    for line in lines:
        buckets = line.reading.buckets
        figure.add_scatter(
            x=[_span(one) for one in buckets],
            y=[one.mean for one in buckets],
            error_y={
                "type": "data",
                "array": [2 * (one.error or 0.0) for one in buckets],
                "color": line.colour,
                "thickness": 1.2,
                "width": 4,
            },
            name=line.name,
            mode="lines+markers",
            line={"color": line.colour, "width": 2, "dash": "dot" if line.dotted else "solid"},
            marker={"size": 6, "color": line.colour},
            customdata=[one.tokens for one in buckets],
            hovertemplate="%{x}: %{y:.4f} of %{customdata:,} tokens<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title="tokens that could be seen", type="category")
    figure.update_yaxes(title=title, nticks=6)
    return styled(figure, height=300, margin={"l": 8, "r": 14, "t": 10, "b": 8})


def _span(one: Bucket) -> str:
    return f"{short_tokens(one.first)}–{short_tokens(one.until)}"


def needle_figure(cells: Sequence[Cell]) -> Figure:
    """Return a map of depth × length with the counts of one kind of question; darker: more were found."""
    lengths = sorted({one.length_tokens for one in cells})
    depths = sorted({(one.depth_from or 0.0, one.depth_until or 1.0) for one in cells})
    found = {(one.length_tokens, (one.depth_from or 0.0, one.depth_until or 1.0)): one for one in cells}
    rows = [[found.get((length, depth)) for length in lengths] for depth in depths]
    columns, names = [short_tokens(length) for length in lengths], [f"{a:.0%}–{b:.0%}" for a, b in depths]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if one is None else one.share for one in row] for row in rows],
            x=columns,
            y=names,
            zmin=0,
            zmax=1,
            colorscale=LOAD_SCALE,
            showscale=False,
            xgap=2,
            ygap=2,
            customdata=[["" if one is None else f"{one.low:.0%} to {one.high:.0%}" for one in row] for row in rows],
            hovertemplate="depth %{y}, %{x} tokens: %{z:.0%} (%{customdata})<extra></extra>",
        )
    )
    for name, row in zip(names, rows, strict=True):
        for column, one in zip(columns, row, strict=True):
            if one is not None:
                colour = LOAD_SCALE[0 if one.share > DARK_FROM else -1][1]
                text = f"{one.found}/{one.asked}"
                figure.add_scatter(
                    x=[column], y=[name], text=[text], mode="text", textfont={"color": colour, "size": 13},
                    hoverinfo="skip",
                )  # fmt: skip
    figure.update_xaxes(title="tokens of the sequence", type="category", showgrid=False)
    figure.update_yaxes(title="depth of the needle", type="category", showgrid=False, autorange="reversed")
    return styled(figure, height=90 + 34 * len(names), margin={"l": 8, "r": 8, "t": 8, "b": 8})


def reach_figure(reach: Sequence[LayerReach], far: str) -> Figure:
    """Return a map of head × layer: the share of keys that no query so far away attends; darker: more."""
    heads = heads_of(reach)
    rows = [list(one.unattended.get(far) or ()) for one in reach]
    figure = go.Figure(
        go.Heatmap(
            z=[[*row, *[None] * (heads - len(row))] for row in rows],
            y=[str(one.layer) for one in reach],
            zmin=0,
            zmax=1,
            colorscale=LOAD_SCALE,
            showscale=False,
            hovertemplate="layer %{y}, head %{x}: %{z:.1%} of keys<extra></extra>",
        )
    )
    step = -(-len(rows) // 8)
    names = [str(one.layer) for one in reach][::step]
    figure.update_xaxes(title="head", dtick=max(1, heads // 8), showgrid=False)
    figure.update_yaxes(title="layer", type="category", tickvals=names, showgrid=False, autorange="reversed")
    return styled(figure, height=320 if len(rows) > 8 else 200, margin={"l": 8, "r": 8, "t": 8, "b": 8})
