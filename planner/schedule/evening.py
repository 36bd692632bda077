"""Evening out what ranks have to do, units against units, so that every rank keeps as many as it had.

Longest processing time first leaves the busiest rank up to a fifth above the best where a rank has few units. From
there this descends: the busiest rank gives another one a few units for as many lighter ones, as long as the busier of
the two gets less. Of few units that is tried from several starts, since a descent may end where no pair of ranks can
improve and three of them could.

Shape legend: W ranks, U units of each.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Loads = NDArray[np.float64]
Units = NDArray[np.int64]

MOST_TOGETHER = 3  # units that change ranks at once
MOST_SETS = 2048  # sets of one rank's units that are looked at
FEW_UNITS = 64  # of all ranks: then there are other starts
STARTS = 128
SHUFFLED = 3  # pairs of units that change places before another start
ENOUGH = 1.0 + 1e-4  # times the mean: not worth a further step


def evened(units: Units, load: Loads) -> Units:
    """Return units int64 [W, U] of no busier a busiest rank. load: float64 [units]; a function of both alone."""
    best = _descended(units, load)
    if units.size > FEW_UNITS:
        return best
    random, found = np.random.default_rng(0), best
    for _ in range(STARTS):
        if _busiest(best, load) <= ENOUGH * load.sum() / len(units):
            break
        found = _descended(_shuffled(found, random), load)
        if _busiest(found, load) <= _busiest(best, load):
            best = found
        else:
            found = best
    return best


def _busiest(units: Units, load: Loads) -> float:
    return float(load[units].sum(axis=1).max())


def _shuffled(units: Units, random: np.random.Generator) -> Units:
    """Return the units with some changed between ranks."""
    moved = units.copy()
    flat = moved.reshape(-1)
    for one, other in random.integers(0, units.size, (SHUFFLED, 2)):
        flat[one], flat[other] = flat[other], flat[one]
    return moved


def _descended(units: Units, load: Loads) -> Units:
    """Exchange units of the busiest rank until no other rank can take anything from it."""
    owned = units.copy()
    sets = _sets(owned.shape[1])
    while True:
        total = load[owned].sum(axis=1)
        busiest = int(total.argmax())
        if total[busiest] <= ENOUGH * total.mean():
            return owned
        for other in np.argsort(total, kind="stable"):
            if _exchanged(owned, load, busiest, int(other), sets):
                break
        else:
            return owned


def _sets(count: int) -> list[Units]:
    """Return the sets of places that are exchanged: of one unit, two, and so on, as many as there is patience for."""
    found: list[Units] = []
    for size in range(1, min(MOST_TOGETHER, count) + 1):
        if size > 1 and len(found[-1]) * count > MOST_SETS * size:
            break
        found.append(np.array(list(combinations(range(count), size)), dtype=np.int64))
    return found


def _exchanged(owned: Units, load: Loads, busy: int, other: int, sets: list[Units]) -> bool:
    """Exchange the units of two ranks that leave the busier of both least to do; whether that is less than before."""
    wanted = (load[owned[busy]].sum() - load[owned[other]].sum()) / 2  # to be moved from one to the other
    if wanted <= 0:
        return False
    best: tuple[float, Units, Units] | None = None
    for places in sets:
        given, taken = (load[owned[rank][places]].sum(axis=1) for rank in (busy, other))
        order = np.argsort(taken, kind="stable")
        # Of all sets of the other rank's units those next to the load that would leave both alike.
        near = np.searchsorted(taken[order], given - wanted)
        for beside in (near - 1, near):
            back = order[np.clip(beside, 0, order.size - 1)]
            missed = np.abs(given - taken[back] - wanted)
            first = int(missed.argmin())
            if missed[first] < wanted * (1 - 1e-9) and (best is None or missed[first] < best[0]):
                best = float(missed[first]), places[first], places[back[first]]
    if best is None:
        return False
    _, here, there = best
    owned[busy, here], owned[other, there] = owned[other, there], owned[busy, here].copy()
    return True
