"""Scores of candidates: every (placement, layout, direction) on every sampled layer, with what is costly kept.

A step is forward plus backward of one layer; times are means over the sampled layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import UnsupportedError
from ..cost.bounds import step_bound_us
from ..cost.cluster import Cluster
from ..cost.evaluation import Evaluation, Evaluator, imbalance
from ..cost.kernels import CostModel
from ..cost.memory import LayerMemory, layer_memory
from ..layouts.registry import build
from ..layouts.ulysses import can_split_heads
from ..plan import ELEMENT_BYTES, DType, ModelShape
from ..schedule.heads import HeadOrder, balanced_order
from ..schedule.pairs import Pairs, causal_pairs, pairs_of_blocks
from ..schedule.placement import Placement
from ..schedule.schedule import Direction, Schedule
from ..schedule.shape import AttentionShape
from ..schedule.workload import Workload, workload
from .candidates import (
    KEEPING,
    ROUNDING_BACKENDS,
    LayoutChoice,
    PlacementChoice,
    head_degrees,
    layout_choices,
    why_not_executable,
)
from .sampling import Sample, TraceSummary


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """All that a search is given.

    memory_limit_bytes: for one layer's attention on one GPU; replayed: whether a run replays the recorded patterns,
    and no others; narrow_gradients: whether dK/dV may travel in 16 bits; pulls: whether ranks may pull.
    """

    cluster: Cluster
    cost: CostModel
    model: ModelShape
    seq_len_tokens: int
    block_size: int
    dtype: DType
    backend: str
    memory_limit_bytes: int
    samples: tuple[Sample, ...]
    summary: TraceSummary
    replayed: bool = True
    narrow_gradients: bool = False
    pulls: bool = True

    @property
    def narrow_parts(self) -> bool:
        """Whether what one kernel adds to dK/dV may travel in 16 bits: in any case where it wrote no more."""
        return self.narrow_gradients or self.backend in ROUNDING_BACKENDS

    def pairs(self, placement: Placement) -> Pairs:
        """Return the pairs that can have work: in any recorded layer, or in any causal pattern where they are chosen.

        Without a count of what the layers activate together, what is causal has to do.
        """
        if not self.replayed or self.summary.active_blocks is None:
            return causal_pairs(placement)
        return pairs_of_blocks(self.summary.active_blocks, placement, block_size=self.block_size)

    def head_order(self, layer: int, degree: int) -> HeadOrder:
        """Return the order in which a layer's heads are dealt out to groups; as they are where nothing is known."""
        load = self.summary.head_load.get(layer)
        if load is None:
            return tuple(range(self.model.heads))
        return balanced_order(load, kv_heads=self.model.kv_heads, degree=degree)

    def reorders(self, degree: int) -> bool:
        """Return whether any layer's heads are dealt out in another order than they have."""
        return self.head_orders(degree) is not None

    def head_orders(self, degree: int) -> tuple[HeadOrder, ...] | None:
        """Return the order of every layer's heads, dealt out to `degree` groups; None where all stay as they are."""
        natural = tuple(range(self.model.heads))
        if degree == 1:
            return None
        orders = tuple(self.head_order(layer, degree) for layer in range(self.model.layers))
        return None if all(order == natural for order in orders) else orders

    def shape(self, placement: Placement) -> AttentionShape:
        """Return the sizes of transfers under a placement."""
        element_bytes = ELEMENT_BYTES[self.dtype]
        return AttentionShape(
            world_size=placement.world_size,
            tokens_per_rank=placement.tokens_per_rank,
            heads=self.model.heads,
            kv_heads=self.model.kv_heads,
            head_dim=self.model.head_dim,
            element_bytes=element_bytes,
            accumulator_bytes=max(4, element_bytes),
            columns_capacity=self.summary.columns_capacity,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rater:
    """An evaluator with the name that it goes by, and the numbers of the samples that it is shown."""

    name: str
    evaluator: Evaluator
    samples: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One direction of one candidate. evaluations: one per layer shown to the rater; why_not: not to be executed."""

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
    forward_layout: LayoutChoice
    backward_layout: LayoutChoice
    forward: Score
    backward: Score
    rater: Rater

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
        return max(self.forward.memory.total_bytes, self.backward.memory.total_bytes)

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
        ratios = []
        for _, phases in self._layers():
            mean = phases.mean(axis=0).sum()
            ratios.append(phases.max(axis=0).sum() / mean if mean else 1.0)
        return float(np.mean(ratios))

    def _layers(self) -> Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Yield (compute [W], compute of all phases of both directions [W, phases]) per sampled layer."""
        for one, other in zip(self.forward.evaluations, self.backward.evaluations, strict=True):
            yield one.compute_us + other.compute_us, np.concatenate([one.phase_us, other.phase_us], axis=1)


@dataclass(kw_only=True, eq=False)
class ScoreBoard:
    """Scores under one problem, each computed once. Placements, workloads and schedules are shared by evaluators."""

    problem: Problem
    _placements: dict[PlacementChoice, Placement] = field(default_factory=dict)
    _workloads: dict[tuple[PlacementChoice, int, int], Workload] = field(default_factory=dict)
    _pairs: dict[PlacementChoice, Pairs] = field(default_factory=dict)
    _schedules: dict[tuple[LayoutChoice, Direction, int, Pairs], Schedule] = field(default_factory=dict)
    _scores: dict[tuple[Rater, PlacementChoice, LayoutChoice, Direction], Score] = field(default_factory=dict)

    def placement(self, choice: PlacementChoice) -> Placement:
        """Return the placement of a choice."""
        if choice not in self._placements:
            self._placements[choice] = choice.build(
                seq_len_tokens=self.problem.seq_len_tokens,
                world_size=self.problem.cluster.world_size,
                block_size=self.problem.block_size,
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
            one = self.problem.samples[sample]
            if degree == 1:
                self._workloads[key] = workload(one.pattern, self.placement(choice))
            else:
                order = self.problem.head_order(one.layer, degree)
                self._workloads[key] = self.workload(choice, sample).with_heads(order)
        return self._workloads[key]

    def schedule(self, choice: PlacementChoice, layout: LayoutChoice, direction: Direction) -> Schedule:
        """Return the schedule; UnsupportedError where the layout does not apply."""
        shape, pairs = self.problem.shape(self.placement(choice)), self.pairs(choice)
        key = (layout, direction, shape.tokens_per_rank, pairs)
        if key not in self._schedules:
            self._schedules[key] = build(
                layout.layout, dict(layout.parameters), shape=shape, direction=direction, pairs=pairs
            )
        return self._schedules[key]

    def may_keep(self, choice: PlacementChoice) -> bool:
        """Whether the memory limit allows to keep all gathered K/V of every layer until backward."""
        problem, shape = self.problem, self.problem.shape(self.placement(choice))
        two_levels = layout_choices(cluster=problem.cluster, names=["two_level"]) if problem.cluster.nodes > 1 else []
        schedules = [self.schedule(choice, layout, "backward") for layout in (KEEPING, *two_levels)]
        memories = [layer_memory(one, shape, layers=problem.model.layers, backend=problem.backend) for one in schedules]
        return min(memory.total_bytes for memory in memories) <= problem.memory_limit_bytes

    def applies(self, choice: PlacementChoice, layout: LayoutChoice) -> bool:
        """Whether the layout can be built for these sizes at all."""
        try:
            self.schedule(choice, layout, "forward")
        except UnsupportedError:
            return False
        return True

    def score(self, choice: PlacementChoice, layout: LayoutChoice, direction: Direction, rater: Rater) -> Score:
        """Return the score of one direction."""
        key = (rater, choice, layout, direction)
        if key not in self._scores:
            schedule, problem = self.schedule(choice, layout, direction), self.problem
            shape = problem.shape(self.placement(choice))
            memory = layer_memory(
                schedule,
                shape,
                layers=problem.model.layers,
                backend=problem.backend,
                reordered=problem.reorders(layout.degree),
            )
            self._scores[key] = Score(
                evaluations=tuple(
                    rater.evaluator(
                        schedule, self.workload(choice, sample, layout.degree), problem.cluster, problem.cost
                    )
                    for sample in rater.samples
                ),
                memory=memory,
                why_not=why_not_executable(choice, backend=problem.backend, block_size=problem.block_size),
                fits_memory=memory.total_bytes <= problem.memory_limit_bytes,
            )
        return self._scores[key]

    def step(self, choice: PlacementChoice, forward: LayoutChoice, backward: LayoutChoice, rater: Rater) -> Step:
        """Return forward and backward of a candidate."""
        return Step(
            placement=choice,
            forward_layout=forward,
            backward_layout=backward,
            forward=self.score(choice, forward, "forward", rater),
            backward=self.score(choice, backward, "backward", rater),
            rater=rater,
        )

    def degrees(self, placement: Placement) -> list[int]:
        """Return the sizes of groups that heads can be split over."""
        shape = self.problem.shape(placement)
        return [degree for degree in head_degrees(self.problem.cluster) if can_split_heads(shape, degree)]

    def bound_us(self, samples: tuple[int, ...]) -> float:
        """Return the lower bound of a step: the least over the placements looked at, mean over these samples."""
        problem = self.problem
        bounds = [
            [
                step_bound_us(
                    workload=self.workload(choice, sample),
                    cluster=problem.cluster,
                    cost=problem.cost,
                    shape=problem.shape(placement),
                    pairs=self.pairs(choice),
                    keep_kv=self.may_keep(choice),
                    narrow_gradients=problem.narrow_parts,
                    pulls=problem.pulls,
                    degrees=self.degrees(placement),
                )
                for choice, placement in self._placements.items()
            ]
            for sample in samples
        ]
        return float(np.mean([min(values) for values in bounds]))
