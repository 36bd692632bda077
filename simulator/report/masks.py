"""Mask maps: which blocks of keys each block of queries attends, with the columns between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from ...traces.dataset.rows import head_density
from ...traces.dataset.store import Trace
from ...traces.pattern import HeadPattern, LayerPattern
from .figures import BLUE, FAINT, ORANGE, styled

SHOWN = 8
PER_ROW = 4
MOST_CELLS = 256  # rows of a map; longer sequences are shown coarser


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownHead:
    """One head that is shown."""

    layer: int
    head: int
    density: float
    pattern: HeadPattern
    of: LayerPattern


def masks_figure(trace: Trace) -> go.Figure:
    """Return maps of eight heads, from the sparsest to the densest of the last training step."""
    heads = chosen_heads(trace, SHOWN)
    rows = -(-len(heads) // PER_ROW)
    titles = [
        f"layer {one.layer}, head {one.head}<br><span style='color:{FAINT}'>density {one.density:.2f}, "
        f"{one.pattern.columns.size} columns</span>"
        for one in heads
    ]
    figure = make_subplots(rows=rows, cols=PER_ROW, subplot_titles=titles, horizontal_spacing=0.035,
                           vertical_spacing=0.14)  # fmt: skip
    for number, one in enumerate(heads):
        row, column = number // PER_ROW + 1, number % PER_ROW + 1
        figure.add_traces(_map(one), rows=row, cols=column)
        last = one.of.seq_len_tokens
        ticks = {"showgrid": False, "constrain": "domain", "dtick": _tick(last), "tickformat": "d"}
        figure.update_xaxes(range=[0, last], row=row, col=column, **ticks)
        figure.update_yaxes(range=[last, 0], scaleanchor=f"x{number + 1 if number else ''}",
                            showticklabels=column == 1, row=row, col=column, **ticks)  # fmt: skip
    figure.update_xaxes(title="key token", row=rows)
    figure.update_yaxes(title="query token", col=1)
    return styled(figure, height=320 * rows + 40, margin={"l": 72, "r": 16, "t": 60, "b": 52}, showlegend=False)


def _tick(last: int) -> int:
    """Return a round distance that makes at most four ticks."""
    distance = 1
    while last / distance > 4:
        distance *= 2
    return distance


def chosen_heads(trace: Trace, count: int) -> list[ShownHead]:
    """Return `count` heads of the last training step at even distances in the order of their density."""
    found = []
    for layer in trace.layers:
        of = trace.layer_pattern(trace.steps[-1], layer)
        for number, head in enumerate(of.heads):
            density = head_density(head, of.num_blocks)
            found.append(ShownHead(layer=layer, head=number, density=density, pattern=head, of=of))
    found.sort(key=lambda one: one.density)
    places = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return [found[place] for place in places]


def block_map(pattern: LayerPattern, head: HeadPattern) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return (active [N, N], columns [N, N]): active block pairs; elsewhere the share of the key block's tokens that
    are columns, on and below the diagonal.
    """
    blocks = pattern.num_blocks
    active = head.block_bits(blocks)
    share = np.bincount(head.columns // pattern.block_size, minlength=blocks) / pattern.block_size
    columns = np.tril(np.broadcast_to(share, (blocks, blocks))) * ~active
    return active, columns.astype(np.float32)


def _map(one: ShownHead) -> list[go.Heatmap]:
    active, columns = block_map(one.of, one.pattern)
    step = -(-active.shape[0] // MOST_CELLS)
    if step > 1:
        active, columns = (_coarser(values, step) for values in (active, columns))
    centre = (np.arange(active.shape[0]) + 0.5) * step * one.of.block_size
    common = {"x": centre, "y": centre, "showscale": False, "hoverongaps": False}
    place = "queries around %{y:.0f}, keys around %{x:.0f}: "
    return [
        go.Heatmap(
            z=np.where(active > 0, 1.0, np.nan).astype(np.float32),
            colorscale=[[0, BLUE], [1, BLUE]],
            hovertemplate=f"{place}whole block<extra></extra>",
            **common,
        ),
        go.Heatmap(
            z=np.where((columns > 0) & (active == 0), columns, np.nan).astype(np.float32),
            zmin=0.0,
            zmax=0.25,
            colorscale=[[0, "#fbe3cf"], [0.2, "#f0b27e"], [1, ORANGE]],
            hovertemplate=place + "columns, %{z:.0%} of the keys<extra></extra>",
            **common,
        ),
    ]


def _coarser(values: NDArray, step: int) -> NDArray:
    """Return the largest value of every step × step cells."""
    size = -(-values.shape[0] // step) * step
    padded = np.zeros((size, size), dtype=values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.reshape(size // step, step, size // step, step).max(axis=(1, 3))
