"""Pulls without a GPU: the protocol of ready and done on real threads, arenas, and which machines are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsering.planner.layouts.gather import Gather
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, Direction, GroupCall, Schedule, Transfer
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.runtime.attention.buffers import BufferPool
from sparsering.runtime.comm.pull import Arena, Pull, Signals, why_not_readable

TIMEOUT_S = 20.0


class Pads:
    """The flags of all ranks, as torch's kernels treat them: 0 to 1 by putting, 1 to 0 by waiting."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.set: set[tuple[int, int, int]] = set()  # (channel, who put, who waits)
        self.put_too_early = 0

    def put(self, flag: tuple[int, int, int]) -> None:
        with self.changed:
            self.put_too_early += flag in self.set
            assert self.changed.wait_for(lambda: flag not in self.set, TIMEOUT_S), f"{flag} was never taken"
            self.set.add(flag)
            self.changed.notify_all()

    def take(self, flag: tuple[int, int, int]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: flag in self.set, TIMEOUT_S), f"{flag} was never put"
            self.set.remove(flag)
            self.changed.notify_all()


class Pad:
    """One rank's view of the flags."""

    def __init__(self, pads: Pads, rank: int) -> None:
        self.pads, self.rank = pads, rank

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self.pads.put((channel, self.rank, dst_rank))

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self.pads.take((channel, src_rank, self.rank))


class Rank:
    """Plays a rank's group calls, each communicator's in order on a thread (a stream), with tokens as contents.

    Phases are waited for as `ring.play` does. A pull reads the source's memory when it runs, and nothing else orders it
    against what the source writes there next.
    """

    def __init__(self, schedule: Schedule, rank: int, pads: Pads, memory: list[dict[str, torch.Tensor]]) -> None:
        self.schedule, self.rank, self.memory = schedule, rank, memory
        self.streams = {
            communicator.name: (
                ThreadPoolExecutor(1),
                Signals(pad=Pad(pads, rank), ready=2 * number, done=2 * number + 1, timeout_ms=0),
            )
            for number, communicator in enumerate(schedule.communicators)
        }

    def play(self) -> set[str]:
        """Return the transfers that landed here, having seen what the source had meant to send."""
        flying, landed = {}, set()
        for phase in self.schedule.phases(self.rank):
            for name in phase.waits:
                transfer, future = flying.pop(name)
                future.result(TIMEOUT_S)
                if transfer.destination == self.rank:
                    assert self.memory[self.rank][transfer.buffer].item() == token(transfer)
                    landed.add(name)
                elif transfer.kind == "dkv":
                    self.memory[self.rank][transfer.source_buffer].fill_(-1)  # may be overwritten from now on
            for call in phase.group_calls:
                stream, signals = self.streams[call.communicator]
                readers, pulls = self.prepared(call)
                future = stream.submit(signals.exchange, readers=readers, pulls=pulls)
                flying |= {transfer.id: (transfer, future) for transfer in call.transfers}
        for stream, _ in self.streams.values():
            stream.shutdown()
        return landed

    def prepared(self, call: GroupCall) -> tuple[list[int], list[Pull]]:
        own, readers, pulls = self.memory[self.rank], [], []
        for transfer in call.transfers:
            if transfer.source == self.rank:
                own[transfer.source_buffer].fill_(token(transfer))
                readers.append(transfer.destination)
            else:
                origin = self.memory[transfer.source][transfer.source_buffer]
                pulls.append(Pull(source=transfer.source, target=own[transfer.buffer], origin=origin))
        return readers, pulls


def token(transfer: Transfer) -> int:
    """What a source sends: K/V of one rank are the same to all; gradients are each reader's own."""
    assert transfer.shard is not None
    return transfer.shard.sequence_part + (1000 * (transfer.sequence + 1) if transfer.kind == "dkv" else 0)


def made(
    world_size: int, direction: Direction, pairs: Pairs | None = None, *, chunks: int = 1, keep_kv: bool = False,
    pull: bool = True,
) -> Schedule:  # fmt: skip
    shape = AttentionShape(world_size=world_size, tokens_per_rank=64, heads=2, kv_heads=1, head_dim=8)
    return Gather(chunks=chunks, keep_kv=keep_kv, pull=pull).build(shape=shape, direction=direction, pairs=pairs)


@st.composite
def pulling(draw: st.DrawFn) -> Schedule:
    world_size = draw(st.integers(2, 5))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=world_size, max_size=world_size), min_size=world_size,
                         max_size=world_size))  # fmt: skip
    pairs = draw(st.sampled_from([None, Pairs.of(np.array(rows))]))
    direction = draw(st.sampled_from(DIRECTIONS))
    return made(world_size, direction, pairs, chunks=draw(st.integers(1, 3)), keep_kv=draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(schedule=pulling())
def test_signals_bring_everything_over_and_leave_no_flag(schedule: Schedule) -> None:
    """Whatever pairs are left out, and twice over the same flags, as two layers would."""
    pads = Pads()
    for _ in range(2):
        names = {buffer.name for buffer in schedule.buffers}
        memory = [{name: torch.full((1,), -1) for name in names} for _ in range(schedule.world_size)]
        ranks = [Rank(schedule, rank, pads, memory) for rank in range(schedule.world_size)]
        with ThreadPoolExecutor(schedule.world_size) as threads:
            landed = [future.result(TIMEOUT_S) for future in [threads.submit(rank.play) for rank in ranks]]
        for rank, names in enumerate(landed):
            assert names == {transfer.id for transfer in transfers(schedule, rank) if transfer.destination == rank}
    assert not pads.set and not pads.put_too_early


def transfers(schedule: Schedule, rank: int) -> Iterator[Transfer]:
    for phase in schedule.phases(rank):
        for call in phase.group_calls:
            yield from call.transfers


def test_two_ranks_signal_once_for_all_their_transfers() -> None:
    told: list[str] = []

    class Told:
        def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
            told.append(f"put {dst_rank} on {channel} within {timeout_ms}")

        def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
            told.append(f"wait {src_rank} on {channel} within {timeout_ms}")

    target, origin = torch.zeros(2), torch.tensor([3.0, 4.0])
    pulls = [Pull(source=1, target=target[place], origin=origin[place]) for place in range(2)]
    Signals(pad=Told(), ready=4, done=5, timeout_ms=7).exchange(readers=[2, 2, 1], pulls=pulls)
    assert told == ["put 2 on 4 within 7", "put 1 on 4 within 7", "wait 1 on 4 within 7", "put 1 on 5 within 7",
                    "wait 2 on 5 within 7", "wait 1 on 5 within 7"]  # fmt: skip
    assert target.tolist() == [3.0, 4.0]


class _Twins:
    """What the memory of every rank looks like from one of them."""

    def __init__(self, ranks: int, nbytes: int) -> None:
        self.memory = [torch.full((nbytes,), rank, dtype=torch.uint8) for rank in range(ranks)]

    def get_buffer(self, rank: int, sizes: torch.Size, dtype: torch.dtype, storage_offset: int) -> torch.Tensor:
        return self.memory[rank].view(dtype)[storage_offset : storage_offset + sizes.numel()].view(sizes)


class _Peers:
    """Stands for memory that peers can read, on a machine where there is none."""

    def __init__(self, rank: int) -> None:
        self.rank, self.twins = rank, _Twins(0, 0)

    def allocate(self, nbytes: int) -> Arena:
        self.twins = _Twins(3, nbytes)
        return Arena(memory=self.twins.memory[self.rank], handle=self.twins)


def test_slots_lie_alike_on_all_ranks() -> None:
    schedules = [made(3, direction) for direction in DIRECTIONS]
    peers = _Peers(rank=1)
    pool = BufferPool(torch.device("cpu"), schedules, peers)  # pyright: ignore[reportArgumentType]
    slots = pool.slots(schedules[1], torch.Size((1, 64, 1, 8)), {"kv": torch.bfloat16, "dkv": torch.float32})
    assert list(slots) == ["dkv:0", "dkv:1", "kv:0", "kv:1", "landing:0", "landing:1", "staged:0"]
    ones, twos = torch.ones(1, 64, 1, 8, dtype=torch.bfloat16), torch.full((1, 64, 1, 8), 2, dtype=torch.bfloat16)
    slots.stage((ones, twos))
    assert (slots["staged:0"][0] == 1).all() and (slots["staged:0"][1] == 2).all()
    for name in slots:
        for part, twin in zip(slots[name], slots.of_peer(name, 2), strict=True):
            assert twin is not None and (twin.shape, twin.dtype) == (part.shape, part.dtype)
            offset_bytes = part.data_ptr() - peers.twins.memory[1].data_ptr()
            assert twin.data_ptr() - peers.twins.memory[2].data_ptr() == offset_bytes


def test_nothing_is_shared_where_nobody_pulls() -> None:
    schedules = [made(3, direction, pull=False) for direction in DIRECTIONS]
    pool = BufferPool(torch.device("cpu"), schedules, _Peers(rank=0))  # pyright: ignore[reportArgumentType]
    slots = pool.slots(schedules[0], torch.Size((1, 64, 1, 8)), {"kv": torch.float32, "dkv": torch.float32})
    assert "staged:0" not in slots and slots.of_peer("kv:0", 1) == (None, None)


@pytest.mark.parametrize(
    ("places", "access", "told"),
    [
        ([("a", "g0"), ("a", "g1"), ("a", "g2")], {"g1": True}, None),
        ([("a", "g0"), ("b", "g0"), ("a", "g2")], {}, "rank 1 is on another host"),
        ([("a", "g0"), ("a", "g1"), ("a", "g0")], {}, "rank 2 uses the same GPU"),
        ([("a", "g0"), ("a", "g1"), ("a", "g2")], {"g1": True, "g2": False}, "its GPU has no access to that of rank 2"),
    ],
)
def test_machines_without_access_are_refused(
    places: list[tuple[str, str]], access: dict[str, bool], told: str | None
) -> None:
    assert why_not_readable(0, places, access.get) == told
