"""What of a launch decides how long it takes: the few numbers that measured costs are tables of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..schedule.batch import BatchWork, LaunchBatch, Numbers
from ..schedule.launches import Launch
from ..schedule.workload import TaskWork


@dataclass(frozen=True, kw_only=True)
class LaunchCounts:
    """Counts of one launch, over all its query heads.

    tile_pairs: active pairs of a query tile and a key tile; column_tile_pairs: of a query tile and a tile of gathered
    columns; rows: query tiles of all heads; longest_row: key tiles of the longest; key_rows: key tiles of all query
    heads; longest_key_row: query tiles of the longest; cells: pairs that the index had to look at, rows x key tiles.
    """

    tile_pairs: int
    column_tile_pairs: int
    rows: int
    longest_row: int
    key_rows: int
    longest_key_row: int
    cells: int

    @classmethod
    def of(cls, launch: Launch, work: Sequence[TaskWork]) -> LaunchCounts:
        """Count a launch. work: of each of its tasks."""
        keyed = [one for task, one in zip(launch.tasks, work, strict=True) if task.key is not None]
        columns = [one for task, one in zip(launch.tasks, work, strict=True) if task.key is None]
        heads = launch.tasks[0].heads[1] - launch.tasks[0].heads[0]
        return cls.of_work(keyed, columns, heads=heads)

    @classmethod
    def of_work(cls, keyed: Sequence[TaskWork], columns: Sequence[TaskWork], *, heads: int) -> LaunchCounts:
        """Count the work of one query shard with several key shards, and with gathered columns."""
        rows = [*keyed, *columns][0].rows
        return cls(
            tile_pairs=sum(one.tile_pairs for one in keyed),
            column_tile_pairs=sum(one.tile_pairs for one in columns),
            rows=rows,
            longest_row=sum(one.longest_row for one in keyed),
            key_rows=len(keyed) * rows,
            longest_key_row=max((one.longest_key_row for one in keyed), default=0),
            cells=rows * len(keyed) * rows // heads,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchCounts:
    """The fields of LaunchCounts for many launches, int64 [L] each; key_rows_of_a_head: key tiles of one query head."""

    tile_pairs: Numbers
    column_tile_pairs: Numbers
    rows: Numbers
    longest_row: Numbers
    key_rows: Numbers
    longest_key_row: Numbers
    cells: Numbers
    key_rows_of_a_head: Numbers

    @classmethod
    def of(cls, batch: LaunchBatch, work: BatchWork) -> BatchCounts:
        """Count a batch's launches as `LaunchCounts.of` counts one."""
        keyed, rows = batch.keyed.astype(np.int64), work.rows[batch.first_task]
        shards, heads = batch.total(keyed), batch.head_counts
        return cls(
            tile_pairs=batch.total(work.tile_pairs * keyed),
            column_tile_pairs=batch.total(work.tile_pairs * (1 - keyed)),
            rows=rows,
            longest_row=batch.total(work.longest_row * keyed),
            key_rows=shards * rows,
            longest_key_row=batch.largest(work.longest_key_row * keyed),
            cells=rows * shards * rows // heads,
            key_rows_of_a_head=shards * rows // heads,
        )
