"""What launches were measured to take, as numbers in a cluster file, and the fit that makes them of measured points.

A launch takes the sum of its counts, each times a price; no price is negative, so more work is never quicker. The
prices are fitted to measured launches by least squares of the relative error (Lawson-Hanson), in which long launches
count a little more: a layer takes what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from ..schedule.schedule import Direction
from ..schedule.workload import MaskKind
from ..specs import Strict
from .constants import HostPrices
from .counts import BatchCounts, LaunchCounts


@dataclass(frozen=True, kw_only=True)
class LaunchPoint:
    """One measured launch: medians, in microseconds.

    key_bytes: K and V that it reads. launch_us: on the device, with its index ready, the first that adds to its
    results; resumed_us: the same, adding to earlier results; fresh_us: as the first, its index made anew. host_us and
    fresh_host_us: what the issuing thread takes for the first and for the last.
    """

    direction: Direction
    mask: MaskKind
    counts: LaunchCounts
    key_bytes: int
    launch_us: float
    resumed_us: float
    fresh_us: float
    host_us: float
    fresh_host_us: float


class LaunchPrices(Strict):
    """Microseconds of a launch, and of each of its counts (see LaunchCounts). index: of making the index of its mask.

    far_tile_pair: what a tile pair takes more as K and V outgrow the cache: of the share of them that cannot be in it.
    resumed_row: what a query row takes more when there are earlier results. host, host_index: of the issuing thread,
    with an index that is ready and beyond that.
    """

    launch: float = Field(ge=0)
    tile_pair: float = Field(ge=0)
    far_tile_pair: float = Field(ge=0)
    row: float = Field(ge=0)
    resumed_row: float = Field(ge=0)
    longest_row: float = Field(ge=0)
    key_row: float = Field(default=0.0, ge=0)
    longest_key_row: float = Field(default=0.0, ge=0)
    column_launch: float = Field(default=0.0, ge=0)
    column_tile_pair: float = Field(default=0.0, ge=0)
    index_launch: float = Field(ge=0)
    index_row: float = Field(ge=0)
    index_cell: float = Field(ge=0)
    host: float = Field(ge=0)
    host_index: float = Field(ge=0)

    def launch_us(self, counts: LaunchCounts | BatchCounts, *, far: Any, resumed: Any) -> Any:
        """Return the device's time without the index: a number, or float64 [L] of a batch's launches.

        far: share of K and V that the cache cannot hold; resumed: whether there are earlier results.
        """
        prices = dict(zip(_FEATURES, features(counts, far), strict=True))
        total = sum(value * getattr(self, name) for name, value in prices.items())
        return total + self.resumed_row * counts.rows * resumed

    def index_us(self, counts: LaunchCounts | BatchCounts) -> Any:
        """Return the device's time to make the index, or float64 [L] of a batch's."""
        return self.index_launch + self.index_row * counts.rows + self.index_cell * counts.cells


class LaunchTable(Strict):
    """Prices of one backend's launches in one direction, for heads of one shape and masks of one kind.

    points: how many launches they were fitted to; median_error, largest_error: relative, over these; tile_pairs: the
    least and the most of them.
    """

    backend: str
    direction: Direction
    listed: bool
    documents: bool
    head_dim: int = Field(gt=0)
    queries_per_kv_head: int = Field(gt=0)
    block_size: int = Field(gt=0)
    prices: LaunchPrices
    points: int = Field(gt=0)
    median_error: float = Field(ge=0)
    largest_error: float = Field(ge=0)
    tile_pairs: tuple[int, int]

    @property
    def mask(self) -> MaskKind:
        """The kind of masks it is for."""
        return MaskKind(listed=self.listed, documents=self.documents)


# Weights are times to this power. At 0 launches of 3 ms and more came out 3 % too short in the median of three
# calibrations, each point predicted from the others; at 0.25 1 %, and short ones as before.
LONG_COUNTS_MORE = 0.25
_FEATURES = (
    "launch", "tile_pair", "far_tile_pair", "row", "longest_row", "key_row", "longest_key_row", "column_launch",
    "column_tile_pair",
)  # fmt: skip


def features(counts: LaunchCounts | BatchCounts, far: Any) -> tuple[Any, ...]:
    """Return what the prices of a launch with a ready index are multiplied with, in the order of their names.

    Numbers, or arrays [L] of a batch's launches.
    """
    return (
        1.0,
        counts.tile_pairs,
        counts.tile_pairs * far,
        counts.rows,
        counts.longest_row,
        counts.key_rows,
        counts.longest_key_row,
        1.0 * (counts.column_tile_pairs > 0),
        counts.column_tile_pairs,
    )


def far_share(key_bytes: Any, cache_bytes: int) -> Any:
    """Return the share of K and V that the GPU's cache cannot hold. key_bytes: a number or an array."""
    return np.maximum(0.0, 1.0 - cache_bytes / np.maximum(key_bytes, 1)) * (key_bytes > 0)


def fit_prices(points: Sequence[LaunchPoint], *, cache_bytes: int) -> tuple[LaunchPrices, list[float]]:
    """Fit prices to measured launches of one kind; return them, and the relative error of each point."""
    matrix = np.array([features(one.counts, far_share(one.key_bytes, cache_bytes)) for one in points])
    if points[0].direction == "forward":  # a forward launch has no programs over key rows
        matrix[:, [_FEATURES.index(name) for name in ("key_row", "longest_key_row")]] = 0.0
    measured = np.array([one.launch_us for one in points])
    weights = measured**LONG_COUNTS_MORE
    found = _nonnegative(matrix * (weights / measured)[:, None], weights)
    errors = matrix @ found / measured - 1.0
    rows = np.array([float(one.counts.rows) for one in points])
    resumed = _nonnegative(rows[:, None], np.array([one.resumed_us - one.launch_us for one in points]))
    index = np.array([[1.0, one.counts.rows, one.counts.cells] for one in points])
    made = _nonnegative(index, np.array([one.fresh_us - one.launch_us for one in points]))
    host = float(np.median([one.host_us for one in points]))
    fresh = float(np.median([one.fresh_host_us - one.host_us for one in points]))
    prices = dict(zip(_FEATURES, map(float, found), strict=True)) | {
        "resumed_row": float(resumed[0]),
        "index_launch": float(made[0]),
        "index_row": float(made[1]),
        "index_cell": float(made[2]),
        "host": host,
        "host_index": max(0.0, fresh),
    }
    return LaunchPrices.model_validate(prices), [float(error) for error in errors]


def _nonnegative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients, columns scaled alike."""
    from scipy.optimize import nnls  # half a second of every command that plans: only calibrations need it

    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(matrix / scale, wanted)
    return found / scale


class Calibration(Strict):
    """What was measured on GPUs of one kind. date: ISO 8601; versions: of torch, Triton, CUDA and the driver.

    element_bytes: of q, k and v; cache_bytes: of the GPU's last level; host: of the machine that these GPUs were in.
    """

    date: str
    versions: dict[str, str]
    element_bytes: int = Field(gt=0)
    cache_bytes: int = Field(gt=0)
    host: HostPrices | None = None
    tables: tuple[LaunchTable, ...]

    def tables_of(
        self, *, backend: str, head_dim: int, queries_per_kv_head: int, block_size: int
    ) -> dict[tuple[Direction, MaskKind], LaunchTable]:
        """Return the tables for heads of a shape, by direction and kind of mask; none where it was not measured."""
        wanted = (backend, head_dim, queries_per_kv_head, block_size)
        return {
            (table.direction, table.mask): table
            for table in self.tables
            if (table.backend, table.head_dim, table.queries_per_kv_head, table.block_size) == wanted
        }
