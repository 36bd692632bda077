"""What a placement may be combined with in each direction: layouts, their times, and which of them go together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product

from ..layouts.layout import Layout
from ..schedule.schedule import DIRECTIONS, Direction
from .candidates import Candidate, PlacementChoice
from .scores import Step

FINAL_LAYOUTS = 2

# Layouts that a placement may be combined with in each direction, and their times in microseconds.
Options = dict[Direction, dict[Layout, float]]


def mixtures_of(options: Options) -> dict[tuple[Layout, Layout], float]:
    """Return the (forward, backward) layouts that go together, and the microseconds of a step.

    Both keep K/V in the same slots, or none does; and heads are dealt out in one order, to one number of groups.
    """
    return {
        (forward, backward): options["forward"][forward] + options["backward"][backward]
        for forward, backward in product(options["forward"], options["backward"])
        if forward.kept_slots == backward.kept_slots and len({forward.head_groups, backward.head_groups} - {1}) < 2
    }


def eligible_options(candidates: Sequence[Candidate], steps: dict[Candidate, Step]) -> dict[PlacementChoice, Options]:
    """Return what can be executed within the memory limit, by placement, in the order of `candidates`.

    Candidates without a step were left out; of layouts that play a direction alike the plainest is there.
    """
    found: dict[PlacementChoice, Options] = {}
    for choice, layout in candidates:
        options, step = found.setdefault(choice, {way: {} for way in DIRECTIONS}), steps.get((choice, layout))
        if step is None:
            continue
        for way in DIRECTIONS:
            score = step.forward if way == "forward" else step.backward
            if score.eligible:
                options[way].setdefault(layout.played_as(way), score.makespan_us)
    return found


def worth_placing(options: dict[PlacementChoice, Options], *, within: float) -> set[Layout]:
    """Return the best layouts of each kind in either direction, but for those that take so many times the best."""
    found: set[Layout] = set()
    for times_us in (one[way] for one in options.values() for way in DIRECTIONS):
        limit_us = within * min(times_us.values(), default=0.0)
        found |= {layout for layout in best_of_their_kind(times_us) if times_us[layout] <= limit_us}
    return found


def best_of_their_kind(times_us: dict[Layout, float]) -> list[Layout]:
    """Return the quickest few of each way to keep K/V, to transfer, and to split heads or not."""
    groups: dict[Hashable, list[Layout]] = {}
    for layout in times_us:
        groups.setdefault((layout.kept_slots, layout.transfers, layout.head_groups > 1), []).append(layout)
    return [one for alike in groups.values() for one in sorted(alike, key=times_us.__getitem__)[:FINAL_LAYOUTS]]
