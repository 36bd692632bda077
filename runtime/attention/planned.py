"""Sparse attention over many ranks, as a plan says: one differentiable call per layer.

Shape legend: B batch, S tokens of this rank's shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels.api import AttentionMask, accumulator_dtype, backend_of
from ...kernels.sinks import sink_gradients
from ...planner.schedule.schedule import Direction
from ...traces.errors import InputError, UnsupportedError
from ..comm.channels import Channel, Channels, CommunicationError, Waiting
from ..comm.measure import Recorder
from ..comm.mesh import agree, name_lost_ranks, naming_lost_ranks
from ..comm.reuse import common_channels
from ..pattern.form import PLAIN, AttentionForm
from .bound import BoundPlan
from .buffers import BufferPool, Slots
from .graphs.graphs import Graphs
from .graphs.passes import Gradients, RecordedPasses, Results
from .heads import Pattern
from .launches import BackwardLaunches, ForwardLaunches
from .layer import Layer, Tensors
from .masks import Indexes, MaskSource, RunningHash
from .recompute import computed_once
from .ring import play
from .sums import KeySums

_planned = itertools.count(1)  # all ranks make theirs in the same order


class Saved(NamedTuple):
    """What a layer's forward keeps for its backward beside its inputs.

    out [B, S, H, D], lse [B, H, S], sinks counted; columns: gathered [2, B, H, C, D], None where there are none;
    kept_kv: K/V of other ranks [2, count, B, S, H_kv, D], None where none are kept.
    """

    out: Tensor
    lse: Tensor
    columns: Tensor | None
    kept_kv: Tensor | None
    indexes: Indexes

    @property
    def results(self) -> Results:
        """All but the indexes."""
        return Results(self.out, self.lse, self.columns, self.kept_kv)


class PlayedForward(NamedTuple):
    """One layer's forward as it was played on this rank, heads in the plan's order: q, k, v, the mask and results.

    q, out [B, S, H, D], k, v [B, S, H_kv, D], lse [B, H, S]; form: softcap and sinks [H], in the same order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: AttentionMask
    scale: float
    form: AttentionForm
    out: Tensor
    lse: Tensor


class PlayedBackward(NamedTuple):
    """One layer's backward: grad_out and dq [B, S, H, D], dk and dv [B, S, H_kv, D] in the accumulator's type."""

    forward: PlayedForward
    grad_out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Watch(Protocol):
    """Who is shown what layers were given and returned, on all ranks at the same places."""

    def after_forward(self, layer: int | None, played: PlayedForward) -> None:
        """Look at a layer's forward. layer: its number, where attention was told it."""
        ...

    def after_backward(self, layer: int | None, played: PlayedBackward) -> None:
        """Look at a layer's backward."""
        ...


class PlannedAttention:
    """Attention by a bound plan: channels and buffers, shared by all layers.

    Making it is collective. channels: in place of those that all plans of the mesh share, and of its own where a
    recorder notes what every call does. graphs: layers are played by recordings kept there (see `graphs_for`), unless
    there is a recorder. waiting: made around every wait for other ranks, to measure it; while it does, graphs must be
    paused. watch: is shown every layer. poisons: whether buffers for other ranks' data are filled with NaN before every
    layer.
    """

    waiting: Waiting = nullcontext
    watch: Watch | None = None
    poisons: bool = False

    def __init__(
        self, bound: BoundPlan, *, channels: Channels | None = None, recorder: Recorder | None = None,
        graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        self.bound, self.recorder = bound, recorder
        programs, mesh = list(bound.programs.values()), bound.mesh
        schedules, kv_heads = [one.schedule for one in programs], [one.groups.kv_heads_of_one for one in programs]
        self._owns_channels = channels is None and recorder is not None
        if channels is None:
            channels = Channels(mesh, timed=True) if self._owns_channels else common_channels(mesh)
        self._channels = channels
        self.channels: Mapping[str, Channel] = self._channels.bind(schedules)
        self.pool = BufferPool(mesh.device, schedules, self._channels.peers, kv_heads=kv_heads)
        self._joined_positions: dict[tuple[int, ...], Tensor] = {}
        self._recorded: RecordedPasses | None = None
        if graphs is not None and recorder is None:
            self._recorded = RecordedPasses(
                self, graphs, indexed=self._indexes, generation=lambda: self.pool.generation
            )  # fmt: skip
        self._pattern_hash = RunningHash(mesh.device)
        self._topic, self._agreements = f"{bound.topic} attention {next(_planned)}", 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Pattern, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return out [B, S, H, D] of this rank's queries. See `with_lse`."""
        return self.with_lse(q, k, v, mask, scale=scale, layer=layer, form=form)[0]

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Pattern, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return (out [B, S, H, D] in q's dtype, lse [B, H, S] in the accumulator's, not differentiable).

        q [B, S, H, D], k and v [B, S, H_kv, D]: this rank's shard, in the order of `bound.own_positions`. mask: the
        layer's patterns, equal on all ranks, or a function of (q, k, scale) that chooses them while K and V are on
        their way. layer: its number in the model, which only plans with an order of heads by layer ask for. form: its
        softcap and sinks, which get gradients too; its reach is in the mask.
        Collective: every rank calls it for the same layer. Raises InputError when a shape or type is not the plan's, or
        the mask activates a pair of shards that the plan leaves out.
        """
        self._check(q, k, v)
        if isinstance(mask, AttentionMask):
            self.bound.guard.admit(mask)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        order = self.bound.head_order(layer)
        if order is not None:
            mask = order.of_mask(mask, q, k)
            q, k, v = order.of_inputs(q, k, v)
            form = order.of_form(form)
        given = self, mask, factor, layer, form.softcap
        out, lse = _RingFunction.apply(q, k, v, form.sinks, *given)  # pyright: ignore[reportGeneralTypeIssues]
        return (out, lse) if order is None else order.back(out, lse)

    def forward(self, qkv: Tensors, mask: Pattern, scale: float, form: AttentionForm = PLAIN) -> Saved:
        """Play the plan's forward on contiguous q, k, v; return its results and what backward needs."""
        q, k, _ = qkv
        indexes = self._indexes(
            mask if isinstance(mask, AttentionMask) else (lambda: mask(q, k, scale)), self.note_pattern
        )
        recorded = self._recorded
        if recorded is not None and recorded.ready and recorded.takes(indexes.mask, q.shape[1]):
            return Saved(*recorded.forward(qkv, indexes.mask, scale, form), indexes=indexes)
        return Saved(*self.play_forward(qkv, indexes, scale, form), indexes=indexes)

    def backward(
        self, grad_out: Tensor, qkv: Tensors, saved: Saved, scale: float, form: AttentionForm = PLAIN
    ) -> Gradients:
        """Play the plan's backward. grad_out: contiguous."""
        mask, recorded = saved.indexes.mask, self._recorded
        if recorded is not None and recorded.ready and recorded.takes(mask, grad_out.shape[1]):
            return recorded.backward(grad_out, qkv, saved.results, mask, scale, form)
        return self.play_backward(grad_out, qkv, saved.results, saved.indexes, scale, form)

    def play_forward(self, qkv: Tensors, indexes: Indexes, scale: float, form: AttentionForm) -> Results:
        """Play forward, one launch after the other."""
        q, k, v = qkv
        kept_kv, program = None, self.bound.programs["forward"]
        if program.kept_slots:  # room for what a layer keeps of others' K/V until backward
            batch, tokens, _, head_dim = k.shape
            kept_kv = k.new_empty(2, program.kept_slots, batch, tokens, program.groups.kv_heads_of_one, head_dim)
        slots = self.slots("forward", k, kept_kv)
        layer = Layer(program=program, indexes=indexes, slots=slots, kv=(k, v), queries=(q,))
        self._play(layer, ForwardLaunches(layer=layer, scale=scale, softcap=form.softcap))
        assert layer.results is not None
        out, lse = layer.results
        if form.sinks is not None:
            out, lse = backend_of(self.bound.backend).with_sinks(out, lse, form.sinks.detach())
        return Results(out=out, lse=lse, columns=layer.columns, kept_kv=kept_kv)

    def play_backward(
        self, grad_out: Tensor, qkv: Tensors, results: Results, indexes: Indexes, scale: float, form: AttentionForm
    ) -> Gradients:
        """Play backward, one launch after the other."""
        q, k, v = qkv
        program, dtype = self.bound.programs["backward"], accumulator_dtype(q.dtype)
        backend = backend_of(self.bound.backend)
        delta = backend.row_products(grad_out, results.out)
        slots = self.slots("backward", k, results.kept_kv)
        home = torch.empty_like(k, dtype=dtype), torch.empty_like(v, dtype=dtype)
        sums = KeySums(slots=slots, groups=program.groups, home=home, backend=backend, dtype=q.dtype)
        layer = Layer(
            program=program, indexes=indexes, slots=slots, kv=(k, v), columns=results.columns, sums=sums,
            queries=(q, grad_out, results.lse, delta),
        )  # fmt: skip
        self._play(layer, BackwardLaunches(layer=layer, scale=scale, softcap=form.softcap))
        grad_q = torch.zeros_like(q) if layer.results is None else layer.results[0]
        grad_k, grad_v = sums.finish()
        of_sinks = None if form.sinks is None else sink_gradients(results.lse, delta, form.sinks)
        return Gradients(q=grad_q, k=grad_k, v=grad_v, sinks=of_sinks)

    def slots(self, direction: Direction, k: Tensor, kept: Tensor | None = None) -> Slots:
        """Return the slots of one direction for K/V shaped like `k`; kept: those of the layer's own."""
        dtypes = {"kv": k.dtype, "dkv": accumulator_dtype(k.dtype)}
        slots = self.pool.slots(self.bound.programs[direction].schedule, k.shape, dtypes)
        for tensor in (one for name in slots for one in slots[name]) if self.poisons else ():
            tensor.fill_(torch.nan)
        return slots if kept is None else slots.with_kept(kept)

    def note_pattern(self, mask: AttentionMask) -> None:
        """Take a layer's mask into the hash that `agree_on_patterns` compares.

        Does not wait for the device, unless the plan leaves out pairs that a causal mask may have and this mask is new.
        """
        self.bound.guard.admit(mask)
        self._pattern_hash.note(mask)

    def agree_on_patterns(self) -> None:
        """Check, once per training step, that all ranks used the same patterns since the last time. Collective.

        Raises InputError naming the first rank that differs, RankLost when ranks are lost. Waits for the device.
        """
        self._agreements += 1
        mesh = self.bound.mesh
        with naming_lost_ranks(mesh):
            own = f"{int(self._pattern_hash.take()):016x}"
            mesh.check()  # before the others are asked, who may be gone
            agree(mesh, f"{self._topic} patterns {self._agreements}", own)

    def close(self) -> None:
        """End the channels that are its own."""
        if self._owns_channels:
            self._channels.close()

    def _indexes(
        self, source: AttentionMask | MaskSource, chosen: Callable[[AttentionMask], None] = lambda mask: None
    ) -> Indexes:
        return Indexes(
            source=source, positions=self.bound.positions, rank=self.bound.mesh.rank, backend=self.bound.backend,
            columns_capacity=self.bound.plan.columns_capacity, joined_positions=self._joined_positions, chosen=chosen,
        )  # fmt: skip

    def _play(self, layer: Layer, launches: ForwardLaunches | BackwardLaunches) -> None:
        """Play one direction of one layer; RankLost names the ranks that stopped answering."""
        mesh = self.bound.mesh
        with naming_lost_ranks(mesh):
            try:
                play(layer, launches, self.channels, self.recorder, self.waiting)
            except CommunicationError as error:
                raise name_lost_ranks(mesh, self.bound.topic, error) from error

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        model, tokens, device = self.bound.plan.model, self.bound.own_positions.numel(), self.bound.mesh.device
        for name, tensor, heads in (("q", q, model.heads), ("k", k, model.kv_heads), ("v", v, model.kv_heads)):
            wanted = (tokens, heads, model.head_dim)
            if tensor.dim() != 4 or tuple(tensor.shape[1:]) != wanted or tensor.shape[0] != q.shape[0]:
                raise InputError(
                    f"shape {tuple(tensor.shape)} is not [B, {wanted[0]}, {wanted[1]}, {wanted[2]}]", field=name
                )
            if tensor.dtype != self.bound.dtype:
                raise InputError(f"{tensor.dtype} is not the plan's {self.bound.dtype}", field=name)
            if tensor.device != device:
                raise InputError(f"is on {tensor.device}, this rank works on {device}", field=name)


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, planned: PlannedAttention, mask: Pattern,
        scale: float, layer: int | None, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Play the plan's forward, or take its results where a checkpointed layer kept them."""
        q, k, v, form = q.contiguous(), k.contiguous(), v.contiguous(), AttentionForm(softcap=softcap, sinks=sinks)

        def play_forward() -> Saved:
            saved = planned.forward((q, k, v), mask, scale, form)
            if planned.watch is not None:
                planned.watch.after_forward(layer, _played((q, k, v), saved, scale, form))
            return saved

        saved = Saved(*computed_once(play_forward, q.device))
        ctx.save_for_backward(q, k, v, sinks, saved.out, saved.lse, saved.columns, saved.kept_kv)
        ctx.given = planned, saved.indexes, scale, layer, softcap
        ctx.mark_non_differentiable(saved.lse)
        return saved.out, saved.lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Play the plan's backward: dq, dk, dv, those of the sinks. UnsupportedError under create_graph."""
        # once_differentiable would refuse too, but only where the incoming gradient has a graph
        if torch.is_grad_enabled():  # in backward: create_graph
            raise UnsupportedError(
                "gradients of gradients of planned attention are not supported", field="create_graph"
            )
        q, k, v, sinks, out, lse, columns, kept_kv = ctx.saved_tensors
        planned, indexes, scale, layer, softcap = ctx.given
        form = AttentionForm(softcap=softcap, sinks=sinks)
        saved, grad_out = Saved(out, lse, columns, kept_kv, indexes), grads[0].contiguous()
        grad_q, grad_k, grad_v, grad_sinks = planned.backward(grad_out, (q, k, v), saved, scale, form)
        if planned.watch is not None:
            played = PlayedBackward(_played((q, k, v), saved, scale, form), grad_out, grad_q, grad_k, grad_v)
            planned.watch.after_backward(layer, played)
        of_sinks = None if grad_sinks is None else grad_sinks.to(sinks.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), of_sinks, None, None, None, None, None


def _played(qkv: Tensors, saved: Saved, scale: float, form: AttentionForm) -> PlayedForward:
    q, k, v = qkv
    return PlayedForward(q=q, k=k, v=v, mask=saved.indexes.mask, scale=scale, form=form, out=saved.out, lse=saved.lse)
