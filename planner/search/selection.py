"""Picks a candidate: every candidate under a quick evaluator, the best few and all plain layouts under a good one.

Placement is shared by both directions, layouts are chosen for each. The pick is the quickest step that the backend can
execute within the memory limit; equal times go to the plainer candidate, and what evaluators are known to see too well
must gain more than a margin. No plain layout that is eligible is quicker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from ...traces.errors import InputError
from ...traces.progress import Progress, no_progress
from ..cost.evaluation import Evaluator
from ..layouts.layout import Layout
from .candidates import Candidate, PlacementChoice, baselines, layout_choices, placement_choices
from .problem import Problem
from .sampling import evenly_spread
from .scores import Rater, ScoreBoard, Step

FINAL_PLACEMENTS = 3
FINAL_LAYOUTS = 2
# What an irregular placement must gain over all others. Evaluators know how many blocks a rank computes, not in
# which order its kernels meet them: rows of such placements share less of the cache (2 to 14 % of a layer,
# docs/measured/rank.md).
IRREGULAR_MARGIN = 0.01
# Counting the tile pairs of token striping is quadratic in the sequence's blocks, whatever the density.
MAX_TOKEN_STRIPING_TOKENS = 128 * 1024
SIMULATED_RANKS = 32  # ranks times layers per candidate and direction that are simulated
QUICK, GOOD = "recurrence", "simulator"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rated:
    """A candidate with one layout in both directions, and the plain layout that it is, if it is one."""

    step: Step
    baseline: Candidate | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What was found. table: every candidate with one layout in both directions, under its best evaluator."""

    pick: Step
    table: tuple[Rated, ...]
    bound_us: float
    notes: tuple[str, ...]

    @property
    def baselines(self) -> tuple[Rated, ...]:
        """The plain layouts."""
        return tuple(rated for rated in self.table if rated.baseline is not None)

    @property
    def best_baseline(self) -> Rated | None:
        """The quickest plain layout that can be executed within the memory limit."""
        return min(
            (rated for rated in self.baselines if rated.step.eligible),
            key=lambda rated: rated.step.step_time_us,
            default=None,
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Layouts that one placement may be combined with in each direction, and their times."""

    forward: dict[Layout, float] = field(default_factory=dict)
    backward: dict[Layout, float] = field(default_factory=dict)

    @property
    def mixtures(self) -> list[tuple[Layout, Layout]]:
        """(forward, backward) layouts that go together.

        Both keep K/V in the same slots, or none does; and heads are dealt out in one order, to one number of groups.
        """
        return [
            (forward, backward)
            for forward, backward in product(self.forward, self.backward)
            if forward.kept_slots == backward.kept_slots and len({forward.head_groups, backward.head_groups} - {1}) < 2
        ]

    @property
    def complete(self) -> bool:
        """Whether there is a layout for both directions."""
        return bool(self.mixtures)

    @property
    def best_us(self) -> float:
        """The best time of a step."""
        return min(self.forward[forward] + self.backward[backward] for forward, backward in self.mixtures)


def select(
    problem: Problem, *, quick: Evaluator, final: Evaluator | None = None, progress: Progress = no_progress
) -> Selection:
    """Return the best candidate; InputError when none can be executed within the memory limit.

    final: evaluates the best few and all plain layouts; None: `quick` has the last word.
    """
    board = ScoreBoard(problem=problem)
    candidates, notes = _candidates(board)
    offers = problem.space.offers(problem.cluster, restricted=False)
    plain = {one: one for one in baselines(offers, block_size=problem.attention.block_size)}
    rater = Rater(name=QUICK, evaluator=quick, samples=tuple(range(len(problem.samples))))
    steps = _rate(board, [*dict.fromkeys([*candidates, *plain])], rater, "estimating", progress)
    options = _eligible_options(candidates, steps)
    if not any(one.complete for one in options.values()):
        raise _none_eligible(problem, [steps[one] for one in candidates])
    if final is not None:
        rater = Rater(name=GOOD, evaluator=final, samples=_simulated_samples(problem))
        steps |= _rate(board, list(plain), rater, "simulating plain layouts", progress)
        options = _finalists(options, steps, [one for one in plain if one in candidates])
    pick = min(_best_steps(board, options, rater, progress).values(), key=competing_us)
    for choice, one in options.items():  # scores of both directions are there already
        both = [layout for layout in one.forward if layout in one.backward]
        steps |= {
            Candidate(placement=choice, layout=layout): board.step(choice, layout, layout, rater) for layout in both
        }
    table = tuple(Rated(step=step, baseline=plain.get(one)) for one, step in steps.items())
    return Selection(pick=pick, table=table, bound_us=board.bound_us(rater.samples), notes=tuple(notes))


def _simulated_samples(problem: Problem) -> tuple[int, ...]:
    """Return fewer of the sampled layers on larger clusters: a simulation takes long there."""
    count = max(1, SIMULATED_RANKS // problem.cluster.world_size)
    return tuple(evenly_spread(range(len(problem.samples)), count))


def _candidates(board: ScoreBoard) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that apply, plainest first, and what was left out and why."""
    problem, notes, inapplicable, found = board.problem, [], [], []
    space, attention, world = problem.space, problem.attention, problem.cluster.world_size
    choices = placement_choices(attention, world_size=world, names=space.placements)
    if attention.seq_len_tokens > MAX_TOKEN_STRIPING_TOKENS and any(one.granularity_tokens == 1 for one in choices):
        choices = [one for one in choices if one.granularity_tokens > 1]
        notes.append(f"token striping is not looked at beyond {MAX_TOKEN_STRIPING_TOKENS} tokens")
    for layout in layout_choices(space.offers(problem.cluster)):
        # A layout that computes whole sequences does the same work under every placement: one stands for all.
        relevant = choices[:1] if layout.head_groups == world > 1 else choices
        applicable = [choice for choice in relevant if board.applies(choice, layout)]
        found += [Candidate(placement=choice, layout=layout) for choice in applicable]
        if relevant and not applicable:
            inapplicable.append(f"{layout.name} ({layout.why_not(problem.shape(board.placement(relevant[0])))})")
    if inapplicable:
        notes.append(f"not for these sizes: {', '.join(dict.fromkeys(inapplicable))}")
    if space.narrow_gradients and not any(one.layout.transfers.narrow for one in found):
        raise InputError("no layout that is left to choose from rounds gradients", field="narrow_gradients")
    if not found:
        raise InputError("nothing is left to choose from: " + "; ".join(notes), field="layout, placement")
    order = {choice: number for number, choice in enumerate(choices)}
    return sorted(found, key=lambda one: order[one.placement]), notes


def _rate(
    board: ScoreBoard, candidates: Sequence[Candidate], rater: Rater, stage: str, progress: Progress
) -> dict[Candidate, Step]:
    steps = {}
    for number, one in enumerate(candidates):
        steps[one] = board.step(one.placement, one.layout, one.layout, rater)
        progress(stage, number + 1, len(candidates))
    return steps


def _eligible_options(candidates: Sequence[Candidate], steps: dict[Candidate, Step]) -> dict[PlacementChoice, Options]:
    """Return what can be executed within the memory limit, by placement, in the order of `candidates`."""
    found: dict[PlacementChoice, Options] = {}
    for one in candidates:
        options, step = found.setdefault(one.placement, Options()), steps[one]
        if step.forward.eligible:
            options.forward[one.layout] = step.forward.makespan_us
        if step.backward.eligible:
            options.backward[one.layout] = step.backward.makespan_us
    return found


def _finalists(
    options: dict[PlacementChoice, Options], steps: dict[Candidate, Step], plain: Sequence[Candidate]
) -> dict[PlacementChoice, Options]:
    """Return the best few layouts of each direction for the best few placements, and the eligible plain layouts.

    The best few of each way to keep K/V, since both directions must agree on it, and of each way to transfer, since
    what transfers take from kernels is nothing that the recurrence sees.
    """
    found = _eligible_options(plain, steps)
    complete = [choice for choice in options if options[choice].complete]
    quickest = sorted(complete, key=lambda choice: options[choice].best_us)
    regular = [choice for choice in quickest if choice.regular]
    for choice in dict.fromkeys([*quickest[:FINAL_PLACEMENTS], *regular[:1]]):
        kept = found.setdefault(choice, Options())
        for all_of_them, of_them in (
            (options[choice].forward, kept.forward),
            (options[choice].backward, kept.backward),
        ):
            for alike in _grouped(all_of_them):
                best = sorted(alike, key=all_of_them.__getitem__)[:FINAL_LAYOUTS]
                of_them.update((layout, all_of_them[layout]) for layout in best)
    return found


def _grouped(layouts: Iterable[Layout]) -> list[list[Layout]]:
    """Group layouts that keep K/V in the same slots, transfer in the same way and split heads or do not."""
    groups: dict[tuple[object, ...], list[Layout]] = {}
    for layout in layouts:
        groups.setdefault((layout.kept_slots, layout.transfers, layout.head_groups > 1), []).append(layout)
    return list(groups.values())


def _best_steps(
    board: ScoreBoard, options: dict[PlacementChoice, Options], rater: Rater, progress: Progress
) -> dict[PlacementChoice, Step]:
    """Return the quickest mixture of every placement; the directions' layouts may differ.

    Options come plainest first, the same layout in both directions before mixtures, and `min` keeps the first of
    equals. Scores that are there already are not computed again.
    """
    complete = {choice: one for choice, one in options.items() if one.complete}
    best = {}
    for number, (choice, one) in enumerate(complete.items()):
        mixtures = sorted(one.mixtures, key=lambda both: both[0] != both[1])
        steps = [board.step(choice, forward, backward, rater) for forward, backward in mixtures]
        best[choice] = min(steps, key=competing_us)
        progress("choosing", number + 1, len(complete))
    return best


def competing_us(step: Step) -> float:
    """Return the time by which a step competes, in microseconds: plain layouts have no margin, so none is quicker."""
    margin = 0.0 if step.placement.regular else IRREGULAR_MARGIN
    margin += max(step.forward_layout.margin, step.backward_layout.margin)
    return step.step_time_us * (1 + margin)


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
