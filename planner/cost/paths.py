"""Longest paths in a graph of events, level by level: what a max-plus system's times are.

Where ranks come in turns that are alike, the graph is one turn's, and an edge says by how many turns its two ends are
apart: every node then has a time for each turn. A level holds the nodes whose predecessors all lie in earlier levels,
which is the same in every turn. Nodes are numbered anew, level by level, and edges lie in the order of the nodes that
they lead to, so that a level is a slice of both.

Shape legend: T turns, modulo which turns are counted.
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

    most: edges into one node, where all nodes have as many; else 0. turned: by how many turns later each edge's source
    is than its target; None where none is. shared: the nodes that all turns have in common.
    """

    nodes: slice
    edges: slice
    sources: Numbers
    starts: Numbers
    most: int
    turned: Numbers | None
    shared: Numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Paths:
    """A graph, ordered. place: int64 [nodes], a node's new number; edge_order: int64 [edges], edges as they lie."""

    place: Numbers
    edge_order: Numbers
    levels: tuple[_Level, ...]

    @classmethod
    def through(
        cls, nodes: int, source: Numbers, target: Numbers, turned: Numbers | None = None, shared: Numbers | None = None
    ) -> Paths:
        """Order a graph of so many nodes. source, target: int64 [edges]. ScheduleError when edges close a circle.

        turned: int64 [edges], by how many turns later an edge's source is than its target. shared: nodes that are one
        for all turns. By default there is one turn.
        """
        depth = _depths(nodes, source, target)
        order = np.argsort(depth, kind="stable")
        place = np.empty(nodes, dtype=np.int64)
        place[order] = np.arange(nodes)
        edge_order = np.argsort(place[target], kind="stable")
        sources, targets = place[source[edge_order]], place[target[edge_order]]
        turns = np.zeros(source.size, dtype=np.int64) if turned is None else turned[edge_order]
        common = np.sort(place[np.zeros(0, dtype=np.int64) if shared is None else shared])
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
                turned=turns[begin:end] if turns[begin:end].any() else None,
                shared=common[np.searchsorted(common, first) : np.searchsorted(common, last)],
            )
            levels.append(level)
        return cls(place=place, edge_order=edge_order, levels=tuple(levels))

    def longest(self, weight: Numbers) -> Numbers:
        """Return int64 [nodes, T]: the longest path to each; nodes without predecessors are at 0. weight: [edges, T].

        An edge's weight of a turn is that of the turn in which its target is.
        """
        turns = weight.shape[1]
        time, ordered = np.zeros((self.place.size, turns), dtype=np.int64), weight[self.edge_order]
        for level in self.levels:
            if level.turned is None:
                reached = time[level.sources]
            else:
                reached = time[level.sources[:, None], (np.arange(turns) + level.turned[:, None]) % turns]
            reached += ordered[level.edges]
            if level.most == 1:
                time[level.nodes] = reached
            elif level.most == 2:
                np.maximum(reached[::2], reached[1::2], out=time[level.nodes])
            else:
                np.maximum.reduceat(reached, level.starts, axis=0, out=time[level.nodes])
            if level.shared.size:
                time[level.shared] = time[level.shared].max(axis=1, keepdims=True)
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
