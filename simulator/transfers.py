"""Group calls and transfers as chains of events on one clock; engine.py says what they mean.

An event here is what a process of a simulation library would wait for, and is queued where the library would queue it:
what happens within one nanosecond has an order too, and tests hold it to that of an engine written with simpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ..planner.cost.cluster import Cluster
from ..planner.cost.model import CostModel
from ..planner.cost.timing import Leg, legs_of
from ..planner.schedule.launches import rank_launches
from ..planner.schedule.schedule import ALL_RANKS, GroupCall, Phase, Schedule, Transfer
from ..planner.schedule.workload import Workload
from ..traces.errors import ScheduleError
from ..traces.progress import Progress, no_progress
from .clock import Clock, Event
from .network import Network
from .pricing import launch_times
from .recorder import Recorder, TransferTimes


class Setting(NamedTuple):
    """What a schedule is played on, and who is told how far it is."""

    workload: Workload
    cluster: Cluster
    cost: CostModel
    progress: Progress = no_progress


class Stage:
    """What all ranks of a run share."""

    def __init__(self, schedule: Schedule, setting: Setting, with_timeline: bool) -> None:
        self.schedule, self.cluster, self.cost = schedule, setting.cluster, setting.cost
        self.workload = setting.workload
        self.clock = Clock()
        self.network = Network(self.clock, setting.cluster)
        programs = [schedule.phases(rank) for rank in range(schedule.world_size)]
        self.launches = [rank_launches(program, backend=setting.cost.backend) for program in programs]
        self.device_ns, self.host_ns = launch_times(
            self.launches, setting.workload, setting.cost, schedule.direction
        )  # fmt: skip
        phases = max(len(program) for program in programs)
        self.recorder = Recorder(schedule.direction, (schedule.world_size, phases), keeps_spans=with_timeline)
        self.tails: dict[tuple[int, str], Call] = {}  # the last call of a rank on a communicator
        self._meetings: dict[str, _Meetings] = {}
        self._progress, self._phases_done = setting.progress, 0
        self._phases = sum(len(schedule.phases(rank)) for rank in range(schedule.world_size))

    def phase_done(self) -> None:
        """Count a phase of a rank as done."""
        self._phases_done += 1
        self._progress(f"simulating {self.schedule.direction}", self._phases_done, self._phases)

    def meetings(self, communicator: str) -> _Meetings:
        """Return the transfers of a communicator."""
        found = self._meetings.get(communicator)
        if found is None:
            found = self._meetings[communicator] = _Meetings(self, communicator)
        return found

    def refuse_deadlock(self) -> None:
        """Raise ScheduleError unless all calls have ended."""
        for (rank, communicator), call in self.tails.items():
            if not call.has_ended:
                raise ScheduleError(f"rank {rank} has a call on {communicator} that never ends")

    def transfer_times(self) -> TransferTimes:
        """Return when every transfer from one rank to another began to move, and when it had arrived."""
        return {
            (name, transfer): (one.started_ns, one.arrived_ns)
            for name, meetings in self._meetings.items()
            for transfer, one in meetings.pairs.items()
        }


class _Meetings:
    """The transfers of one communicator, by their ids: between two ranks, and of groups by their first rank."""

    __slots__ = ("_communicator", "_groups", "_stage", "collectives", "pairs")

    def __init__(self, stage: Stage, communicator: str) -> None:
        self._stage, self._communicator = stage, communicator
        self._groups: dict[int, tuple[int, ...]] = {}
        self.pairs: dict[str, _Rendezvous] = {}
        self.collectives: dict[tuple[int, str], _Rendezvous] = {}

    def group_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of a rank's group."""
        found = self._groups.get(rank)
        if found is None:
            found = self._stage.schedule.communicator(self._communicator).group_of(rank)
            self._groups.update((member, found) for member in found)
        return found

    def join(self, call: Call, transfer: Transfer, name: str) -> None:
        """Add one end of a transfer; the last one starts it. name: its id."""
        group = self._groups.get(call.rank) or self.group_of(call.rank)
        if transfer.source != ALL_RANKS:
            one = self.pairs.get(name)
            if one is None:
                one = self.pairs[name] = _Rendezvous(self._stage, 2)
        else:
            one = self.collectives.get((group[0], name))
            if one is None:
                one = self.collectives[group[0], name] = _Rendezvous(self._stage, len(group))
        one.missing -= 1
        one.calls.append(call)
        if one.missing < 0:
            raise ScheduleError(f"rank {call.rank} joins {name} on {transfer.communicator} once too often")
        if not one.missing:
            self._stage.clock.first.append(partial(one.begin, transfer, group))


class _Rendezvous:
    """A transfer: ends that are missing, then legs that are moving."""

    __slots__ = ("_moving", "_stage", "arrived_ns", "calls", "missing", "started_ns")

    def __init__(self, stage: Stage, ends: int) -> None:
        self._stage, self.missing = stage, ends
        self.calls: list[Call] = []

    def begin(self, transfer: Transfer, group: tuple[int, ...]) -> None:
        """Let the bytes move, one latency from now."""
        legs = legs_of(transfer, group)
        self._stage.clock.after(self._stage.network.latency_ns(legs), partial(self._move, legs))

    def _move(self, legs: list[Leg]) -> None:
        stage = self._stage
        self.started_ns, self._moving = stage.clock.now, len(legs)
        if not legs:
            stage.clock.queue.append(self._all_arrived)
        for leg in legs:
            stage.network.move(leg, self._leg_arrived)

    def _leg_arrived(self) -> None:
        self._moving -= 1
        if not self._moving:
            self._stage.clock.queue.append(self._all_arrived)

    def _all_arrived(self) -> None:
        self.arrived_ns = self._stage.clock.now
        self._stage.clock.queue.append(self._done)

    def _done(self) -> None:
        for call in self.calls:
            call.moving -= 1
            if not call.moving:
                self._stage.clock.queue.append(call.complete)
        self.calls = []


class Call:
    """A group call of one rank: queued behind the communicator's earlier ones, then joined to its transfers.

    names: ids of its transfers; moving: how many of them are not complete.
    """

    __slots__ = ("_asked", "_call", "_names", "_phase", "_previous", "_stage", "_start_ns", "has_ended", "moving",
                 "rank")  # fmt: skip

    def __init__(self, stage: Stage, rank: int, phase: Phase, call: GroupCall, names: Sequence[str]) -> None:
        self._stage, self.rank, self._phase, self._call, self._names = stage, rank, phase, call, names
        self.has_ended = False
        self.moving = len(names)
        self._asked: list[Event] | None = None
        key = (rank, call.communicator)
        self._previous = stage.tails.get(key)
        stage.tails[key] = self

    def begin(self) -> None:
        """Wait for the turn."""
        previous, self._previous = self._previous, None
        if previous is not None and not previous.has_ended:
            previous.on_end(self._start)
        else:
            self._start()

    def on_end(self, event: Event) -> None:
        """Play an event when the call has ended, after those asked for earlier."""
        if self._asked is None:
            self._asked = []
        self._asked.append(event)

    def complete(self) -> None:
        """All its transfers are complete."""
        stage, call = self._stage, self._call
        if stage.recorder.keeps_spans:
            group = stage.meetings(call.communicator).group_of(self.rank)
            stage.recorder.transferred(self.rank, self._phase.index, call, group, self._start_ns, stage.clock.now)
        else:
            stage.recorder.ended(stage.clock.now)
        stage.clock.queue.append(self._end)

    def _start(self) -> None:
        stage, call = self._stage, self._call
        self._start_ns = stage.clock.now
        own = stage.meetings(call.communicator)
        for transfer, name in zip(call.transfers, self._names, strict=True):
            same = transfer.communicator == call.communicator
            (own if same else stage.meetings(transfer.communicator)).join(self, transfer, name)
        if not call.transfers:
            stage.clock.queue.append(self.complete)

    def _end(self) -> None:
        self.has_ended = True
        if self._asked is not None:
            asked, self._asked = self._asked, None
            for event in asked:
                event()
