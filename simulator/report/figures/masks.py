"""Mask maps: which blocks of keys each block of queries attends, with the columns between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from ....traces.dataset.rows import head_density
from ....traces.dataset.store import Trace
from ....traces.pattern import HeadPattern, LayerPattern
from .theme import BLUE, COLUMN_SCALE, Figure, styled

SHOWN = 8
MOST_CELLS = 192  # rows of a map; longer sequences are shown coarser
MOST_PERCENT, STRONGEST_PERCENT = 99, 25  # of a block's keys that are columns: in a map at all, and by its colour
NOTHING = "rgba(0, 0, 0, 0)"
MAP_SCALE = [
    [0.0, NOTHING], [0.005, NOTHING],
    *([0.005 + place * STRONGEST_PERCENT / 100, colour] for place, colour in COLUMN_SCALE),
    [0.995, COLUMN_SCALE[-1][1]], [0.995, BLUE], [1.0, BLUE],
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownHead:
    """One head that is shown."""

    layer: int
    head: int
    density: float
    pattern: HeadPattern
    of: LayerPattern


def chosen_heads(trace: Trace, count: int = SHOWN) -> list[ShownHead]:
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


def mask_figure(one: ShownHead) -> Figure:
    """Return the map of one head: queries downwards, keys to the right, in tokens."""
    figure = go.Figure([_map(one)])
    last = one.of.seq_len_tokens
    values = [0, last // 2, last]
    ticks = {"tickvals": values, "ticktext": [_short(value) for value in values], "showgrid": False}
    figure.update_xaxes(range=[0, last], constrain="domain", constraintoward="left", title="key token", **ticks)
    figure.update_yaxes(
        range=[last, 0], scaleanchor="x", constrain="domain", constraintoward="top", title="query token", **ticks
    )
    return styled(figure, height=232, margin={"l": 8, "r": 14, "t": 8, "b": 8})


def _short(tokens: int) -> str:
    """Return a number of tokens in few characters: 8192 is 8K, K being 1,024."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def block_map(pattern: LayerPattern, head: HeadPattern, step: int = 1) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return (active, columns), both [n, n] over squares of step × step blocks.

    active: whether any block pair is; columns: elsewhere, on and below the diagonal, the largest share of a key block's
    tokens that are columns. Rows are taken a stripe at a time: a million tokens have 268 million pairs.
    """
    blocks = pattern.num_blocks
    bits, keys, starts = head.block_bits(blocks), np.arange(blocks), np.arange(0, blocks, step)
    share = np.bincount(head.columns // pattern.block_size, minlength=blocks).astype(np.float32) / pattern.block_size
    active = np.zeros((len(starts), len(starts)), dtype=np.bool_)
    columns = np.zeros(active.shape, dtype=np.float32)
    for row, first in enumerate(starts):
        stripe = bits[first : first + step]
        queries = keys[first : first + step, None]
        touched = np.where(~stripe & (keys <= queries), share, np.float32(0.0)).max(axis=0)
        active[row] = np.logical_or.reduceat(stripe.any(axis=0), starts)
        columns[row] = np.maximum.reduceat(touched, starts)
    return active, columns


def _map(one: ShownHead) -> go.Heatmap:
    """Return the map in whole percent, a byte a cell: pages hold many of them."""
    step = -(-one.of.num_blocks // MOST_CELLS)
    active, columns = block_map(one.of, one.pattern, step)
    percent = np.where(active, 100, np.minimum(np.ceil(100 * columns), MOST_PERCENT)).astype(np.uint8)
    centre = (np.arange(active.shape[0]) + 0.5) * step * one.of.block_size
    return go.Heatmap(
        z=percent, zmin=0, zmax=100, x=centre, y=centre, showscale=False, colorscale=MAP_SCALE,
        hovertemplate="queries around %{y:.0f}, keys around %{x:.0f}: up to %{z} % of a block's keys<extra></extra>",
    )  # fmt: skip
