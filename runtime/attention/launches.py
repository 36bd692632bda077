"""Launches of a layer on this rank, part by part: the queries of one shard, for some heads, are a part.

A part is begun with its first task and ended with its last; forward accumulates out and lse, backward dq. Nothing here
knows of transfers: what a launch reads has landed, and what a part gives waits in the layer.

Shape legend: B batch, S tokens of a shard, H query heads of the part, H_kv K/V heads that they use, D head dim,
C columns; n key shards of a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import api
from ...planner.schedule.schedule import Task
from .buffers import Pair
from .layer import Layer
from .masks import Indexes
from .program import Launched, PartKey, part_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Attended:
    """What one launch attends: key shards, columns, or both.

    tasks: those over key shards; keys: (K, V) [B, n * S, H_kv, D] of these shards, one after the other; columns:
    gathered [2, B, H, C, D].
    """

    tasks: Sequence[Task]
    keys: Pair | None
    columns: Tensor | None

    @property
    def count(self) -> int:
        """How many tasks of a schedule it is."""
        return len(self.tasks) + (self.columns is not None)

    def indexed(self, indexes: Indexes) -> tuple[api.Keys | None, api.Columns | None]:
        """Return what kernels take."""
        keys = columns = None
        if self.keys is not None:
            keys = api.Keys(k=self.keys[0], v=self.keys[1], index=indexes.block(self.tasks))
        if self.columns is not None:
            columns = api.Columns(k=self.columns[0], v=self.columns[1], index=indexes.columns())
        return keys, columns


@dataclass(eq=False, kw_only=True)
class ForwardPart:
    """tasks: how many are left; with the last one `result` is (out [B, S, H, D] in q's dtype, lse [B, H, S])."""

    queries: api.Queries
    indexes: Indexes
    tasks: int
    result: api.Partial | None = None

    def launch(self, attended: Attended) -> None:
        """Attend, and merge into the result."""
        self.tasks -= attended.count
        given = attended.indexed(self.indexes)
        self.result = api.forward(self.queries, *given, earlier=self.result, final=self.tasks == 0)


@dataclass(eq=False, kw_only=True)
class BackwardPart:
    """tasks: how many are left; with the last one `grad_q` is dq [B, S, H, D] in q's dtype."""

    queries: api.BackwardQueries
    indexes: Indexes
    tasks: int
    grad_q: Tensor | None = None

    def launch(self, attended: Attended, of_keys: api.KeyGradients | None) -> Tensor | None:
        """Add to dq, and to dk and dv of the keys; return the gradients of the columns [2, B, H, C, D], if attended.

        of_keys: laid out as the keys, where there are any.
        """
        keys, columns = attended.indexed(self.indexes)
        grad_columns = of_columns = None
        if attended.columns is not None:
            dtype = api.accumulator_dtype(self.queries.q.dtype)
            grad_columns = torch.empty_like(attended.columns, dtype=dtype)
            of_columns = api.KeyGradients(k=grad_columns[0], v=grad_columns[1], add=False)
        into = api.Gradients(query=self._query_gradient(attended.count), keys=of_keys, columns=of_columns)
        api.backward(self.queries, keys, columns, into)
        return grad_columns

    def _query_gradient(self, tasks: int) -> api.QueryGradient:
        """Return where this launch's dq goes: the first one begins the sum, the last one ends it in q's dtype."""
        self.tasks -= tasks
        q, total, final = self.queries.q, self.grad_q, None
        add = total is not None
        if total is None:
            total = torch.empty_like(q, dtype=api.accumulator_dtype(q.dtype))
        if self.tasks == 0 and total.dtype != q.dtype:
            final = torch.empty_like(q)
        self.grad_q = total if final is None else final
        return api.QueryGradient(total=total, add=add, final=final)


@dataclass(eq=False, kw_only=True)
class ForwardLaunches:
    """The launches of a layer's forward. scale: of the scores."""

    layer: Layer
    scale: float
    _parts: dict[PartKey, ForwardPart] = field(default_factory=dict)

    @property
    def computes_at_once(self) -> bool:
        """Whether first tasks are ready, on a device that idles until the host has issued them.

        While a pattern is being chosen, tensors had better travel."""
        return self.layer.queries[0].is_cuda and self.layer.indexes.known

    def compute(self, tasks: Launched) -> None:
        """Compute the tasks of one launch and merge them into their part's results."""
        key, layer = part_of(tasks[0]), self.layer
        if key not in self._parts:
            (q,) = layer.take_queries(tasks[0])
            queries, indexes = api.Queries(q=q, scale=self.scale), layer.indexes.part(*key)
            self._parts[key] = ForwardPart(queries=queries, indexes=indexes, tasks=layer.program.tasks[key])
        part = self._parts[key]
        part.launch(_attended(layer, tasks))
        if not part.tasks:
            assert part.result is not None
            layer.finish(*key, part.result)
            del self._parts[key]


@dataclass(eq=False, kw_only=True)
class BackwardLaunches:
    """The launches of a layer's backward. scale: of the scores."""

    layer: Layer
    scale: float
    _parts: dict[PartKey, BackwardPart] = field(default_factory=dict)

    @property
    def computes_at_once(self) -> bool:
        """See `ForwardLaunches`."""
        return self.layer.queries[0].is_cuda

    def compute(self, tasks: Launched) -> None:
        """Add dq, dk and dv of the tasks of one launch."""
        key, layer = part_of(tasks[0]), self.layer
        if key not in self._parts:
            queries, indexes = self._begun(tasks[0]), layer.indexes.part(*key)
            self._parts[key] = BackwardPart(queries=queries, indexes=indexes, tasks=layer.program.tasks[key])
        part = self._parts[key]
        grad_columns = self._launch(part, _attended(layer, tasks))
        if grad_columns is not None:
            layer.add_column_gradients(key[1], grad_columns)
        if not part.tasks:
            assert part.grad_q is not None
            layer.finish(*key, (part.grad_q,))
            del self._parts[key]

    def _begun(self, task: Task) -> api.BackwardQueries:
        q, grad_out, lse, delta = self.layer.take_queries(task)
        several = self.layer.program.keyed_tasks[part_of(task)] > 1  # for a single launch scratch would not pay
        scratch = {} if several else None
        return api.BackwardQueries(q=q, scale=self.scale, grad_out=grad_out, lse=lse, delta=delta, scratch=scratch)

    def _launch(self, part: BackwardPart, attended: Attended) -> Tensor | None:
        sums, tasks = self.layer.sums, attended.tasks
        if attended.keys is None:
            return part.launch(attended, None)
        assert sums is not None
        group, names = tasks[0].query.head_group, [str(task.grad_buffer) for task in tasks]
        within = self.layer.program.groups.keys_within(group, tasks[0].heads)
        if within is None:
            return part.launch(attended, sums.for_launch(names, group))
        grads = sums.room_like(attended.keys)
        grad_columns = part.launch(attended, grads)
        sums.add_some_heads(names, group, within, grads)
        return grad_columns


def _attended(layer: Layer, tasks: Launched) -> Attended:
    """Return what a launch attends; it begins with the columns, if it attends them."""
    if tasks[0].key is not None:
        return Attended(tasks=tasks, keys=layer.keys(tasks), columns=None)
    return Attended(tasks=tasks[1:], keys=layer.keys(tasks[1:]), columns=layer.columns_of(tasks[0].heads))
