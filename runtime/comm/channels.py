"""Channels: one communicator on this rank. Groups of messages posted on one channel run first in, first out.

On GPUs a channel is a side stream over an NCCL process group: a group starts once the compute stream has reached the
point of the post (or an earlier `Moment`), and nothing here ever blocks the host. Pulls leave NCCL alone (pull.py). On
CPUs it is a thread over a gloo process group, and a pull is a send and a receive: no process can read another's memory
over gloo.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...planner.schedule.schedule import Communicator, Schedule
from ...traces.errors import InputError
from .group import Mesh
from .lost import CommunicationError
from .pull import PeerMemory, Pull, Signals, require_peer_access

# Newer versions of PyTorch have them under other names, and warn of the old ones.
OF_PARTS = {
    "all_gather": getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor,
    "reduce_scatter": getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """One tensor to send to, or receive from, rank `peer` of the mesh; or one part of a collective of the whole group.

    "all_reduce" sums `tensor` in place. "all_gather" fills `output`, "reduce_scatter" sums `tensor` into it: the larger
    of the two holds a part for every rank, one after the other. pulled: the receiver copies from the sender's memory,
    where that can be: from `origin`, which is the sender's tensor; else a pull is carried by a send and a receive.
    """

    operation: Literal["send", "receive", "all_reduce", "all_gather", "reduce_scatter"]
    tensor: Tensor
    peer: int = -1
    output: Tensor | None = None
    pulled: bool = False
    origin: Tensor | None = None


Waiting = Callable[[], AbstractContextManager[None]]  # made around a wait for other ranks


class Pending(Protocol):
    """A posted group of messages."""

    started: Any
    ended: Any

    def wait(self) -> None:
        """Let what follows on the caller's stream (or thread) see the messages complete."""


class Channel(Protocol):
    """Where groups of messages are posted."""

    def post(self, messages: Sequence[Message]) -> Pending:
        """Start the messages together, after everything posted here before."""
        ...

    def close(self) -> None:
        """Finish what was posted and free the channel's thread or stream."""


def _transmit(group: dist.ProcessGroup, messages: Sequence[Message], first_process: int) -> list[dist.Work]:
    """Hand the messages to torch.distributed in one batch per kind. first_process: that is rank 0 of the peers."""
    point_to_point = [
        dist.P2POp(dist.isend if m.operation == "send" else dist.irecv, m.tensor, first_process + m.peer, group)
        for m in messages
        if m.operation in ("send", "receive")
    ]
    works: list[Any] = dist.batch_isend_irecv(point_to_point) if point_to_point else []
    for message in messages:
        if message.operation == "all_reduce":
            works.append(dist.all_reduce(message.tensor, group=group, async_op=True))
        elif message.operation in OF_PARTS:
            assert message.output is not None
            output, tensor = message.output.flatten(), message.tensor.flatten()
            works.append(OF_PARTS[message.operation](output, tensor, group=group, async_op=True))
    return works


@dataclass(eq=False)
class _HostPending:
    messages: Sequence[Message]
    name: str
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    started: int = 0
    ended: int = 0

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            peers = sorted({m.peer for m in self.messages if m.peer >= 0})
            raise CommunicationError(f"communicator {self.name!r} with ranks {peers}: {self.error}") from self.error


class HostChannel:
    """A gloo channel. One thread plays the posted groups in order, so that compute goes on meanwhile."""

    def __init__(self, name: str, group: dist.ProcessGroup, *, first_process: int) -> None:
        self._name, self._group, self._first_process = name, group, first_process
        self._posted: queue.SimpleQueue[_HostPending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"sparsering-{name}", daemon=True)
        self._thread.start()

    def post(self, messages: Sequence[Message]) -> _HostPending:
        """Queue the messages behind what was posted before."""
        pending = _HostPending(messages=tuple(messages), name=self._name)
        self._posted.put(pending)
        return pending

    def close(self) -> None:
        """Let the thread end once the queue is empty."""
        self._posted.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (pending := self._posted.get()) is not None:
            self._play(pending)
            pending.done.set()
            del pending  # or its tensors would live until something else is posted

    def _play(self, pending: _HostPending) -> None:
        """Carry one group to its end. No frame that goes on may name a work: each holds its tensors."""
        pending.started = time.perf_counter_ns()
        try:
            for work in _transmit(self._group, pending.messages, self._first_process):
                work.wait()
        except Exception as error:  # handed to whoever waits
            pending.error = error
        pending.ended = time.perf_counter_ns()


@dataclass(eq=False)
class _DevicePending:
    messages: Sequence[Message]
    started: torch.cuda.Event
    ended: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.ended)


class DeviceChannel:
    """An NCCL channel on a stream of its own. signals: what pulls need; set before the first of them is posted."""

    signals: Signals | None = None

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, timed: bool, first_process: int) -> None:
        self._group, self._timed, self._first_process = group, timed, first_process
        self._stream = torch.cuda.Stream(device, priority=-1)  # transfers start before queued compute fills the GPU

    def post(self, messages: Sequence[Message]) -> _DevicePending:
        """Enqueue the messages behind the current stream's work so far and everything posted here before."""
        started, ended = (torch.cuda.Event(enable_timing=self._timed) for _ in range(2))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            started.record()
            pulled = [message for message in messages if message.pulled]
            if pulled:
                assert self.signals is not None
                readers = [m.peer for m in pulled if m.operation == "send"]
                pulls = [Pull(m.peer, m.tensor, m.origin) for m in pulled if m.operation == "receive"]
                self.signals.exchange(readers=readers, pulls=pulls)
            for work in _transmit(self._group, [m for m in messages if not m.pulled], self._first_process):
                work.wait()
            ended.record()
        return _DevicePending(messages=tuple(messages), started=started, ended=ended)

    def close(self) -> None:
        """Wait for what was posted."""
        self._stream.synchronize()


@cache
def _posting_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Moment:
    """A point on the compute stream, from which messages can be posted although the host has issued more since."""

    def __init__(self) -> None:
        current = torch.cuda.current_stream()
        self._stream = _posting_stream(current.device)
        self._stream.wait_stream(current)

    @contextmanager
    def posting(self) -> Iterator[None]:
        """What is posted within waits for what had been issued at that point, and for nothing that came after it."""
        with torch.cuda.stream(self._stream):
            yield


class Channels:
    """Channels of this rank, shared by all layers and plans that are given them and use the same communicators.

    Process groups are made in the same order on every rank, so `bind` is collective. `timed` makes GPU channels record
    timing events. peers: memory that all ranks read, from the first schedule on whose ranks pull; None on CPUs.
    """

    peers: PeerMemory | None = None

    def __init__(self, mesh: Mesh, *, timed: bool = False) -> None:
        self._mesh, self._timed = mesh, timed
        self._channels: dict[Communicator, Channel] = {}

    def bind(self, schedules: Sequence[Schedule]) -> dict[str, Channel]:
        """Return the channels of the schedules' communicators by name, opening those that are not open yet.

        Raises InputError, on all ranks, when ranks are to pull from GPUs that they have no access to, or when schedules
        that are played together have different communicators of one name.
        """
        shares = self._mesh.device.type == "cuda" and any(schedule.shares for schedule in schedules)
        if shares and self.peers is None:
            require_peer_access(self._mesh)
        named: dict[str, Communicator] = {}
        for schedule in schedules:
            for communicator in schedule.communicators:
                if named.setdefault(communicator.name, communicator).groups != communicator.groups:
                    raise InputError(
                        f"{communicator.name!r} is of other ranks in another schedule", field="communicators"
                    )
        for communicator in named.values():
            if communicator not in self._channels:
                self._open(communicator)
        if shares:
            self.peers = self.peers or PeerMemory(self._mesh)
            for number, channel in enumerate(self._channels.values()):  # all ranks opened them in one order
                if isinstance(channel, DeviceChannel):
                    channel.signals = self.peers.signals(number)
        return {name: self._channels[communicator] for name, communicator in named.items()}

    def close(self) -> None:
        """Close all channels; the process groups end with the default one."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self.peers = None

    def _open(self, communicator: Communicator) -> None:
        device, first = self._mesh.device, self._mesh.process(0)
        for ranks in communicator.groups:
            group = self._mesh.new_group(ranks)
            if group is None:
                continue
            if device.type == "cuda":
                channel: Channel = DeviceChannel(group, device, timed=self._timed, first_process=first)
            else:
                channel = HostChannel(communicator.name, group, first_process=first)
            self._channels[communicator] = channel
            self._warm_up(channel, ranks)

    def _warm_up(self, channel: Channel, ranks: tuple[int, ...]) -> None:
        """Connect the channel now, and to the end, so that the first layer does not pay for it."""
        place = ranks.index(self._mesh.rank)
        token, landed = (torch.zeros(1, device=self._mesh.device) for _ in range(2))
        channel.post([Message(operation="all_reduce", tensor=token)]).wait()
        if len(ranks) > 1:
            following, previous = ranks[(place + 1) % len(ranks)], ranks[place - 1]
            sends = Message(operation="send", tensor=token, peer=following)
            channel.post([sends, Message(operation="receive", tensor=landed, peer=previous)]).wait()
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)
