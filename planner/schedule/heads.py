"""In which order heads are dealt out where ranks compute parts of them: so that every head group has as much to do.

Patterns differ from head to head, and ranks of a group wait for the one whose heads have most blocks. Groups take heads
in the order of a permutation, equally many each: whole K/V heads with all their query heads, or parts of one K/V head's
query heads.

Shape legend: H query heads, H_kv K/V heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...traces.pattern import BlockMask, HeadPattern, LayerPattern
from .active import keys_of_queries

HeadOrder = tuple[int, ...]


def head_load(pattern: LayerPattern) -> NDArray[np.float64]:
    """Return float64 [H]: the work of every query head of a layer in tile pairs, columns included."""
    known: dict[HeadPattern, float] = {}
    for head in dict.fromkeys(pattern.heads):  # synthetic patterns repeat one head object
        blocks_after = pattern.num_blocks - head.columns // pattern.block_size
        known[head] = _pairs_of(pattern, head) + float(blocks_after.sum()) / pattern.block_size
    return np.array([known[head] for head in pattern.heads])


def _pairs_of(pattern: LayerPattern, head: HeadPattern) -> int:
    if isinstance(head, BlockMask) and pattern.documents is None:  # counted without looking at single rows
        return head.count_active_blocks(pattern.num_blocks)
    return int(keys_of_queries(pattern, head).sum())


def balanced_order(load: NDArray[np.float64], *, kv_heads: int, degree: int) -> HeadOrder:
    """Return the order of query heads that evens out the load of `degree` groups; as it is where that is no worse.

    load: of each query head. The heaviest unit goes to the group with least that still has room.
    """
    heads = len(load)
    per_key = heads // kv_heads
    natural = tuple(range(heads))
    if degree <= kv_heads:  # units are K/V heads with all their query heads
        of_keys = load.reshape(kv_heads, per_key).sum(axis=1)
        keys = [key for group in _dealt(of_keys, degree) for key in group]
        order = [key * per_key + member for key in keys for member in range(per_key)]
    else:  # units are query heads, and a group has those of one K/V head
        order = []
        for key in range(kv_heads):
            first = key * per_key
            dealt = _dealt(load[first : first + per_key], degree // kv_heads)
            order += [first + member for group in dealt for member in group]
    found = tuple(int(head) for head in order)
    return found if heaviest(load, found, degree) < heaviest(load, natural, degree) else natural


def heaviest(load: NDArray[np.float64], order: HeadOrder, degree: int) -> float:
    """Return the load of the group that has most."""
    return float(load[list(order)].reshape(degree, -1).sum(axis=1).max())


def key_order(order: HeadOrder, *, kv_heads: int) -> HeadOrder:
    """Return the order of K/V heads that goes with one of query heads."""
    per_key = len(order) // kv_heads
    return tuple(order[place * per_key] // per_key for place in range(kv_heads))


def is_order(order: Sequence[int], *, heads: int, kv_heads: int) -> bool:
    """Whether this permutes the query heads and leaves those of a K/V head together."""
    if sorted(order) != list(range(heads)):
        return False
    of_keys = (np.array(order) // (heads // kv_heads)).reshape(kv_heads, -1)
    return bool((of_keys == of_keys[:, :1]).all())


def _dealt(load: NDArray[np.float64], groups: int) -> list[list[int]]:
    """Deal units out to groups, equally many each, the heaviest first; each group's in rising order."""
    room = len(load) // groups
    found: list[list[int]] = [[] for _ in range(groups)]
    total = np.zeros(groups)
    for unit in np.argsort(-load, kind="stable"):
        group = min((one for one in range(groups) if len(found[one]) < room), key=lambda one: total[one])
        found[group].append(int(unit))
        total[group] += load[unit]
    return [sorted(group) for group in sorted(found)]
