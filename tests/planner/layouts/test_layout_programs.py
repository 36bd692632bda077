"""What single layouts build: two small rings by heart, what is kept, what pulls change, what a ring sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layout_cases import layout_shape as shape
from sparsering.planner.check.check import check, check_step
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, Schedule, ShardId
from sparsering.traces.errors import ScheduleError


def test_kept_kv_are_gathered_once() -> None:
    made = shape(4)
    for pairs in (None, Pairs(rows=("1000", "1100", "0110", "1011"))):
        forward, backward = (
            Gather(chunks=2, keep_kv=True).build(shape=made, direction=direction, pairs=pairs)
            for direction in DIRECTIONS
        )
        check_step(forward, backward)
        inactive = pairs.left_out() if pairs else frozenset()
        assert set(check(backward, inactive=inactive).sent_bytes) == {"gather_grad"}
        fetched = 3 if pairs is None else 2
        assert forward.kept_bytes == backward.kept_bytes == forward.buffer_bytes == fetched * made.kv_bytes
        # Another number of chunks keeps the same in the same slots; gathering again does not begin with it.
        check_step(forward, Gather(chunks=1, keep_kv=True).build(shape=made, direction="backward", pairs=pairs))
        again = Gather(chunks=2).build(shape=made, direction="backward", pairs=pairs)
        with pytest.raises(ScheduleError, match=r"forward keeps .* in kept:0.*backward begins with nothing"):
            check_step(forward, again)


def test_what_is_kept_is_proved() -> None:
    """Forward must leave, and backward may use, just what is said to be kept."""
    forward, backward = (
        Gather(chunks=1, keep_kv=True).build(shape=shape(3), direction=direction) for direction in DIRECTIONS
    )
    swapped = {"kept:0": ShardId(sequence_part=1), "kept:1": ShardId(sequence_part=2)}

    def wrong(rank: int) -> dict[str, ShardId]:
        return swapped if rank == 0 else forward.kept(rank)

    with pytest.raises(ScheduleError, match=r"rank 0, .*kept:0: kept:0 holds 2\.0, not 1\.0"):
        check(replace(forward, kept=wrong))
    with pytest.raises(ScheduleError, match="rank 0"):
        check(replace(backward, kept=wrong))
    with pytest.raises(ScheduleError, match="kept:9: kept, but not stated as such"):
        check(replace(forward, kept=lambda rank: {"kept:9": ShardId(sequence_part=rank)}))
    assert replace(forward, kept=wrong).sha256() != forward.sha256()


def test_report_of_a_ring() -> None:
    made = shape(4, 64)
    report = check(Ring(prefetch=2).build(shape=made, direction="backward"))
    assert report.sent_bytes == {
        "ring": (3 * made.kv_bytes,) * 4,
        "ring_grad": (3 * made.dkv_bytes,) * 4,
        "columns": (made.columns_bytes("backward"),) * 4,
    }
    assert report.transfers == 4 * 6 + 1
    assert report.phases == 6
    assert report.peak_bytes == 3 * made.kv_bytes + 3 * made.dkv_bytes


def test_pulls_differ_from_sends_in_transport_and_shared_buffers_alone() -> None:
    made = shape(4, 64)
    for direction in DIRECTIONS:
        for keep_kv in (False, True):
            sent, pulled = (
                Gather(chunks=2, keep_kv=keep_kv, pull=pull).build(shape=made, direction=direction)
                for pull in (False, True)
            )
            fetches = direction == "forward" or not keep_kv
            shared = {buffer.name for buffer in pulled.buffers if buffer.shared}
            grads = {f"dkv:{slot}" for slot in range(4)} if direction == "backward" else set()
            assert shared == grads | ({"kv:home"} if fetches else set())
            assert pulled.buffer_bytes == sent.buffer_bytes + made.kv_bytes * fetches  # a copy that others can read
            assert transports(pulled) == {"columns": {"all_reduce"}} | {
                kind: {"pull"} for kind in kinds(fetches, grads)
            }
            assert not sent.shares and pulled.shares and sent.sha256() != pulled.sha256()
            for name in sources(pulled):
                buffers = [replace(buffer, shared=buffer.shared and buffer.name != name) for buffer in pulled.buffers]
                with pytest.raises(ScheduleError, match=f"pulls from {name}, which is not stated as shared"):
                    check(replace(pulled, buffers=tuple(buffers)))
            kept = [replace(buffer, shared=buffer.name == "kept:0") for buffer in pulled.buffers]
            if keep_kv:
                with pytest.raises(ScheduleError, match="kept:0: a layer's own, others cannot read it"):
                    check(replace(pulled, buffers=tuple(kept)))


def sources(schedule: Schedule) -> set[str]:
    phases = [phase for rank in range(schedule.world_size) for phase in schedule.phases(rank)]
    transfers = [transfer for phase in phases for call in phase.group_calls for transfer in call.transfers]
    return {transfer.source_buffer for transfer in transfers if transfer.transport == "pull"}


def transports(schedule: Schedule) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for rank in range(schedule.world_size):
        for transfer in (t for p in schedule.phases(rank) for c in p.group_calls for t in c.transfers):
            found.setdefault(transfer.kind, set()).add(transfer.transport)
    return found


def kinds(fetches: bool, grads: set[str]) -> list[str]:
    return ["kv"] * fetches + ["dkv"] * bool(grads)


def events(schedule: Schedule, rank: int) -> list[tuple[int, str]]:
    """Return (phase, event) of a rank's program, in the order in which it is played."""
    told = []
    for phase in schedule.phases(rank):
        told += [(phase.index, f"wait {name}") for name in phase.waits]
        for call in phase.group_calls:
            moves = (f"{t.id} {t.source_buffer}->{t.buffer}+{t.accumulate_into}" for t in call.transfers)
            told.append((phase.index, f"{call.communicator}: {', '.join(moves)}"))
        for task in phase.tasks:
            told.append((phase.index, f"{task.kind} {task.query}x{task.key} {task.key_buffer} {task.grad_buffer}"))
    return told


def test_a_ring_of_two_forward_with_columns() -> None:
    schedule = Ring(prefetch=1).build(shape=shape(2, 64), direction="forward")
    assert events(schedule, 0) == [
        (0, "ring: kv/0.0/0>1/1 kv:home->kv:0+None, kv/1.0/1>0/1 kv:home->kv:0+None"),
        (0, "columns: columns/-/all/0 columns:home->columns:home+None"),
        (0, "block 0.0x0.0 kv:home None"),
        (1, "wait kv/0.0/0>1/1"),
        (1, "wait kv/1.0/1>0/1"),
        (1, "wait columns/-/all/0"),
        (1, "columns 0.0xNone columns:home None"),
        (1, "block 0.0x1.0 kv:0 None"),
    ]


def test_a_ring_of_three_backward() -> None:
    schedule = Ring(prefetch=1).build(shape=shape(3), direction="backward")
    assert events(schedule, 0) == [
        (0, "ring: kv/0.0/0>1/1 kv:home->kv:0+None, kv/2.0/2>0/1 kv:home->kv:0+None"),
        (0, "block 0.0x0.0 kv:home dkv:home"),
        (1, "wait kv/0.0/0>1/1"),
        (1, "wait kv/2.0/2>0/1"),
        (1, "ring: kv/2.0/0>1/2 kv:0->kv:1+None, kv/1.0/2>0/2 kv:0->kv:1+None"),
        (1, "block 0.0x2.0 kv:0 dkv:1"),
        (2, "wait kv/2.0/0>1/2"),
        (2, "wait kv/1.0/2>0/2"),
        (2, "ring_grad: dkv/2.0/0>1/2 dkv:1->landing:0+dkv:0, dkv/1.0/2>0/2 dkv:1->landing:0+dkv:0"),
        (2, "block 0.0x1.0 kv:1 dkv:0"),
        (3, "wait dkv/2.0/0>1/2"),
        (3, "wait dkv/1.0/2>0/2"),
        (3, "ring_grad: dkv/1.0/0>1/3 dkv:0->landing:0+dkv:home, dkv/0.0/2>0/3 dkv:0->landing:0+dkv:home"),
        (4, "wait dkv/1.0/0>1/3"),
        (4, "wait dkv/0.0/2>0/3"),
    ]
