"""Picks a candidate: every candidate under a quick evaluator, the best few and all plain layouts under a good one.

Placement is shared by both directions, layouts are chosen for each. The pick is the quickest step that the backend can
execute within the memory limit; equal times go to the plainer candidate, and what evaluators are known to see too well
must gain more than a margin. No plain layout that is eligible is quicker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...traces.errors import InputError
from ...traces.progress import Progress, no_progress
from ..cost.evaluation import Evaluator
from ..layouts.layout import VERY_MANY_RANKS, Layout
from ..schedule.schedule import DIRECTIONS
from .candidates import Candidate, PlacementChoice, baselines, layout_choices, placement_choices
from .estimates import (
    ALL_PLACED_RANKS,
    SCREENED,
    Options,
    best_of_their_kind,
    competing_us,
    eligible_options,
    estimates,
    margin_of,
    mixtures_of,
)
from .problem import Problem
from .sampling import evenly_spread
from .scores import Aside, Rater, ScoreBoard, Step

FINAL_PLACEMENTS = 3
# Counting the tile pairs of token striping is quadratic in the sequence's blocks, whatever the density.
MAX_TOKEN_STRIPING_TOKENS = 128 * 1024
MOST_SIMULATED_RANKS = VERY_MANY_RANKS  # on more of them the recurrence has the last word
# Ranks times layers, per candidate and direction, that are simulated, and that are estimated.
SIMULATED_RANKS, ESTIMATED_RANKS = 32, 256
QUICK, GOOD = "recurrence", "simulator"


Mixture = tuple[PlacementChoice, Layout, Layout]  # forward's layout, backward's


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What was found. table: every candidate with one layout in both directions, under its best evaluator.

    baselines: the plain layouts among them.
    """

    pick: Step
    table: tuple[Step, ...]
    baselines: tuple[Step, ...]
    bound_us: float
    notes: tuple[str, ...]

    @property
    def best_baseline(self) -> Step | None:
        """The quickest plain layout that can be executed within the memory limit."""
        eligible = (step for step in self.baselines if step.eligible)
        return min(eligible, key=lambda step: step.step_time_us, default=None)


def select(
    problem: Problem, *, quick: Evaluator, final: Evaluator | None = None, progress: Progress = no_progress,
    aside: Aside | None = None,
) -> Selection:  # fmt: skip
    """Return the best candidate; InputError when none can be executed within the memory limit.

    final: evaluates the best few and all plain layouts; None: `quick` has the last word. aside: scores forward by
    evaluators of the names QUICK and GOOD, which are those.
    """
    board = ScoreBoard(problem=problem, aside=aside)
    candidates, notes = _candidates(board)
    choices = tuple(dict.fromkeys(choice for choice, _ in candidates))
    offers = problem.offers(restricted=False)
    plain = baselines(offers, block_size=problem.attention.block_size)
    rater = screen = Rater(
        name=QUICK, evaluator=quick, samples=_samples(problem, ESTIMATED_RANKS), ever_full_speed=True
    )
    steps, left_out = estimates(board, candidates, plain, rater, progress)
    candidates = [one for one in candidates if one in steps]
    options = eligible_options(candidates, steps)
    if not any(mixtures_of(one) for one in options.values()):
        raise _none_eligible(problem, [steps[one] for one in candidates])
    rated: dict[Mixture, Step] = {}
    if final is not None and problem.cluster.world_size <= MOST_SIMULATED_RANKS:
        samples = _samples(problem, SIMULATED_RANKS)
        rater = Rater(name=GOOD, evaluator=final, samples=samples)
        screen = replace(screen, samples=samples)
        options = _finalists(options, steps, [one for one in plain if one in candidates])
        both_ways = [(choice, layout, layout) for choice, layout in plain]
        # Of many ranks plain layouts that are estimated to take longer than one did are no better; those that come near
        # the pick are simulated with the others.
        within = 1.0 if problem.cluster.world_size > ALL_PLACED_RANKS else math.inf
        _rate_best(board, both_ways, rated, (rater, screen, within), "simulating plain layouts", progress)
    mixtures = [(choice, *both) for choice, one in options.items() for both in _plainest_first(mixtures_of(one))]
    _rate_best(board, mixtures, rated, (rater, screen, SCREENED), "choosing", progress)
    pick = min((rated[one] for one in mixtures if one in rated), key=competing_us)
    steps |= {(choice, forward): step for (choice, forward, backward), step in rated.items() if forward == backward}
    return Selection(
        pick=pick,
        table=tuple(steps.values()),
        baselines=tuple(step for one, step in steps.items() if one in plain),
        bound_us=board.bound_us(rater, choices),
        notes=(*notes, *left_out),
    )


def _samples(problem: Problem, ranks: int) -> tuple[int, ...]:
    """Return fewer of the sampled layers on larger clusters: so many ranks times layers are looked at, one at least."""
    count = max(1, ranks // problem.cluster.world_size)
    return tuple(evenly_spread(range(len(problem.samples)), count))


def _candidates(board: ScoreBoard) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that apply, plainest first, and what was left out and why."""
    problem, notes, inapplicable, found = board.problem, [], [], []
    space, attention, world = problem.space, problem.attention, problem.cluster.world_size
    choices = placement_choices(attention, world_size=world, names=space.placements)
    if attention.seq_len_tokens > MAX_TOKEN_STRIPING_TOKENS and any(one.granularity_tokens == 1 for one in choices):
        choices = [one for one in choices if one.granularity_tokens > 1]
        notes.append(f"token striping is not looked at beyond {MAX_TOKEN_STRIPING_TOKENS} tokens")
    for layout in layout_choices(problem.offers()):
        # A layout that computes whole sequences does the same work under every placement: one stands for all.
        relevant = choices[:1] if layout.head_groups == world > 1 else choices
        applicable = [choice for choice in relevant if board.applies(choice, layout)]
        found += [(choice, layout) for choice in applicable]
        if relevant and not applicable:
            inapplicable.append(f"{layout.name} ({layout.why_not(problem.shape(board.placement(relevant[0])))})")
    if inapplicable:
        notes.append(f"not for these sizes: {', '.join(dict.fromkeys(inapplicable))}")
    if space.narrow_gradients and not any(layout.transfers.narrow for _, layout in found):
        raise InputError("no layout that is left to choose from rounds gradients", field="narrow_gradients")
    if not found:
        raise InputError("nothing is left to choose from: " + "; ".join(notes), field="layout, placement")
    order = {choice: number for number, choice in enumerate(choices)}
    return sorted(found, key=lambda one: order[one[0]]), notes


def _rate_best(
    board: ScoreBoard, mixtures: Sequence[Mixture], rated: dict[Mixture, Step], raters: tuple[Rater, Rater, float],
    stage: str, progress: Progress,
) -> None:  # fmt: skip
    """Rate mixtures that may be the quickest, those that are estimated to be so first; add them to `rated`.

    raters: who rates them, who estimates them, and how many times as long as the quickest so far that is eligible an
    estimate may be: it ends with the first that is longer.
    """
    rater, screen, within = raters
    quickest_us = min((competing_us(rated[one]) for one in mixtures if one in rated and rated[one].eligible),
                      default=math.inf)  # fmt: skip
    estimated_us = {one: competing_us(board.step(*one, screen)) for one in mixtures}
    ordered = sorted(mixtures, key=estimated_us.__getitem__)
    for number, one in enumerate(ordered):
        if estimated_us[one] > within * quickest_us:
            break
        for choice, forward, backward in ordered[number : number + 2]:  # who scores aside goes on with the next
            near = (choice, forward, backward)
            if estimated_us[near] <= within * quickest_us and (
                within == math.inf or _floor_us(board, near, (rater, screen)) <= quickest_us
            ):
                board.ask(choice, forward, rater)
        if within < math.inf and _is_slower(board, one, (rater, screen), quickest_us):
            continue
        rated[one] = board.step(*one, rater)
        if rated[one].eligible:
            quickest_us = min(quickest_us, competing_us(rated[one]))
        progress(stage, number + 1, len(mixtures))
    progress(stage, len(mixtures), len(mixtures))


def _is_slower(board: ScoreBoard, one: Mixture, raters: tuple[Rater, Rater], limit_us: float) -> bool:
    """Whether a mixture takes longer than the limit: by what it computes, or by its forward and what backward computes.

    raters: who rates it, and who estimated it. Its forward is rated where that is needed to tell.
    """
    if _floor_us(board, one, raters) > limit_us:
        return True
    choice, forward, _ = one
    board.score(choice, forward, "forward", raters[0])
    return _floor_us(board, one, raters) > limit_us


def _floor_us(board: ScoreBoard, one: Mixture, raters: tuple[Rater, Rater]) -> float:
    """Return what the time by which a mixture competes is not below, by what is known of it; see `_is_slower`."""
    choice, forward, backward = one
    rater, screen = raters
    known_us = (board.known_us(choice, forward, "forward", rater, screen),
                board.known_us(choice, backward, "backward", rater, screen))  # fmt: skip
    return (1 + margin_of(choice, forward, backward)) * sum(known_us)


def _finalists(
    options: dict[PlacementChoice, Options], steps: dict[Candidate, Step], plain: Sequence[Candidate]
) -> dict[PlacementChoice, Options]:
    """Return the best few layouts of each direction for the best few placements, and the eligible plain layouts.

    The best few of each way to keep K/V, since both directions must agree on it, and of each way to transfer, since
    what transfers take from kernels is nothing that the recurrence sees.
    """
    found = eligible_options(plain, steps)
    best_us = {choice: min(both.values()) for choice, one in options.items() if (both := mixtures_of(one))}
    quickest = sorted(best_us, key=best_us.__getitem__)
    regular = [choice for choice in quickest if choice.regular]
    for choice in dict.fromkeys([*quickest[:FINAL_PLACEMENTS], *regular[:1]]):
        kept = found.setdefault(choice, {way: {} for way in DIRECTIONS})
        for way, times_us in options[choice].items():
            kept[way].update((layout, times_us[layout]) for layout in best_of_their_kind(times_us))
    return found


def _plainest_first(mixtures: Iterable[tuple[Layout, Layout]]) -> list[tuple[Layout, Layout]]:
    """Return mixtures in order, the same layout in both directions before others: `min` keeps the first of equals."""
    return sorted(mixtures, key=lambda one: one[0] != one[1])


def _none_eligible(problem: Problem, steps: Sequence[Step]) -> InputError:
    executable = [step for step in steps if step.why_not is None]
    if not executable:
        reasons = ", ".join(sorted({step.why_not for step in steps if step.why_not}))
        return InputError(f"no candidate can be executed: {reasons}", field="backend")
    least = min(executable, key=lambda step: step.memory_bytes)
    return InputError(
        f"{problem.memory_limit_bytes} is too little for any candidate; the least, {least.placement} with "
        f"{least.forward_layout}, needs {least.memory_bytes} bytes for one layer",
        field="memory_limit_bytes",
    )
