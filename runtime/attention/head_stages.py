"""Forward and backward of one layer on one rank that computes heads by groups, of its own queries and of others'.

Every part of the queries and every head group is a stage of its own (stages.py) over the same slots. What is here lets
queries and results change ranks, and puts together what belongs to the different groups of heads.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns; H_g and H_kv_g those
of a head group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import api
from ...planner.schedule.launches import parse_slot
from ...planner.schedule.schedule import (
    COLUMNS_HOME,
    DCOLUMNS_HOME,
    DKV_HOME,
    Q_HOME,
    ShardId,
    Task,
    Transfer,
    slots_from,
)
from .buffers import Pair, runs_of_neighbours
from .head_groups import HeadStage, some_heads
from .stages import BackwardStage, ForwardStage


@dataclass(eq=False, kw_only=True)
class HeadForwardStage(HeadStage):
    """Forward of heads by groups. q [B, S, H, D], kv: the rank's own, all heads, contiguous.

    The parts of out that were computed here for others are sent to them, and theirs land here.
    """

    q: Tensor
    _parts: dict[ShardId, ForwardStage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make room for what comes home."""
        batch, tokens, heads, _ = self.q.shape
        self._out = torch.empty_like(self.q)
        self._lse = self.q.new_empty((batch, heads, tokens), dtype=api.accumulator_dtype(self.q.dtype))

    @property
    def computes_at_once(self) -> bool:
        """See `ring.Stage`: while a pattern is being chosen, tensors had better travel."""
        return self.q.is_cuda and self.indexes.known

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer reads."""
        if transfer.source_buffer == COLUMNS_HOME:
            self.gathered = self.indexes.own_columns(self.kv)
            return (self.gathered,)
        assert transfer.shard is not None  # of a collective too: that of its head group
        if transfer.kind == "q":
            return (some_heads(self.q, self.groups.queries(transfer.shard.head_group)),)
        if transfer.kind == "out":
            return self._parts[transfer.shard].finish()
        return self.kv_of(transfer.shard.head_group)

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer fills."""
        if transfer.transport == "all_gather":
            return self.slots.block(transfer.buffer, len(self.indexes.positions))
        if transfer.kind == "kv":
            return self.slots[transfer.buffer]
        assert transfer.shard is not None
        first, last = self.groups.queries(transfer.shard.head_group)
        room = self.q.new_empty((*self.q.shape[:2], last - first, self.q.shape[3]))
        if transfer.kind == "q":
            self._queries[transfer.buffer] = (room,)
            return (room,)
        rows = self._lse.new_empty((self._lse.shape[0], last - first, self._lse.shape[2]))
        self._landed[transfer.buffer] = room, rows
        return room, rows

    def sent(self, transfer: Transfer) -> None:
        """Results that went home are no longer needed here."""
        if transfer.shard is not None and transfer.kind == "kv":
            self.drop_kv_of(transfer.shard.head_group)
        elif transfer.shard is not None and transfer.kind == "out":
            del self._parts[transfer.shard]

    def received(self, transfers: Sequence[Transfer]) -> None:
        """Put results where their heads are."""
        for transfer in transfers:
            if transfer.kind == "out":
                assert transfer.shard is not None
                out, lse = self._landed.pop(transfer.buffer)
                self._put(transfer.shard.head_group, (out, lse))

    def compute(self, tasks: tuple[Task, ...]) -> None:
        """Compute the tasks of one launch."""
        query = tasks[0].query
        if query not in self._parts:
            self._parts[query] = self._part(tasks[0])
        part = self._parts[query]
        if tasks[0].key is None:  # launches begin with the columns, which have been summed up only now
            part.gathered = self.columns_of(tasks[0].heads)
        part.compute(tasks)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return (out [B, S, H, D] in q's dtype, lse [B, H, S]) of the own queries, of all heads."""
        for own in self.own_parts():
            self._put(own.head_group, self._parts.pop(own).finish())
        return self._out, self._lse

    def _part(self, task: Task) -> ForwardStage:
        if task.query_buffer == Q_HOME:
            q = some_heads(self.q, task.heads)
        else:
            (q,) = self._queries.pop(task.query_buffer)
        return ForwardStage(
            q=q,
            kv=self.kv_of(task.query.head_group),
            slots=self.slots,
            indexes=self.part_indexes(task),
            scale=self.scale,
            tasks=self.count(task.query),
        )

    def _put(self, group: int, result: tuple[Tensor, Tensor]) -> None:
        heads = slice(*self.groups.queries(group))
        self._out[:, :, heads], self._lse[:, heads] = result


@dataclass(eq=False, kw_only=True)
class HeadBackwardStage(HeadStage):
    """Backward of heads by groups. q, grad_out [B, S, H, D], lse, delta [B, H, S]: the own queries', all heads.

    grad_kv: where the rank's own (dK, dV) are summed, of all heads, holding nothing yet.
    """

    q: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor
    grad_kv: Pair
    _parts: dict[ShardId, BackwardStage] = field(default_factory=dict)
    _filled: dict[int, set[str]] = field(default_factory=dict)
    _home: set[int] = field(default_factory=set)
    _grad_columns: Tensor | None = None
    _own_grads: dict[int, Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make room for what comes home."""
        self._grad_q = torch.empty_like(self.q)

    @property
    def computes_at_once(self) -> bool:
        """See `ring.Stage`."""
        return self.q.is_cuda

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer reads."""
        if transfer.source_buffer == DCOLUMNS_HOME:
            return (self._gradients_of_columns(),)
        assert transfer.shard is not None
        if transfer.kind == "q":
            return self._own_queries(self.groups.queries(transfer.shard.head_group))
        if transfer.kind == "out":
            return (self._of_queries(transfer.shard),)
        if transfer.transport == "reduce_scatter":
            return self.slots.block(transfer.source_buffer, len(self.indexes.positions))
        return self.kv_of(transfer.shard.head_group) if transfer.kind == "kv" else self.slots[transfer.source_buffer]

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer fills."""
        if transfer.transport == "all_gather":
            return self.slots.block(transfer.buffer, len(self.indexes.positions))
        if transfer.kind in ("kv", "dkv"):
            return self.slots[transfer.buffer]
        assert transfer.shard is not None
        first, last = self.groups.queries(transfer.shard.head_group)
        batch, tokens, _, head_dim = self.q.shape
        room = self.q.new_empty((batch, tokens, last - first, head_dim))
        if transfer.kind == "out":
            self._landed[transfer.buffer] = (room,)
            return (room,)
        rows = self.lse.new_empty((2, batch, last - first, tokens))
        self._queries[transfer.buffer] = room, torch.empty_like(room), rows[0], rows[1]
        return self._queries[transfer.buffer]

    def sent(self, transfer: Transfer) -> None:
        """What went home is no longer here."""
        if transfer.shard is not None and transfer.kind == "kv":
            self.drop_kv_of(transfer.shard.head_group)
        elif transfer.shard is not None and transfer.kind == "out":
            self._take_columns(transfer.shard, self._parts.pop(transfer.shard))
        elif transfer.transport == "reduce_scatter":
            self._forget(slots_from(transfer.source_buffer, len(self.indexes.positions)))
        elif transfer.kind == "dkv":
            self._forget([transfer.source_buffer])

    def received(self, transfers: Sequence[Transfer]) -> None:
        """Put dq where its heads are, and add dK/dV to those of their heads; what lies side by side, in one pass."""
        landed: dict[tuple[int, int], list[str]] = {}
        for transfer in transfers:
            if transfer.kind == "out":
                assert transfer.shard is not None
                (grad,) = self._landed.pop(transfer.buffer)
                self._grad_q[:, :, slice(*self.groups.queries(transfer.shard.head_group))] = grad
            elif transfer.kind == "dkv":
                assert transfer.shard is not None
                landed.setdefault(self.groups.keys(transfer.shard.head_group), []).append(transfer.buffer)
        for heads, names in landed.items():
            for together in runs_of_neighbours(sorted(names, key=parse_slot)):
                self._add_home(heads, self.slots.block(together[0], len(together)))
        if any(transfer.source_buffer == DCOLUMNS_HOME for transfer in transfers):
            assert self._grad_columns is not None
            self._fill_home()
            self.indexes.add_to_own_rows(self._grad_columns, self.grad_kv)

    def compute(self, tasks: tuple[Task, ...]) -> None:
        """Add dq, dk and dv of the tasks of one launch."""
        query = tasks[0].query
        if query not in self._parts:
            self._parts[query] = self._part(tasks[0])
        self._parts[query].compute(tasks)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq (in q's dtype), dk and dv (the accumulator's) of all heads; what nothing was added to is zero."""
        for own in self.own_parts():
            self._grad_q[:, :, slice(*self.groups.queries(own.head_group))] = self._of_queries(own)
        self._parts.clear()
        self._add_own()
        self._fill_home()
        return self._grad_q, *self.grad_kv

    def _own_queries(self, heads: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return q, grad_out, lse and delta for some heads, contiguous."""
        of_tokens = (some_heads(x, heads) for x in (self.q, self.grad_out))
        of_rows = (some_heads(x, heads, dim=1) for x in (self.lse, self.delta))
        return *of_tokens, *of_rows

    def _part(self, task: Task) -> BackwardStage:
        own = task.query_buffer == Q_HOME
        queries = self._own_queries(task.heads) if own else self._queries.pop(task.query_buffer)
        q, grad_out, lse, delta = queries
        group = task.query.head_group
        keyed = [other for other in self.tasks if other.query == task.query and other.key is not None]
        return BackwardStage(
            q=q,
            kv=self.kv_of(group),
            grad_out=grad_out,
            lse=lse,
            delta=delta,
            slots=self.slots,
            indexes=self.part_indexes(task),
            scale=self.scale,
            tasks=self.count(task.query),
            grad_kv=self._own_gradients(group),
            gathered=self.columns_of(task.heads),
            filled=self._filled.setdefault(group, set()),
            scratch={} if len(keyed) > 1 else None,
        )

    def _of_queries(self, query: ShardId) -> Tensor:
        """Return dq of a part's queries that is complete."""
        grad = self._parts[query].grad_q
        assert grad is not None
        return grad

    def _forget(self, names: Sequence[str]) -> None:
        """Slots whose sums went home hold nothing."""
        for filled in self._filled.values():
            filled.difference_update(names)

    def _own_gradients(self, group: int) -> Pair | None:
        """Return where tasks sum dK/dV of the own keys for a group [B, S, H_kv_g, D]; None where none does at home."""
        if not any(task.grad_buffer == DKV_HOME and task.query.head_group == group for task in self.tasks):
            return None
        if group not in self._own_grads:
            dtype = api.accumulator_dtype(self.q.dtype)
            k, v = self.kv_of(group)
            self._own_grads[group] = torch.empty_like(k, dtype=dtype), torch.empty_like(v, dtype=dtype)
        return self._own_grads[group]

    def _add_own(self) -> None:
        """Add what was computed here of the own keys' gradients."""
        for group, (grad_k, grad_v) in self._own_grads.items():
            if DKV_HOME in self._filled[group]:
                self._add_home(self.groups.keys(group), (grad_k[None], grad_v[None]))

    def _add_home(self, heads: tuple[int, int], parts: Pair) -> None:
        """Add parts [n, B, S, H_kv_g, D] to the own gradients of some heads."""
        add = heads[0] in self._home
        for into, some in zip(self.grad_kv, parts, strict=True):
            api.add_up(into[:, :, slice(*heads)], some, add=add, backend=self.indexes.backend)
        self._home.update(range(*heads))

    def _fill_home(self) -> None:
        """Zero the own gradients of heads that nothing was added to."""
        for head in set(range(self.groups.kv_heads)) - self._home:
            for grad in self.grad_kv:
                grad[:, :, head].zero_()
        self._home.update(range(self.groups.kv_heads))

    def _gradients_of_columns(self) -> Tensor:
        """Return the gradients of all columns [2, B, H, C, D]: sums over the parts, zero for heads of other groups."""
        for query, part in self._parts.items():
            self._take_columns(query, part)
        assert self._grad_columns is not None
        return self._grad_columns

    def _take_columns(self, query: ShardId, part: BackwardStage) -> None:
        """Add a part's gradients of the columns to those of all, whose sum outlives the part."""
        if part.grad_gathered is None:
            return
        if self._grad_columns is None:
            assert self.gathered is not None
            self._grad_columns = torch.zeros_like(self.gathered, dtype=api.accumulator_dtype(self.q.dtype))
        self._grad_columns[:, :, slice(*self.groups.queries(query.head_group))] += part.grad_gathered
        part.grad_gathered = None
