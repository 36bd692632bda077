"""What a task costs: planner and simulator ask this protocol; a measured table can stand in for the datasheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .cluster import Gpu
from .schedule import Direction, Task
from .workload import TaskWork, Workload

BACKWARD_FLOPS_FACTOR = 2.5  # five matrix products where forward has two


class CostModel(Protocol):
    """Time of tasks on one GPU."""

    def task_us(self, work: TaskWork, task: Task, direction: Direction) -> float:
        """Return the microseconds that a task of this much work takes alone on its GPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class DatasheetCost:
    """Times from peak rate and efficiency, with waves: programs take the longest rows first.

    A launch of rows on P resident programs ends no sooner than total / P and no sooner than its longest row.
    """

    gpu: Gpu
    head_dim: int
    block_size: int

    def task_us(self, work: TaskWork, task: Task, direction: Direction) -> float:
        """Return the microseconds of one task; an empty task costs nothing, since it is not launched."""
        if not work.tile_pairs:
            return 0.0
        programs = self.gpu.multiprocessors * self.gpu.programs_per_multiprocessor
        waves = max(work.tile_pairs / min(programs, work.rows_with_work), float(work.longest_row))
        return self.gpu.launch_overhead_us + waves * programs * self._tile_pair_us(task, direction)

    def _tile_pair_us(self, task: Task, direction: Direction) -> float:
        flops = 4.0 * self.block_size**2 * self.head_dim
        efficiency = self.gpu.block_forward_efficiency
        if direction == "backward":
            flops *= BACKWARD_FLOPS_FACTOR
            efficiency = self.gpu.block_backward_efficiency
        if task.kind == "columns":
            efficiency *= self.gpu.column_efficiency
        return flops / (self.gpu.peak_flops_per_us * efficiency)


def task_work(task: Task, workload: Workload) -> TaskWork:
    """Return the work of a schedule's task under a layer's workload."""
    if task.key is None:
        return workload.columns_task(task.query.sequence_part, task.heads)
    return workload.block_task(task.query.sequence_part, task.key.sequence_part, task.heads)
