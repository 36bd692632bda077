"""Longest paths in a graph of events, level by level: what a max-plus system's times are.

A level holds the nodes whose predecessors all lie in earlier levels. Nodes are numbered anew, level by level, and edges
lie in the order of the nodes that they lead to, so that a level is a slice of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import ScheduleError

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Level:
    """Slices of nodes and of edges; sources: where the edges come from; starts: of each node's edges among them.

    most: edges into one node, where all nodes have as many; else 0.
    """

    nodes: slice
    edges: slice
    sources: Numbers
    starts: Numbers
    most: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Paths:
    """A graph, ordered. place: int64 [nodes], a node's new number; edge_order: int64 [edges], edges as they lie."""

    place: Numbers
    edge_order: Numbers
    levels: tuple[_Level, ...]

    @classmethod
    def through(cls, nodes: int, source: Numbers, target: Numbers) -> Paths:
        """Order a graph of so many nodes. source, target: int64 [edges]. ScheduleError when edges close a circle."""
        depth = _depths(nodes, source, target)
        order = np.argsort(depth, kind="stable")
        place = np.empty(nodes, dtype=np.int64)
        place[order] = np.arange(nodes)
        edge_order = np.argsort(place[target], kind="stable")
        sources, targets = place[source[edge_order]], place[target[edge_order]]
        node_cuts = np.searchsorted(depth[order], np.arange(1, depth.max(initial=0) + 2)).tolist()
        edge_cuts = np.searchsorted(targets, node_cuts).tolist()
        levels = []
        for (first, last), (begin, end) in zip(pairwise(node_cuts), pairwise(edge_cuts), strict=True):
            counts = np.bincount(targets[begin:end] - first, minlength=last - first)
            level = _Level(
                nodes=slice(first, last),
                edges=slice(begin, end),
                sources=sources[begin:end],
                starts=np.cumsum(counts) - counts,
                most=int(counts[0]) if counts.min() == counts.max() else 0,
            )
            levels.append(level)
        return cls(place=place, edge_order=edge_order, levels=tuple(levels))

    def longest(self, weight: Numbers) -> Numbers:
        """Return int64 [nodes]: the longest path to each; nodes without predecessors are at 0. weight: [edges]."""
        time, ordered = np.zeros(self.place.size, dtype=np.int64), weight[self.edge_order]
        for level in self.levels:
            reached = time[level.sources]
            reached += ordered[level.edges]
            if level.most == 1:
                time[level.nodes] = reached
            elif level.most == 2:
                np.maximum(reached[::2], reached[1::2], out=time[level.nodes])
            else:
                np.maximum.reduceat(reached, level.starts, out=time[level.nodes])
        return time[self.place]


def _depths(nodes: int, source: Numbers, target: Numbers) -> Numbers:
    """Return int64 [nodes]: the most edges of a path to each."""
    order = np.argsort(source, kind="stable")
    offset = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=nodes))])
    missing = np.bincount(target, minlength=nodes)
    depth, settled, ready, level = np.zeros(nodes, dtype=np.int64), 0, np.flatnonzero(missing == 0), 0
    while ready.size:
        settled, level = settled + ready.size, level + 1
        counts = offset[ready + 1] - offset[ready]
        edges = np.arange(counts.sum()) + np.repeat(offset[ready] - np.cumsum(counts) + counts, counts)
        touched, often = np.unique(target[order[edges]], return_counts=True)
        missing[touched] -= often
        ready = touched[missing[touched] == 0]
        depth[ready] = level
    if settled != nodes:
        raise ScheduleError(f"the schedule cannot finish: {nodes - settled} of its {nodes} events wait in a circle")
    return depth
