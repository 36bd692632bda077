"""A layer's launches on this rank: every part of the queries, begun with its first task and ended with its last.

Nothing here knows of transfers: what a launch reads has landed, and what a part gives waits in the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...kernels.api import BackwardQueries, Queries
from ...planner.schedule.schedule import Task
from .layer import Layer
from .part import Attended, BackwardPart, ForwardPart
from .program import Launched, PartKey, part_of


@dataclass(eq=False, kw_only=True)
class ForwardLaunches:
    """The launches of a layer's forward. scale: of the scores."""

    layer: Layer
    scale: float
    _parts: dict[PartKey, ForwardPart] = field(default_factory=dict)

    @property
    def computes_at_once(self) -> bool:
        """See `ring.Launches`: while a pattern is being chosen, tensors had better travel."""
        return self.layer.queries[0].is_cuda and self.layer.indexes.known

    def compute(self, tasks: Launched) -> None:
        """Compute the tasks of one launch and merge them into their part's results."""
        key, layer = part_of(tasks[0]), self.layer
        if key not in self._parts:
            (q,) = layer.take_queries(tasks[0])
            queries, indexes = Queries(q=q, scale=self.scale), layer.indexes.part(*key)
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
        """See `ring.Launches`."""
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

    def _begun(self, task: Task) -> BackwardQueries:
        q, grad_out, lse, delta = self.layer.take_queries(task)
        several = self.layer.program.keyed_tasks[part_of(task)] > 1  # for a single launch scratch would not pay
        scratch = {} if several else None
        return BackwardQueries(q=q, scale=self.scale, grad_out=grad_out, lse=lse, delta=delta, scratch=scratch)

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
