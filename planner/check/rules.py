"""Rules that one object of a schedule keeps or breaks by itself: names, kinds, capacities, ends, head ranges.

The other parts of the proof (`check_order`, `check_contents`, `check`) rely on them and do not repeat them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ...traces.errors import ScheduleError
from ..schedule.schedule import (
    ALL_RANKS,
    COLUMNS_HOME,
    DCOLUMNS_HOME,
    DKV_HOME,
    KEPT,
    KV_HOME,
    OUT_HOME,
    Q_HOME,
    Buffer,
    GroupCall,
    Phase,
    Schedule,
    ShardId,
    Task,
    Transfer,
    TransferKind,
    Transport,
    slots_from,
)

# The rank's own data: exists on every rank, stated or not. Transfers need it stated, for its capacity.
OWN: dict[str, TransferKind] = {
    KV_HOME: "kv",
    DKV_HOME: "dkv",
    Q_HOME: "q",
    OUT_HOME: "out",
    COLUMNS_HOME: "columns",
    DCOLUMNS_HOME: "columns",
}
SUMS: tuple[TransferKind, ...] = ("dkv", "out")  # partial sums: moved, never copied, never overwritten
COLLECTIVES: dict[TransferKind, Transport] = {"columns": "all_reduce", "kv": "all_gather", "dkv": "reduce_scatter"}
POINT_TO_POINT = ("p2p", "pull")  # one source, one destination; "pull" is not FIFO with what its source receives


def broken(problem: str, *, rank: int | None = None, phase: int | None = None, about: str = "") -> ScheduleError:
    """Return the error that says where (rank, phase, object) a schedule breaks a rule."""
    where = [f"rank {rank}"] if rank is not None else []
    where += [f"phase {phase}"] if phase is not None else []
    where += [about] if about else []
    return ScheduleError(f"{', '.join(where)}: {problem}" if where else problem)


def describe(about: Task | Transfer | str) -> str:
    """Name a task or a transfer in a few words."""
    if isinstance(about, Transfer):
        return f"transfer {about.id}"
    if isinstance(about, Task):
        return f"task {about.query}x{about.key or 'columns'} heads {about.heads[0]}:{about.heads[1]}"
    return about


def is_own(buffer: str) -> bool:
    """Whether a buffer is the rank's own data."""
    return buffer in OWN


@dataclass(frozen=True)
class Site:
    """A place in one rank's program; named only when a rule is broken there."""

    rank: int
    phase: int
    about: Task | Transfer | str

    def broken(self, problem: str) -> ScheduleError:
        """Return the error for a rule broken here."""
        return broken(problem, rank=self.rank, phase=self.phase, about=describe(self.about))

    def require(self, holds: bool, problem: str) -> None:
        """Raise ScheduleError unless the rule holds."""
        if not holds:
            raise self.broken(problem)


@dataclass(frozen=True)
class Rules:
    """A schedule's statements, looked up by name, and the rules that follow from them."""

    schedule: Schedule
    _proved: set[tuple[object, ...]] = field(default_factory=set, init=False, repr=False, compare=False)

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """The stated buffers."""
        return {buffer.name: buffer for buffer in self.schedule.buffers}

    @cached_property
    def groups(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Communicator name -> rank -> that rank's group."""
        return {c.name: {rank: group for group in c.groups for rank in group} for c in self.schedule.communicators}

    @cached_property
    def head_groups(self) -> int:
        """How many equal groups the heads are split in, from the tasks' shards."""
        tasks = (task for _, phase in every_phase(self.schedule) for task in phase.tasks)
        return 1 + max((task.query.head_group for task in tasks), default=0)

    def check(self) -> None:
        """Raise ScheduleError for the first object that breaks a rule of its own."""
        self._check_statements()
        for rank, phase in every_phase(self.schedule):
            for call in phase.group_calls:
                self._check_call(rank, phase.index, call)
            for task in phase.tasks:
                self._check_task(Site(rank, phase.index, task), task)

    def _check_statements(self) -> None:
        world = self.schedule.world_size
        if world < 1 or self.schedule.num_heads < 1:
            raise broken(f"{world} ranks and {self.schedule.num_heads} heads are not a schedule")
        if len(self.buffers) != len(self.schedule.buffers):
            raise broken("two buffers have the same name", about="buffers")
        if len(self.groups) != len(self.schedule.communicators):
            raise broken("two communicators have the same name", about="communicators")
        for communicator in self.schedule.communicators:
            ranks = [rank for group in communicator.groups for rank in group]
            if len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(world)):
                raise broken(f"ranks {ranks} repeat or are not of {world}", about=f"communicator {communicator.name}")
        for name, buffer in self.buffers.items():
            if buffer.kind != OWN.get(name, buffer.kind) or (name.endswith(":home") and name not in OWN):
                raise broken(f"cannot hold {buffer.kind}", about=f"buffer {name}")
            if buffer.shared and name.startswith(KEPT):
                raise broken("a layer's own, others cannot read it", about=f"buffer {name}")
            if buffer.kind != "kv" and name.startswith(KEPT):
                raise broken(f"keeps K/V for backward, not {buffer.kind}", about=f"buffer {name}")
        self._check_pools()
        if self.schedule.num_heads % self.head_groups:
            raise broken(f"{self.schedule.num_heads} heads do not split in {self.head_groups} head groups")
        for rank in range(world):
            for name in self.schedule.kept(rank):
                if name not in self.buffers or not name.startswith(KEPT):
                    raise broken("kept, but not stated as such", rank=rank, about=f"buffer {name}")
            indices = [phase.index for phase in self.schedule.phases(rank)]
            if indices != list(range(len(indices))):
                raise broken(f"phases are numbered {indices}", rank=rank)

    def _check_pools(self) -> None:
        """Slots of one pool lie in one tensor, so they hold one kind of content in one width."""
        first_of: dict[str, Buffer] = {}
        first_slots: dict[str, Buffer] = {}
        for buffer in self.schedule.buffers:
            pool, own, about = buffer.name.partition(":")[0], is_own(buffer.name), f"buffer {buffer.name}"
            first = first_of.setdefault(pool, buffer)
            if buffer.kind != first.kind:
                problem = f"is for {buffer.kind}, {first.name} of the same pool for {first.kind}"
                raise broken(problem, about=about)
            if buffer.narrow and (buffer.kind != "dkv" or own):
                raise broken("is narrow, which only slots for gradients are", about=about)
            if not own and first_slots.setdefault(pool, buffer).narrow != buffer.narrow:
                raise broken("is narrow or wide unlike others of its pool", about=about)

    def _check_call(self, rank: int, phase: int, call: GroupCall) -> None:
        site = Site(rank, phase, f"group call on {call.communicator}")
        site.require(call.communicator in self.groups, "unknown communicator")
        site.require(rank in self.groups[call.communicator], "the rank is in no group of this communicator")
        site.require(bool(call.transfers), "launches nothing")
        for transfer in call.transfers:
            at = Site(rank, phase, transfer)
            at.require(transfer.communicator == call.communicator, f"launched on {call.communicator}")
            self._check_ends(at, transfer)
            self._check_buffers(at, transfer)

    def _check_ends(self, site: Site, transfer: Transfer) -> None:
        group = self.groups[transfer.communicator][site.rank]
        ends = (transfer.source, transfer.destination)
        if transfer.kind == "columns" or transfer.transport in COLLECTIVES.values():
            fits = COLLECTIVES.get(transfer.kind) == transfer.transport
            site.require(fits, f"{transfer.kind} cannot go by {transfer.transport}")
            site.require(ends == (ALL_RANKS, ALL_RANKS), "must be of all ranks")
            shard = transfer.shard  # of no rank, but it may be of one head group
            if transfer.kind == "columns" or self.head_groups == 1:
                site.require(shard is None, "must be of no shard")
            else:
                of_all = shard is not None and shard.sequence_part == ALL_RANKS
                of_group = shard is not None and 0 <= shard.head_group < self.head_groups
                site.require(of_all and of_group, "must be of a head group of all ranks")
            site.require(group == tuple(range(self.schedule.world_size)), f"goes over {group} alone")
            return
        if transfer.transport not in POINT_TO_POINT:
            raise site.broken(f"{transfer.kind} cannot go by {transfer.transport}")
        site.require(site.rank in ends, "launched on a rank that is neither source nor destination")
        site.require(ends[0] != ends[1], "source and destination are the same rank")
        group_of = self.groups[transfer.communicator]
        if any(group_of.get(end) is not group for end in ends):
            raise site.broken(f"leaves the group {group} of {transfer.communicator}")
        site.require(transfer.shard is not None and self._exists(transfer.shard), "is of no shard")

    def _exists(self, shard: ShardId) -> bool:
        return 0 <= shard.sequence_part < self.schedule.world_size and 0 <= shard.head_group < self.head_groups

    def _check_buffers(self, site: Site, transfer: Transfer) -> None:
        """Check what transfers of one kind between the same buffers have in common, once."""
        into = transfer.accumulate_into
        alike = (transfer.kind, transfer.transport, transfer.source_buffer, transfer.buffer, into,
                 transfer.capacity_bytes, transfer.narrow)  # fmt: skip
        if alike in self._proved:
            return
        site.require(transfer.capacity_bytes >= 1, f"capacity_bytes {transfer.capacity_bytes}")
        site.require(transfer.kind != "dkv" or self.schedule.direction == "backward", "gradients in forward")
        if transfer.narrow:
            summed = transfer.kind == "dkv" and transfer.transport in POINT_TO_POINT and into is not None
            site.require(summed, "only gradients sent from rank to rank that are added on arrival travel narrow")
        for name in (transfer.source_buffer, transfer.buffer):
            self._check_fits(site, transfer, name)
        # What lies rounded travels rounded; what does not is rounded where it is sent, so that nobody can pull it.
        source, target = self.buffers[transfer.source_buffer], self.buffers[transfer.buffer]
        lies_narrow = source.narrow or target.narrow
        site.require(transfer.narrow or not lies_narrow, "leaves or enters a narrow buffer, but travels wide")
        pulls = transfer.transport == "pull"
        rounds = pulls and transfer.narrow and not source.narrow
        site.require(not rounds, f"pulls rounded what {source.name} holds wide")
        summed_narrow = into in self.buffers and self.buffers[into].narrow
        site.require(not summed_narrow, f"is added into {into}, which holds rounded sums")
        site.require(source.shared or not pulls, f"pulls from {source.name}, which is not stated as shared")
        if transfer.kind == "columns":
            site.require(transfer.source_buffer == transfer.buffer, "an all_reduce is done in place")
            backward = self.schedule.direction == "backward"
            site.require(into == (DKV_HOME if backward else None), f"accumulates into {into}")
            site.require(into is None or into in self.buffers, f"buffer {into} is not stated")
            return
        if transfer.transport in COLLECTIVES.values():
            self._check_collective(site, transfer)
        site.require(not is_own(transfer.buffer), f"lands on the rank's own data {transfer.buffer}")
        if transfer.kind not in SUMS:
            site.require(into is None, f"{transfer.kind} cannot be added into {into}")
            self._proved.add(alike)
            return
        site.require(not is_own(transfer.source_buffer), f"takes {transfer.source_buffer} from home")
        if into is not None:
            site.require(into != transfer.buffer, f"is added into {into}, where it lands")
            self._check_fits(site, transfer, into)
        self._proved.add(alike)

    def _check_collective(self, site: Site, transfer: Transfer) -> None:
        """A slot per rank; K/V come from home, and sums of gradients go there."""
        gathers = transfer.transport == "all_gather"
        first = transfer.buffer if gathers else transfer.source_buffer
        numbered = first.partition(":")[2].isdecimal()
        site.require(numbered and not is_own(first), f"has no slot per rank in {first}")
        for name in slots_from(first, self.schedule.world_size):
            self._check_fits(site, transfer, name)
            site.require(gathers or name != transfer.buffer, f"lands in {name}, which it takes from")
        if gathers:
            site.require(transfer.source_buffer == KV_HOME, f"takes {transfer.source_buffer}, not {KV_HOME}")
        else:
            site.require(transfer.accumulate_into == DKV_HOME, f"accumulates into {transfer.accumulate_into}")

    def _check_fits(self, site: Site, transfer: Transfer, name: str) -> None:
        site.require(name in self.buffers, f"buffer {name} is not stated")
        buffer = self.buffers[name]
        site.require(buffer.kind == transfer.kind, f"buffer {name} is for {buffer.kind}")
        size, room = transfer.capacity_bytes, buffer.capacity_bytes
        site.require(size <= room, f"{size} bytes do not fit the {room} bytes of buffer {name}")

    def _check_task(self, site: Site, task: Task) -> None:
        first, last = task.heads
        group_heads = self.schedule.num_heads // self.head_groups
        lowest = task.query.head_group * group_heads
        if not self._exists(task.query):
            raise site.broken(f"there is no shard {task.query}")
        site.require(lowest <= first < last <= lowest + group_heads, "heads are not of the shard's head group")
        if (task.key is None) != (task.kind == "columns"):
            raise site.broken(f"kind {task.kind} with key {task.key}")
        if task.key is not None:
            site.require(self._exists(task.key), "there is no such key shard")
            site.require(task.key.head_group == task.query.head_group, "query and key differ in head group")
        block = task.kind == "block"
        self._check_used(site, task.query_buffer, "q")
        self._check_used(site, task.out_buffer, "out")
        self._check_used(site, task.key_buffer, "kv" if block else "columns")
        backward = self.schedule.direction == "backward"
        site.require((task.grad_buffer is not None) == backward, f"{task.grad_buffer} for gradients")
        if task.grad_buffer is not None:
            self._check_used(site, task.grad_buffer, "dkv" if block else "columns")
            site.require(task.grad_buffer != task.key_buffer, f"gradients overwrite the keys in {task.key_buffer}")

    def _check_used(self, site: Site, name: str, kind: TransferKind) -> None:
        implied = OWN.get(name) if kind != "columns" else None  # columns are summed, so their buffers have a size
        held = self.buffers[name].kind if name in self.buffers else implied
        if held != kind:
            raise site.broken(f"buffer {name} is {f'for {held}, not {kind}' if held else 'not stated'}")


def every_phase(schedule: Schedule) -> Iterator[tuple[int, Phase]]:
    """Yield (rank, phase) of all ranks, in order."""
    for rank in range(schedule.world_size):
        for phase in schedule.phases(rank):
            yield rank, phase
