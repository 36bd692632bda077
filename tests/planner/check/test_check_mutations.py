"""`check` accepts what builders make and rejects every mutation of it.

A mutation is a function that lists the *sites* where it applies; each site makes one mutated schedule. What would leave
an equivalent program (a landing slot exchanged for a free one, a wait moved to before its first use) is no site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sparsering.planner.check.check import check
from sparsering.planner.check.rules import every_phase
from sparsering.planner.layouts.registry import build
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import (
    ALL_RANKS,
    DIRECTIONS,
    DKV_HOME,
    GroupCall,
    Phase,
    Schedule,
    ShardId,
    Task,
    Transfer,
    with_programs,
)
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.traces.errors import ScheduleError

Mutant = Callable[[], Schedule]
Program = tuple[Phase, ...]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    return draw(schedules_of(draw(st.integers(1, 6))))


@st.composite
def reduced_schedules(draw: st.DrawFn) -> tuple[Schedule, Pairs]:
    """A schedule that leaves pairs out, and the pairs that it has."""
    world_size = draw(st.integers(2, 6))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=world_size, max_size=world_size), min_size=world_size,
                         max_size=world_size))  # fmt: skip
    pairs = Pairs.of(np.array(rows))
    return draw(schedules_of(world_size, pairs)), pairs


@st.composite
def schedules_of(draw: st.DrawFn, world_size: int, pairs: Pairs | None = None) -> Schedule:
    kinds = ["ring", "gather", "hierarchical", "ulysses", *(["collective", "two_level"] if pairs is None else [])]
    layout = draw(st.sampled_from(kinds))
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    cut = [{"inner_size": size, "chunks": size} for size in divisors if size > 1]
    cut += [{"inner_size": size, "halves": 1} for size in divisors]
    degrees = [size for size in divisors if shape(world_size).splits_heads(size)]
    parameters = {
        "ring": {"prefetch": draw(st.integers(1, 4))},
        "gather": {name: draw(st.integers(0, 1)) for name in ("keep_kv", "pull")} | {"chunks": draw(st.integers(1, 4))},
        "hierarchical": {"inner_size": draw(st.sampled_from(divisors))},
        "two_level": draw(st.sampled_from([{"inner_size": size} for size in divisors] + cut)),
        "collective": draw(st.sampled_from([{}, {"chunks": 2}])),
        "ulysses": {"degree": draw(st.sampled_from(degrees)), "chunks": draw(st.integers(1, 3))},
    }[layout]
    made = shape(world_size, draw(st.sampled_from([0, 32])))
    return build(layout, parameters, shape=made, direction=draw(st.sampled_from(DIRECTIONS)), pairs=pairs)


def shape(world_size: int, columns: int = 0) -> AttentionShape:
    return AttentionShape(
        world_size=world_size,
        tokens_per_rank=64,
        heads=2 * world_size,
        kv_heads=2,
        head_dim=16,
        columns_capacity=columns,
    )


# Editing


def programs(schedule: Schedule) -> dict[int, Program]:
    return {rank: schedule.phases(rank) for rank in range(schedule.world_size)}


def with_phase(schedule: Schedule, rank: int, phase: Phase) -> Schedule:
    """Replace (or append) one phase of one rank."""
    phases = schedule.phases(rank)
    return with_programs(schedule, {rank: (*phases[: phase.index], phase, *phases[phase.index + 1 :])})


def with_transfers(
    schedule: Schedule, name: str, change: Callable[[Transfer], Transfer | None], *, ranks: set[int]
) -> Schedule:
    """Change (None: drop) the transfer of that name on some ranks, waits and all."""
    return with_programs(schedule, {rank: _changed(schedule.phases(rank), name, change) for rank in ranks})


def _changed(phases: Program, name: str, change: Callable[[Transfer], Transfer | None]) -> Program:
    renamed: dict[str, str | None] = {}

    def changed_call(call: GroupCall) -> GroupCall:
        kept = []
        for transfer in call.transfers:
            new = change(transfer) if transfer.id == name else transfer
            renamed[transfer.id] = new.id if new else None
            kept += [new] if new else []
        return replace(call, transfers=tuple(kept))

    calls = [tuple(call for call in map(changed_call, phase.group_calls) if call.transfers) for phase in phases]
    waits = [tuple(new for new in (renamed[old] for old in phase.waits) if new) for phase in phases]
    return tuple(
        replace(phase, group_calls=its_calls, waits=its_waits)
        for phase, its_calls, its_waits in zip(phases, calls, waits, strict=True)
    )


def ends(schedule: Schedule) -> Iterator[tuple[int, Phase, Transfer]]:
    """Every (rank, phase, transfer) launched."""
    for rank, phases in programs(schedule).items():
        for phase in phases:
            for call in phase.group_calls:
                yield from ((rank, phase, transfer) for transfer in call.transfers)


def sides(schedule: Schedule, transfer: Transfer) -> list[set[int]]:
    """The ranks at which a transfer can be changed: one end, the other, or all of them."""
    if transfer.source == ALL_RANKS:
        everyone = set(range(schedule.world_size))
        return [{rank} for rank in everyone] + [everyone]
    return [{transfer.source}, {transfer.destination}, {transfer.source, transfer.destination}]


def every_transfer(schedule: Schedule) -> list[Transfer]:
    return list({transfer.id: transfer for _, _, transfer in ends(schedule)}.values())


def every_task(schedule: Schedule) -> Iterator[tuple[int, Phase, int]]:
    for rank, phases in programs(schedule).items():
        for phase in phases:
            yield from ((rank, phase, index) for index in range(len(phase.tasks)))


def edited(transfer: Transfer, **changes: object) -> Transfer:
    return replace(transfer, **changes)  # type: ignore[arg-type]


# Mutations


def drop_transfer(schedule: Schedule) -> Iterator[Mutant]:
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            yield partial(with_transfers, schedule, transfer.id, lambda _: None, ranks=ranks)


def drop_group_call(schedule: Schedule) -> Iterator[Mutant]:
    """At one rank, with its waits or without."""
    for rank, phases in programs(schedule).items():
        for phase in phases:
            for index, call in enumerate(phase.group_calls):
                kept = phase.group_calls[:index] + phase.group_calls[index + 1 :]
                without = with_phase(schedule, rank, replace(phase, group_calls=kept))
                yield partial(_identity, without)
                dropped = {transfer.id for transfer in call.transfers}
                yield partial(_without_waits, without, rank, dropped)


def _identity(schedule: Schedule) -> Schedule:
    return schedule


def _without_waits(schedule: Schedule, rank: int, dropped: set[str]) -> Schedule:
    phases = schedule.phases(rank)
    waits = [tuple(name for name in phase.waits if name not in dropped) for phase in phases]
    kept = [replace(phase, waits=its_waits) for phase, its_waits in zip(phases, waits, strict=True)]
    return with_programs(schedule, {rank: kept})


def swap_transfer_buffer(schedule: Schedule) -> Iterator[Mutant]:
    """Another source or destination. A landing slot is not exchanged at both ends for one that may be free."""
    names = [buffer.name for buffer in schedule.buffers]
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            for name in names:
                if name != transfer.source_buffer:
                    yield partial(_edit, schedule, transfer, ranks, source_buffer=name)
                if name != transfer.buffer and not (len(ranks) > 1 and may_be_free(schedule, transfer, name)):
                    yield partial(_edit, schedule, transfer, ranks, buffer=name)


def may_be_free(schedule: Schedule, transfer: Transfer, name: str) -> bool:
    """Whether what lands and is added elsewhere might as well land in `name`: no other use of it is known here."""
    kinds = {buffer.name: buffer.kind for buffer in schedule.buffers}
    if transfer.accumulate_into is None or kinds[name] != transfer.kind or name.endswith(":home"):
        return False
    together = next(
        call.transfers
        for phase in schedule.phases(transfer.destination)
        for call in phase.group_calls
        if transfer in call.transfers
    )
    busy = {other.source_buffer for other in together if other.source == transfer.destination}
    return name not in busy | {transfer.accumulate_into}


def _edit(schedule: Schedule, transfer: Transfer, ranks: set[int], **changes: object) -> Schedule:
    return with_transfers(schedule, transfer.id, lambda old: edited(old, **changes), ranks=ranks)


def wrong_accumulate_into(schedule: Schedule) -> Iterator[Mutant]:
    names = [None, *(buffer.name for buffer in schedule.buffers)]
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            for name in names:
                if name != transfer.accumulate_into:
                    yield partial(_edit, schedule, transfer, ranks, accumulate_into=name)


def wrong_transfer_shard(schedule: Schedule) -> Iterator[Mutant]:
    parts = [ShardId(sequence_part=part) for part in range(schedule.world_size + 1)]
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            for shard in [*parts, None, ShardId(sequence_part=0, head_group=schedule.num_heads)]:
                if shard != transfer.shard:
                    yield partial(_edit, schedule, transfer, ranks, shard=shard)


def ends_disagree(schedule: Schedule) -> Iterator[Mutant]:
    """At one end only: size, transport, sequence, kind or communicator."""
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            if len(ranks) < schedule.world_size and len(ranks) == 1:
                yield partial(_edit, schedule, transfer, ranks, capacity_bytes=transfer.capacity_bytes - 1)
                yield partial(_edit, schedule, transfer, ranks, sequence=transfer.sequence + 1000)
                other = "p2p" if transfer.transport == "pull" else "pull"
                yield partial(_edit, schedule, transfer, ranks, transport=other)
                yield partial(_edit, schedule, transfer, ranks, communicator="elsewhere")


def too_small_capacity(schedule: Schedule) -> Iterator[Mutant]:
    """A stated slot one byte too small, or a transfer larger than its slots."""
    sizes = {buffer.name: buffer.capacity_bytes for buffer in schedule.buffers}
    for transfer in every_transfer(schedule):
        for name in {transfer.source_buffer, transfer.buffer, transfer.accumulate_into} - {None}:
            if transfer.kind != "columns" or name == transfer.buffer:
                yield partial(_shrink, schedule, str(name), transfer.capacity_bytes - 1)
        everyone = sides(schedule, transfer)[-1]
        yield partial(_edit, schedule, transfer, everyone, capacity_bytes=sizes[transfer.buffer] + 1)


def _shrink(schedule: Schedule, name: str, capacity_bytes: int) -> Schedule:
    buffers = [replace(b, capacity_bytes=capacity_bytes) if b.name == name else b for b in schedule.buffers]
    return replace(schedule, buffers=tuple(buffers))


def buffer_not_stated(schedule: Schedule) -> Iterator[Mutant]:
    used = {name for t in every_transfer(schedule) for name in (t.source_buffer, t.buffer)}
    for name in sorted(used):
        buffers = tuple(buffer for buffer in schedule.buffers if buffer.name != name)
        yield partial(replace, schedule, buffers=buffers)


def _with_tasks(schedule: Schedule, rank: int, phase: Phase, tasks: tuple[Task, ...]) -> Schedule:
    return with_phase(schedule, rank, replace(phase, tasks=tasks))


def drop_task(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        yield partial(_with_tasks, schedule, rank, phase, phase.tasks[:index] + phase.tasks[index + 1 :])


def duplicate_task(schedule: Schedule) -> Iterator[Mutant]:
    """In the same phase, or in any other phase of the rank."""
    for rank, phase, index in every_task(schedule):
        for other in schedule.phases(rank):
            yield partial(_with_tasks, schedule, rank, other, (*other.tasks, phase.tasks[index]))


def move_task_to_another_rank(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        without = _with_tasks(schedule, rank, phase, phase.tasks[:index] + phase.tasks[index + 1 :])
        for other in set(range(schedule.world_size)) - {rank}:
            end = without.phases(other)[-1]
            yield partial(_with_tasks, without, other, end, (*end.tasks, phase.tasks[index]))


def swap_task_buffer(schedule: Schedule) -> Iterator[Mutant]:
    """Another key, query, out or gradient buffer, of any kind, or none."""
    names = [buffer.name for buffer in schedule.buffers] + ["nowhere"]
    for rank, phase, index in every_task(schedule):
        task = phase.tasks[index]
        for name in names:
            for part in ("key_buffer", "query_buffer", "out_buffer", "grad_buffer"):
                if getattr(task, part) != name:
                    yield partial(_edit_task, schedule, rank, phase, index, **{part: name})
        if task.grad_buffer is not None:
            yield partial(_edit_task, schedule, rank, phase, index, grad_buffer=None)


def wrong_task_shard(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        task = phase.tasks[index]
        for part in range(schedule.world_size + 1):
            shard = replace(task.query, sequence_part=part)
            if shard != task.query:
                yield partial(_edit_task, schedule, rank, phase, index, query=shard)
            if shard != task.key:
                yield partial(_edit_task, schedule, rank, phase, index, key=shard)
        if task.key is not None:
            yield partial(_edit_task, schedule, rank, phase, index, key=None)


def wrong_heads(schedule: Schedule) -> Iterator[Mutant]:
    for rank, phase, index in every_task(schedule):
        first, last = phase.tasks[index].heads
        for heads in ((first, last - 1), (first + 1, last), (first, last + 1), (first - 1, last), (last, first)):
            yield partial(_edit_task, schedule, rank, phase, index, heads=heads)


def _edit_task(schedule: Schedule, rank: int, phase: Phase, index: int, **changes: object) -> Schedule:
    task = replace(phase.tasks[index], **changes)  # type: ignore[arg-type]
    return _with_tasks(schedule, rank, phase, (*phase.tasks[:index], task, *phase.tasks[index + 1 :]))


def every_wait(schedule: Schedule) -> Iterator[tuple[int, Phase, Phase, Transfer]]:
    """Every (rank, phase that launches, phase that waits, transfer)."""
    launched = {(rank, transfer.id): (phase, transfer) for rank, phase, transfer in ends(schedule)}
    for rank, phases in programs(schedule).items():
        for phase in phases:
            for name in phase.waits:
                yield rank, launched[rank, name][0], phase, launched[rank, name][1]


def remove_wait(schedule: Schedule) -> Iterator[Mutant]:
    for rank, _, phase, transfer in every_wait(schedule):
        yield partial(_without_waits, schedule, rank, {transfer.id} & set(phase.waits))


def repeat_wait(schedule: Schedule) -> Iterator[Mutant]:
    for rank, _, phase, transfer in every_wait(schedule):
        for other in schedule.phases(rank)[phase.index :]:
            yield partial(with_phase, schedule, rank, replace(other, waits=(*other.waits, transfer.id)))


def wait_before_launch(schedule: Schedule) -> Iterator[Mutant]:
    for rank, launch, _, transfer in every_wait(schedule):
        without = _without_waits(schedule, rank, {transfer.id})
        for phase in without.phases(rank)[: launch.index + 1]:
            yield partial(with_phase, without, rank, replace(phase, waits=(*phase.waits, transfer.id)))


def wait_after_first_use(schedule: Schedule) -> Iterator[Mutant]:
    """To any phase after that in which the wait stands now, where something in this very phase relies on it."""
    for rank, _, phase, transfer in every_wait(schedule):
        if relies_on(phase, rank, transfer):
            without = _without_waits(schedule, rank, {transfer.id})
            phases = without.phases(rank)
            for later in (*phases[phase.index + 1 :], Phase(index=len(phases))):
                waited = replace(later, waits=(*later.waits, transfer.id))
                yield partial(with_phase, without, rank, waited)
                yield partial(with_phase, without, rank, replace(later, waits=(transfer.id, *later.waits)))


def relies_on(phase: Phase, rank: int, transfer: Transfer) -> bool:
    """Whether a phase computes with what was received, sends a sum it is part of, or reuses its slot."""
    launched = [each for call in phase.group_calls for each in call.transfers]
    refilled = {each.buffer for each in launched if each.destination == rank}
    sent = {each.source_buffer for each in launched if each.source == rank}
    read = {name for task in phase.tasks for name in (task.key_buffer, task.query_buffer)}
    written = {name for task in phase.tasks for name in (task.out_buffer, task.grad_buffer)}
    if transfer.source == rank:
        return transfer.source_buffer in refilled | written
    if transfer.accumulate_into is not None:
        return transfer.buffer in refilled or transfer.accumulate_into in sent
    return transfer.buffer in read | refilled


def swap_communicators(schedule: Schedule) -> Iterator[Mutant]:
    """Two communicators launched in the other order on one rank."""
    for rank, phases in programs(schedule).items():
        for phase in phases:
            calls = phase.group_calls
            for index, (one, two) in enumerate(pairwise(calls)):
                if one.communicator != two.communicator:
                    swapped = (*calls[:index], two, one, *calls[index + 2 :])
                    yield partial(with_phase, schedule, rank, replace(phase, group_calls=swapped))


def swap_calls(schedule: Schedule) -> Iterator[Mutant]:
    """Two calls of one communicator launched in each other's place on one rank."""
    yield from _swapped_calls(schedule, one_route=False)


def swap_calls_of_one_route(schedule: Schedule) -> Iterator[Mutant]:
    """The same, but only where both calls move something between the same two ranks: others may be independent."""
    yield from _swapped_calls(schedule, one_route=True)


def _swapped_calls(schedule: Schedule, *, one_route: bool) -> Iterator[Mutant]:
    for rank, phases in programs(schedule).items():
        places = [(phase.index, index) for phase in phases for index in range(len(phase.group_calls))]
        for start, one in enumerate(places):
            for two in places[start + 1 :]:
                first, second = (phases[phase].group_calls[index] for phase, index in (one, two))
                shared = {(t.source, t.destination) for t in first.transfers} & {
                    (t.source, t.destination) for t in second.transfers
                }
                if first.communicator == second.communicator and (shared or not one_route):
                    yield partial(_exchange, schedule, rank, {one: second, two: first})


def _exchange(schedule: Schedule, rank: int, calls: dict[tuple[int, int], GroupCall]) -> Schedule:
    phases = [
        replace(
            phase,
            group_calls=tuple(calls.get((phase.index, index), call) for index, call in enumerate(phase.group_calls)),
        )
        for phase in schedule.phases(rank)
    ]
    return with_programs(schedule, {rank: phases})


def launch_on_foreign_ranks(schedule: Schedule) -> Iterator[Mutant]:
    """A communicator whose groups leave out one rank, or that is not listed."""
    for index, communicator in enumerate(schedule.communicators):
        if any(call.communicator == communicator.name for call in every_call(schedule)):
            others = schedule.communicators[:index] + schedule.communicators[index + 1 :]
            yield partial(replace, schedule, communicators=others)
            single = replace(communicator, groups=tuple((rank,) for rank in range(1, schedule.world_size)))
            yield partial(replace, schedule, communicators=(*others[:index], single, *others[index:]))


def every_call(schedule: Schedule) -> Iterator[GroupCall]:
    for phases in programs(schedule).values():
        for phase in phases:
            yield from phase.group_calls


def gradients(schedule: Schedule) -> list[Transfer]:
    """The sums of dK/dV that go from rank to rank."""
    return [each for each in every_transfer(schedule) if each.kind == "dkv" and each.source != ALL_RANKS]


def gradients_stay_where_they_land(schedule: Schedule) -> Iterator[Mutant]:
    """Not added anywhere, or to a slot that has no part in their way home; rounded or not."""
    unused = replace(schedule.buffers[0], name="dkv_nowhere:0", kind="dkv", capacity_bytes=1 << 40)
    stated = replace(schedule, buffers=(*schedule.buffers, unused))
    for transfer in gradients(schedule):
        if transfer.accumulate_into is not None:
            both = sides(schedule, transfer)[-1]
            for into in (None, unused.name):
                yield partial(_edit, stated, transfer, both, accumulate_into=into)
                yield partial(_edit, stated, transfer, both, accumulate_into=into, narrow=True)


def gradients_land_where_nothing_takes_them(schedule: Schedule) -> Iterator[Mutant]:
    """In the slot that they are to be added to, or in another, where they are left."""
    unused = replace(schedule.buffers[0], name="dkv_nowhere:0", kind="dkv", capacity_bytes=1 << 40)
    stated = replace(schedule, buffers=(*schedule.buffers, unused))
    for transfer in gradients(schedule):
        both = sides(schedule, transfer)[-1]
        if transfer.accumulate_into == DKV_HOME:
            yield partial(_edit, stated, transfer, both, buffer=DKV_HOME, accumulate_into=None)
        yield partial(_edit, stated, transfer, both, buffer=unused.name, accumulate_into=None)


def gradients_sent_twice(schedule: Schedule) -> Iterator[Mutant]:
    """The same sum once more: in the same call, or when everything else is done."""
    for transfer in gradients(schedule):
        again = edited(transfer, sequence=transfer.sequence + 1000)
        yield partial(_again_at_the_end, schedule, again)
        yield partial(_again_in_the_call, schedule, transfer, again)


def _again_at_the_end(schedule: Schedule, again: Transfer) -> Schedule:
    changed = {}
    for rank in (again.source, again.destination):
        phases = schedule.phases(rank)
        call = GroupCall(communicator=again.communicator, transfers=(again,))
        launch = Phase(index=len(phases), group_calls=(call,))
        changed[rank] = (*phases, launch, Phase(index=len(phases) + 1, waits=(again.id,)))
    return with_programs(schedule, changed)


def _again_in_the_call(schedule: Schedule, transfer: Transfer, again: Transfer) -> Schedule:
    def doubled(call: GroupCall) -> GroupCall:
        return replace(call, transfers=(*call.transfers, again)) if transfer in call.transfers else call

    changed = {
        rank: [
            replace(
                phase,
                group_calls=tuple(map(doubled, phase.group_calls)),
                waits=(*phase.waits, again.id) if transfer.id in phase.waits else phase.waits,
            )
            for phase in schedule.phases(rank)
        ]
        for rank in (transfer.source, transfer.destination)
    }
    return with_programs(schedule, changed)


def column_gradients_lost(schedule: Schedule) -> Iterator[Mutant]:
    """Summed and left; not summed at all; computed on one rank when the sum is under way."""
    if schedule.direction == "forward":
        return
    for transfer in every_transfer(schedule):
        if transfer.kind == "columns":
            everyone = sides(schedule, transfer)[-1]
            yield partial(with_transfers, schedule, transfer.id, lambda _: None, ranks=everyone)
            for into in {None, *(buffer.name for buffer in schedule.buffers)} - {transfer.accumulate_into}:
                yield partial(_edit, schedule, transfer, everyone, accumulate_into=into)
            yield from _late_columns(schedule, transfer)


def _late_columns(schedule: Schedule, transfer: Transfer) -> Iterator[Mutant]:
    launched = {rank: phase.index for rank, phase, each in ends(schedule) if each == transfer}
    for rank, phase, index in every_task(schedule):
        if phase.tasks[index].key is None:
            without = _with_tasks(schedule, rank, phase, phase.tasks[:index] + phase.tasks[index + 1 :])
            for later in without.phases(rank)[launched[rank] :]:
                yield partial(_with_tasks, without, rank, later, (*later.tasks, phase.tasks[index]))


MUTATIONS = [
    drop_transfer,
    drop_group_call,
    swap_transfer_buffer,
    wrong_accumulate_into,
    wrong_transfer_shard,
    ends_disagree,
    too_small_capacity,
    buffer_not_stated,
    drop_task,
    duplicate_task,
    move_task_to_another_rank,
    swap_task_buffer,
    wrong_task_shard,
    wrong_heads,
    remove_wait,
    repeat_wait,
    wait_before_launch,
    wait_after_first_use,
    swap_communicators,
    swap_calls,
    launch_on_foreign_ranks,
    gradients_stay_where_they_land,
    gradients_land_where_nothing_takes_them,
    gradients_sent_twice,
    column_gradients_lost,
]


@given(schedule=schedules())
def test_every_built_schedule_is_accepted(schedule: Schedule) -> None:
    check(schedule)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_every_mutation_is_rejected(mutation: Callable[[Schedule], Iterator[Mutant]], data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    sites = list(mutation(schedule))
    assume(sites)
    mutant = data.draw(st.sampled_from(sites))()
    with pytest.raises(ScheduleError):
        check(mutant)


@given(made=reduced_schedules())
def test_every_reduced_schedule_is_accepted_and_nothing_in_it_is_idle(made: tuple[Schedule, Pairs]) -> None:
    schedule, pairs = made
    report = check(schedule, inactive=pairs.left_out())
    has_columns = any(transfer.kind == "columns" for transfer in every_transfer(schedule))
    computed = pairs.matrix
    if schedule.layout == "ulysses":  # the own keys are always computed
        computed = computed | np.eye(schedule.world_size, dtype=bool)
    groups = 1 + max(task.query.head_group for _, phase in every_phase(schedule) for task in phase.tasks)
    assert report.tasks == groups * (int(computed.sum()) + has_columns * schedule.world_size)
    used = {name for transfer in every_transfer(schedule) for name in (transfer.source_buffer, transfer.buffer)}
    stated = {buffer.name for buffer in schedule.buffers if buffer.name.startswith("kv")}
    assert stated - {"kv:home"} <= used


REDUCED_MUTATIONS = [swap_calls_of_one_route if mutation is swap_calls else mutation for mutation in MUTATIONS]


@pytest.mark.parametrize("mutation", REDUCED_MUTATIONS, ids=lambda mutation: mutation.__name__)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_every_mutation_of_a_reduced_schedule_is_rejected(
    mutation: Callable[[Schedule], Iterator[Mutant]], data: st.DataObject
) -> None:
    schedule, pairs = data.draw(reduced_schedules())
    sites = list(mutation(schedule))
    assume(sites)
    mutant = data.draw(st.sampled_from(sites))()
    with pytest.raises(ScheduleError):
        check(mutant, inactive=pairs.left_out())
