"""Mutations of transfers: each lists the sites where it applies, each site makes one mutated schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from schedule_edits import (
    Mutant,
    edit,
    every_transfer,
    identity,
    programs,
    sides,
    with_phase,
    with_transfers,
    without_waits,
)
from sparsering.planner.schedule.schedule import Schedule, ShardId, Transfer


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
                yield partial(identity, without)
                dropped = {transfer.id for transfer in call.transfers}
                yield partial(without_waits, without, rank, dropped)


def swap_transfer_buffer(schedule: Schedule) -> Iterator[Mutant]:
    """Another source or destination. A landing slot is not exchanged at both ends for one that may be free."""
    names = [buffer.name for buffer in schedule.buffers]
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            for name in names:
                if name != transfer.source_buffer:
                    yield partial(edit, schedule, transfer, ranks, source_buffer=name)
                if name != transfer.buffer and not (len(ranks) > 1 and may_be_free(schedule, transfer, name)):
                    yield partial(edit, schedule, transfer, ranks, buffer=name)


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


def wrong_accumulate_into(schedule: Schedule) -> Iterator[Mutant]:
    names = [None, *(buffer.name for buffer in schedule.buffers)]
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            for name in names:
                if name != transfer.accumulate_into:
                    yield partial(edit, schedule, transfer, ranks, accumulate_into=name)


def wrong_transfer_shard(schedule: Schedule) -> Iterator[Mutant]:
    parts = [ShardId(sequence_part=part) for part in range(schedule.world_size + 1)]
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            for shard in [*parts, None, ShardId(sequence_part=0, head_group=schedule.num_heads)]:
                if shard != transfer.shard:
                    yield partial(edit, schedule, transfer, ranks, shard=shard)


def ends_disagree(schedule: Schedule) -> Iterator[Mutant]:
    """At one end only: size, transport, sequence, kind or communicator."""
    for transfer in every_transfer(schedule):
        for ranks in sides(schedule, transfer):
            if len(ranks) < schedule.world_size and len(ranks) == 1:
                yield partial(edit, schedule, transfer, ranks, capacity_bytes=transfer.capacity_bytes - 1)
                yield partial(edit, schedule, transfer, ranks, sequence=transfer.sequence + 1000)
                other = "p2p" if transfer.transport == "pull" else "pull"
                yield partial(edit, schedule, transfer, ranks, transport=other)
                yield partial(edit, schedule, transfer, ranks, communicator="elsewhere")


def too_small_capacity(schedule: Schedule) -> Iterator[Mutant]:
    """A stated slot one byte too small, or a transfer larger than its slots."""
    sizes = {buffer.name: buffer.capacity_bytes for buffer in schedule.buffers}
    for transfer in every_transfer(schedule):
        for name in {transfer.source_buffer, transfer.buffer, transfer.accumulate_into} - {None}:
            if transfer.kind != "columns" or name == transfer.buffer:
                yield partial(_shrink, schedule, str(name), transfer.capacity_bytes - 1)
        everyone = sides(schedule, transfer)[-1]
        yield partial(edit, schedule, transfer, everyone, capacity_bytes=sizes[transfer.buffer] + 1)


def _shrink(schedule: Schedule, name: str, capacity_bytes: int) -> Schedule:
    buffers = [replace(b, capacity_bytes=capacity_bytes) if b.name == name else b for b in schedule.buffers]
    return replace(schedule, buffers=tuple(buffers))


def buffer_not_stated(schedule: Schedule) -> Iterator[Mutant]:
    used = {name for t in every_transfer(schedule) for name in (t.source_buffer, t.buffer)}
    for name in sorted(used):
        buffers = tuple(buffer for buffer in schedule.buffers if buffer.name != name)
        yield partial(replace, schedule, buffers=buffers)
