"""Playing a schedule: the same phases that the simulator plays, on real tensors, streams and processes.

Nothing here knows how the schedule was made. A layer says what a transfer's tensors are and its launches how tasks are
computed; `play` does the rest in the order that planner/schedule/schedule.py defines for the device, even where the
host issues a first phase's tasks before its calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...planner.schedule.launches import launch_name
from ...planner.schedule.schedule import ALL_RANKS, GroupCall, Phase, Transfer
from ..comm.channels import Channel, Message, Moment, Pending, Waiting
from ..comm.measure import Recorder
from .launches import Launches
from .layer import Layer
from .program import Launched


def play(
    layer: Layer, launches: Launches, channels: Mapping[str, Channel], recorder: Recorder | None, waiting: Waiting
) -> None:
    """Play one direction of a layer on this rank. waiting: made around every wait for other ranks.

    On GPUs this only enqueues; the caller's current stream is the compute stream.
    """
    player = _Player(layer, launches, channels, recorder, waiting)
    for phase, launched in layer.program.phases(layer.kv[0].shape[0]):
        player.play(phase, launched)
    assert not player.in_flight, f"rank {player.rank} never waited for {sorted(player.in_flight)}"


class _Player:
    def __init__(
        self, layer: Layer, launches: Launches, channels: Mapping[str, Channel], recorder: Recorder | None,
        waiting: Waiting,
    ) -> None:  # fmt: skip
        self.layer, self.launches, self.channels, self.recorder = layer, launches, channels, recorder
        self.rank, self.direction, self.waiting = layer.program.rank, layer.program.direction, waiting
        self.in_flight: dict[str, tuple[Transfer, Pending | None]] = {}  # None: waited for already

    def play(self, phase: Phase, launches: Sequence[Launched]) -> None:
        self._wait(phase.waits)
        if phase.index == 0 and launches and self.launches.computes_at_once:
            self._play_computing_first(phase, launches)
            return
        for call in phase.group_calls:
            self._post(call, self._messages(call), phase.index)
        self._compute(launches, phase.index)

    def _play_computing_first(self, phase: Phase, launches: Sequence[Launched]) -> None:
        """Issue the tasks before the transfers, which wait for no more than if they had been issued first."""
        calls = [(call, self._messages(call)) for call in phase.group_calls]
        before_tasks = Moment() if calls else None
        self._compute(launches, phase.index)
        if before_tasks is not None:
            with before_tasks.posting():
                for call, messages in calls:
                    self._post(call, messages, phase.index)

    def _wait(self, names: Sequence[str]) -> None:
        landed: list[Transfer] = []
        for name in names:
            transfer, pending = self.in_flight.pop(name)
            if pending is not None:
                with self.waiting():
                    pending.wait()
                for other, (flying, its) in self.in_flight.items():
                    if its is pending:  # transfers of one call complete together
                        self.in_flight[other] = (flying, None)
            if transfer.source in (self.rank, ALL_RANKS):
                self.layer.sent(transfer)
            if transfer.destination in (self.rank, ALL_RANKS):
                landed.append(transfer)
        if landed:
            self.layer.received(landed)

    def _post(self, call: GroupCall, messages: Sequence[Message], phase: int) -> None:
        pending = self.channels[call.communicator].post(messages)
        for transfer in call.transfers:
            self.in_flight[transfer.id] = (transfer, pending)
        if self.recorder is not None:
            kinds = [transfer.kind for transfer in call.transfers]
            self.recorder.add(
                pending, stream=call.communicator, name=" ".join(dict.fromkeys(kinds)), category=kinds[0],
                direction=self.direction, phase=phase, nbytes=sum(message.tensor.nbytes for message in messages),
            )  # fmt: skip

    def _messages(self, call: GroupCall) -> list[Message]:
        return [message for transfer in call.transfers for message in self._messages_of(transfer)]

    def _messages_of(self, transfer: Transfer) -> list[Message]:
        if transfer.source == ALL_RANKS:
            return self._collective(transfer)
        pulled = transfer.transport == "pull"
        if transfer.source == self.rank:
            peer, tensors = transfer.destination, self.layer.outgoing(transfer)
            return [Message(operation="send", tensor=tensor, peer=peer, pulled=pulled) for tensor in tensors]
        peer, tensors = transfer.source, self.layer.incoming(transfer)
        origins = self.layer.origins(transfer) if pulled else (None,) * len(tensors)
        return [
            Message(operation="receive", tensor=tensor, peer=peer, pulled=pulled, origin=origin)
            for tensor, origin in zip(tensors, origins, strict=True)
        ]

    def _collective(self, transfer: Transfer) -> list[Message]:
        assert transfer.transport in ("all_reduce", "all_gather", "reduce_scatter")
        tensors = self.layer.outgoing(transfer)
        in_place = transfer.transport == "all_reduce"
        outputs = (None,) * len(tensors) if in_place else self.layer.incoming(transfer)
        return [
            Message(operation=transfer.transport, tensor=tensor, output=output)
            for tensor, output in zip(tensors, outputs, strict=True)
        ]

    def _compute(self, launches: Sequence[Launched], phase: int) -> None:
        for together in launches:
            if self.recorder is None:
                self.launches.compute(together)
                continue
            started = self.recorder.mark()
            self.launches.compute(together)
            self.recorder.add_compute(started, name=launch_name(together), direction=self.direction, phase=phase)
