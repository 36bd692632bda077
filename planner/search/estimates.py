"""Which candidates are estimated: all of few ranks; of many only those that no lower bound says to be far behind.

On many ranks schedules are long, and most layouts send too much to be quick. What a layout sends between nodes follows
from the pairs alone, so those that cannot be quick are never built.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, product

from ...traces.progress import Progress
from ..layouts.layout import VERY_MANY_RANKS, Layout
from ..schedule.schedule import DIRECTIONS, Direction
from .candidates import Candidate, PlacementChoice
from .scores import Rater, ScoreBoard, Step

FINAL_LAYOUTS = 2

# Layouts that a placement may be combined with in each direction, and their times in microseconds.
Options = dict[Direction, dict[Layout, float]]
# What an irregular placement must gain over all others. Evaluators know how many blocks a rank computes, not in
# which order its kernels meet them: rows of such placements share less of the cache (2 to 14 % of a layer,
# docs/measured/rank.md).
IRREGULAR_MARGIN = 0.01
# What is estimated to take so much longer than the best is not looked at further. The recurrence overlooks that calls
# share links, so it is seldom above the simulator.
SCREENED = 1.05
# On more ranks only some layouts are tried under each placement: the plain ones (but of very many ranks), and
# the best of each kind under the first placement, unless they took so many times the best there.
ALL_PLACED_RANKS, PLACED = 16, 1.25
# There, what is so many times the quickest on one layer is not looked at on the others.
PROBED = 1.1


def margin_of(placement: PlacementChoice, forward: Layout, backward: Layout) -> float:
    """Return the share of its time that a step must gain over plain layouts, which have no margin."""
    return (0.0 if placement.regular else IRREGULAR_MARGIN) + max(forward.margin, backward.margin)


def competing_us(step: Step) -> float:
    """Return the time by which a step competes, in microseconds: plain layouts have no margin, so none is quicker."""
    return step.step_time_us * (1 + margin_of(step.placement, step.forward_layout, step.backward_layout))


def estimates(
    board: ScoreBoard, candidates: Sequence[Candidate], plain: Sequence[Candidate], rater: Rater, progress: Progress
) -> tuple[dict[Candidate, Step], list[str]]:
    """Return the steps of candidates by a quick evaluator, those of plain layouts among them, and what was left out.

    Left out is a placement whose lower bound, whatever the layout, is beyond what is left of the field when candidates
    are screened. On many ranks the best layouts of the first placement are tried under the others: which ones are quick
    hangs on the cluster more than on who has which blocks; and those are left out that send too much to be quick.
    """
    world = board.problem.cluster.world_size
    found = _Field(board=board, rater=rater, progress=progress, most=len(candidates), explores=world > VERY_MANY_RANKS)
    for one in plain:
        found.estimate(one)
    tried: set[Layout] | None = None
    for choice, both in groupby(candidates, key=lambda one: one[0]):
        group = [one for one in both if tried is None or one[1] in tried]
        if world <= ALL_PLACED_RANKS:
            found.look(choice, group, within=math.inf)
        elif tried is not None:
            found.look(choice, found.probed(choice, group), within=SCREENED)
        elif found.look(choice, group, within=PLACED):
            found.explores = False
            tried = worth_placing(eligible_options(group, found.steps), within=PLACED)
            tried |= set() if world > VERY_MANY_RANKS else {layout for _, layout in plain}
    progress("estimating", len(candidates), len(candidates))
    return found.steps, found.notes


@dataclass(kw_only=True, eq=False)
class _Field:
    """The candidates that were estimated. most: how many there may be; quickest, quickest_us: of those eligible.

    least_seen_us: of all, whether they can be executed or not. explores: whether layouts are met for the first time, of
    so many ranks that schedules of those far behind are not kept.
    """

    board: ScoreBoard
    rater: Rater
    progress: Progress
    most: int
    steps: dict[Candidate, Step] = field(default_factory=dict)
    quickest: Candidate | None = None
    quickest_us: float = math.inf
    least_seen_us: float = math.inf
    explores: bool = False
    beaten: list[PlacementChoice] = field(default_factory=list)
    behind: list[PlacementChoice] = field(default_factory=list)
    unbuilt: int = 0

    def estimate(self, one: Candidate) -> None:
        """Estimate a candidate, once."""
        if one not in self.steps:
            choice, layout = one
            step = self.steps[one] = self.board.step(choice, layout, layout, self.rater)
            self.progress("estimating", min(len(self.steps), self.most), self.most)
            self.least_seen_us = min(self.least_seen_us, step.step_time_us)
            if self.explores and step.step_time_us > PLACED * self.least_seen_us:
                self.board.forget(choice, layout)  # of hundreds of ranks each takes a hundred megabytes

    def look(self, choice: PlacementChoice, group: Sequence[Candidate], *, within: float) -> bool:
        """Estimate one placement's candidates, unless none of them can be quick, which is False.

        within: those whose lower bounds are so many times the quickest are left out; the most promising come first.
        """
        if not group:
            return False
        least_us = self.board.least_us(choice, self.rater.samples)
        floor_us = sum(least_us.values())
        if floor_us > SCREENED * self.quickest_us:
            self.beaten.append(choice)
            return False
        bounds_us = {one: self._bound_us(one, least_us) if within < math.inf else floor_us for one in group}
        ordered = sorted(group, key=bounds_us.__getitem__)
        for number, one in enumerate(ordered):
            if bounds_us[one] > within * self.quickest_us:
                self.unbuilt += one not in self.steps
                continue
            for near in ordered[number : number + 2]:  # who scores aside goes on with the next
                if near not in self.steps and bounds_us[near] <= within * self.quickest_us:
                    self.board.ask(*near, self.rater)
            self.estimate(one)
            # An estimate may be below the bound, since it overlooks that links are shared: then the bound is nearer.
            competing = max(competing_us(self.steps[one]), floor_us)
            if self.steps[one].eligible and competing < self.quickest_us:
                self.quickest, self.quickest_us = one, competing
        return True

    def probed(self, choice: PlacementChoice, group: Sequence[Candidate]) -> list[Candidate]:
        """Return those of one placement's candidates that are not far behind on a single layer; see PROBED.

        Counting what ranks compute of a layer takes longest, and to most placements the middle one does no good.
        """
        if self.quickest is None or len(self.rater.samples) == 1:
            return list(group)
        quickest, layout = self.quickest
        limit_us = PROBED * competing_us(self.board.step(quickest, layout, layout, self._one_layer))
        least_us = self.board.least_us(choice, self._one_layer.samples)
        bounds_us = {one: self._bound_us(one, least_us) for one in group}
        steps = {one: self.board.step(choice, one[1], one[1], self._one_layer)
                 for one in group if bounds_us[one] <= limit_us}  # fmt: skip
        self.unbuilt += len(group) - len(steps)
        options = eligible_options(list(steps), steps).get(choice)
        both_us = {} if options is None else mixtures_of(options)
        near = {layout for both, us in both_us.items() if us <= limit_us for layout in both}
        if not near:
            self.behind.append(choice)
        return [one for one in steps if one[1] in near]

    @cached_property
    def _one_layer(self) -> Rater:
        samples = self.rater.samples
        return replace(self.rater, samples=(samples[len(samples) // 2],))

    def _bound_us(self, one: Candidate, least_us: dict[Direction, float]) -> float:
        """Return the lower bound by which a candidate competes; least_us: that of its placement."""
        choice, layout = one
        return self.board.least_with_us(choice, layout, least_us) * (1 + margin_of(choice, layout, layout))

    @property
    def notes(self) -> list[str]:
        """What was left out, and why."""
        found = []
        if self.beaten:
            told = f"not looked at further, since no layout can bring them within {SCREENED - 1:.0%} of the best: "
            found.append(told + ", ".join(map(str, self.beaten)))
        if self.behind:
            told = f"not looked at further, since on one layer they are estimated {PROBED - 1:.0%} behind or more: "
            found.append(told + ", ".join(map(str, self.behind)))
        if self.unbuilt:
            told = "candidates were not estimated: what their layouts send takes too long by itself"
            found.append(f"{self.unbuilt} {told}")
        return found


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
