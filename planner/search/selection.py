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
from ..cost.evaluation import Evaluator
from .candidates import (
    MAX_TOKEN_STRIPING_TOKENS,
    Baseline,
    LayoutChoice,
    PlacementChoice,
    baselines,
    layout_choices,
    placement_choices,
)
from .sampling import Progress, evenly_spread, no_progress
from .scores import Problem, Rater, ScoreBoard, Step

FINAL_PLACEMENTS = 3
FINAL_LAYOUTS = 2
# What an irregular placement must gain over all others. Evaluators know how many blocks a rank computes, not in
# which order its kernels meet them: rows of such placements share less of the cache (2 to 14 % of a layer,
# docs/kernels.md).
IRREGULAR_MARGIN = 0.01
# What head parallelism must gain for every rank of a group: each one's queries are launches of their own, which the
# host has to issue. What was predicted for it was further from what was measured than for other layouts, by 2 to 5 %
# with groups of two or four and by 3 to 25 % with eight (docs/ring.md).
SPLIT_HEADS_MARGIN = 0.025
SIMULATED_RANKS = 32  # ranks times layers per candidate and direction that are simulated
QUICK = "recurrence"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rated:
    """A candidate with one layout in both directions, and the plain layout that it is, if it is one."""

    step: Step
    baseline: Baseline | None


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
class Pair:
    """A placement and a layout, used in both directions."""

    placement: PlacementChoice
    layout: LayoutChoice


@dataclass(frozen=True, kw_only=True)
class Options:
    """Layouts that one placement may be combined with in each direction, and their times."""

    forward: dict[LayoutChoice, float] = field(default_factory=dict)
    backward: dict[LayoutChoice, float] = field(default_factory=dict)

    @property
    def mixtures(self) -> list[tuple[LayoutChoice, LayoutChoice]]:
        """(forward, backward) layouts that go together.

        Both keep K/V in the same slots, or none does; and heads are dealt out in one order, to one number of groups.
        """
        return [
            (forward, backward)
            for forward, backward in product(self.forward, self.backward)
            if forward.kept_slots == backward.kept_slots and len({forward.degree, backward.degree} - {1}) < 2
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
    problem: Problem,
    *,
    quick: Evaluator,
    final: Evaluator | None = None,
    final_name: str = "simulator",
    layouts: Sequence[str] | None = None,
    placements: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Selection:
    """Return the best candidate; InputError when none can be executed within the memory limit.

    final: evaluates the best few and all plain layouts; None: `quick` has the last word.
    layouts, placements: names to restrict the pick to; plain layouts are compared with all the same.
    """
    board = ScoreBoard(problem=problem)
    pairs, notes = _pairs(board, layouts, placements)
    plain = {
        Pair(placement=one.placement, layout=one.layout): one
        for one in baselines(cluster=problem.cluster, block_size=problem.block_size)
    }
    rater = Rater(name=QUICK, evaluator=quick, samples=tuple(range(len(problem.samples))))
    steps = _rate(board, [*dict.fromkeys([*pairs, *plain])], rater, "estimating", progress)
    options = _eligible_options(pairs, steps)
    if not any(one.complete for one in options.values()):
        raise _none_eligible(problem, [steps[pair] for pair in pairs])
    if final is not None:
        rater = Rater(name=final_name, evaluator=final, samples=_simulated_samples(problem))
        steps |= _rate(board, list(plain), rater, "simulating plain layouts", progress)
        options = _finalists(options, steps, [pair for pair in plain if pair in pairs])
    pick = _pick(_best_steps(board, options, rater, progress))
    for choice, one in options.items():  # scores of both directions are there already
        both = [layout for layout in one.forward if layout in one.backward]
        steps |= {Pair(placement=choice, layout=layout): board.step(choice, layout, layout, rater) for layout in both}
    table = tuple(Rated(step=step, baseline=plain.get(pair)) for pair, step in steps.items())
    return Selection(pick=pick, table=table, bound_us=board.bound_us(rater.samples), notes=tuple(notes))


def _simulated_samples(problem: Problem) -> tuple[int, ...]:
    """Return fewer of the sampled layers on larger clusters: a simulation takes long there."""
    count = max(1, SIMULATED_RANKS // problem.cluster.world_size)
    return tuple(evenly_spread(range(len(problem.samples)), count))


def _pairs(
    board: ScoreBoard, layouts: Sequence[str] | None, placements: Sequence[str] | None
) -> tuple[list[Pair], list[str]]:
    """Return the candidates that apply, plainest first, and what was left out and why."""
    problem, notes, inapplicable = board.problem, [], []
    world = problem.cluster.world_size
    choices = placement_choices(
        seq_len_tokens=problem.seq_len_tokens, world_size=world, block_size=problem.block_size, names=placements
    )
    if problem.seq_len_tokens > MAX_TOKEN_STRIPING_TOKENS and any(one.granularity_tokens == 1 for one in choices):
        choices = [one for one in choices if one.granularity_tokens > 1]
        notes.append(f"token striping is not looked at beyond {MAX_TOKEN_STRIPING_TOKENS} tokens")
    pairs = []
    candidates = layout_choices(
        cluster=problem.cluster,
        names=layouts,
        narrow_gradients=problem.narrow_gradients,
        narrow_parts=problem.narrow_parts,
        pulls=problem.pulls,
    )
    for layout in candidates:
        # A layout that computes whole sequences does the same work under every placement: one stands for all.
        relevant = choices[:1] if layout.degree == world > 1 else choices
        applicable = [choice for choice in relevant if board.applies(choice, layout)]
        pairs += [Pair(placement=choice, layout=layout) for choice in applicable]
        if relevant and not applicable:
            inapplicable.append(f"{layout.layout} (degree {layout.degree})" if layout.splits_heads else str(layout))
    if inapplicable:
        notes.append(f"not for these sizes: {', '.join(dict.fromkeys(inapplicable))}")
    if problem.narrow_gradients and not any(("narrow_grads", 1) in pair.layout.parameters for pair in pairs):
        raise InputError("no layout that is left to choose from rounds gradients", field="narrow_gradients")
    if not pairs:
        raise InputError("nothing is left to choose from: " + "; ".join(notes), field="layout, placement")
    order = {choice: number for number, choice in enumerate(choices)}
    return sorted(pairs, key=lambda pair: order[pair.placement]), notes


def _rate(board: ScoreBoard, pairs: Sequence[Pair], rater: Rater, stage: str, progress: Progress) -> dict[Pair, Step]:
    steps = {}
    for number, pair in enumerate(pairs):
        steps[pair] = board.step(pair.placement, pair.layout, pair.layout, rater)
        progress(stage, number + 1, len(pairs))
    return steps


def _eligible_options(pairs: Sequence[Pair], steps: dict[Pair, Step]) -> dict[PlacementChoice, Options]:
    """Return what can be executed within the memory limit, by placement, in the order of `pairs`."""
    found: dict[PlacementChoice, Options] = {}
    for pair in pairs:
        options = found.setdefault(pair.placement, Options())
        if steps[pair].forward.eligible:
            options.forward[pair.layout] = steps[pair].forward.makespan_us
        if steps[pair].backward.eligible:
            options.backward[pair.layout] = steps[pair].backward.makespan_us
    return found


def _finalists(
    options: dict[PlacementChoice, Options], steps: dict[Pair, Step], plain: Sequence[Pair]
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


def _grouped(layouts: Iterable[LayoutChoice]) -> list[list[LayoutChoice]]:
    """Group layouts that keep K/V in the same slots, transfer in the same way and split heads or do not."""
    groups: dict[tuple[object, ...], list[LayoutChoice]] = {}
    for layout in layouts:
        groups.setdefault((layout.kept_slots, layout.transfers, layout.splits_heads), []).append(layout)
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


def _pick(best: dict[PlacementChoice, Step]) -> Step:
    """Return the quickest step, margins counted. best: of every placement.

    Plain layouts have none, so none of them is quicker.
    """
    return min(best.values(), key=competing_us)


def competing_us(step: Step) -> float:
    """Return the time by which a step competes."""
    margin = 0.0 if step.placement.regular else IRREGULAR_MARGIN
    degree = max(step.forward_layout.degree, step.backward_layout.degree)
    margin += SPLIT_HEADS_MARGIN * degree if degree > 1 else 0.0
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
