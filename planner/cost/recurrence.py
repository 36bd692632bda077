"""The planner's quick evaluator: a schedule as a max-plus system, solved level by level with numpy.

Same semantics as the simulator's engine (see schedule.py), with these simplifications: a transfer moves at the
bandwidth of its slowest port, shared only among the transfers that the same call puts on that port; different calls
do not slow each other, and communication does not slow compute. The host is taken to be ahead of the device; what else
the costs' constants say is honoured. Without contention both agree to the nanosecond. With it, the recurrence is an
estimate, most often below the engine and no bound: a call's transfers share a port here as long as the longest of them
takes, where the engine gives what one leaves to the others, and ends that join late meet on other ports there.
Times are integer nanoseconds.

The events and their order (events.py) depend on the schedule and the cluster alone; a workload only changes how long
launches take.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np

from ..schedule.schedule import Schedule
from ..schedule.workload import Workload
from .cluster import Cluster
from .evaluation import Evaluation
from .events import Events
from .model import CostModel
from .timing import NS_PER_US, check_sizes, launches_ns


@dataclass(kw_only=True, eq=False)
class CompiledRecurrence:
    """An `Evaluator` that keeps events of schedules for as long as these live, and the clusters that they are on.

    A search evaluates a few schedules under many placements and layers.
    """

    _events: dict[tuple[int, int, str], tuple[Events, Cluster]] = field(default_factory=dict)

    def __call__(self, schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel) -> Evaluation:
        """Predict one schedule. ScheduleError when it can never finish."""
        check_sizes(schedule, workload, cluster)
        key = (id(schedule), id(cluster), cost.backend)
        if key not in self._events:
            self._events[key] = Events(schedule, cluster, cost.backend), cluster
            weakref.finalize(schedule, self._events.pop, key, None)  # before another schedule gets this id
        return _evaluated(self._events[key][0], workload, cost)


def _evaluated(events: Events, workload: Workload, cost: CostModel) -> Evaluation:
    ranks, phases = events.cells
    took_ns, _ = launches_ns(events.batch, workload, cost, events.direction)
    # Sums of whole nanoseconds are exact in float64 below 2**53 of them: a hundred days.
    phase_ns = np.bincount(events.launch_cells, weights=took_ns, minlength=ranks * phases).astype(np.int64)
    by_rank = phase_ns.reshape(ranks, phases)
    return Evaluation(
        makespan_us=events.makespan_ns(phase_ns, cost.constants, workload.tokens_per_rank) / NS_PER_US,
        compute_us=by_rank.sum(axis=1) / NS_PER_US,
        phase_us=by_rank / NS_PER_US,
        peak_buffer_bytes=events.buffer_bytes,
    )
