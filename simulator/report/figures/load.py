"""Work by rank and phase as a map, one for each way to spread it."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from ..spread import Loads
from .theme import LOAD_SCALE, Figure, styled


def load_figure(one: Loads, most: int) -> Figure:
    """Return a map of rank × phase. most: tile pairs of the darkest colour, the same for all maps beside each other."""
    ranks, phases = one.pairs.shape
    figure = go.Figure(
        go.Heatmap(
            z=one.pairs.astype(np.int32),
            zmin=0,
            zmax=max(most, 1),
            colorscale=LOAD_SCALE,
            showscale=False,
            xgap=1 if phases <= 40 else 0,
            ygap=1 if ranks <= 40 else 0,
            hovertemplate="rank %{y}, phase %{x}: %{z:,} tile pairs<extra></extra>",
        )
    )
    figure.update_xaxes(title="phase", dtick=_tick(phases), showgrid=False)
    figure.update_yaxes(title="rank", dtick=_tick(ranks), showgrid=False, autorange="reversed")
    return styled(figure, height=320 if ranks > 8 else 200, margin={"l": 8, "r": 8, "t": 8, "b": 8})


def _tick(count: int) -> int:
    """Return a distance, a power of two, that makes at most eight ticks."""
    distance = 1
    while count / distance > 8:
        distance *= 2
    return distance
