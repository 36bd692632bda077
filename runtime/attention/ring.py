"""Playing a schedule: the same phases that the simulator plays, on real tensors, streams and processes.

Nothing here knows how the schedule was made. A `Stage` (forward or backward of one layer) says what a buffer's tensors
are and how a task is computed; `play` does the rest in the order that planner/schedule/schedule.py defines for the
device, even where the host issues a first phase's tasks before its calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ...planner.schedule.launches import launch_name
from ...planner.schedule.schedule import ALL_RANKS, GroupCall, Phase, Schedule, Task, Transfer
from ..comm.channels import Channel, Message, Moment, Pending
from ..comm.measure import Record, Recorder


class Stage(Protocol):
    """One direction of one layer on this rank."""

    @property
    def computes_at_once(self) -> bool:
        """Whether the first tasks are ready, on a device that idles until the host has issued them."""
        ...

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that this transfer reads on its source."""
        ...

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that this transfer fills on its destination."""
        ...

    def origins(self, transfer: Transfer) -> tuple[Tensor | None, ...]:
        """Return the tensors that this pull reads, in the memory of its source; None where that cannot be read."""
        ...

    def launches(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """Cut a phase's tasks into what is computed together, in order."""
        ...

    def compute(self, tasks: tuple[Task, ...]) -> None:
        """Compute tasks together on the current stream."""
        ...

    def sent(self, transfer: Transfer) -> None:
        """Learn that a transfer from here is complete: moved content is gone."""
        ...

    def received(self, transfers: Sequence[Transfer]) -> None:
        """Learn that transfers to here have landed, and add them where they belong."""
        ...


def play(
    schedule: Schedule, rank: int, stage: Stage, channels: Mapping[str, Channel], recorder: Recorder | None = None
) -> None:
    """Play one rank's phases. On GPUs this only enqueues; the caller's current stream is the compute stream."""
    player = _Player(schedule, rank, stage, channels, recorder)
    for phase in schedule.phases(rank):
        player.play(phase)
    assert not player.in_flight, f"rank {rank} never waited for {sorted(player.in_flight)}"


class _Player:
    def __init__(
        self, schedule: Schedule, rank: int, stage: Stage, channels: Mapping[str, Channel], recorder: Recorder | None
    ) -> None:
        self.rank, self.stage, self.channels, self.recorder = rank, stage, channels, recorder
        self.direction = schedule.direction
        self.in_flight: dict[str, tuple[Transfer, Pending]] = {}

    def play(self, phase: Phase) -> None:
        self._wait(phase.waits)
        if phase.index == 0 and phase.tasks and self.stage.computes_at_once:
            self._play_computing_first(phase)
            return
        for call in phase.group_calls:
            self._post(call, self._messages(call), phase.index)
        self._compute(phase)

    def _play_computing_first(self, phase: Phase) -> None:
        """Issue the tasks before the transfers, which wait for no more than if they had been issued first."""
        calls = [(call, self._messages(call)) for call in phase.group_calls]
        before_tasks = Moment() if calls else None
        self._compute(phase)
        if before_tasks is not None:
            with before_tasks.posting():
                for call, messages in calls:
                    self._post(call, messages, phase.index)

    def _wait(self, names: Sequence[str]) -> None:
        landed: list[Transfer] = []
        waited: list[Pending] = []
        for name in names:
            transfer, pending = self.in_flight.pop(name)
            if not any(pending is one for one in waited):  # transfers of one call complete together
                pending.wait()
                waited.append(pending)
            if transfer.source in (self.rank, ALL_RANKS):
                self.stage.sent(transfer)
            if transfer.destination in (self.rank, ALL_RANKS):
                landed.append(transfer)
        if landed:
            self.stage.received(landed)

    def _post(self, call: GroupCall, messages: Sequence[Message], phase: int) -> None:
        pending = self.channels[call.communicator].post(messages)
        for transfer in call.transfers:
            self.in_flight[transfer.id] = (transfer, pending)
        if self.recorder is not None:
            self.recorder.records.append(
                Record(
                    stream=call.communicator,
                    name=_call_name(call),
                    category=call.transfers[0].kind,
                    direction=self.direction,
                    phase=phase,
                    nbytes=sum(message.tensor.nbytes for message in messages),
                    marks=pending,
                )
            )

    def _messages(self, call: GroupCall) -> list[Message]:
        return [message for transfer in call.transfers for message in self._messages_of(transfer)]

    def _messages_of(self, transfer: Transfer) -> list[Message]:
        if transfer.source == ALL_RANKS:
            return self._collective(transfer)
        pulled = transfer.transport == "pull"
        if transfer.source == self.rank:
            peer, tensors = transfer.destination, self.stage.outgoing(transfer)
            return [Message(operation="send", tensor=tensor, peer=peer, pulled=pulled) for tensor in tensors]
        peer, tensors = transfer.source, self.stage.incoming(transfer)
        origins = self.stage.origins(transfer) if pulled else (None,) * len(tensors)
        return [
            Message(operation="receive", tensor=tensor, peer=peer, pulled=pulled, origin=origin)
            for tensor, origin in zip(tensors, origins, strict=True)
        ]

    def _collective(self, transfer: Transfer) -> list[Message]:
        tensors = self.stage.outgoing(transfer)
        if transfer.transport == "all_reduce":
            return [Message(operation="all_reduce", tensor=tensor) for tensor in tensors]
        assert transfer.transport in ("all_gather", "reduce_scatter")
        outputs = self.stage.incoming(transfer)
        return [
            Message(operation=transfer.transport, tensor=tensor, output=output)
            for tensor, output in zip(tensors, outputs, strict=True)
        ]

    def _compute(self, phase: Phase) -> None:
        for together in self.stage.launches(phase.tasks):
            if self.recorder is None:
                self.stage.compute(together)
                continue
            started = self.recorder.mark()
            self.stage.compute(together)
            self.recorder.add_compute(launch_name(together), "compute", self.direction, phase.index, started)


def _call_name(call: GroupCall) -> str:
    kinds: Mapping[str, None] = dict.fromkeys(transfer.kind for transfer in call.transfers)
    return " ".join(kinds)
