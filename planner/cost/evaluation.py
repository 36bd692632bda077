"""What an evaluator says of one schedule: the protocol between the planner's search and whoever predicts times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...traces.timeline import Timeline
from ..schedule.schedule import Schedule
from ..schedule.workload import Workload
from .cluster import Cluster
from .model import CostModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Predicted times of one schedule (one direction of one layer).

    makespan_us: from the first start to the last end; compute_us [W]: each rank's tasks; exposed_us [W]: time a rank's
    compute stream waited, launches and idle end included, so compute + exposed = makespan; phase_us [W, phases]:
    compute of every phase; timeline: only when the evaluator was asked for one.
    """

    makespan_us: float
    compute_us: NDArray[np.float64]
    phase_us: NDArray[np.float64]
    peak_buffer_bytes: int
    timeline: Timeline | None = None

    @property
    def exposed_us(self) -> NDArray[np.float64]:
        """Waiting time of each rank's compute stream [W]."""
        return self.makespan_us - self.compute_us

    @property
    def worker_imbalance(self) -> float:
        """Maximum over ranks of total compute over the mean."""
        return imbalance(self.compute_us)

    @property
    def step_imbalance(self) -> float:
        """Sum over phases of the maximum over ranks over the sum of the means."""
        return step_imbalance(self.phase_us)


class Evaluator(Protocol):
    """Predicts one schedule on a cluster; the simulator's engine and the planner's recurrence both are one."""

    def __call__(self, schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel) -> Evaluation:
        """Return the prediction."""
        ...


def imbalance(values: NDArray[np.float64]) -> float:
    """Return maximum over mean; 1 when there is no work at all."""
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0


def step_imbalance(phases: NDArray[np.float64]) -> float:
    """Return the sum over phases of the maximum over ranks over that of the means; 1 without work. phases: [W, P]."""
    mean = phases.mean(axis=0).sum()
    return float(phases.max(axis=0).sum() / mean) if mean else 1.0
