"""What all launches of a schedule take, on the device and on the host that issues them, in whole nanoseconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ..planner.cost.model import CostModel
from ..planner.cost.timing import launches_ns
from ..planner.schedule.batch import LaunchBatch
from ..planner.schedule.launches import Launch
from ..planner.schedule.schedule import Direction
from ..planner.schedule.workload import Workload

Times = list[list[list[int]]]  # by rank, phase and launch


def launch_times(
    launches: Sequence[Sequence[Sequence[Launch]]], workload: Workload, cost: CostModel, direction: Direction
) -> tuple[Times, Times]:
    """Return the nanoseconds of each launch, of all ranks at once: on the device, and of the host that issues it."""
    flat = [launch for phases in launches for together in phases for launch in together]
    found = launches_ns(LaunchBatch.of(flat), workload, cost, direction)
    return _nested(found[0].tolist(), launches), _nested(found[1].tolist(), launches)


def _nested(values: list[int], launches: Sequence[Sequence[Sequence[Launch]]]) -> Times:
    rest = iter(values)
    return [[list(islice(rest, len(together))) for together in phases] for phases in launches]
