"""The engine's semantics once more, with processes and events of simpy: slow and independent; tests hold both equal.

Every rank is a process that walks through its phases, every group call and every transfer another. What the costs say
of constants is played too, but for the host, which is taken to be ahead of the device.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from reference_network import Network
from sparsering.planner.cost.cluster import Cluster
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.cost.kernels import task_work
from sparsering.planner.cost.model import CostModel
from sparsering.planner.cost.timing import NS_PER_US, check_sizes, latency_ns, launch_ns, legs_of
from sparsering.planner.schedule.launches import Launch, rank_launches
from sparsering.planner.schedule.schedule import ALL_RANKS, GroupCall, Phase, Schedule, Transfer
from sparsering.planner.schedule.workload import Workload
from sparsering.simulator.engine import STEADY, Jitter
from sparsering.simulator.recorder import Recorder, TransferTimes
from sparsering.traces.errors import ScheduleError

Process = Generator[simpy.Event, Any, None]


def reference(
    schedule: Schedule,
    workload: Workload,
    cluster: Cluster,
    cost: CostModel,
    *,
    jitter: Jitter = STEADY,
    timeline: bool = False,
) -> Evaluation:
    """Play one direction of one layer, as `simulate` does where costs have no host."""
    check_sizes(schedule, workload, cluster)
    return _Engine(schedule, workload, cluster, cost, jitter).run(with_timeline=timeline)


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
        phases = max(len(schedule.phases(rank)) for rank in range(schedule.world_size))
        self.recorder = Recorder(schedule.direction, (schedule.world_size, phases), keeps_spans=True)
        self.position = [0] * schedule.world_size  # the phase that each rank is in
        self._rendezvous: dict[tuple[str, int, str], _Rendezvous] = {}
        self._call_ends: list[dict[str, simpy.Event]] = [{} for _ in range(schedule.world_size)]  # by transfer id
        self._transfers: list[dict[str, Transfer]] = [{} for _ in range(schedule.world_size)]  # launched there, by id
        self._tails: dict[tuple[int, str], simpy.Event] = {}  # end of the last call of a rank on a communicator

    @property
    def now(self) -> int:
        return int(self.environment.now)

    def run(self, *, with_timeline: bool) -> Evaluation:
        ranks = [self.environment.process(self._rank(rank)) for rank in range(self.schedule.world_size)]
        self.environment.run()
        self._refuse_deadlock(ranks)
        times = self._transfer_times() if with_timeline else None
        return self.recorder.evaluation(self.schedule.buffer_bytes, times)

    def _rank(self, rank: int) -> Process:
        """Walk through a rank's phases: wait, add what landed, launch, compute."""
        constants, tokens = self.cost.constants, self.workload.tokens_per_rank
        yield from self._busy(constants.begin_us(self.schedule.direction, tokens))
        launches = rank_launches(self.schedule.phases(rank), backend=self.cost.backend)
        for number, phase in enumerate(self.schedule.phases(rank)):
            self.position[rank] = number
            for name in phase.waits:
                yield self._end_of(rank, phase, name)
            landed = [self._transfers[rank][name] for name in phase.waits]
            yield from self._busy(sum(constants.landing_us(transfer, rank) for transfer in landed))
            for call in phase.group_calls:
                self._launch(rank, phase, call)
            for launch in launches[number]:
                yield from self._compute(rank, number, launch)
        yield from self._busy(constants.end_us(self.schedule.direction, tokens))
        self.recorder.ended(self.now)

    def _busy(self, duration_us: float) -> Process:
        duration_ns = round(duration_us * NS_PER_US)
        if duration_ns:
            yield self.environment.timeout(duration_ns)

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
        self._transfers[rank].update((transfer.id, transfer) for transfer in call.transfers)

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
