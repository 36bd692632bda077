"""A plan bound to one rank: all that follows from a plan and a mesh, worked out once and in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from ...kernels.api import AttentionMask, fastest_backend
from ...kernels.select.probe import ShardTensors
from ...kernels.triton import tuning
from ...planner.check.check import check_step
from ...planner.check.playable import check_playable
from ...planner.check.rules import Rules
from ...planner.plan import ModelShape, Plan
from ...planner.schedule.heads import HeadOrder
from ...planner.schedule.placement import Placement
from ...planner.schedule.schedule import DIRECTIONS, Direction, Schedule
from ...traces.dataset.store import Trace
from ...traces.errors import InputError, ScheduleError, UnsupportedError
from ..comm.mesh import Mesh, agree
from ..pattern.form import Reach
from .heads import HeadGroups, HeadPermutation
from .masks import PairGuard, mask_of, with_capacity
from .program import Program

_bound = count(1)  # ranks bind plans in the same order


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundPlan:
    """What one rank of a mesh needs to know of a plan.

    topic: a name for what ranks agree on about it. backend: the kernels', settled. positions: int64 [S] of every rank's
    tokens, on this rank's device. guard: refuses masks that need pairs of shards which the plan leaves out.
    """

    plan: Plan
    mesh: Mesh
    topic: str
    backend: str
    programs: dict[Direction, Program]
    placement: Placement
    positions: list[Tensor]
    guard: PairGuard
    _orders: dict[HeadOrder, HeadPermutation] = field(default_factory=dict)
    _own_masks: dict[Reach, AttentionMask] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The type of q, k and v."""
        return getattr(torch, self.plan.dtype)

    @property
    def own_positions(self) -> Tensor:
        """The positions of this rank's tokens, int64 [S]."""
        return self.positions[self.mesh.rank]

    def head_order(self, layer: int | None) -> HeadPermutation | None:
        """Return the order of a layer's heads, None where they stay as they are. InputError names the layer."""
        order = self.plan.head_order(layer)
        if order is None:
            return None
        if order not in self._orders:
            kv_heads, device = self.plan.model.kv_heads, self.mesh.device
            self._orders[order] = HeadPermutation.of(order, kv_heads=kv_heads, device=device)
        return self._orders[order]

    def own_mask(self, layer: int, documents: Tensor | None = None) -> AttentionMask | None:
        """Return the pattern of a layer that the model itself lets look less far than the sequence; None of others.

        documents: int32 [S] of all tokens, where sequences are packed. Raises InputError when the plan leaves out a
        pair of shards that it needs.
        """
        reach = reach_of(self.plan.model, layer)
        if not reach.limits(self.plan.seq_len_tokens):
            return None
        if documents is not None:
            return self._mask_of_reach(reach, documents)
        if reach not in self._own_masks:
            self._own_masks[reach] = mask = self._mask_of_reach(reach, None)
            self.guard.admit(mask)
        return self._own_masks[reach]

    def replayed(self, trace: Trace, training_step: int) -> list[AttentionMask]:
        """Return the masks of all layers of the model, as a trace recorded them.

        Of layers that the model itself lets look less far than the sequence, the model's own. Raises InputError, before
        any GPU work, when one has more columns than planned or needs a pair that is left out.
        """
        masks = []
        for layer in range(self.plan.model.layers):
            pattern = trace.layer_pattern(training_step, layer)
            documents = None if pattern.documents is None else torch.from_numpy(pattern.documents).to(self.mesh.device)
            own = self.own_mask(layer, documents)
            if own is None:
                self.plan.require_covered(pattern, about=f"layer {layer}")
                own = mask_of(pattern, columns_capacity=self.plan.columns_capacity, device=self.mesh.device)
            masks.append(own)
        return masks

    def _mask_of_reach(self, reach: Reach, documents: Tensor | None) -> AttentionMask:
        plan = self.plan
        mask = reach.mask(
            heads=plan.model.heads, seq_len_tokens=plan.seq_len_tokens, block_size=plan.block_size,
            device=self.mesh.device, documents=documents,
        )  # fmt: skip
        return with_capacity(mask, plan.columns_capacity)

    def shard_tensors(self, q: Tensor, k: Tensor, documents: Tensor | None = None) -> ShardTensors:
        """Return this rank's q [B, S, H, D] and k [B, S, H_kv, D] as what choosing patterns looks at, without history.

        documents: int32, of all tokens of the sequence.
        """
        plan = self.plan
        return ShardTensors(
            q=q.detach(), k=k.detach(), positions=self.own_positions, seq_len_tokens=plan.seq_len_tokens,
            block_size=plan.block_size, granularity_tokens=plan.placement.granularity_tokens, documents=documents,
            softcap=plan.model.softcap,
        )  # fmt: skip


def reach_of(model: ModelShape, layer: int) -> Reach:
    """Return how far back a model lets one of its layers look."""
    window, chunk = (0 if lengths is None else lengths[layer] for lengths in (model.windows, model.chunks))
    return Reach(window_tokens=window, chunk_tokens=chunk)


def bind(plan: Plan, mesh: Mesh) -> BoundPlan:
    """Bind a plan to this rank. Collective: all ranks must hold the same plan, whose digests are compared first.

    Raises InputError when the plan is for another world size or ranks differ, and UnsupportedError when it says what
    the runtime does not play.
    """
    plan.require(world_size=mesh.world_size)
    plan.require_kernels()
    if plan.kernels.tuned is not None:
        try:
            tuning.use(**plan.kernels.tuned.model_dump())
        except ValueError as error:
            raise InputError(str(error), field="kernels.tuned") from error
    topic = f"plan {next(_bound)}"
    agree(mesh, f"{topic} digest", plan.digest)
    backend, head_dim = plan.kernels.backend, plan.model.head_dim
    if backend == "fastest":
        dtype = getattr(torch, plan.dtype)
        backend = fastest_backend(
            mesh.device,
            dtype=dtype,
            head_dim=head_dim,
            block_size=plan.block_size,
            elements=bool(plan.asked_of_elements()),
        )
        agree(mesh, f"{topic} backend", backend)
    placement = plan.make_placement()
    positions = [torch.from_numpy(placement.positions(rank)).to(mesh.device) for rank in range(mesh.world_size)]
    return BoundPlan(
        plan=plan, mesh=mesh, topic=topic, backend=backend, programs=_programs(plan, mesh.rank, backend),
        placement=placement, positions=positions, guard=PairGuard(plan.active_pairs(), placement),
    )  # fmt: skip


def _programs(plan: Plan, rank: int, backend: str) -> dict[Direction, Program]:
    schedules: dict[Direction, Schedule] = {direction: plan.schedule(direction) for direction in DIRECTIONS}
    for schedule in schedules.values():
        check_playable(schedule)
    try:
        check_step(schedules["forward"], schedules["backward"])
    except ScheduleError as error:  # of layouts that do not go together, as a file may name them
        raise InputError(f"directions do not fit together: {error}", field="backward") from error
    programs: dict[Direction, Program] = {
        direction: Program(schedule=schedule, rank=rank, groups=_head_groups(plan, schedule), backend=backend)
        for direction, schedule in schedules.items()
    }
    forward, backward = programs["forward"], programs["backward"]
    if forward.kept_slots and forward.groups != backward.groups:
        raise UnsupportedError("are of other head groups in backward", field="kept K/V")
    return programs


def _head_groups(plan: Plan, schedule: Schedule) -> HeadGroups:
    """Return how a schedule splits heads. UnsupportedError for what no kernel takes.

    Tasks of all ranks are looked at: one rank that refuses alone would leave the others waiting.
    """
    count = Rules(schedule).head_groups
    if not plan.attention_shape().splits_heads(count):
        raise UnsupportedError(f"{count} groups do not have whole K/V heads each", field="heads")
    groups = HeadGroups(count=count, heads=plan.model.heads, kv_heads=plan.model.kv_heads)
    phases = (phase for rank in range(schedule.world_size) for phase in schedule.phases(rank))
    for heads in {task.heads for phase in phases for task in phase.tasks}:
        groups.require_whole(heads)
    return groups
