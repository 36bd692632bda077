"""Scores of candidates: every (placement, layout, direction) on every sampled layer, with what is costly kept.

A step is forward plus backward of one layer; times are means over the sampled layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..cost.bounds import Allowed, entering_us, layout_bound_us, lower_bound_us
from ..cost.evaluation import Evaluation, Evaluator, imbalance, step_imbalance
from ..cost.memory import LayerMemory, layer_memory
from ..layouts.layout import Layout
from ..schedule.active import contents_of
from ..schedule.pairs import Pairs
from ..schedule.placement import Placement
from ..schedule.schedule import DIRECTIONS, Direction, Schedule
from ..schedule.workload import Workload, workload
from .candidates import PlacementChoice, layout_choices, why_not_executable
from .problem import Problem

Scheduled = tuple[Layout, Direction, int, Pairs | None]  # tokens of a rank; no pairs where the layout leaves out none


@dataclass(frozen=True, kw_only=True, eq=False)
class Rater:
    """An evaluator with the name that it goes by, and the numbers of the samples that it is shown.

    ever_full_speed: whether it takes compute to be as quick while data move.
    """

    name: str
    evaluator: Evaluator
    samples: tuple[int, ...]
    ever_full_speed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One direction of one candidate. evaluations: one per layer shown to the rater; why_not: not to be executed.

    memory: what a step needs as far as this direction's slots are the larger ones.
    """

    evaluations: tuple[Evaluation, ...]
    memory: LayerMemory
    why_not: str | None
    fits_memory: bool

    @cached_property
    def makespan_us(self) -> float:
        """Mean over the layers."""
        return float(np.mean([evaluation.makespan_us for evaluation in self.evaluations]))

    @property
    def eligible(self) -> bool:
        """Whether this direction can be executed within the memory limit."""
        return self.why_not is None and self.fits_memory


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """Forward and backward of one candidate, with layouts that may differ."""

    placement: PlacementChoice
    forward_layout: Layout
    backward_layout: Layout
    forward: Score
    backward: Score
    rater: Rater

    def __str__(self) -> str:
        """Name the placement and the layout; both directions have the same where this is asked for."""
        return f"{self.placement}, {self.forward_layout}"

    @property
    def why_not(self) -> str | None:
        """Why the step cannot be executed; None when it can."""
        return self.forward.why_not or self.backward.why_not

    @property
    def fits_memory(self) -> bool:
        """Whether both directions keep to the memory limit."""
        return self.forward.fits_memory and self.backward.fits_memory

    @property
    def eligible(self) -> bool:
        """Whether the step can be executed within the memory limit."""
        return self.forward.eligible and self.backward.eligible

    @property
    def step_time_us(self) -> float:
        """Forward + backward of one layer."""
        return self.forward.makespan_us + self.backward.makespan_us

    @property
    def memory_bytes(self) -> int:
        """The larger need of the two directions."""
        return self.memory.total_bytes

    @property
    def memory(self) -> LayerMemory:
        """The larger need of the two directions, by what it is for."""
        return max(self.forward.memory, self.backward.memory, key=lambda one: one.total_bytes)

    @property
    def peak_buffer_bytes(self) -> int:
        """The larger peak of the two directions."""
        return max(one.peak_buffer_bytes for one in (*self.forward.evaluations, *self.backward.evaluations))

    @property
    def exposed_us(self) -> float:
        """Time that a rank waits in a step: mean over ranks and layers."""
        return self.step_time_us - float(np.mean([compute.mean() for compute, _ in self._layers()]))

    @property
    def worker_imbalance(self) -> float:
        """Maximum over ranks of a layer's compute over the mean; mean over layers."""
        return float(np.mean([imbalance(compute) for compute, _ in self._layers()]))

    @property
    def step_imbalance(self) -> float:
        """Sum over phases of both directions of the maximum over ranks, over that of the means; mean over layers."""
        return float(np.mean([step_imbalance(phases) for _, phases in self._layers()]))

    def _layers(self) -> Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Yield (compute [W], compute of all phases of both directions [W, phases]) per sampled layer."""
        for one, other in zip(self.forward.evaluations, self.backward.evaluations, strict=True):
            yield one.compute_us + other.compute_us, np.concatenate([one.phase_us, other.phase_us], axis=1)


_Key: TypeAlias = tuple[Rater, PlacementChoice, Layout, Direction]


class Aside(Protocol):
    """Who scores forward meanwhile: see `aside.ForwardScorer`."""

    def ask(self, choice: PlacementChoice, layout: Layout, rater: Rater) -> None: ...
    def answer(self) -> Score: ...
    def forget(self, choice: PlacementChoice, layout: Layout) -> None: ...


@dataclass(kw_only=True, eq=False)
class ScoreBoard:
    """Scores under one problem, each computed once. Placements, workloads and schedules are shared by evaluators.

    aside: scores forward while backward is scored here; None: both are scored here, one after the other.
    """

    problem: Problem
    aside: Aside | None = None
    _placements: dict[PlacementChoice, Placement] = field(default_factory=dict)
    _workloads: dict[tuple[PlacementChoice, int, int], Workload] = field(default_factory=dict)
    _pairs: dict[PlacementChoice, Pairs] = field(default_factory=dict)
    _schedules: dict[Scheduled, Schedule] = field(default_factory=dict)
    _memories: dict[Scheduled, LayerMemory] = field(default_factory=dict)
    _scores: dict[_Key, Score] = field(default_factory=dict)
    _asked: deque[_Key] = field(default_factory=deque)  # what is not answered yet

    def placement(self, choice: PlacementChoice) -> Placement:
        """Return the placement of a choice."""
        if choice not in self._placements:
            self._placements[choice] = choice.build(
                seq_len_tokens=self.problem.attention.seq_len_tokens,
                world_size=self.problem.cluster.world_size,
                block_size=self.problem.attention.block_size,
                block_load=self.problem.summary.block_load,
            )
        return self._placements[choice]

    def pairs(self, choice: PlacementChoice) -> Pairs:
        """Return the pairs that can have work under a placement."""
        if choice not in self._pairs:
            self._pairs[choice] = self.problem.pairs(self.placement(choice))
        return self._pairs[choice]

    def workload(self, choice: PlacementChoice, sample: int, degree: int = 1) -> Workload:
        """Return the work of a sampled layer under a placement, its heads dealt out to `degree` groups."""
        key = (choice, sample, degree)
        if key not in self._workloads:
            one, first = self.problem.samples[sample], self._first_alike[sample]
            if degree > 1:
                order = self.problem.head_order(one.layer, degree)
                self._workloads[key] = self.workload(choice, sample).with_heads(order)
            elif first != sample:
                self._workloads[key] = self.workload(choice, first)
            else:
                self._workloads[key] = workload(one.pattern, self.placement(choice))
        return self._workloads[key]

    @cached_property
    def _first_alike(self) -> list[int]:
        """The first sample that attends what each one attends: their work is counted once."""
        first: dict[Hashable, int] = {}
        contents = (contents_of(one.pattern) for one in self.problem.samples)
        return [first.setdefault(content, number) for number, content in enumerate(contents)]

    def schedule(self, choice: PlacementChoice, layout: Layout, direction: Direction) -> Schedule:
        """Return the schedule; UnsupportedError where the layout does not apply."""
        key = self._scheduled(choice, layout, direction)
        if key not in self._schedules:
            shape = self.problem.shape(self.placement(choice))
            self._schedules[key] = layout.build(shape=shape, direction=direction, pairs=self.pairs(choice))
        return self._schedules[key]

    def forget(self, choice: PlacementChoice, layout: Layout) -> None:
        """Let go of a candidate's schedules, and so of their events: scores stay, and others are built when needed."""
        for way in DIRECTIONS:
            self._schedules.pop(self._scheduled(choice, layout, way), None)
        if self.aside is not None:
            self.aside.forget(choice, layout)

    def _scheduled(self, choice: PlacementChoice, layout: Layout, direction: Direction) -> Scheduled:
        """Return all that a schedule depends on: placements may have it in common."""
        pairs = self.pairs(choice) if layout.leaves_out else None
        return layout.played_as(direction), direction, self.placement(choice).tokens_per_rank, pairs

    def applies(self, choice: PlacementChoice, layout: Layout) -> bool:
        """Whether the layout can be built for these sizes at all."""
        return layout.why_not(self.problem.shape(self.placement(choice))) is None

    def memory(self, choice: PlacementChoice, layout: Layout, direction: Direction) -> LayerMemory:
        """Return the bytes that a step needs as far as this direction's slots are the larger ones."""
        key = self._scheduled(choice, layout, direction)
        if key not in self._memories:
            self._memories[key] = layer_memory(
                self.schedule(choice, layout, direction),
                self.problem.shape(self.placement(choice)),
                layers=self.problem.attention.model.layers,
                backend=self.problem.backend,
                reordered=self.problem.head_orders(layout.head_groups) is not None,
                listed_block_tokens=self.problem.attention.block_size if self.problem.summary.listed else None,
            )
        return self._memories[key]

    def score(self, choice: PlacementChoice, layout: Layout, direction: Direction, rater: Rater) -> Score:
        """Return the score of one direction."""
        layout = layout.played_as(direction)
        key = (rater, choice, layout, direction)
        if key not in self._scores and self.aside is not None and direction == "forward":
            self.ask(choice, layout, rater)
            while key not in self._scores:
                self._scores[self._asked.popleft()] = self.aside.answer()
        if key not in self._scores:
            problem, memory = self.problem, self.memory(choice, layout, direction)
            schedule = self.schedule(choice, layout, direction)
            works = (self.workload(choice, sample, layout.head_groups) for sample in rater.samples)
            self._scores[key] = Score(
                evaluations=tuple(rater.evaluator(schedule, work, problem.cluster, problem.cost) for work in works),
                memory=memory,
                why_not=why_not_executable(choice, backend=problem.backend, block_size=problem.attention.block_size),
                fits_memory=memory.total_bytes <= problem.memory_limit_bytes,
            )
        return self._scores[key]

    def ask(self, choice: PlacementChoice, layout: Layout, rater: Rater) -> None:
        """Have forward scored meanwhile, where anybody does; `score` waits for it."""
        layout = layout.played_as("forward")
        key: _Key = (rater, choice, layout, "forward")
        if self.aside is not None and key not in self._scores and key not in self._asked:
            self.aside.ask(choice, layout, rater)
            self._asked.append(key)

    def known_us(self, choice: PlacementChoice, layout: Layout, direction: Direction, rater: Rater, by: Rater) -> float:
        """Return what a rater says of one direction where that is known, else what it cannot be below.

        That is what the busiest rank computes, and what any rank does while its compute is slowed by what comes to it
        from other nodes (`bounds.slowed_bound_us`). by: evaluates the same layers, with launches that are as long.
        """
        known = self._scores.get((rater, choice, layout.played_as(direction), direction))
        if known is not None:
            return known.makespan_us
        cluster, shape = self.problem.cluster, self.problem.shape(self.placement(choice))
        share = 0.0 if rater.ever_full_speed else cluster.gpu.communication_slowdown
        slowed_us = share * entering_us(cluster, shape, direction, layout, self.pairs(choice))
        evaluations = self.score(choice, layout, direction, by).evaluations
        return float(np.mean([(evaluation.compute_us + slowed_us).max() for evaluation in evaluations]))

    def step(self, choice: PlacementChoice, forward: Layout, backward: Layout, rater: Rater) -> Step:
        """Return forward and backward of a candidate."""
        self.ask(choice, forward, rater)
        backward_score = self.score(choice, backward, "backward", rater)
        return Step(
            placement=choice,
            forward_layout=forward,
            backward_layout=backward,
            forward=self.score(choice, forward, "forward", rater),
            backward=backward_score,
            rater=rater,
        )

    def bound_us(self, rater: Rater, choices: Iterable[PlacementChoice]) -> float:
        """Return the lower bound of a step: the least over these placements, mean over what the rater is shown."""
        allowed = {one: replace(self._allowed(one), ever_full_speed=rater.ever_full_speed) for one in choices}
        bounds_us = [
            np.sum([self._bounds_us(one, rater.samples, way, what) for way in DIRECTIONS], axis=0)
            for one, what in allowed.items()
        ]
        return float(np.min(np.stack(bounds_us), axis=0).mean())

    def least_us(self, choice: PlacementChoice, samples: tuple[int, ...]) -> dict[Direction, float]:
        """Return lower bounds of both directions under one placement that cost little: memory is not looked at."""
        allowed = replace(self._links(choice), keep_kv=True, ever_full_speed=True)
        return {way: float(np.mean(self._bounds_us(choice, samples, way, allowed))) for way in DIRECTIONS}

    def least_with_us(self, choice: PlacementChoice, layout: Layout, least_us: dict[Direction, float]) -> float:
        """Return a lower bound of steps that have this layout in one direction, and any in the other.

        least_us: the lower bounds of the placement.
        """
        cluster, shape = self.problem.cluster, self.problem.shape(self.placement(choice))
        pairs, both_us = self.pairs(choice), sum(least_us.values())
        own_us = {way: layout_bound_us(cluster, shape, way, layout, pairs) for way in DIRECTIONS}
        return both_us + min(max(0.0, own_us[way] - least_us[way]) for way in DIRECTIONS)

    def _bounds_us(
        self, choice: PlacementChoice, samples: tuple[int, ...], direction: Direction, allowed: Allowed
    ) -> list[float]:
        cluster, cost, shape = self.problem.cluster, self.problem.cost, self.problem.shape(self.placement(choice))
        works = [self.workload(choice, sample) for sample in samples]
        return [lower_bound_us(work, cluster, cost, shape, direction, allowed) for work in works]

    def _allowed(self, choice: PlacementChoice) -> Allowed:
        """Return what any layout may do under a placement, those that were not asked for among them."""
        keep = [one for one in self._layouts(choice) if one.kept_slots is not None]
        keep.sort(key=lambda one: one.leaves_out)  # first those whose schedules placements have in common
        keeping = (self.memory(choice, one, "backward") for one in keep)
        limit_bytes = self.problem.memory_limit_bytes
        return replace(self._links(choice), keep_kv=any(memory.total_bytes <= limit_bytes for memory in keeping))

    def _links(self, choice: PlacementChoice) -> Allowed:
        """Return what layouts may send under a placement, memory not looked at."""
        return Allowed(
            pairs=self.pairs(choice),
            narrow_gradients=self.problem.space.rounds_parts,
            pulls=self.problem.space.pulls,
            degrees=tuple(sorted({one.head_groups for one in self._layouts(choice)} - {1})),
        )

    def _layouts(self, choice: PlacementChoice) -> list[Layout]:
        offers = self.problem.offers(restricted=False)
        return [one for one in layout_choices(offers) if self.applies(choice, one)]
