"""Costs of a calibrated cluster: launches by their measured prices, and what a layer takes beside its launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..plan import Plan
from ..schedule.batch import BatchWork, LaunchBatch
from ..schedule.launches import Launch
from ..schedule.schedule import Direction
from ..schedule.workload import MaskKind, TaskWork
from ..specs import ELEMENT_BYTES, DType, ModelShape
from .cluster import Cluster
from .constants import LayerConstants
from .counts import BatchCounts
from .kernels import ACCUMULATOR_BYTES, PORTABLE_BACKEND, datasheet_cost
from .model import CostModel
from .tables import Calibration, LaunchTable, far_share

Tables = Mapping[tuple[Direction, MaskKind], LaunchTable]


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """A `CostModel` of measured prices. key_bytes_of_a_tile: K and V of one key tile, of all K/V heads."""

    backend: str
    tables: Tables
    cache_bytes: int
    key_bytes_of_a_tile: int
    constants: LayerConstants

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the microseconds of one launch and of its index; one without any work costs nothing."""
        return float(self.launches_us(LaunchBatch.of([launch]), BatchWork.of(work), direction)[0])

    def launches_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return the microseconds of each launch and of its index, float64 [L]."""
        prices, counts = self._table(direction, work.mask).prices, BatchCounts.of(batch, work)
        far = far_share(counts.key_rows_of_a_head * self.key_bytes_of_a_tile, self.cache_bytes)
        us = prices.launch_us(counts, far=far, resumed=~batch.begins) + prices.index_us(counts)
        return np.where(batch.total(work.tile_pairs) > 0, us, 0.0)

    def least_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return what each launch's tasks take at least, float64 [L]: in pieces, by shards or heads, no less.

        No price is negative, and the counts of pieces add up to those of the launch at least, of rows those that have
        work, since pieces without any are not launched. Only the share of K/V that the cache cannot hold is smaller of
        fewer shards, and of none below that of one.
        """
        prices, counts = self._table(direction, work.mask).prices, BatchCounts.of(batch, work)
        of_a_shard = np.minimum(counts.key_rows_of_a_head, counts.rows // batch.head_counts)
        far = far_share(of_a_shard * self.key_bytes_of_a_tile, self.cache_bytes)
        counts = replace(
            counts,
            rows=batch.largest(work.rows_with_work),
            key_rows=batch.total(work.key_rows_with_work * batch.keyed),
            cells=np.zeros_like(counts.cells),
        )
        us = prices.launch_us(counts, far=far, resumed=np.zeros(len(batch.launches))) + prices.index_us(counts)
        return np.where(batch.total(work.tile_pairs) > 0, us, 0.0)

    def hosts_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return the microseconds that the host takes to issue each launch, its index included, float64 [L]."""
        prices = self._table(direction, work.mask).prices
        return np.where(batch.total(work.tile_pairs) > 0, prices.host + prices.host_index, 0.0)

    def _table(self, direction: Direction, mask: MaskKind) -> LaunchTable:
        """Return the table for a kind of mask, or the nearest: with or without documents, then the other index."""
        kinds = [MaskKind(listed=listed, documents=documents)
                 for listed in (mask.listed, not mask.listed)
                 for documents in (mask.documents, not mask.documents)]  # fmt: skip
        return next(self.tables[direction, kind] for kind in kinds if (direction, kind) in self.tables)


def cluster_cost(
    cluster: Cluster, model: ModelShape, *, block_size: int, dtype: DType = "bfloat16", backend: str = PORTABLE_BACKEND
) -> CostModel:
    """Return the measured costs of a model's attention on a cluster, where its file has them; else the datasheet's."""
    named, calibration = PORTABLE_BACKEND if backend == "fastest" else backend, cluster.calibration
    tables: Tables = {}
    if calibration is not None and ELEMENT_BYTES[dtype] == calibration.element_bytes:
        tables = calibration.tables_of(
            backend=named,
            head_dim=model.head_dim,
            queries_per_kv_head=model.heads // model.kv_heads,
            block_size=block_size,
        )
    if calibration is None or len({direction for direction, _ in tables}) < 2:
        return datasheet_cost(cluster.gpu, model, block_size=block_size, dtype=dtype, backend=backend)
    return MeasuredCost(
        backend=named,
        tables=tables,
        cache_bytes=calibration.cache_bytes,
        key_bytes_of_a_tile=2 * block_size * model.kv_heads * model.head_dim * ELEMENT_BYTES[dtype],
        constants=_constants(cluster, calibration, model, ELEMENT_BYTES[dtype]),
    )


def plan_cost(plan: Plan, cluster: Cluster) -> CostModel:
    """Return the costs of a plan's launches on a cluster."""
    return cluster_cost(cluster, plan.model, block_size=plan.block_size, dtype=plan.dtype, backend=plan.kernels.backend)


def _constants(cluster: Cluster, calibration: Calibration, model: ModelShape, element_bytes: int) -> LayerConstants:
    """Return what is bound by the bandwidth of the GPU's memory, and the host's prices."""
    bandwidth = cluster.gpu.memory_bandwidth_bytes_per_us
    if bandwidth is None:
        return LayerConstants(host=calibration.host)
    wide = max(ACCUMULATOR_BYTES, element_bytes)
    rounded_bytes = wide + element_bytes if wide > element_bytes else 0
    return LayerConstants(
        delta_us_per_token=2 * model.heads * model.head_dim * element_bytes / bandwidth,
        round_us_per_token=2 * model.kv_heads * model.head_dim * rounded_bytes / bandwidth,
        landing_us_per_byte=3 / bandwidth,  # what landed and the sum are read, the sum is written
        host=calibration.host,
    )
