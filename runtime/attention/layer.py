"""What one pass of a layer, forward or backward, holds on this rank, by the names of the schedule's buffers.

Which tensors each transfer reads and fills, and what becomes of what landed, is said here; nothing knows what is
computed from it, nor how tensors travel. Own tensors have all heads, and copies by head group where there are
several; queries and results of other ranks have the heads of one group.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.api import KeyGradients, accumulator_dtype, gather_columns, scatter_columns
from ...planner.schedule.schedule import (
    COLUMNS_HOME,
    DCOLUMNS_HOME,
    KV_HOME,
    Q_HOME,
    ShardId,
    Task,
    Transfer,
    slots_from,
)
from .buffers import Pair, Slots, staged
from .heads import Heads, group_of, head_dimension, some_heads
from .masks import Indexes
from .program import Program
from .sums import KeySums

Tensors = tuple[Tensor, ...]


@dataclass(eq=False, kw_only=True)
class Layer:
    """Tensors of one pass.

    kv: the rank's own (K, V) [B, S, H_kv, D]; queries: its own q, in backward (q, grad_out, lse, delta): [B, S, H, D]
    and [B, H, S]; all contiguous. columns: gathered [2, B, H, C, D], once they are summed up. sums: of dK/dV, in
    backward. results: (out, lse), in backward (dq,), of the own queries, complete when the pass ends; finished: those
    of other ranks' queries, until they are sent.
    """

    program: Program
    indexes: Indexes
    slots: Slots
    kv: Pair
    queries: Tensors
    columns: Tensor | None = None
    sums: KeySums | None = None
    results: Tensors | None = None
    grad_columns: Tensor | None = None
    finished: dict[ShardId, Tensors] = field(default_factory=dict)
    _kv: dict[Heads, Pair] = field(default_factory=dict)
    _columns: dict[Heads, Tensor] = field(default_factory=dict)
    _landed: dict[str, Tensors] = field(default_factory=dict)  # queries and results, by buffer

    def __post_init__(self) -> None:
        """Make room for results that come in parts, and put K/V where others pull them from."""
        if not self.program.at_once:
            self.results = self._room_for_results((0, self.program.groups.heads))
        self.slots.stage(self.kv)

    # keys

    def own_keys(self, group: int) -> Pair:
        """Return the own K/V for the heads of a group, contiguous; groups that share heads share the copy."""
        heads = self.program.groups.keys(group)
        if heads not in self._kv:
            self._kv[heads] = some_heads(self.kv[0], heads), some_heads(self.kv[1], heads)
        return self._kv[heads]

    def keys(self, tasks: Sequence[Task]) -> Pair:
        """Return (K, V) of a launch's key shards, one after the other, for the heads of its tasks."""
        group, names = tasks[0].query.head_group, [task.key_buffer for task in tasks]
        if len(names) > 1:
            pair = self.slots.joined(names)
        else:
            pair = self.own_keys(group) if names[0] == KV_HOME else self.slots[names[0]]
        within = self.program.groups.keys_within(group, tasks[0].heads)
        return pair if within is None else (some_heads(pair[0], within), some_heads(pair[1], within))

    # columns

    def columns_of(self, heads: Heads) -> Tensor:
        """Return the gathered columns for some query heads, contiguous."""
        assert self.columns is not None
        if heads not in self._columns:
            self._columns[heads] = some_heads(self.columns, heads)
        return self._columns[heads]

    def add_column_gradients(self, heads: Heads, grad: Tensor) -> None:
        """Add the gradients of the columns for some query heads [2, B, heads, C, D], in the accumulator's dtype."""
        if self.grad_columns is None:
            assert self.columns is not None
            if grad.shape == self.columns.shape:
                self.grad_columns = grad
                return
            self.grad_columns = torch.zeros_like(self.columns, dtype=grad.dtype)
        _narrowed(self.grad_columns, heads).add_(grad)

    # queries and results

    def own_queries(self, heads: Heads) -> Tensors:
        """Return the own queries' tensors for some heads, contiguous."""
        return tuple(some_heads(x, heads) for x in self.queries)

    def take_queries(self, task: Task) -> Tensors:
        """Return the tensors of a task's queries, which nobody asks for again."""
        return self.own_queries(task.heads) if task.query_buffer == Q_HOME else self._landed.pop(task.query_buffer)

    def finish(self, query: ShardId, heads: Heads, results: Tensors) -> None:
        """Take a part's results: home, or to be sent."""
        if query.sequence_part == self.program.rank:
            self._put(heads, results)
        else:
            self.finished[query] = results

    # transfers

    def outgoing(self, transfer: Transfer) -> Tensors:
        """Return the tensors that the transfer reads."""
        if (
            transfer.source_buffer == COLUMNS_HOME
        ):  # the own rows, zero elsewhere: what their sum makes of it, all attend
            self.columns = gather_columns(*self.kv, self.indexes.columns())
            return (self.columns,)
        if transfer.source_buffer == DCOLUMNS_HOME:
            assert self.grad_columns is not None
            return (self.grad_columns,)
        if transfer.kind == "q":
            return self.own_queries(self.program.groups.queries(group_of(transfer)))
        if transfer.kind == "out":
            assert transfer.shard is not None
            return self.finished[transfer.shard]
        if transfer.transport == "reduce_scatter":
            return self.slots.block(transfer.source_buffer, len(self.indexes.positions))
        if transfer.source_buffer == KV_HOME and transfer.transport != "pull":
            pair = self.own_keys(group_of(transfer))
        else:
            pair = self.slots[self._source(transfer)]
        return tuple(part.to(self.queries[0].dtype) for part in pair) if transfer.narrow else pair

    def incoming(self, transfer: Transfer) -> Tensors:
        """Return the tensors that the transfer fills."""
        if transfer.transport == "all_gather":
            return self.slots.block(transfer.buffer, len(self.indexes.positions))
        if transfer.kind in ("q", "out"):
            heads = self.program.groups.queries(group_of(transfer))
            of_queries = transfer.kind == "q"
            room = tuple(_empty(x, heads) for x in self.queries) if of_queries else self._room_for_results(heads)
            self._landed[transfer.buffer] = room
            return room
        if transfer.kind == "dkv":
            assert self.sums is not None
            return self.sums.landing(transfer)
        return self.slots[transfer.buffer]

    def origins(self, transfer: Transfer) -> tuple[Tensor | None, ...]:
        """Return the tensors that the pull reads, in the memory of its source."""
        return self.slots.of_peer(self._source(transfer), transfer.source)

    def sent(self, transfer: Transfer) -> None:
        """Learn that a transfer from here is complete: what moved is no longer here."""
        if transfer.kind == "kv" and transfer.source_buffer == KV_HOME:
            heads = self.program.groups.keys(group_of(transfer))
            if heads not in self.program.computed_keys:
                self._kv.pop(heads, None)
        elif transfer.kind == "out":
            assert transfer.shard is not None
            del self.finished[transfer.shard]
        elif transfer.kind == "dkv":
            assert self.sums is not None
            several = transfer.transport == "reduce_scatter"
            self.sums.forget(slots_from(transfer.source_buffer, len(self.indexes.positions) if several else 1))

    def received(self, transfers: Sequence[Transfer]) -> None:
        """Learn that transfers to here have landed, and add them where they belong."""
        for transfer in transfers:
            if transfer.kind == "out":
                self._put(self.program.groups.queries(group_of(transfer)), self._landed.pop(transfer.buffer))
        if self.sums is None:
            return
        self.sums.land([transfer for transfer in transfers if transfer.kind == "dkv"])
        if any(transfer.source_buffer == DCOLUMNS_HOME for transfer in transfers):
            assert self.grad_columns is not None
            grad_k, grad_v = self.sums.at_home()
            into = KeyGradients(k=grad_k, v=grad_v, add=True)
            scatter_columns((self.grad_columns[0], self.grad_columns[1]), self.indexes.columns(), into)

    def _source(self, transfer: Transfer) -> str:
        """Return the slot that a transfer reads: of the own K/V, where others pull them from."""
        if transfer.source_buffer != KV_HOME:
            return transfer.source_buffer
        return staged(self.program.groups.key_part(group_of(transfer)))

    def _put(self, heads: Heads, results: Tensors) -> None:
        if self.results is None:
            self.results = results
            return
        for whole, some in zip(self.results, results, strict=True):
            _narrowed(whole, heads).copy_(some)

    def _room_for_results(self, heads: Heads) -> Tensors:
        q = self.queries[0]
        room = _empty(q, heads)
        if self.program.direction == "backward":
            return (room,)
        batch, tokens, count, _ = room.shape
        return room, q.new_empty((batch, count, tokens), dtype=accumulator_dtype(q.dtype))


def _empty(x: Tensor, heads: Heads) -> Tensor:
    """Return a tensor like x with some heads."""
    shape = list(x.shape)
    shape[head_dimension(x)] = heads[1] - heads[0]
    return x.new_empty(shape)


def _narrowed(x: Tensor, heads: Heads) -> Tensor:
    return x.narrow(head_dimension(x), heads[0], heads[1] - heads[0])
