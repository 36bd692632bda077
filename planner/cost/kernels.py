"""What a kernel launch costs: planner and simulator ask this protocol; measured costs can stand in for datasheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..schedule.backends import kernel_head_dim
from ..schedule.launches import Launch
from ..schedule.schedule import Direction, Task
from ..schedule.workload import TaskWork, Workload
from ..specs import ELEMENT_BYTES, DType, ModelShape
from .cluster import Gpu
from .constants import NO_CONSTANTS, LayerConstants

BACKWARD_FLOPS_FACTOR = 2.5  # five matrix products where forward has two
# Kernels for dQ and for dK/dV share what backward takes by their matrix products: both compute two of the five anew.
QUERY_SHARE, KEY_SHARE = 3 / 7, 4 / 7
ACCUMULATOR_BYTES = 4
PORTABLE_BACKEND = "triton"  # what "fastest" is priced as: which backend it becomes is settled where a plan runs


class CostModel(Protocol):
    """Time of launches on one GPU. `backend` says which tasks are one launch (see launches.py)."""

    @property
    def backend(self) -> str:
        """The kernels whose launches these are."""
        ...

    @property
    def constants(self) -> LayerConstants:
        """What a layer takes beside its launches."""
        ...

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the microseconds that a launch takes alone on its GPU. work: of each of its tasks.

        It may depend on the tasks' shards, heads and kinds, and on begins and ends, but on no buffer's name.
        """
        ...

    def host_us(self, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the microseconds that the host takes to issue a launch; asked where `constants` has a host."""
        ...


class DeviceCost:
    """What a `CostModel` says that knows launches alone: no constants, no host."""

    @property
    def constants(self) -> LayerConstants:
        """Nothing."""
        return NO_CONSTANTS

    def host_us(self, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return nothing: the host is taken to be ahead of the device."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class DatasheetCost(DeviceCost):
    """Times from peak rate, efficiency and memory bandwidth: overhead, waves and accumulators of every kernel.

    Waves: programs take the longest rows first. Rows on P resident programs end no sooner than total / P, and no
    sooner than the longest row. Forward and dQ have a program per query row. In a joined launch a row is as long as
    its parts together: tile pairs add up; the longest row is taken to be the sum of the parts' longest, which is the
    most it can be, and rows with work to be those of the part that has most, which is the least. So joining tasks that
    have work is never dearer than launching them one by one. dK/dV have a program per key row, and keys of different
    shards are different rows: their numbers add up, and the longest is the longest of any part. Programs for dK/dV walk
    all query heads of a K/V head; a row is a head's all the same, since kernels split the longest of them by heads.

    Kernels: one in forward; in backward one for dQ, one for dK/dV of keys and one for those of columns, by the shares
    of their matrix products.

    Accumulators: out (dQ) is written in float32, or in the inputs' type by the launch that ends it, and read before by
    all launches but the first. dK and dV of every key shard are written in float32; that they are read where gradients
    have landed before is left out. Inputs are part of the efficiency.

    heads: of the model; a launch with fewer is a head group's. The first launch of its queries also pays for copying
    them out of all heads, and their results back (in backward q and dout, and dq).

    computed_head_dim: what the kernels compute heads of head_dim as, where that is more (backends.py). Then products
    and accumulators are of that size, and every launch pays for padded copies of all that it reads and writes.
    """

    gpu: Gpu
    head_dim: int
    block_size: int
    queries_per_kv_head: int = 1
    heads: int | None = None
    element_bytes: int = 2
    backend: str = PORTABLE_BACKEND
    computed_head_dim: int | None = None

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the microseconds of one launch; one without any work costs nothing: it is taken as not launched."""
        if not any(one.tile_pairs for one in work):
            return 0.0
        parts = [(one, self._pair_us(task, direction)) for task, one in zip(launch.tasks, work, strict=True)]
        longest_us = sum(one.longest_row * us for one, us in parts)
        kernels_us = [self._waves_us(parts, max(one.rows_with_work for one, _ in parts), longest_us)]
        if direction == "backward":
            keyed = [part for task, part in zip(launch.tasks, parts, strict=True) if task.key is not None]
            columns = [part for task, part in zip(launch.tasks, parts, strict=True) if task.key is None]
            kernels_us = [QUERY_SHARE * kernels_us[0]]
            if keyed:
                rows = -(-sum(one.key_rows_with_work for one, _ in keyed) // self._sharing(launch))
                longest_us = max(one.longest_key_row * us for one, us in keyed)
                kernels_us.append(KEY_SHARE * self._waves_us(keyed, rows, longest_us))
            if columns:
                kernels_us.append(KEY_SHARE * sum(one.tile_pairs * us for one, us in columns))
        traffic_us = self._traffic_us(launch, work, direction)
        return len(kernels_us) * self.gpu.launch_overhead_us + sum(kernels_us) + traffic_us

    def _sharing(self, launch: Launch) -> int:
        """Return how many of a launch's query heads share a K/V head: a head group may have fewer than there are."""
        first, last = launch.tasks[0].heads
        return self.queries_per_kv_head if self.heads is None else min(self.queries_per_kv_head, last - first)

    @property
    def _kernel_head_dim(self) -> int:
        return self.computed_head_dim or self.head_dim

    def _waves_us(self, parts: Sequence[tuple[TaskWork, float]], rows: int, longest_us: float) -> float:
        """Return the time of a kernel over so many rows. parts: work, and the time of a tile pair on the whole GPU."""
        programs = self.gpu.multiprocessors * self.gpu.programs_per_multiprocessor
        total_us = sum(work.tile_pairs * pair_us for work, pair_us in parts)
        return programs * max(total_us / min(programs, max(rows, 1)), longest_us)

    def _pair_us(self, task: Task, direction: Direction) -> float:
        flops = 4.0 * self.block_size**2 * self._kernel_head_dim
        kernels = self.gpu.kernels_of(self.backend)
        efficiency = kernels.block_forward_efficiency
        if direction == "backward":
            flops *= BACKWARD_FLOPS_FACTOR
            efficiency = kernels.block_backward_efficiency
        if task.kind == "columns":
            efficiency *= kernels.column_efficiency
        return flops / (self.gpu.peak_flops_per_us * efficiency)

    def _traffic_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the time of accumulators, and of copies."""
        if self.gpu.memory_bandwidth_bytes_per_us is None:
            return 0.0
        accumulator = max(ACCUMULATOR_BYTES, self.element_bytes)
        rows = work[0].rows * self.block_size
        query_bytes = (self.element_bytes if launch.ends else accumulator) + (0 if launch.begins else accumulator)
        backward = direction == "backward"
        # Of every row of the queries: K and V of the key shards, and dK and dV, which are written in backward alone.
        keys = 2 * sum(task.key is not None for task in launch.tasks) / self._sharing(launch)
        key_bytes = keys * accumulator if backward else 0
        first, last = launch.tasks[0].heads
        copies = launch.begins and self.heads is not None and last - first < self.heads  # a head group's queries, once
        copied_bytes = 2 * self.element_bytes * (3 if backward else 2) if copies else 0
        moved = self._kernel_head_dim * (query_bytes + key_bytes) + self.head_dim * copied_bytes
        if self._kernel_head_dim != self.head_dim:  # copies: one of the two sizes is read, the other written
            operand_bytes = self.element_bytes * ((2 if backward else 1) + keys)
            moved += (self.head_dim + self._kernel_head_dim) * (operand_bytes + query_bytes + key_bytes)
        return rows * moved / self.gpu.memory_bandwidth_bytes_per_us


def datasheet_cost(
    gpu: Gpu, model: ModelShape, *, block_size: int, dtype: DType = "bfloat16", backend: str = PORTABLE_BACKEND
) -> DatasheetCost:
    """Return the datasheet's costs of a model's attention by a backend's kernels, as a plan names it."""
    return DatasheetCost(
        gpu=gpu,
        head_dim=model.head_dim,
        block_size=block_size,
        queries_per_kv_head=model.heads // model.kv_heads,
        heads=model.heads,
        element_bytes=ELEMENT_BYTES[dtype],
        backend=PORTABLE_BACKEND if backend == "fastest" else backend,
        computed_head_dim=kernel_head_dim(backend, model.head_dim),
    )


def task_work(task: Task, workload: Workload) -> TaskWork:
    """Return the work of a schedule's task under a layer's workload."""
    if task.key is None:
        return workload.columns_task(task.query.sequence_part, task.heads)
    return workload.block_task(task.query.sequence_part, task.key.sequence_part, task.heads)
