"""Launches of one part: the queries of one shard, for some heads, over keys that are handed in.

Nothing here knows where keys come from or where results go. Forward accumulates out and lse, backward dq.

Shape legend: B batch, S tokens of a shard, H query heads of the part, H_kv K/V heads that they use, D head dim,
C columns; n key shards of a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import api
from ...planner.schedule.schedule import Task
from .buffers import Pair
from .indexes import Indexes


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
