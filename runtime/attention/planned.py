"""Sparse attention over many ranks, as a plan says: one differentiable call per layer.

Shape legend: B batch, S tokens of this rank's shard, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.api import AttentionMask, Partial, accumulator_dtype, fastest_backend, row_products
from ...kernels.triton import tuning
from ...planner.check.check import check_step
from ...planner.check.playable import check_playable
from ...planner.check.rules import Rules
from ...planner.layouts.ulysses import can_split_heads
from ...planner.plan import Plan
from ...planner.schedule.heads import HeadOrder
from ...planner.schedule.schedule import DIRECTIONS, KEPT, Direction, Schedule, Task
from ...traces.errors import InputError, UnsupportedError
from ..comm.channels import Channel, Channels, CommunicationError
from ..comm.failures import name_lost_ranks, naming_lost_ranks
from ..comm.measure import Recorder
from ..comm.mesh import Mesh, agree
from .buffers import BufferPool, Pair, Slots
from .head_groups import HeadGroups
from .head_order import Chooser, HeadPermutation
from .head_stages import HeadBackwardStage, HeadForwardStage
from .patterns import PairGuard, RunningHash
from .recompute import current_kept
from .ring import Stage, play
from .stages import BackwardStage, ForwardStage, Indexes


class PlannedAttention:
    """A plan bound to this rank: channels, buffers and token positions, shared by all layers.

    Making it is collective: all ranks must hold the same plan (their digests are compared before the first collective).
    channels: those of another plan to share; recorder: where to note what every call does.
    Raises InputError when the plan is for another world size or cannot be executed.
    """

    _made = 0

    def __init__(
        self, plan: Plan, mesh: Mesh, *, channels: Channels | None = None, recorder: Recorder | None = None
    ) -> None:
        plan.require(world_size=mesh.world_size)
        _use_tuned_launches(plan)
        PlannedAttention._made += 1
        self.topic = f"plan {PlannedAttention._made}"  # ranks make plans in the same order
        agree(mesh, f"{self.topic} digest", plan.digest)
        self.plan, self.mesh, self.recorder = plan, mesh, recorder
        self.backend = _settled_backend(plan, mesh, self.topic)
        self.schedules = {direction: plan.schedule(direction) for direction in DIRECTIONS}
        for schedule in self.schedules.values():
            check_playable(schedule)
        check_step(self.schedules["forward"], self.schedules["backward"])
        self._channels = channels or Channels(mesh, timed=recorder is not None)
        self.channels: Mapping[str, Channel] = self._channels.bind(list(self.schedules.values()))
        self._groups = {direction: _head_groups(plan, schedule) for direction, schedule in self.schedules.items()}
        self.pool = BufferPool(
            mesh.device,
            list(self.schedules.values()),
            self._channels.peers,
            kv_heads=[groups.kv_heads_of_one for groups in self._groups.values()],
        )
        placement = plan.make_placement()
        self._pairs = PairGuard(plan.active_pairs(), placement)
        self.positions = [
            torch.from_numpy(placement.positions(rank)).to(mesh.device) for rank in range(mesh.world_size)
        ]
        self.joined_positions: dict[tuple[int, ...], Tensor] = {}
        self._pattern_hash = RunningHash(mesh.device)
        self._agreements = 0
        self._orders: dict[HeadOrder, HeadPermutation] = {}
        self.dtype: torch.dtype = getattr(torch, plan.dtype)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | Chooser,
        *,
        scale: float | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """Return out [B, S, H, D] of this rank's queries. See `with_lse`."""
        return self.with_lse(q, k, v, mask, scale=scale, layer=layer)[0]

    def with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | Chooser,
        *,
        scale: float | None = None,
        layer: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (out [B, S, H, D] in q's dtype, lse [B, H, S] in the accumulator's, not differentiable).

        q [B, S, H, D], k and v [B, S, H_kv, D]: this rank's shard, in the order of `positions[rank]`. mask: the layer's
        patterns, equal on all ranks, or a function of (q, k, scale) that chooses them while K and V are on their way.
        layer: its number in the model, which only plans with an order of heads by layer ask for.
        Collective: every rank calls it for the same layer. Raises InputError when a shape or type is not the plan's, or
        the mask activates a pair of shards that the plan leaves out.
        """
        self._check(q, k, v)
        if isinstance(mask, AttentionMask):
            self._pairs.admit(mask)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        order = self._head_order(layer)
        if order is not None:
            mask = order.of_mask(mask, q, k)
            q, k, v = order.of_queries(q), order.of_keys(k), order.of_keys(v)
        out, lse = _RingFunction.apply(q, k, v, self, mask, factor)  # pyright: ignore[reportGeneralTypeIssues]
        return (out, lse) if order is None else order.back(out, lse)

    def _head_order(self, layer: int | None) -> HeadPermutation | None:
        order = self.plan.head_order(layer)
        if order is None:
            return None
        if order not in self._orders:
            kv_heads, device = self.plan.model.kv_heads, self.mesh.device
            self._orders[order] = HeadPermutation.of(order, kv_heads=kv_heads, device=device)
        return self._orders[order]

    def slots(self, direction: str, k: Tensor, kept: Tensor | None = None) -> Slots:
        """Return the slots of one direction for K/V shaped like `k`; kept: those of the layer's own."""
        dtypes = {"kv": k.dtype, "dkv": accumulator_dtype(k.dtype)}
        slots = self.pool.slots(self.schedules[direction], k.shape, dtypes)
        return slots if kept is None else slots.with_kept(kept)

    def kept_slots(self, k: Tensor) -> Tensor | None:
        """Return room for what a layer keeps of others' K/V until backward [2, count, *k.shape]; None for nothing."""
        count = sum(buffer.name.startswith(KEPT) for buffer in self.schedules["forward"].buffers)
        return k.new_empty((2, count, *k.shape)) if count else None

    def forward_stage(
        self, q: Tensor, kv: Pair, *, kept_kv: Tensor | None, indexes: Indexes, scale: float
    ) -> ForwardStage | HeadForwardStage:
        """Return the forward of a layer on this rank: q [B, S, H, D], kv its own (K, V), contiguous."""
        tasks = self._tasks("forward")
        common: dict[str, Any] = {"q": q, "kv": kv, "slots": self.slots("forward", kv[0], kept_kv)}
        common |= {"indexes": indexes, "scale": scale}
        groups = self._groups["forward"]
        if groups.count == 1:
            return ForwardStage(**common, tasks=len(tasks))
        return HeadForwardStage(**common, tasks=tasks, groups=groups)

    def backward_stage(
        self,
        q: Tensor,
        kv: Pair,
        grad_out: Tensor,
        out_lse: Partial,
        *,
        gathered: Tensor | None,
        kept_kv: Tensor | None,
        indexes: Indexes,
        scale: float,
    ) -> BackwardStage | HeadBackwardStage:
        """Return the backward of a layer on this rank; gathered, kept_kv: what its forward kept."""
        tasks, dtype = self._tasks("backward"), accumulator_dtype(q.dtype)
        out, lse = out_lse
        common: dict[str, Any] = {"q": q, "kv": kv, "grad_out": grad_out, "lse": lse, "gathered": gathered}
        common |= {"delta": row_products(grad_out, out, backend=self.backend), "indexes": indexes, "scale": scale}
        common |= {"slots": self.slots("backward", kv[0], kept_kv)}
        common |= {"grad_kv": tuple(torch.empty_like(part, dtype=dtype) for part in kv)}
        groups = self._groups["backward"]
        if groups.count == 1:
            keyed = sum(task.key is not None for task in tasks)
            return BackwardStage(**common, tasks=len(tasks), scratch={} if keyed > 1 else None)
        return HeadBackwardStage(**common, tasks=tasks, groups=groups)

    def _tasks(self, direction: Direction) -> list[Task]:
        return [task for phase in self.schedules[direction].phases(self.mesh.rank) for task in phase.tasks]

    def play(self, direction: Direction, stage: Stage) -> None:
        """Play one direction of one layer; RankLost names the ranks that stopped answering."""
        with naming_lost_ranks(self.mesh):
            try:
                play(self.schedules[direction], self.mesh.rank, stage, self.channels, self.recorder)
            except CommunicationError as error:
                raise name_lost_ranks(self.mesh, self.topic, error) from error

    def note_pattern(self, mask: AttentionMask) -> None:
        """Take a layer's mask into the hash that `agree_on_patterns` compares.

        Does not wait for the device, unless the plan leaves out pairs that a causal mask may have and this mask is new.
        """
        self._pairs.admit(mask)
        self._pattern_hash.note(mask)

    def agree_on_patterns(self) -> None:
        """Check, once per training step, that all ranks used the same patterns since the last time. Collective.

        Raises InputError naming the first rank that differs, RankLost when ranks are lost. Waits for the device.
        """
        self._agreements += 1
        with naming_lost_ranks(self.mesh):
            own = f"{int(self._pattern_hash.take()):016x}"
            self.mesh.check()  # before the others are asked, who may be gone
            agree(self.mesh, f"{self.topic} patterns {self._agreements}", own)

    def close(self) -> None:
        """Finish all channels."""
        self._channels.close()

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        model, tokens = self.plan.model, self.positions[0].numel()
        for name, tensor, heads in (("q", q, model.heads), ("k", k, model.kv_heads), ("v", v, model.kv_heads)):
            wanted = (tokens, heads, model.head_dim)
            if tensor.dim() != 4 or tuple(tensor.shape[1:]) != wanted or tensor.shape[0] != q.shape[0]:
                raise InputError(
                    f"shape {tuple(tensor.shape)} is not [B, {wanted[0]}, {wanted[1]}, {wanted[2]}]", field=name
                )
            if tensor.dtype != self.dtype:
                raise InputError(f"{tensor.dtype} is not the plan's {self.dtype}", field=name)
            if tensor.device != self.mesh.device:
                raise InputError(f"is on {tensor.device}, this rank works on {self.mesh.device}", field=name)


def _settled_backend(plan: Plan, mesh: Mesh, topic: str) -> str:
    """Return the kernels' backend: "fastest" becomes one by name, and InputError names a rank that has another."""
    if plan.kernels.backend != "fastest":
        return plan.kernels.backend
    backend = fastest_backend(
        mesh.device,
        dtype=getattr(torch, plan.dtype),
        head_dim=plan.model.head_dim,
        block_size=plan.block_size,
    )
    agree(mesh, f"{topic} backend", backend)
    return backend


def _head_groups(plan: Plan, schedule: Schedule) -> HeadGroups:
    count = Rules(schedule).head_groups
    if not can_split_heads(plan.attention_shape(), count):
        raise UnsupportedError(f"{count} groups do not have whole K/V heads each", field="heads")
    return HeadGroups(count=count, heads=plan.model.heads, kv_heads=plan.model.kv_heads)


def _use_tuned_launches(plan: Plan) -> None:
    if plan.kernels.tuned is None:
        return
    try:
        tuning.use(**plan.kernels.tuned.model_dump())
    except ValueError as error:
        raise InputError(str(error), field="kernels.tuned") from error


def _refuse_second_gradients() -> None:
    """Refuse to run as part of a graph; once_differentiable would, but only where the incoming gradient has one."""
    if torch.is_grad_enabled():  # in backward: create_graph
        raise UnsupportedError("gradients of gradients of planned attention are not supported", field="create_graph")


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        planned: PlannedAttention,
        mask: AttentionMask | Chooser,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Play the plan's forward, or take its results where a checkpointed layer kept them."""
        q, kv = q.contiguous(), (k.contiguous(), v.contiguous())
        kept = current_kept()
        if kept is not None and kept.replaying:
            out, lse, gathered, kept_kv, indexes = kept.take(q.device)
            ctx.save_for_backward(q, *kv, out, lse, gathered, kept_kv)
            ctx.given = planned, indexes, scale
            ctx.mark_non_differentiable(lse)
            return out, lse
        indexes = Indexes(
            source=mask if isinstance(mask, AttentionMask) else (lambda: mask(q, k, scale)),
            positions=planned.positions,
            rank=planned.mesh.rank,
            backend=planned.backend,
            columns_capacity=planned.plan.columns_capacity,
            joined_positions=planned.joined_positions,
            chosen=planned.note_pattern,
        )
        kept_kv = planned.kept_slots(k)
        stage = planned.forward_stage(q, kv, kept_kv=kept_kv, indexes=indexes, scale=scale)
        planned.play("forward", stage)
        out, lse = stage.finish()
        if kept is not None:
            kept.put(out, lse, stage.gathered, kept_kv, indexes)
        ctx.save_for_backward(q, *kv, out, lse, stage.gathered, kept_kv)
        ctx.given = planned, indexes, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Play the plan's backward: dq, dk, dv, and nothing for the rest. UnsupportedError under create_graph."""
        _refuse_second_gradients()
        q, k, v, out, lse, gathered, kept_kv = ctx.saved_tensors
        planned, indexes, scale = ctx.given
        given_back = (q, (k, v), grads[0].contiguous(), (out, lse))
        kept: dict[str, Any] = {"gathered": gathered, "kept_kv": kept_kv, "indexes": indexes}
        stage = planned.backward_stage(*given_back, **kept, scale=scale)
        planned.play("backward", stage)
        grad_q, grad_k, grad_v = stage.finish()
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None
