"""What one rank plays of a schedule: phases cut into kernel launches, parts of queries; worked out once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from ...planner.schedule.launches import launches_of
from ...planner.schedule.schedule import KEPT, Direction, Phase, Schedule, ShardId, Task
from .heads import HeadGroups, Heads

PartKey = tuple[ShardId, Heads]  # the queries of a shard, for some query heads
Launched = tuple[Task, ...]  # tasks that are one kernel launch


def part_of(task: Task) -> PartKey:
    """Return the part whose queries a task computes."""
    return task.query, task.heads


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One direction of a schedule on one rank. backend: the kernels', which decides what is launched together."""

    schedule: Schedule
    rank: int
    groups: HeadGroups
    backend: str
    _phases: dict[bool, list[tuple[Phase, list[Launched]]]] = field(default_factory=dict)

    @property
    def direction(self) -> Direction:
        """Forward or backward."""
        return self.schedule.direction

    def phases(self, batch: int) -> list[tuple[Phase, list[Launched]]]:
        """Return the phases in order, each with its launches, for so many sequences at a time."""
        alone = batch == 1
        if alone not in self._phases:
            self._phases[alone] = [
                (phase, launches_of(phase.tasks, backend=self.backend, batch=batch))
                for phase in self.schedule.phases(self.rank)
            ]
        return self._phases[alone]

    @cached_property
    def tasks(self) -> Counter[PartKey]:
        """How many tasks compute each part."""
        return Counter(part_of(task) for phase in self.schedule.phases(self.rank) for task in phase.tasks)

    @cached_property
    def keyed_tasks(self) -> Counter[PartKey]:
        """How many of them are over key shards, and not over the columns."""
        phases = self.schedule.phases(self.rank)
        return Counter(part_of(task) for phase in phases for task in phase.tasks if task.key is not None)

    @cached_property
    def computed_keys(self) -> frozenset[Heads]:
        """K/V heads of the head groups that are computed here, in whole or in part."""
        return frozenset(self.groups.keys(query.head_group) for query, _ in self.tasks)

    @cached_property
    def at_once(self) -> bool:
        """Whether the rank's own queries are one part of all heads, and nobody else has results of them."""
        own = [heads for query, heads in self.tasks if query.sequence_part == self.rank]
        return own == [(0, self.groups.heads)]

    @cached_property
    def kept_slots(self) -> int:
        """How many slots of K/V a layer keeps for itself, from its forward to its backward."""
        return sum(buffer.name.startswith(KEPT) for buffer in self.schedule.buffers)
