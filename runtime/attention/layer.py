"""What one pass of a layer, forward or backward, holds on this rank, by the names of the schedule's buffers.

Nothing here knows what is computed or sent. Own tensors have all heads, and copies by head group where there are
several; queries and results of other ranks have the heads of one group.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.api import accumulator_dtype
from ...planner.schedule.schedule import KV_HOME, Q_HOME, ShardId, Task, Transfer
from .buffers import Pair, Slots
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

    def drop_own_keys(self, group: int) -> None:
        """Forget the copy for a group, once it was sent, if it is not computed here."""
        heads = self.program.groups.keys(group)
        if heads not in self.program.computed_keys:
            self._kv.pop(heads, None)

    def keys(self, tasks: Sequence[Task]) -> Pair | None:
        """Return (K, V) of a launch's key shards, one after the other, for the heads of its tasks; None for none."""
        if not tasks:
            return None
        group, names = tasks[0].query.head_group, [task.key_buffer for task in tasks]
        if len(names) > 1:
            pair = self.slots.joined(names)
        else:
            pair = self.own_keys(group) if names[0] == KV_HOME else self.slots[names[0]]
        within = self.program.groups.keys_within(group, tasks[0].heads)
        return pair if within is None else (some_heads(pair[0], within), some_heads(pair[1], within))

    # columns

    def gather_columns(self) -> Tensor:
        """Return the own rows of the columns, zero elsewhere: what the sum over ranks makes of it, all attend."""
        self.columns = self.indexes.own_columns(self.kv)
        return self.columns

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

    def room_for(self, transfer: Transfer) -> Tensors:
        """Return where another rank's queries, or results of the own ones, land."""
        heads = self.program.groups.queries(group_of(transfer))
        of_queries = transfer.kind == "q"
        room = tuple(_empty(x, heads) for x in self.queries) if of_queries else self._room_for_results(heads)
        self._landed[transfer.buffer] = room
        return room

    def take_landed(self, transfer: Transfer) -> None:
        """Put results that landed where their heads are."""
        self._put(self.program.groups.queries(group_of(transfer)), self._landed.pop(transfer.buffer))

    def finish(self, query: ShardId, heads: Heads, results: Tensors) -> None:
        """Take a part's results: home, or to be sent."""
        if query.sequence_part == self.program.rank:
            self._put(heads, results)
        else:
            self.finished[query] = results

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
