"""What a rank's launches take, on the device and on the host that issues them, in whole nanoseconds."""

from __future__ import annotations

from ..planner.cost.kernels import CostModel
from ..planner.cost.timing import NS_PER_US, launch_ns
from ..planner.schedule.launches import Launch
from ..planner.schedule.schedule import Direction, Task
from ..planner.schedule.workload import TaskWork, Workload

Counts = tuple[int, ...]  # the fields of a TaskWork but for its mask, in order


class Prices:
    """Times of launches under one workload; the counts of all pairs of shards are summed over heads at once."""

    def __init__(self, workload: Workload, cost: CostModel, direction: Direction) -> None:
        self._workload, self._cost = workload, cost
        self._direction: Direction = direction
        self._blocks: dict[tuple[int, int], list[list[list[int]]]] = {}  # by heads: five tables [query][key]
        self._columns: dict[tuple[int, int], list[list[int]]] = {}  # by heads: three lists [query]
        self._rows: dict[tuple[int, int], int] = {}
        self._works: dict[Counts, TaskWork] = {}

    def launch_ns(self, launch: Launch) -> int:
        """Return what a launch takes alone on its GPU."""
        work = [self._work_of(task) for task in launch.tasks]
        return launch_ns(launch, work, self._cost, self._direction)

    def host_ns(self, launch: Launch) -> int:
        """Return what the host takes to issue a launch."""
        work = [self._work_of(task) for task in launch.tasks]
        return round(self._cost.host_us(work, self._direction) * NS_PER_US)

    def _work_of(self, task: Task) -> TaskWork:
        heads = task.heads
        if heads not in self._blocks:
            self._count(heads)
        query = task.query.sequence_part
        if task.key is None:
            pairs, rows, longest = (column[query] for column in self._columns[heads])
            counts = (pairs, rows, longest, 0, 0, self._rows[heads])
        else:
            key = task.key.sequence_part
            active, rows, longest, key_rows, longest_key = self._blocks[heads]
            counts = (
                active[query][key], rows[query][key], longest[query][key], key_rows[query][key],
                longest_key[query][key], self._rows[heads],
            )  # fmt: skip
        work = self._works.get(counts)
        if work is None:
            work = self._works[counts] = _task_work(counts, self._workload)
        return work

    def _count(self, heads: tuple[int, int]) -> None:
        """Sum up the counts of some heads; of longest rows, take the longest."""
        workload, chosen = self._workload, (..., slice(*heads))
        self._blocks[heads] = [
            workload.active[chosen].sum(axis=-1).tolist(),
            workload.rows[chosen].sum(axis=-1).tolist(),
            workload.longest[chosen].max(axis=-1, initial=0).tolist(),
            workload.key_rows[chosen].sum(axis=-1).tolist(),
            workload.longest_key[chosen].max(axis=-1, initial=0).tolist(),
        ]
        self._columns[heads] = [
            workload.columns[chosen].sum(axis=-1).tolist(),
            workload.column_rows[chosen].sum(axis=-1).tolist(),
            workload.longest_column_row[chosen].max(axis=-1, initial=0).tolist(),
        ]
        self._rows[heads] = -(-workload.tokens_per_rank // workload.block_size) * (heads[1] - heads[0])


def _task_work(counts: Counts, workload: Workload) -> TaskWork:
    tile_pairs, rows_with_work, longest_row, key_rows_with_work, longest_key_row, rows = counts
    return TaskWork(
        tile_pairs=tile_pairs, rows_with_work=rows_with_work, longest_row=longest_row,
        key_rows_with_work=key_rows_with_work, longest_key_row=longest_key_row, rows=rows, mask=workload.mask,
    )  # fmt: skip
