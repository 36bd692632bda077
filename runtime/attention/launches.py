"""Launches of a layer on this rank, part by part: the queries of one shard, for some heads, are a part.

A part is begun with its first task and ended with its last; forward accumulates out and lse, backward dq. Nothing here
knows of transfers: what a launch reads has landed, and what a part gives waits in the layer.

Shape legend: B batch, S tokens of a shard, H query heads of the part, H_kv K/V heads that they use, D head dim,
C columns; n key shards of a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels import api
from ...planner.schedule.schedule import Task
from .layer import Layer, Tensors
from .masks import Indexes
from .program import Launched, PartKey, part_of


@dataclass(eq=False, kw_only=True)
class Part:
    """tasks: how many are left. queries: api.Queries, in backward api.BackwardQueries.

    results: what they add up to so far; with the last task (out [B, S, H, D] in q's dtype, lse [B, H, S]), in backward
    (dq [B, S, H, D] in q's dtype,).
    """

    queries: Any
    indexes: Indexes
    tasks: int
    results: Tensors | None = None


@dataclass(eq=False, kw_only=True)
class Launches:
    """The launches of one pass of a layer. scale and softcap: of the scores, see `kernels.values.Queries`."""

    layer: Layer
    scale: float
    softcap: float | None = None
    _parts: dict[PartKey, Part] = field(default_factory=dict)

    @property
    def computes_at_once(self) -> bool:
        """Whether first tasks are ready, on a device that idles until the host has issued them."""
        return self.layer.queries[0].is_cuda

    def compute(self, tasks: Launched) -> None:
        """Compute the tasks of one launch and merge them into their part's results, and what else they add to."""
        key, layer = part_of(tasks[0]), self.layer
        if key not in self._parts:
            queries, indexes = self._queries(tasks[0]), layer.indexes.part(*key)
            self._parts[key] = Part(queries=queries, indexes=indexes, tasks=layer.program.tasks[key])
        part = self._parts[key]
        part.tasks -= len(tasks)
        self._launch(part, tasks)
        if not part.tasks:
            assert part.results is not None
            layer.finish(*key, part.results)
            del self._parts[key]

    def _attended(self, part: Part, tasks: Launched) -> tuple[api.Keys | None, api.Columns | None]:
        """Return what a launch attends: key shards [B, n * S, H_kv, D], columns [B, H, C, D], or both."""
        keyed, keys, columns = _keyed(tasks), None, None
        if keyed:
            k, v = self.layer.keys(keyed)
            keys = api.Keys(k=k, v=v, index=part.indexes.block(keyed))
        if len(keyed) < len(tasks):
            k, v = self.layer.columns_of(tasks[0].heads)
            columns = api.Columns(k=k, v=v, index=part.indexes.columns())
        return keys, columns

    def _queries(self, task: Task) -> api.Queries:
        """Return the queries of the part that a task begins."""
        raise NotImplementedError

    def _launch(self, part: Part, tasks: Launched) -> None:
        raise NotImplementedError


class ForwardLaunches(Launches):
    """The launches of a layer's forward."""

    @property
    def computes_at_once(self) -> bool:
        """See `Launches`. While a pattern is being chosen, tensors had better travel."""
        return super().computes_at_once and self.layer.indexes.known

    def _queries(self, task: Task) -> api.Queries:
        (q,) = self.layer.take_queries(task)
        return api.Queries(q=q, scale=self.scale, softcap=self.softcap)

    def _launch(self, part: Part, tasks: Launched) -> None:
        given: Any = part.results
        part.results = api.forward(part.queries, *self._attended(part, tasks), earlier=given, final=not part.tasks)


class BackwardLaunches(Launches):
    """The launches of a layer's backward: they add to dq of their part, to dk and dv, and to the columns' gradients."""

    def _queries(self, task: Task) -> api.BackwardQueries:
        q, grad_out, lse, delta = self.layer.take_queries(task)
        several = self.layer.program.keyed_tasks[part_of(task)] > 1  # for a single launch scratch would not pay
        scratch = {} if several else None
        return api.BackwardQueries(
            q=q, scale=self.scale, softcap=self.softcap, grad_out=grad_out, lse=lse, delta=delta, scratch=scratch
        )

    def _launch(self, part: Part, tasks: Launched) -> None:
        layer, sums, keyed = self.layer, self.layer.sums, _keyed(tasks)
        keys, columns = self._attended(part, tasks)
        dtype = api.accumulator_dtype(part.queries.q.dtype)
        group, names = tasks[0].query.head_group, [str(task.grad_buffer) for task in keyed]
        of_keys = of_columns = grad_columns = within = None
        if keys is not None:
            assert sums is not None
            within = layer.program.groups.keys_within(group, tasks[0].heads)
            if within is None:
                of_keys = sums.for_launch(names, group)
            else:
                grad_k, grad_v = torch.empty_like(keys.k, dtype=dtype), torch.empty_like(keys.v, dtype=dtype)
                of_keys = api.KeyGradients(k=grad_k, v=grad_v, add=False)
        if columns is not None:
            grad_columns = columns.k.new_empty((2, *columns.k.shape), dtype=dtype)
            of_columns = api.KeyGradients(k=grad_columns[0], v=grad_columns[1], add=False)
        into = api.Gradients(query=_query_gradient(part), keys=of_keys, columns=of_columns)
        api.backward(part.queries, keys, columns, into)
        if within is not None and of_keys is not None and sums is not None:
            sums.add_some_heads(names, group, within, of_keys)
        if grad_columns is not None:
            layer.add_column_gradients(tasks[0].heads, grad_columns)


def _keyed(tasks: Launched) -> Launched:
    """Return a launch's tasks over key shards; it begins with the columns, if it attends them."""
    return tasks if tasks[0].key is not None else tasks[1:]


def _query_gradient(part: Part) -> api.QueryGradient:
    """Return where a launch's dq goes: the first one begins the sum, the last one ends it in q's dtype."""
    q, final, add = part.queries.q, None, part.results is not None
    total = torch.empty_like(q, dtype=api.accumulator_dtype(q.dtype)) if part.results is None else part.results[0]
    if not part.tasks and total.dtype != q.dtype:
        final = torch.empty_like(q)
    part.results = (total if final is None else final,)
    return api.QueryGradient(total=total, add=add, final=final)
