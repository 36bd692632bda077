"""Many launches at once, as arrays: their prices are then a few operations of numpy instead of a call for each.

Shape legend: L launches, T tasks of all of them, those of a launch next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from .launches import Launch
from .schedule import Task
from .workload import DIAGONALS, MaskKind, TaskWork, Workload

COLUMNS = -1  # in place of a key shard
Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchBatch:
    """Launches of any ranks. first_task [L]: where a launch's tasks begin; begins, ends: bool [L], as in Launch.

    query, key [T]: the shards' sequence parts, COLUMNS for gathered columns; heads [T]: places in `ranges`.
    launches: one by one; asked for where a cost prices them so.
    """

    launches: Sequence[Launch]
    first_task: Numbers
    begins: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    query: Numbers
    key: Numbers
    heads: Numbers
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> LaunchBatch:
        """Put launches side by side; each has a task at least."""
        tasks = [task for launch in launches for task in launch.tasks]
        sizes = np.array([len(launch.tasks) for launch in launches], dtype=np.int64)
        ranges = {heads: number for number, heads in enumerate(dict.fromkeys(task.heads for task in tasks))}
        keys = (COLUMNS if task.key is None else task.key.sequence_part for task in tasks)
        return cls(
            launches=launches,
            first_task=np.cumsum(sizes) - sizes,
            begins=np.array([launch.begins for launch in launches], dtype=bool),
            ends=np.array([launch.ends for launch in launches], dtype=bool),
            query=np.array([task.query.sequence_part for task in tasks], dtype=np.int64),
            key=np.fromiter(keys, dtype=np.int64, count=len(tasks)),
            heads=np.array([ranges[task.heads] for task in tasks], dtype=np.int64),
            ranges=tuple(ranges),
        )

    @classmethod
    def whole(cls, workload: Workload) -> LaunchBatch:
        """Put all that a rank has to compute into one launch, for every rank; pairs without work are left out.

        These launches are of numbers alone: there is no asking for them one by one.
        """
        world, heads = workload.world_size, workload.active.shape[2]
        found = workload.of_heads((0, heads))
        has_work = np.concatenate([found.columns[:1].T, found.blocks[0]], axis=1) > 0  # [W, 1 + W]
        has_work[np.arange(world), np.arange(world) + 1] = True  # a launch has a task at least
        query, place = np.nonzero(has_work)
        sizes = has_work.sum(axis=1)
        return cls(
            launches=[Launch(tasks=())] * world,
            first_task=np.cumsum(sizes) - sizes,
            begins=np.ones(world, dtype=bool),
            ends=np.ones(world, dtype=bool),
            query=query,
            key=np.where(place == 0, COLUMNS, place - 1),
            heads=np.zeros(query.size, dtype=np.int64),
            ranges=((0, heads),),
        )

    def turned(self, *, period: int, world_size: int) -> LaunchBatch:
        """Return the launches of all ranks, in their order; these are of the first `period`, whom the others are like.

        All parts of the sequence are moved on with the ranks.
        """
        turns = np.repeat(np.arange(0, world_size, period), self.query.size)
        copies = world_size // period
        firsts = np.arange(copies)[:, None] * self.query.size + self.first_task
        key = np.tile(self.key, copies)
        return LaunchBatch(
            launches=_Turned(self.launches, period, world_size),
            first_task=firsts.reshape(-1),
            begins=np.tile(self.begins, copies),
            ends=np.tile(self.ends, copies),
            query=(np.tile(self.query, copies) + turns) % world_size,
            key=np.where(key == COLUMNS, COLUMNS, (key + turns) % world_size),
            heads=np.tile(self.heads, copies),
            ranges=self.ranges,
        )

    @property
    def keyed(self) -> NDArray[np.bool_]:
        """Bool [T]: tasks of key shards, not of columns."""
        return self.key != COLUMNS

    @property
    def head_counts(self) -> Numbers:
        """Query heads of each launch [L]."""
        counts = np.array([last - first for first, last in self.ranges], dtype=np.int64)
        return counts[self.heads[self.first_task]]

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """Add up the values of a launch's tasks: [T] to [L]."""
        return np.add.reduceat(values, self.first_task)

    def largest(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the largest of the values of a launch's tasks: [T] to [L]."""
        return np.maximum.reduceat(values, self.first_task)


class _Turned(Sequence[Launch]):
    """Launches of the first ranks, again and again with all parts moved on: made when they are asked for."""

    def __init__(self, launches: Sequence[Launch], period: int, world_size: int) -> None:
        self._launches, self._period, self._world_size = launches, period, world_size

    def __len__(self) -> int:
        return len(self._launches) * (self._world_size // self._period)

    @overload
    def __getitem__(self, index: int) -> Launch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Launch]: ...
    def __getitem__(self, index: int | slice) -> Launch | list[Launch]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        turn, place = divmod(index, len(self._launches))
        launch = self._launches[place]
        return replace(launch, tasks=tuple(self._moved(task, turn * self._period) for task in launch.tasks))

    def _moved(self, task: Task, by: int) -> Task:
        world = self._world_size
        return replace(task, query=task.query.moved(by, world), key=task.key and task.key.moved(by, world))


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchWork:
    """The work of a batch's tasks under one workload: the fields of TaskWork as arrays [T]; mask: of the layer."""

    tile_pairs: Numbers
    rows_with_work: Numbers
    longest_row: Numbers
    key_rows_with_work: Numbers
    longest_key_row: Numbers
    rows: Numbers
    mask: MaskKind = DIAGONALS

    @classmethod
    def under(cls, workload: Workload, batch: LaunchBatch) -> BatchWork:
        """Count a batch's tasks under a workload."""
        counts = np.zeros((5, batch.query.size), dtype=np.int64)
        rows = np.zeros(batch.query.size, dtype=np.int64)
        for number, heads in enumerate(batch.ranges):
            of_heads, found = batch.heads == number, workload.of_heads(heads)
            of_blocks, of_columns = of_heads & batch.keyed, of_heads & ~batch.keyed
            rows[of_heads] = workload.rows_of(heads)
            counts[:, of_blocks] = found.blocks[:, batch.query[of_blocks], batch.key[of_blocks]]
            counts[:3, of_columns] = found.columns[:, batch.query[of_columns]]
        return cls(
            tile_pairs=counts[0], rows_with_work=counts[1], longest_row=counts[2], key_rows_with_work=counts[3],
            longest_key_row=counts[4], rows=rows, mask=workload.mask,
        )  # fmt: skip

    @classmethod
    def of(cls, works: Sequence[TaskWork]) -> BatchWork:
        """Put the work of tasks side by side."""
        fields = ("tile_pairs", "rows_with_work", "longest_row", "key_rows_with_work", "longest_key_row", "rows")
        arrays = {name: np.array([getattr(one, name) for one in works], dtype=np.int64) for name in fields}
        return cls(**arrays, mask=works[0].mask if works else DIAGONALS)

    def of_launches(self, batch: LaunchBatch) -> Iterator[list[TaskWork]]:
        """Yield the work of each launch's tasks, one object a task."""
        fields = (self.tile_pairs, self.rows_with_work, self.longest_row, self.key_rows_with_work,
                  self.longest_key_row, self.rows)  # fmt: skip
        tasks = iter(zip(*(values.tolist() for values in fields), strict=True))
        for launch in batch.launches:
            yield [_task_work(next(tasks), self.mask) for _ in launch.tasks]


def _task_work(counts: tuple[int, ...], mask: MaskKind) -> TaskWork:
    tile_pairs, rows_with_work, longest_row, key_rows_with_work, longest_key_row, rows = counts
    return TaskWork(
        tile_pairs=tile_pairs, rows_with_work=rows_with_work, longest_row=longest_row,
        key_rows_with_work=key_rows_with_work, longest_key_row=longest_key_row, rows=rows, mask=mask,
    )  # fmt: skip
