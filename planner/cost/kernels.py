"""What kernel launches cost by data sheets: rates, efficiencies, waves; measured costs can stand in for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schedule.backends import kernel_head_dim
from ..schedule.batch import BatchWork, LaunchBatch
from ..schedule.launches import Launch
from ..schedule.schedule import Direction, Task, TaskKind
from ..schedule.workload import TaskWork, Workload
from ..specs import ELEMENT_BYTES, DType, ModelShape
from .cluster import Gpu
from .model import DeviceCost

BACKWARD_FLOPS_FACTOR = 2.5  # five matrix products where forward has two
# Kernels for dQ and for dK/dV share what backward takes by their matrix products: both compute two of the five anew.
QUERY_SHARE, KEY_SHARE = 3 / 7, 4 / 7
ACCUMULATOR_BYTES = 4
PORTABLE_BACKEND = "triton"  # what "fastest" is priced as: which backend it becomes is settled where a plan runs


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
        return float(self.launches_us(LaunchBatch.of([launch]), BatchWork.of(work), direction)[0])

    def launches_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return the microseconds of each launch, float64 [L]."""
        kernels_us = self._kernels_us(batch, work, direction, self._sharing(batch))
        total_us = kernels_us + self._traffic_us(batch, work, direction)
        return np.where(batch.total(work.tile_pairs) > 0, total_us, 0.0)

    def least_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return what each launch's tasks take at least, float64 [L]: in pieces, by shards or heads, no less.

        Of waves: what is shared out over programs adds up, over as many rows as any piece has or more; the longest row
        is the sum of the pieces' longest, or the longest of any. Pieces of few heads share key rows less, so here no
        heads share any. Overheads a launch pays once and pieces each. Of accumulators only rows with work count, since
        pieces without any are not launched: those of the queries once, those of the keys once for every shard.
        """
        kernels_us = self._kernels_us(batch, work, direction, np.ones(len(batch.launches), dtype=np.int64))
        moved_bytes = batch.largest(work.rows_with_work) * float(self.element_bytes)
        if direction == "backward":
            written_bytes = 2 * max(ACCUMULATOR_BYTES, self.element_bytes) / self._sharing(batch)
            moved_bytes += batch.total(work.key_rows_with_work * batch.keyed) * written_bytes
        total_us = kernels_us + self._streamed_us(moved_bytes * self.block_size * self._kernel_head_dim)
        return np.where(batch.total(work.tile_pairs) > 0, total_us, 0.0)

    def _kernels_us(
        self, batch: LaunchBatch, work: BatchWork, direction: Direction, sharing: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return overheads and waves of launches [L]. sharing: how many query heads a program for dK/dV walks."""
        pair_us = np.where(batch.keyed, self._pair_us("block", direction), self._pair_us("columns", direction))
        pairs_us, rows = work.tile_pairs * pair_us, batch.largest(work.rows_with_work)
        kernels_us = self._waves_us(batch.total(pairs_us), rows, batch.total(work.longest_row * pair_us))
        kernels: NDArray[np.float64] = np.ones(len(batch.launches))
        if direction == "backward":
            keyed, any_keys = batch.keyed, batch.largest(batch.keyed)
            rows = -(-batch.total(work.key_rows_with_work * keyed) // sharing)
            longest_us = batch.largest(work.longest_key_row * pair_us * keyed)
            of_keys_us = KEY_SHARE * self._waves_us(batch.total(pairs_us * keyed), rows, longest_us)
            of_columns_us = KEY_SHARE * batch.total(pairs_us * ~keyed)
            kernels_us = QUERY_SHARE * kernels_us + np.where(any_keys, of_keys_us, 0.0) + of_columns_us
            kernels += any_keys.astype(float) + batch.largest(~keyed)
        return kernels * self.gpu.launch_overhead_us + kernels_us

    def _streamed_us(self, moved_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the time of bytes that memory reads and writes; none where its bandwidth is not said."""
        bandwidth = self.gpu.memory_bandwidth_bytes_per_us
        return np.zeros(len(moved_bytes)) if bandwidth is None else moved_bytes / bandwidth

    def _sharing(self, batch: LaunchBatch) -> NDArray[np.int64]:
        """Return how many of a launch's query heads share a K/V head [L]: a head group may have fewer of them."""
        shared = np.full(len(batch.launches), self.queries_per_kv_head, dtype=np.int64)
        return shared if self.heads is None else np.minimum(shared, batch.head_counts)

    @property
    def _kernel_head_dim(self) -> int:
        return self.computed_head_dim or self.head_dim

    def _waves_us(
        self, total_us: NDArray[np.float64], rows: NDArray[np.int64], longest_us: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the times of kernels [L]. total_us: of their tile pairs, each with the whole GPU; so many rows."""
        programs = self.gpu.multiprocessors * self.gpu.programs_per_multiprocessor
        return programs * np.maximum(total_us / np.clip(rows, 1, programs), longest_us)

    def _pair_us(self, kind: TaskKind, direction: Direction) -> float:
        flops = 4.0 * self.block_size**2 * self._kernel_head_dim
        kernels = self.gpu.kernels_of(self.backend)
        efficiency = kernels.block_forward_efficiency
        if direction == "backward":
            flops *= BACKWARD_FLOPS_FACTOR
            efficiency = kernels.block_backward_efficiency
        if kind == "columns":
            efficiency *= kernels.column_efficiency
        return flops / (self.gpu.peak_flops_per_us * efficiency)

    def _traffic_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return the times of accumulators, and of copies [L]."""
        if self.gpu.memory_bandwidth_bytes_per_us is None:
            return np.zeros(len(batch.launches))
        backward, accumulator = direction == "backward", max(ACCUMULATOR_BYTES, self.element_bytes)
        rows = work.rows[batch.first_task] * self.block_size
        read = np.where(batch.begins, 0, accumulator)
        query_bytes = np.where(batch.ends, self.element_bytes, accumulator) + read
        # Of every row of the queries: K and V of the key shards, and dK and dV, which are written in backward alone.
        keys = 2 * batch.total(batch.keyed.astype(np.int64)) / self._sharing(batch)
        key_bytes = keys * accumulator if backward else np.zeros(len(batch.launches))
        # A head group's queries are copied once.
        copies = batch.begins & (batch.head_counts < (self.heads or 0))
        copied_bytes = np.where(copies, 2 * self.element_bytes * (3 if backward else 2), 0)
        moved = self._kernel_head_dim * (query_bytes + key_bytes) + self.head_dim * copied_bytes
        if self._kernel_head_dim != self.head_dim:  # copies: one of the two sizes is read, the other written
            operand_bytes = self.element_bytes * ((2 if backward else 1) + keys)
            moved = moved + (self.head_dim + self._kernel_head_dim) * (operand_bytes + query_bytes + key_bytes)
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
