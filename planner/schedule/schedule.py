"""Schedules: what every rank computes and sends, phase by phase. One value, two interpreters (simulator and runtime).

How a rank plays its phases, in order:

1. A phase begins when the tasks of the phase before it are done and the transfers in its `waits` are complete here:
   what it receives has landed (and, with `accumulate_into`, was added there), what it sends may be overwritten.
2. Its `group_calls` are launched, in the order listed. A group call is one launch on one communicator; all its
   transfers progress together and complete together. Calls of one communicator run one after the other (FIFO), so a
   call may send what an earlier call of the same communicator receives without a wait in between.
3. Its `tasks` are computed, in the order listed, while launched transfers are in flight.

Buffers are named slots of equal size on every rank; names ending in ":home" are the rank's own data and exist always.
Slots named "kept:" are a layer's own: forward fills them, backward begins with them; all others serve all layers.
A transfer reads `source_buffer` on its source and fills `buffer` on its destination. A `dkv` or `out` transfer moves
its content: the source buffer is empty once it completes. A task writes `grad_buffer`/`out_buffer` by adding to it.
A "pull" transfer is a "p2p" one that its destination carries out: the source says when `source_buffer` may be read, the
destination copies it from there and says when it has. So that buffer is stated as `shared`, and what a call receives
may not be pulled on before it was waited for.
Shapes of all transfers are a function of the plan alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

from ...traces.errors import InputError
from ...traces.files import canonical_json

Direction = Literal["forward", "backward"]
TransferKind = Literal["kv", "dkv", "q", "out", "columns"]
Transport = Literal["p2p", "all_gather", "reduce_scatter", "all_reduce", "pull"]
TaskKind = Literal["block", "columns"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
ALL_RANKS = -1

KV_HOME = "kv:home"
DKV_HOME = "dkv:home"
Q_HOME = "q:home"
OUT_HOME = "out:home"
COLUMNS_HOME = "columns:home"
DCOLUMNS_HOME = "dcolumns:home"
HOMES = frozenset({KV_HOME, DKV_HOME, Q_HOME, OUT_HOME, COLUMNS_HOME, DCOLUMNS_HOME})
KEPT = "kept:"  # prefix of slots for K/V that a layer keeps from forward to backward


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ShardId:
    """What a rank owns: part `sequence_part` of the sequence, for head group `head_group`."""

    sequence_part: int
    head_group: int = 0

    def __str__(self) -> str:
        return f"{self.sequence_part}.{self.head_group}"

    def moved(self, by: int, world_size: int) -> ShardId:
        """Return the shard of the part so many further on, counted around."""
        return ShardId(sequence_part=(self.sequence_part + by) % world_size, head_group=self.head_group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Compute the queries of shard `query` against the keys of shard `key`, for query heads [heads[0], heads[1]).

    kind "block": the active block pairs of the two shards; `key` is a shard held in `key_buffer`.
    kind "columns": the queries against all gathered columns; `key` is None.
    Forward adds (by log-sum-exp) into `out_buffer`; backward adds dq into `out_buffer`, dk and dv into `grad_buffer`.
    """

    query: ShardId
    key: ShardId | None
    heads: tuple[int, int]
    key_buffer: str
    kind: TaskKind = "block"
    query_buffer: str = Q_HOME
    out_buffer: str = OUT_HOME
    grad_buffer: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One shard's data on its way from `source` to `destination`, known on both by the same `id`.

    sequence tells apart transfers of the same kind, shard and route. `accumulate_into` names the destination's buffer
    that the landed content is added to when the transfer is waited for. Collectives have source and destination
    ALL_RANKS and no shard, or that of part ALL_RANKS where they are of one head group: "all_reduce" sums in place;
    "all_gather" fills a slot per rank, from `buffer` on; and "reduce_scatter" moves the sums out of a slot per rank,
    from `source_buffer` on, and adds them up in `buffer`. capacity_bytes is that of one slot. narrow: gradients travel
    in the type of q, k and v, rounded once; both ends sum in the accumulator's.
    """

    kind: TransferKind
    shard: ShardId | None
    source: int
    destination: int
    sequence: int
    communicator: str
    transport: Transport
    source_buffer: str
    buffer: str
    capacity_bytes: int
    accumulate_into: str | None = None
    narrow: bool = False

    @property
    def id(self) -> str:
        """The name by which both ends and `Phase.waits` know this transfer."""
        return transfer_id(self.kind, self.shard, self.source, self.destination, self.sequence)


def transfer_id(kind: TransferKind, shard: ShardId | None, source: int, destination: int, sequence: int) -> str:
    """Return the name of a transfer; see `Transfer.id`."""
    route = "all" if source == ALL_RANKS else f"{source}>{destination}"
    return f"{kind}/{shard or '-'}/{route}/{sequence}"


def slots_from(first: str, count: int) -> list[str]:
    """Return the names of `count` neighbouring slots, `first` the first of them."""
    pool, _, number = first.partition(":")
    return [f"{pool}:{int(number) + place}" for place in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCall:
    """Transfers that one rank launches together on one communicator."""

    communicator: str
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One step of a rank's program; see the top of this file for what happens in which order."""

    index: int
    waits: tuple[str, ...] = ()
    group_calls: tuple[GroupCall, ...] = ()
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Communicator:
    """A communicator and its groups of ranks; every rank is in at most one group."""

    name: str
    groups: tuple[tuple[int, ...], ...]

    def group_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of the group that `rank` is in; InputError when it is in none."""
        for group in self.groups:
            if rank in group:
                return group
        raise InputError(f"rank {rank} is in no group of communicator {self.name!r}", field="communicators")


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """A slot on every rank that holds one shard's content of one kind.

    shared: other ranks may read it where it lies, which "pull" transfers do. narrow: it holds dK/dV in the type of q, k
    and v, which one launch or transfer writes whole: sums are added up elsewhere.
    """

    name: str
    kind: TransferKind
    capacity_bytes: int
    shared: bool = False
    narrow: bool = False


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One direction of one layer's attention on all ranks.

    communicators are listed in launch order: within a phase, every rank launches on them in this order, and so there
    is one total order over all communicators. `program(rank)` makes that rank's phases; `phases` keeps them.
    `kept(rank)`: K/V buffers of the layer's own, by the shards that they hold when forward ends and backward begins.
    period: rank r + period does at the same time what rank r does, with all ranks and parts moved on by it (modulo the
    ranks), in slots that are as far from each other, and collectives join all ranks; so the first `period` ranks tell
    how long all take. A divisor of the ranks; 0: nothing is said.
    """

    direction: Direction
    layout: str
    world_size: int
    num_heads: int
    communicators: tuple[Communicator, ...]
    buffers: tuple[Buffer, ...]
    program: Callable[[int], tuple[Phase, ...]]
    kept: Callable[[int], dict[str, ShardId]] = lambda rank: {}
    period: int = 0
    _expanded: dict[int, tuple[Phase, ...]] = field(default_factory=dict, repr=False, compare=False)

    def phases(self, rank: int) -> tuple[Phase, ...]:
        """Return the phases of `rank`, expanded on first use."""
        if rank not in self._expanded:
            self._expanded[rank] = self.program(rank)
        return self._expanded[rank]

    def forget(self) -> None:
        """Let go of expanded phases, which take gigabytes of hundreds of ranks; they are expanded anew when needed."""
        self._expanded.clear()

    def communicator(self, name: str) -> Communicator:
        """Return the communicator of that name; InputError when the schedule has none."""
        for communicator in self.communicators:
            if communicator.name == name:
                return communicator
        raise InputError(f"unknown communicator {name!r}", field="communicators")

    @property
    def different_ranks(self) -> range:
        """The ranks that all others are like, as `period` says."""
        return range(self.period or self.world_size)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers on one rank. Of the rank's own data (":home") only copies that are shared count."""
        counted = [buffer for buffer in self.buffers if buffer.shared or not buffer.name.endswith(":home")]
        return sum(buffer.capacity_bytes for buffer in counted)

    @property
    def shares(self) -> bool:
        """Whether ranks read others' buffers where they lie."""
        return any(buffer.shared for buffer in self.buffers)

    @property
    def kept_bytes(self) -> int:
        """Those of them that every layer has for itself, from its forward to its backward."""
        return sum(buffer.capacity_bytes for buffer in self.buffers if buffer.name.startswith(KEPT))

    def sha256(self) -> str:
        """Return the SHA-256 of the expanded schedule of all ranks, in canonical JSON rank by rank; worked out once."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        head = {"direction": self.direction, "layout": self.layout, "world_size": self.world_size}
        head |= {"num_heads": self.num_heads, "communicators": [asdict(c) for c in self.communicators]}
        head |= {"buffers": [asdict(b) for b in self.buffers]}
        ranks = range(self.world_size)
        head |= {"kept": [{name: str(shard) for name, shard in self.kept(rank).items()} for rank in ranks]}
        digest = hashlib.sha256(canonical_json(head))
        for rank in ranks:
            digest.update(phases_json(self._expanded.get(rank) or self.program(rank)))
        return digest.hexdigest()


def with_programs(schedule: Schedule, programs: Mapping[int, Iterable[Phase]]) -> Schedule:
    """Return the schedule with the phases of some ranks replaced (hand-made schedules, mutation tests)."""
    replaced = {rank: tuple(phases) for rank, phases in programs.items()}

    def program(rank: int) -> tuple[Phase, ...]:
        return replaced[rank] if rank in replaced else schedule.phases(rank)

    return replace(schedule, program=program, period=0, _expanded={})


def phases_json(phases: Sequence[Phase]) -> bytes:
    """Return what `canonical_json` makes of the phases as dictionaries, ten times as quickly: there are many."""
    return f"[{','.join(map(_phase, phases))}]".encode()


@lru_cache(maxsize=4096)
def _text(value: str | None) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)


def _phase(phase: Phase) -> str:
    calls, tasks = ",".join(map(_call, phase.group_calls)), ",".join(map(_task, phase.tasks))
    waits = ",".join([json.dumps(name, ensure_ascii=False) for name in phase.waits])
    return f'{{"group_calls":[{calls}],"index":{phase.index},"tasks":[{tasks}],"waits":[{waits}]}}'


def _call(call: GroupCall) -> str:
    transfers = ",".join(map(_transfer, call.transfers))
    return f'{{"communicator":{_text(call.communicator)},"transfers":[{transfers}]}}'


def _transfer(one: Transfer) -> str:
    return (
        f'{{"accumulate_into":{_text(one.accumulate_into)},"buffer":{_text(one.buffer)},'
        f'"capacity_bytes":{one.capacity_bytes},"communicator":{_text(one.communicator)},'
        f'"destination":{one.destination},"kind":{_text(one.kind)},"narrow":{"true" if one.narrow else "false"},'
        f'"sequence":{one.sequence},"shard":{_shard(one.shard)},"source":{one.source},'
        f'"source_buffer":{_text(one.source_buffer)},"transport":{_text(one.transport)}}}'
    )


def _task(one: Task) -> str:
    return (
        f'{{"grad_buffer":{_text(one.grad_buffer)},"heads":[{one.heads[0]},{one.heads[1]}],"key":{_shard(one.key)},'
        f'"key_buffer":{_text(one.key_buffer)},"kind":{_text(one.kind)},"out_buffer":{_text(one.out_buffer)},'
        f'"query":{_shard(one.query)},"query_buffer":{_text(one.query_buffer)}}}'
    )


def _shard(shard: ShardId | None) -> str:
    if shard is None:
        return "null"
    return f'{{"head_group":{shard.head_group},"sequence_part":{shard.sequence_part}}}'
