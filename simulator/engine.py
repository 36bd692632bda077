"""The reference semantics of a schedule, played in simulated time: one heap of events, integer nanoseconds.

Every rank walks through its phases (schedule.py says what happens in which order): wait, launch transfers, compute; the
tasks of a phase in the kernel launches that the backend makes of them (schedule/launches.py). A group call waits for
its turn in its communicator's queue on that rank, joins its transfers, and ends with the last of them. A transfer is a
rendezvous: it begins, one link latency later, when all its ends have joined; its bytes share links with all others
(network.py). While data moves to or from a GPU, its compute slows by the cluster's `communication_slowdown`, or by its
`pull_slowdown` where copy engines alone move it.

Beside launches a rank's compute stream is busy with what `CostModel.constants` says: before its first phase, after the
waits for gradients that land, after its last phase. Where the constants have a host, each rank's host issues everything
in order and never waits for the device, on which nothing starts before it was issued. `Evaluation.compute_us` counts
launches alone.

Not modelled: choosing patterns, and copies that only some masks or models need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..planner.cost.cluster import Cluster
from ..planner.cost.evaluation import Evaluation
from ..planner.cost.model import CostModel
from ..planner.cost.timing import NS_PER_US, check_sizes, landing_ns
from ..planner.resting import no_collections
from ..planner.schedule.schedule import Phase, Schedule, Transfer
from ..planner.schedule.workload import Workload
from ..traces.errors import InputError, ScheduleError
from ..traces.progress import Progress, no_progress
from ..traces.timeline import Timeline
from .clock import Event
from .host import Host
from .recorder import followed_by
from .transfers import Call, Setting, Stage


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
    """Play one direction of one layer, host and device both beginning at 0; an `Evaluator`.

    Raises InputError for sizes that do not fit, ScheduleError when the schedule deadlocks.
    """
    return _play(schedule, Setting(workload, cluster, cost), jitter, timeline)[0]


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation:
    """Forward and backward of one layer in one go; `timeline` holds both, backward beginning when all ranks ended it.

    backward: as it follows forward, its host ahead by what forward left it. backward_alone_us: what backward takes when
    host and device begin together, which is how it is timed on its own.
    """

    forward: Evaluation
    backward: Evaluation
    backward_alone_us: float
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
    progress: Progress = no_progress,
) -> LayerEvaluation:
    """Play forward, then backward from the moment at which the last rank ended forward; see `simulate`.

    The hosts go on to issue backward as soon as they have issued forward.
    """
    setting = Setting(workload, cluster, cost, progress)
    forward, issued_ns = _play(schedules[0], setting, jitter, timeline)
    if cost.constants.host is None:
        backward, _ = _play(schedules[1], setting, jitter, timeline)
        alone_us = backward.makespan_us
    else:
        ended_ns = round(forward.makespan_us * NS_PER_US)
        backward, _ = _play(schedules[1], setting, jitter, timeline, [one - ended_ns for one in issued_ns])
        alone_us = _play(schedules[1], setting, jitter, False)[0].makespan_us
    joined = None
    if forward.timeline and backward.timeline:
        joined = followed_by(forward.timeline, backward.timeline, start_us=forward.makespan_us)
    return LayerEvaluation(forward=forward, backward=backward, backward_alone_us=alone_us, timeline=joined)


def _play(
    schedule: Schedule, setting: Setting, jitter: Jitter, timeline: bool, host_begins_ns: Sequence[int] = ()
) -> tuple[Evaluation, list[int]]:
    """Play one direction; return also when each rank's host has issued it.

    host_begins_ns: by rank, when its host begins, which may be before the device does; empty: at 0.
    """
    check_sizes(schedule, setting.workload, setting.cluster)
    begins_ns = host_begins_ns or [0] * schedule.world_size
    jittered = [jitter.of_rank(rank) if jitter.sigma else None for rank in range(schedule.world_size)]
    with no_collections():
        stage = Stage(schedule, setting, timeline)
        ranks = [_Rank(stage, rank, jittered[rank], begins_ns[rank]) for rank in range(schedule.world_size)]
        stage.clock.first += [rank.begin for rank in ranks]
        stage.clock.run()
    for rank in ranks:
        rank.refuse_deadlock()
    stage.refuse_deadlock()
    times = stage.transfer_times() if timeline else None
    return stage.recorder.evaluation(schedule.buffer_bytes, times), [rank.host.issued_ns for rank in ranks]


class _Beside:
    """A launch computed beside transfers, up to the next change of its speed or to its end."""

    __slots__ = ("_is_over", "_rank", "_speed", "_start_ns")

    def __init__(self, rank: _Rank) -> None:
        self._rank, self._is_over = rank, False
        stage = rank.stage
        self._start_ns, self._speed = stage.clock.now, 1 - stage.network.slowdown(rank.rank)
        stage.clock.after(max(1, round(rank.left_ns / self._speed)), self._interrupt)
        stage.network.on_flip(rank.rank, self._interrupt)

    def _interrupt(self) -> None:
        """The end or a change of speed, whichever comes first."""
        if not self._is_over:
            self._is_over = True
            self._rank.stage.clock.queue.append(self._resume)

    def _resume(self) -> None:
        rank = self._rank
        rank.left_ns -= (rank.stage.clock.now - self._start_ns) * self._speed
        if rank.left_ns > 0.5:
            _Beside(rank)
        else:
            rank.computed()


class _Rank:
    """A rank that walks through its phases.

    left_ns: of the launch that it computes.
    """

    __slots__ = (
        "_calls", "_constants", "_has_ended", "_jittered", "_launched", "_launches", "_number", "_phases",
        "_start_ns", "_times_ns", "_waited", "host", "left_ns", "rank", "stage",
    )  # fmt: skip

    def __init__(self, stage: Stage, rank: int, jittered: Callable[[int], int] | None, host_begins_ns: int) -> None:
        self.stage, self.rank, self._jittered = stage, rank, jittered
        self._phases = stage.schedule.phases(rank)
        self._launches, self._times_ns = stage.launches[rank], stage.device_ns[rank]
        self._constants = stage.cost.constants
        self._calls: dict[str, tuple[Call, Transfer]] = {}  # by transfer id
        self._number, self._waited, self._launched = 0, 0, 0  # places: phase, and in it wait and launch
        self._has_ended = False
        self.left_ns, self._start_ns = 0.0, 0
        self.host = Host(self._constants.host, stage.schedule.direction, host_begins_ns)

    def begin(self) -> None:
        """Walk, after what comes before the first phase."""
        us = self._constants.begin_us(self.stage.schedule.direction, self.stage.workload.tokens_per_rank)
        self._busy(round(us * NS_PER_US), self._walk)

    def computed(self) -> None:
        """Go on after a launch."""
        stage, launch = self.stage, self._launches[self._number][self._launched - 1]
        stage.recorder.computed(self.rank, self._number, launch.tasks, self._start_ns, stage.clock.now)
        self._after_calls()

    def refuse_deadlock(self) -> None:
        """Raise ScheduleError unless the rank has come to its end."""
        if not self._has_ended:
            phase = self._phases[self._number]
            stuck = [name for name in phase.waits if not self._calls[name][0].has_ended]
            raise ScheduleError(f"rank {self.rank} phase {phase.index} waits forever for {', '.join(stuck)}")

    def _busy(self, duration_ns: int, then: Event) -> None:
        """Do nothing else on the compute stream for so long."""
        if duration_ns:
            self.stage.clock.after(duration_ns, then)
        else:
            then()

    def _walk(self) -> None:
        """Go on from the waits of a phase."""
        calls = self._calls
        while self._number < len(self._phases):
            phase = self._phases[self._number]
            for name in phase.waits[self._waited :]:
                if name not in calls:
                    problem = f"waits for {name}, which it never launched"
                    raise ScheduleError(f"rank {self.rank} phase {phase.index} {problem}")
                call = calls[name][0]
                if not call.has_ended:
                    call.on_end(self._walk)
                    return
                self._waited += 1
            if self._constants.landing_us_per_byte and phase.waits:
                landed = [calls[name][1] for name in phase.waits]
                landing = landing_ns(self._constants, landed, self.rank)
                if landing:
                    self.stage.clock.after(landing, self._after_landing)
                    return
            self._issue_calls(phase)
            if not self._compute():
                return
        us = self._constants.end_us(self.stage.schedule.direction, self.stage.workload.tokens_per_rank)
        self._busy(self.host.finish(self.stage.clock.now) + round(us * NS_PER_US), self._end)

    def _after_landing(self) -> None:
        self._issue_calls(self._phases[self._number])
        self._after_calls()

    def _after_calls(self) -> None:
        if self._compute():
            self._walk()

    def _end(self) -> None:
        self._has_ended = True
        self.stage.recorder.ended(self.stage.clock.now)

    def _issue_calls(self, phase: Phase) -> None:
        """Queue the calls of a phase, each behind the communicator's earlier ones on this rank."""
        calls_ns = self.host.issue(phase, self.stage.host_ns[self.rank][self._number])
        for number, call in enumerate(phase.group_calls):
            names = [transfer.id for transfer in call.transfers]
            made = Call(self.stage, self.rank, phase, call, names)
            for name, transfer in zip(names, call.transfers, strict=True):
                self._calls[name] = (made, transfer)
            if calls_ns is not None and calls_ns[number] > self.stage.clock.now:
                self.stage.clock.after(calls_ns[number] - self.stage.clock.now, made.begin)
            else:
                self.stage.clock.first.append(made.begin)

    def _compute(self) -> bool:
        """Start the next launch that takes any time; after the last one, move on to the next phase and return True."""
        times_ns = self._times_ns[self._number]
        while self._launched < len(times_ns):
            work_ns = times_ns[self._launched]
            if self._jittered is not None:
                work_ns = self._jittered(work_ns)
            self._launched += 1
            begins_ns, lasts_ns = self.host.next_launch(self.stage.clock.now, work_ns)
            if work_ns:
                self.left_ns = lasts_ns
                if begins_ns > self.stage.clock.now:
                    self.stage.clock.after(begins_ns - self.stage.clock.now, self._launch)
                else:
                    self._launch()
                return False
        self._number, self._waited, self._launched = self._number + 1, 0, 0
        self.stage.phase_done()
        return True

    def _launch(self) -> None:
        stage = self.stage
        self._start_ns = stage.clock.now
        if stage.network.slows:
            _Beside(self)
        else:
            stage.clock.after(int(self.left_ns), self.computed)
