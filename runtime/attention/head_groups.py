"""Heads in groups: which heads a group has, and what a rank holds of its own tensors for the stages of its groups.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns; H_g and H_kv_g those
of a head group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...planner.schedule.launches import launches_of
from ...planner.schedule.schedule import ShardId, Task, Transfer
from .buffers import Pair, Slots
from .stages import Indexes


@dataclass(frozen=True, kw_only=True)
class HeadGroups:
    """How heads are split: query heads into `count` equal groups, K/V heads into as many, or shared by neighbours."""

    count: int
    heads: int
    kv_heads: int

    def queries(self, group: int) -> tuple[int, int]:
        """Return the query heads [first, last) of a group."""
        size = self.heads // self.count
        return group * size, (group + 1) * size

    def keys(self, group: int) -> tuple[int, int]:
        """Return the K/V heads [first, last) that they use."""
        first, last = self.queries(group)
        per_key = self.heads // self.kv_heads
        return first // per_key, -(-last // per_key)

    @property
    def kv_heads_of_one(self) -> int:
        """Number of K/V heads that a group uses."""
        first, last = self.keys(0)
        return last - first


@dataclass(eq=False, kw_only=True)
class HeadStage:
    """What forward and backward have in common.

    kv: the rank's own (K, V), all heads; tasks: of this rank and direction; gathered: the columns [2, B, H, C, D] of
    all heads, once they are summed up.
    """

    slots: Slots
    indexes: Indexes
    groups: HeadGroups
    scale: float
    tasks: Sequence[Task]
    kv: Pair
    gathered: Tensor | None = None
    _kv: dict[tuple[int, int], Pair] = field(default_factory=dict)
    _queries: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    _landed: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    _columns: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def launches(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """Cut a phase's tasks into kernel launches."""
        return launches_of(tasks, backend=self.indexes.backend, batch=self.kv[0].shape[0])

    def origins(self, transfer: Transfer) -> tuple[Tensor | None, ...]:
        """Nothing is pulled."""
        raise AssertionError(f"{transfer.id} is pulled")

    def kv_of(self, group: int) -> Pair:
        """Return the own K/V for the heads of a group, contiguous; groups that share heads share the copy."""
        heads = self.groups.keys(group)
        if heads not in self._kv:
            k, v = (some_heads(part, heads) for part in self.kv)
            self._kv[heads] = k, v
        return self._kv[heads]

    def columns_of(self, heads: tuple[int, int]) -> Tensor | None:
        """Return the gathered columns for a group's heads [2, B, H_g, C, D], contiguous; None where there are none."""
        if self.gathered is not None and heads not in self._columns:
            self._columns[heads] = some_heads(self.gathered, heads)
        return self._columns.get(heads)

    def own_parts(self) -> list[ShardId]:
        """Return the parts of the own queries that are computed here, by head group."""
        own = {task.query for task in self.tasks if task.query.sequence_part == self.indexes.rank}
        return sorted(own)

    def drop_kv_of(self, group: int) -> None:
        """Forget the copy for a group, once it was sent, if it is not computed here."""
        if self.groups.keys(group) not in {self.groups.keys(task.query.head_group) for task in self.tasks}:
            self._kv.pop(self.groups.keys(group), None)

    def part_indexes(self, task: Task) -> Indexes:
        """Return the indexes of the queries of a task."""
        return self.indexes.part(task.query.sequence_part, task.heads)

    def count(self, query: ShardId) -> int:
        """Return how many tasks compute a part's queries."""
        return Counter(task.query for task in self.tasks)[query]


def some_heads(x: Tensor, heads: tuple[int, int], *, dim: int = 2) -> Tensor:
    """Return heads [heads[0], heads[1]) of a tensor, contiguous."""
    return x.narrow(dim, heads[0], heads[1] - heads[0]).contiguous()
