"""The reference semantics of a schedule, played in simulated time (simpy, integer nanoseconds).

Every rank is a process that walks through its phases (schedule.py says what happens in which order): wait, launch
transfers, compute; the tasks of a phase in the kernel launches that the backend makes of them (schedule/launches.py).
Every group call is a process that waits for its turn in its communicator's queue on that rank, joins its transfers, and
ends with the last of them. A transfer is a rendezvous: it begins, one link latency later, when all its ends have
joined; its bytes share links with all others (network.py). While data moves to or from a GPU, its compute slows by the
cluster's `communication_slowdown`, or by its `pull_slowdown` where copy engines alone move it.

Not modelled: adding landed gradients to a buffer, choosing patterns, the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from ..planner.cost.cluster import Cluster
from ..planner.cost.evaluation import Evaluation
from ..planner.cost.kernels import CostModel, task_work
from ..planner.cost.timing import check_sizes, latency_ns, launch_ns, legs_of
from ..planner.schedule.launches import Launch, rank_launches
from ..planner.schedule.schedule import ALL_RANKS, GroupCall, Phase, Schedule, Transfer
from ..planner.schedule.workload import Workload
from ..traces.errors import InputError, ScheduleError
from ..traces.timeline import Timeline
from .network import Network
from .recorder import Recorder, TransferTimes, followed_by

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """A lognormal factor of mean 1 on every launch's time, drawn per rank; InputError for a sigma that cannot be.

    sigma: standard deviation of its logarithm.
    """

    sigma: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise InputError(f"must be finite and not negative, not {self.sigma}", field="jitter")

    def of_rank(self, rank: int) -> Callable[[int], int]:
        """Return what one rank's launches take instead, in nanoseconds: a draw for every call."""
        random = np.random.default_rng([self.seed, rank])
        return lambda duration_ns: round(duration_ns * random.lognormal(-(self.sigma**2) / 2, self.sigma))


STEADY = Jitter(sigma=0.0, seed=0)


def simulate(
    schedule: Schedule,
    workload: Workload,
    cluster: Cluster,
    cost: CostModel,
    *,
    jitter: Jitter = STEADY,
    timeline: bool = False,
) -> Evaluation:
    """Play one direction of one layer; an `Evaluator`.

    Raises InputError for sizes that do not fit, ScheduleError when the schedule deadlocks.
    """
    check_sizes(schedule, workload, cluster)
    return _Engine(schedule, workload, cluster, cost, jitter).run(with_timeline=timeline)


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation:
    """Forward and backward of one layer; `timeline` holds both, backward beginning when all ranks ended forward."""

    forward: Evaluation
    backward: Evaluation
    timeline: Timeline | None = None

    @property
    def makespan_us(self) -> float:
        """Forward and backward, one after the other."""
        return self.forward.makespan_us + self.backward.makespan_us


def simulate_layer(
    schedules: tuple[Schedule, Schedule],
    workload: Workload,
    cluster: Cluster,
    cost: CostModel,
    *,
    jitter: Jitter = STEADY,
    timeline: bool = False,
) -> LayerEvaluation:
    """Play forward, then backward from the moment at which the last rank ended forward; see `simulate`."""
    forward, backward = (
        simulate(schedule, workload, cluster, cost, jitter=jitter, timeline=timeline) for schedule in schedules
    )
    joined = None
    if forward.timeline and backward.timeline:
        joined = followed_by(forward.timeline, backward.timeline, start_us=forward.makespan_us)
    return LayerEvaluation(forward=forward, backward=backward, timeline=joined)


@dataclass(kw_only=True, slots=True, eq=False)
class _Rendezvous:
    """A transfer for which some ends may still be missing."""

    missing: int
    done: simpy.Event
    started_ns: int = 0
    arrived_ns: int = 0


class _Engine:
    """One run of one schedule."""

    def __init__(
        self, schedule: Schedule, workload: Workload, cluster: Cluster, cost: CostModel, jitter: Jitter
    ) -> None:
        self.schedule, self.workload, self.cluster, self.cost = schedule, workload, cluster, cost
        self.jittered = [jitter.of_rank(rank) if jitter.sigma else int for rank in range(schedule.world_size)]
        self.environment = simpy.Environment()
        self.network = Network(self.environment, cluster)
        self.recorder = Recorder(schedule.direction, schedule.world_size)
        self.position = [0] * schedule.world_size  # the phase that each rank is in
        self._rendezvous: dict[tuple[str, int, str], _Rendezvous] = {}
        self._call_ends: list[dict[str, simpy.Event]] = [{} for _ in range(schedule.world_size)]  # by transfer id
        self._tails: dict[tuple[int, str], simpy.Event] = {}  # end of the last call of a rank on a communicator

    @property
    def now(self) -> int:
        return int(self.environment.now)

    def run(self, *, with_timeline: bool) -> Evaluation:
        ranks = [self.environment.process(self._rank(rank)) for rank in range(self.schedule.world_size)]
        self.environment.run()
        self._refuse_deadlock(ranks)
        phases = max(len(self.schedule.phases(rank)) for rank in range(self.schedule.world_size))
        times = self._transfer_times() if with_timeline else None
        return self.recorder.evaluation(phases, self.schedule.buffer_bytes, times)

    def _rank(self, rank: int) -> Process:
        """Walk through a rank's phases: wait, launch, compute."""
        launches = rank_launches(self.schedule.phases(rank), backend=self.cost.backend)
        for number, phase in enumerate(self.schedule.phases(rank)):
            self.position[rank] = number
            for name in phase.waits:
                yield self._end_of(rank, phase, name)
            for call in phase.group_calls:
                self._launch(rank, phase, call)
            for launch in launches[number]:
                yield from self._compute(rank, number, launch)
        self.recorder.ended(self.now)

    def _end_of(self, rank: int, phase: Phase, name: str) -> simpy.Event:
        if name not in self._call_ends[rank]:
            raise ScheduleError(f"rank {rank} phase {phase.index} waits for {name}, which it never launched")
        return self._call_ends[rank][name]

    def _launch(self, rank: int, phase: Phase, call: GroupCall) -> None:
        """Queue a group call behind the communicator's earlier ones on this rank."""
        previous = self._tails.get((rank, call.communicator))
        end = self.environment.process(self._group_call(rank, phase, call, previous))
        self._tails[rank, call.communicator] = end
        self._call_ends[rank].update((transfer.id, end) for transfer in call.transfers)

    def _group_call(self, rank: int, phase: Phase, call: GroupCall, previous: simpy.Event | None) -> Process:
        if previous is not None:
            yield previous
        start_ns = self.now
        joined = [self._join(rank, transfer) for transfer in call.transfers]
        yield self.environment.all_of([rendezvous.done for rendezvous in joined])
        group = self.schedule.communicator(call.communicator).group_of(rank)
        self.recorder.transferred(rank, phase.index, call, group, start_ns, self.now)

    def _join(self, rank: int, transfer: Transfer) -> _Rendezvous:
        """Add one end of a transfer; the last one starts it."""
        group = self.schedule.communicator(transfer.communicator).group_of(rank)
        collective = transfer.source == ALL_RANKS
        key = (transfer.communicator, group[0] if collective else ALL_RANKS, transfer.id)
        if key not in self._rendezvous:
            ends = len(group) if collective else 2
            self._rendezvous[key] = _Rendezvous(missing=ends, done=self.environment.event())
        rendezvous = self._rendezvous[key]
        rendezvous.missing -= 1
        if rendezvous.missing < 0:
            raise ScheduleError(f"rank {rank} joins {transfer.id} on {transfer.communicator} once too often")
        if rendezvous.missing == 0:
            self.environment.process(self._transfer(transfer, group, rendezvous))
        return rendezvous

    def _transfer(self, transfer: Transfer, group: tuple[int, ...], rendezvous: _Rendezvous) -> Process:
        """Move a transfer's bytes, one link latency after its last end has joined."""
        legs = legs_of(transfer, group)
        yield self.environment.timeout(latency_ns(self.cluster, legs))
        rendezvous.started_ns = self.now
        yield self.environment.all_of([self.network.move(leg) for leg in legs])
        rendezvous.arrived_ns = self.now
        rendezvous.done.succeed()

    def _compute(self, rank: int, phase: int, launch: Launch) -> Process:
        """Compute the tasks of one launch, slower while this GPU communicates."""
        work = [task_work(task, self.workload) for task in launch.tasks]
        work_ns = self.jittered[rank](launch_ns(launch, work, self.cost, self.schedule.direction))
        if not work_ns:
            return
        start_ns = self.now
        if self.cluster.gpu.communication_slowdown or self.cluster.gpu.pull_slowdown:
            yield from self._compute_beside_transfers(rank, float(work_ns))
        else:
            yield self.environment.timeout(work_ns)
        self.recorder.computed(rank, phase, launch.tasks, start_ns, self.now)

    def _compute_beside_transfers(self, rank: int, left_ns: float) -> Process:
        while left_ns > 0.5:
            speed = 1 - self.network.slowdown(rank)
            start_ns = self.now
            whole = self.environment.timeout(max(1, round(left_ns / speed)))
            yield whole | self.network.flip(rank)
            left_ns -= (self.now - start_ns) * speed

    def _transfer_times(self) -> TransferTimes:
        return {
            (communicator, name): (rendezvous.started_ns, rendezvous.arrived_ns)
            for (communicator, group, name), rendezvous in self._rendezvous.items()
            if group == ALL_RANKS
        }

    def _refuse_deadlock(self, ranks: list[simpy.Process]) -> None:
        for rank, process in enumerate(ranks):
            if process.is_alive:
                phase = self.schedule.phases(rank)[self.position[rank]]
                stuck = [name for name in phase.waits if not self._call_ends[rank][name].processed]
                raise ScheduleError(f"rank {rank} phase {phase.index} waits forever for {', '.join(stuck)}")
        for (rank, communicator), end in self._tails.items():
            if not end.processed:
                raise ScheduleError(f"rank {rank} has a call on {communicator} that never ends")
