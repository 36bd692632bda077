"""Layouts: what builders make is proved by `check`, played in random orders, and one small ring is known by heart."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsering.planner.check.check import check, check_step
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.registry import build
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.two_level import TwoLevel
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import (
    ALL_RANKS,
    DIRECTIONS,
    Direction,
    GroupCall,
    Schedule,
    ShardId,
    Transfer,
    slots_from,
)
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.traces.errors import InputError, ScheduleError, UnsupportedError


def shape(world_size: int, columns: int = 0) -> AttentionShape:
    return AttentionShape(
        world_size=world_size,
        tokens_per_rank=128,
        heads=2 * world_size,
        kv_heads=2,
        head_dim=64,
        columns_capacity=columns,
    )


def layouts(world_size: int) -> Iterator[tuple[str, dict[str, int]]]:
    yield from (Ring(prefetch=depth) for depth in (1, 2, 3, 9))
    yield from (Gather(chunks=chunks) for chunks in (1, 2, 3, 9))
    yield Gather(chunks=2, keep_kv=True)
    yield from (Gather(chunks=chunks, keep_kv=chunks - 1, pull=True) for chunks in (1, 2))
    yield Gather(chunks=1, narrow_gradients=True)
    yield Gather(chunks=3, keep_kv=True, narrow_gradients=True, pull=True)
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    yield from (Hierarchical(inner_size=size) for size in divisors)
    yield from (TwoLevel(inner_size=size) for size in divisors)
    yield TwoLevel(inner_size=divisors[len(divisors) // 2], narrow_gradients=True)
    for size in divisors:
        yield TwoLevel(inner_size=size, halves=True)
        cuts = [chunks for chunks in range(2, size + 1) if size % chunks == 0]
        yield from (TwoLevel(inner_size=size, chunks=chunks) for chunks in cuts)
    yield Collective()
    yield Collective(chunks=2)
    heads, kv_heads = 2 * world_size, 2
    even = [size for size in divisors if not heads % size and not max(size, kv_heads) % min(size, kv_heads)]
    yield from (Ulysses(degree=size, chunks=chunks) for size in even for chunks in (1, 2, 9))


def groups_of(layout: Layout) -> int:
    """Return in how many groups a layout splits the heads."""
    return {"ulysses": parameters.get("degree", 1), "collective": parameters.get("chunks", 1)}.get(layout, 1)


TABLE = [
    pytest.param(world_size, layout, parameters, id=f"{layout}-{world_size}-{'-'.join(map(str, parameters.values()))}")
    for world_size in (1, 2, 3, 4, 6, 8)
    for layout, parameters in layouts(world_size)
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("world_size", "layout"), TABLE)
def test_every_layout_is_proved(world_size: int, layout: Layout, direction: Direction) -> None:
    for columns in (0, 64):
        schedule = build(layout, parameters, shape=shape(world_size, columns), direction=direction)
        report = check(schedule)
        assert report.peak_bytes <= schedule.buffer_bytes
        groups = groups_of(layout, parameters)
        assert report.tasks == groups * (world_size**2 + world_size * bool(columns))


@pytest.mark.parametrize(("layout", "parameters"), [Hierarchical(inner_size=8), Gather(chunks=4)])
def test_32_ranks_are_proved_in_seconds(layout: Layout) -> None:
    schedule = build(layout, parameters, shape=shape(32, 64), direction="backward")
    start = time.process_time()
    report = check(schedule)
    assert time.process_time() - start < 5
    # 31 of 32 K/V and as many dK/dV to move per rank, and one sum of columns
    assert report.transfers == 2 * 32 * 31 + 1


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
        for keep_kv in (0, 1):
            sent, pulled = (
                Gather(chunks=2, keep_kv=keep_kv, pull=pull).build(shape=made, direction=direction) for pull in (0, 1)
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


# What schedules said before they could share buffers: plan files name these hashes.
HASHES = {
    ("collective", "backward"): "1e4baac6658d6fad70b2da8827b6a9ee2b3cfcac4e303e6eb70de30d63140b78",
    ("collective", "forward"): "40ac62bd0e5ea0661fd5bb3e4e03e9bd78c138784b928b20508ab56c61162803",
    ("gather", "backward"): "6993308efffc63d27a2b6f7e6474fa58cfc37eb46b810a0ec6119a3e5bcda5f6",
    ("gather", "forward"): "f4131b50e5a21ff227ab9f0a755395eb5cc2a9f3b95c090e363bcbc6e21d92cb",
    ("ring", "backward"): "2937aa6d85dfe9c2fcda92352e2556609d7a81890cd3ce7739b7cfa2b3aebff2",
    ("ring", "forward"): "6a4241be06113a550f8a756d16a28be6a2082fc4af1c9a11c9c6998877f2ecec",
}


@pytest.mark.parametrize(("layout", "direction"), sorted(HASHES))
def test_schedules_without_pulls_keep_their_hashes(layout: str, direction: Direction) -> None:
    schedule = build(layout, {}, shape=shape(4, 64), direction=direction)
    assert schedule.sha256() == HASHES[layout, direction]


# One program by heart


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


# Played


Content = Counter[tuple[str, int, int]]


class Player:
    """Plays a schedule with contents that can be counted, transfers moving at random moments between launch and wait.

    Knows nothing of `check`: it waits, copies and adds, and fails on a deadlock.
    """

    def __init__(self, schedule: Schedule, chance: random.Random) -> None:
        self.schedule, self.chance = schedule, chance
        self.world = range(schedule.world_size)
        self.held: list[dict[str, Content]] = [
            {f"{kind}:home": Counter({(kind, r, 0): 1}) for kind in ("kv", "q")} for r in self.world
        ]
        self.place = [0 for _ in self.world]
        self.queues: dict[tuple[int, str], list[GroupCall]] = {}
        self.moved: dict[str, Content] = {}
        self.done: set[tuple[int, str]] = set()
        if schedule.direction == "backward":
            for rank, held in enumerate(self.held):
                held["columns:home"] = Counter({("columns", r, 0): 1 for r in self.world})
                for name, shard in schedule.kept(rank).items():
                    held[name] = Counter({("kv", shard.sequence_part, 0): 1})
        else:
            for rank, held in enumerate(self.held):
                held["columns:home"] = Counter({("columns", rank, 0): 1})

    def play(self) -> None:
        while any(self.place[rank] < len(self.schedule.phases(rank)) for rank in self.world):
            ready = [rank for rank in self.world if self._may_begin(rank)]
            ready_moves = self._moves()
            assert ready or ready_moves, "deadlock"
            pick = self.chance.randrange(len(ready) + len(ready_moves))
            if pick < len(ready):
                self._begin(ready[pick])
            else:
                self._move(ready_moves[pick - len(ready)])

    def _may_begin(self, rank: int) -> bool:
        phases = self.schedule.phases(rank)
        left = self.place[rank] < len(phases)
        return left and all((rank, name) in self.done for name in phases[self.place[rank]].waits)

    def _begin(self, rank: int) -> None:
        phase, held = self.schedule.phases(rank)[self.place[rank]], self.held[rank]
        self.place[rank] += 1
        transfers = {t.id: t for p in self.schedule.phases(rank) for c in p.group_calls for t in c.transfers}
        for transfer in (transfers[name] for name in phase.waits):
            if transfer.accumulate_into and transfer.source != rank:
                into = "dcolumns:sum" if transfer.kind == "columns" else transfer.accumulate_into
                held[into] = held.get(into, Counter()) + held.pop(transfer.buffer)
        for call in phase.group_calls:
            self.queues.setdefault((rank, call.communicator), []).append(call)
        for task in phase.tasks:
            key = task.key.sequence_part if task.key else -1
            assert set(held[task.key_buffer]) == (
                {("kv", key, 0)} if task.key else {("columns", r, 0) for r in self.world}
            )
            query = task.query.sequence_part
            assert set(held[task.query_buffer]) == {("q", query, 0)}
            held.setdefault(task.out_buffer, Counter())[("out", query, key)] += 1
            if task.grad_buffer:
                held.setdefault(task.grad_buffer, Counter())[("grad", query, key)] += 1

    def _moves(self) -> list[Transfer]:
        heads = {key: queue[0] for key, queue in self.queues.items() if queue}
        found: dict[str, list[int]] = {}
        transfers: dict[str, Transfer] = {}
        for (rank, _), call in heads.items():
            for transfer in call.transfers:
                if transfer.id not in self.moved:
                    found.setdefault(transfer.id, []).append(rank)
                    transfers[transfer.id] = transfer
        ends = {name: len(self.world) if t.source == ALL_RANKS else 2 for name, t in transfers.items()}
        return [transfers[name] for name in sorted(found) if len(found[name]) == ends[name]]

    def _move(self, transfer: Transfer) -> None:
        if transfer.kind == "columns":
            content = sum((self.held[rank][transfer.buffer] for rank in self.world), Counter())
            for rank in self.world:
                self.held[rank][transfer.buffer] = Counter(content)
        elif transfer.source == ALL_RANKS:
            content, gathers = Counter(), transfer.transport == "all_gather"
            slots = slots_from(transfer.buffer if gathers else transfer.source_buffer, len(self.world))
            for owner, slot in enumerate(slots):
                if gathers:
                    for rank in self.world:
                        self.held[rank][slot] = Counter(self.held[owner]["kv:home"])
                else:
                    sums = (self.held[rank].pop(slot) for rank in self.world)
                    self.held[owner][transfer.buffer] = sum(sums, Counter())
        else:
            source = self.held[transfer.source]
            moves = transfer.kind in ("dkv", "out")
            content = source.pop(transfer.source_buffer) if moves else source[transfer.source_buffer]
            assert transfer.buffer not in self.held[transfer.destination] or not moves, "gradients overwritten"
            self.held[transfer.destination][transfer.buffer] = Counter(content)
        self.moved[transfer.id] = content
        for (rank, _), queue in self.queues.items():
            if queue and all(t.id in self.moved for t in queue[0].transfers):
                self.done |= {(rank, t.id) for t in queue.pop(0).transfers}


@given(data=st.data())
def test_layouts_played_in_random_orders_bring_everything_home(data: st.DataObject) -> None:
    """Every pair once for each head group, results and gradients."""
    world_size = data.draw(st.integers(1, 6))
    layout, parameters = data.draw(st.sampled_from(list(layouts(world_size))))
    direction = data.draw(st.sampled_from(DIRECTIONS))
    columns = data.draw(st.sampled_from([0, 64]))
    schedule = build(layout, parameters, shape=shape(world_size, columns), direction=direction)
    player = Player(schedule, data.draw(st.randoms(use_true_random=False)))
    player.play()
    groups = groups_of(layout, parameters)
    every = [part for part in range(world_size) for _ in range(groups)]
    for rank, held in enumerate(player.held):
        seen = every + [-1] * groups * bool(columns)
        assert held["out:home"] == Counter(("out", rank, key) for key in seen)
        if direction == "backward":
            assert held["dkv:home"] == Counter(("grad", query, rank) for query in every)
            if columns:
                assert held["dcolumns:sum"] == Counter(("grad", query, -1) for query in every)


# Refusals


def test_what_builders_refuse() -> None:
    with pytest.raises(InputError, match="prefetch: must be at least 1, not 0"):
        Ring(prefetch=0).build(shape=shape(4), direction="forward")
    with pytest.raises(InputError, match="chunks: must be at least 1, not 0"):
        Gather(chunks=0).build(shape=shape(4), direction="forward")
    with pytest.raises(InputError, match="pull: is 0 or 1, not 2"):
        Gather(pull=True).build(shape=shape(4), direction="forward")
    with pytest.raises(InputError, match="inner_size: 3 does not divide 4 ranks"):
        Hierarchical(inner_size=3).build(shape=shape(4), direction="forward")
    with pytest.raises(InputError, match="layout: 'star' is not one of"):
        build("star", {}, shape=shape(4), direction="forward")
    with pytest.raises(InputError, match="parameters"):
        Ring(chunks=2).build(shape=shape(4), direction="forward")
    for degree, problem in (
        (3, r"degree: 4 ranks are no groups of 3"),
        (0, r"degree: must be at least 1, not 0"),
    ):
        with pytest.raises((InputError, UnsupportedError), match=problem):
            Ulysses(degree=degree).build(shape=shape(4), direction="forward")
    for layout in ("ulysses", "collective"):
        with pytest.raises(InputError, match="chunks: must be at least 1, not 0"):
            build(layout, {"chunks": 0}, shape=shape(4), direction="forward")
    with pytest.raises(UnsupportedError, match="chunks: 2 K/V heads cannot be cut into 3 chunks"):
        Collective(chunks=3).build(shape=shape(4), direction="forward")
    with pytest.raises(UnsupportedError, match=r"degree: 6 heads \(2 K/V heads\) cannot be split evenly over 3 ranks"):
        Ulysses().build(shape=shape(3), direction="forward")
    with pytest.raises(InputError, match="kv_heads: 4 heads are not a multiple of 3 KV heads"):
        AttentionShape(world_size=1, tokens_per_rank=1, heads=4, kv_heads=3, head_dim=1)


def test_the_hash_names_the_expanded_schedule() -> None:
    one = Ring(prefetch=1).build(shape=shape(4), direction="forward")
    same = Ring(prefetch=1).build(shape=shape(4), direction="forward")
    other = Ring(prefetch=2).build(shape=shape(4), direction="forward")
    assert one.sha256() == same.sha256() != other.sha256()
