"""What stands in for the other ranks where benchmarks/rank.py plays one or two ranks of a plan for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...planner.schedule.schedule import ALL_RANKS, Communicator, Direction, Schedule
from ...runtime.comm.channels import Channel, Channels, Message, Pending
from ...runtime.comm.pull import Arena, PeerMemory, Signals
from ...traces.errors import InputError, UnsupportedError


class EchoStore:
    """A store whose other ranks say whatever this one says."""

    def __init__(self) -> None:
        self._said: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._said[key.rpartition("/")[0]] = value.encode()

    def check(self, keys: Sequence[str]) -> bool:
        return all(key.rpartition("/")[0] in self._said for key in keys)

    def get(self, key: str) -> bytes:
        return self._said[key.rpartition("/")[0]]


@dataclass(kw_only=True)
class _Copied:
    started: Any
    ended: Any

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.ended)


class _NoiseChannel:
    """Copies random numbers to where 16 bits would land, zeros to where wider gradients would; columns stay."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._noise: dict[tuple[int, torch.dtype], Tensor] = {}

    def post(self, messages: Sequence[Message]) -> _Copied:
        """Start the copies behind the current stream's work so far."""
        targets = [m.tensor for m in messages if m.operation == "receive"]
        targets += [m.output for m in messages if m.operation == "all_gather" and m.output is not None]
        started, ended = torch.cuda.Event(), torch.cuda.Event()
        noise = [self._noise_like(target) for target in targets]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            started.record()
            for target, values in zip(targets, noise, strict=True):
                target.view(-1).copy_(values)
            ended.record()
        return _Copied(started=started, ended=ended)

    def close(self) -> None:
        """Wait for what was posted."""
        self._stream.synchronize()

    def _noise_like(self, target: Tensor) -> Tensor:
        key = target.numel(), target.dtype
        if key not in self._noise:
            values = torch.randn(target.numel(), device=target.device, dtype=target.dtype)
            self._noise[key] = values * (1.0 if target.dtype.itemsize == 2 else 0.0)
        return self._noise[key]


class NoiseChannels(Channels):
    def bind(self, schedules: Sequence[Schedule]) -> dict[str, Channel]:
        channel = _NoiseChannel(self._mesh.device)
        return {communicator.name: channel for schedule in schedules for communicator in schedule.communicators}


class PairChannels(Channels):
    """Two processes, each a rank of a plan for many: what goes to any rank goes to the other one, and comes from there.

    So every transfer travels, at its size and at its time; what lands is another shard than the plan says. Sums over
    all ranks are sums over two. The channels are the runtime's own.
    """

    def bind(self, schedules: Sequence[Schedule]) -> dict[str, Channel]:
        """Return a channel between the two processes for every communicator."""
        other = 1 - self._mesh.rank
        between_two = []
        for schedule in schedules:
            both = tuple(Communicator(name=one.name, groups=((0, 1),)) for one in schedule.communicators)
            between_two.append(replace(schedule, world_size=2, communicators=both, period=0))
        opened = super().bind(between_two)
        if self.peers is not None and not isinstance(self.peers, _PairMemory):
            self.peers = _PairMemory(self.peers, other)
        return {name: _PairChannel(channel, other) for name, channel in opened.items()}


class _PairChannel:
    """Sends everything to the other process."""

    def __init__(self, channel: Channel, other: int) -> None:
        self._channel, self._other = channel, other

    def post(self, messages: Sequence[Message]) -> Pending:
        """Post the messages, all of them to and from the other process."""
        return self._channel.post([replace(m, peer=self._other) if m.peer >= 0 else m for m in messages])

    def close(self) -> None:
        """Finish what was posted."""
        self._channel.close()


class _PairMemory(PeerMemory):
    """Memory of two processes, in which every rank but the own one is the other process."""

    def __init__(self, peers: PeerMemory, other: int) -> None:
        self._peers, self._other = peers, other

    def allocate(self, nbytes: int) -> Arena:
        """Return `nbytes` of symmetric memory. Collective."""
        arena = self._peers.allocate(nbytes)
        return Arena(memory=arena.memory, handle=_OtherHandle(handle=arena.handle, other=self._other))

    def signals(self, number: int) -> Signals:
        """Return the signals of a communicator between the two."""
        return self._peers.signals(number)


@dataclass(frozen=True, kw_only=True, eq=False)
class _OtherHandle:
    handle: Any
    other: int

    def get_buffer(self, peer: int, *place: Any) -> Tensor:
        return self.handle.get_buffer(self.other, *place)


def require_pair(schedule: Schedule, ranks: tuple[int, int]) -> None:
    """Raise unless what each of the two ranks sends, call by call, is what the other receives, in number and size.

    UnsupportedError for collectives that hold a part for every rank, InputError for ranks whose calls differ.
    """
    first, second = (_traffic(schedule, rank) for rank in ranks)
    if first != [(at, sent, received) for at, received, sent in second]:
        problem = f"ranks {ranks[0]} and {ranks[1]} of {schedule.layout} do not send what the other receives"
        raise InputError(f"{problem} (where pairs are left out, --keep-all-pairs may help)", field="ranks")


def _traffic(schedule: Schedule, rank: int) -> list[tuple[tuple[Direction, int, str], list[int], list[int]]]:
    """Return ((direction, phase, communicator), bytes sent, bytes received) of every call of a rank.

    Sums over all ranks are both.
    """
    found = []
    for phase in schedule.phases(rank):
        for call in phase.group_calls:
            for transfer in call.transfers:
                if transfer.transport in ("all_gather", "reduce_scatter"):
                    raise UnsupportedError(f"{transfer.transport} holds a part for every rank", field="layout")
            sent = [one.capacity_bytes for one in call.transfers if one.source in (rank, ALL_RANKS)]
            received = [one.capacity_bytes for one in call.transfers if one.destination in (rank, ALL_RANKS)]
            found.append(((schedule.direction, phase.index, call.communicator), sent, received))
    return found
