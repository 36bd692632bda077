"""What prices launches: the protocol that planner and simulator ask, whoever measured or reckoned the prices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..schedule.batch import BatchWork, LaunchBatch
from ..schedule.launches import Launch
from ..schedule.schedule import Direction
from ..schedule.workload import TaskWork
from .constants import NO_CONSTANTS, LayerConstants


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

    def launches_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return what `launch_us` says of each launch of a batch, float64 [L]."""
        ...

    def least_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return what each launch's tasks take at least, however they are cut into launches and in whatever order.

        float64 [L]; 0 says nothing. The first of these launches begins its rank's results, and the last ends them.
        """
        ...

    def hosts_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return what the host takes to issue each launch, float64 [L]; asked where `constants` has a host."""
        ...


class DeviceCost:
    """What a `CostModel` says that knows launches alone: no constants, no host; launches of a batch one by one."""

    @property
    def constants(self) -> LayerConstants:
        """Nothing."""
        return NO_CONSTANTS

    def launch_us(self, launch: Launch, work: Sequence[TaskWork], direction: Direction) -> float:
        """Return the microseconds of one launch: for others to say."""
        raise AssertionError(f"{type(self).__name__} prices no launches")

    def launches_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return the microseconds of each launch, asked one by one."""
        pairs = zip(batch.launches, work.of_launches(batch), strict=True)
        return np.array([self.launch_us(launch, its, direction) for launch, its in pairs], dtype=np.float64)

    def least_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return 0 for each: nothing is said."""
        return np.zeros(len(batch.launches))

    def hosts_us(self, batch: LaunchBatch, work: BatchWork, direction: Direction) -> NDArray[np.float64]:
        """Return nothing for each: the host is taken to be ahead of the device."""
        return np.zeros(len(batch.launches))
