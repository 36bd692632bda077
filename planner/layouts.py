"""Layouts: builders of schedules. Each turns a shape and a few parameters into the phases of any rank.

Notation in comments: W ranks, r this rank, p a phase; n nodes ("outer"), l the rank within its node ("inner").
A shard's number is the rank that owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from ..traces.errors import InputError, UnsupportedError
from .schedule import (
    ALL_RANKS,
    COLUMNS_HOME,
    DCOLUMNS_HOME,
    DKV_HOME,
    KV_HOME,
    OUT_HOME,
    Q_HOME,
    Buffer,
    Communicator,
    Direction,
    GroupCall,
    Phase,
    Schedule,
    ShardId,
    Task,
    Transfer,
    TransferKind,
)

COLUMNS = "columns"


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What the sizes of transfers follow from: one layer's attention on every rank.

    element_bytes is that of q, k, v; accumulator_bytes that of dk and dv on their way home (4, or 8 for float64).
    """

    world_size: int
    tokens_per_rank: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2
    accumulator_bytes: int = 4
    columns_capacity: int = 0

    def __post_init__(self) -> None:
        for name in ("world_size", "tokens_per_rank", "heads", "kv_heads", "head_dim", "element_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"must be at least 1, not {getattr(self, name)}", field=name)
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads are not a multiple of {self.kv_heads} KV heads", field="kv_heads")

    @property
    def kv_bytes(self) -> int:
        """K and V of one shard."""
        return 2 * self.tokens_per_rank * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def dkv_bytes(self) -> int:
        """dK and dV of one shard in the accumulator's type."""
        return 2 * self.tokens_per_rank * self.kv_heads * self.head_dim * self.accumulator_bytes

    def columns_bytes(self, direction: Direction) -> int:
        """K and V (forward) or dK and dV (backward) of all heads' columns."""
        element_bytes = self.element_bytes if direction == "forward" else self.accumulator_bytes
        return 2 * self.columns_capacity * self.heads * self.head_dim * element_bytes


@dataclass
class _Draft:
    """One rank's phases under construction: parts are dropped into numbered phases, in launch order."""

    waits: dict[int, list[str]] = field(default_factory=dict)
    calls: dict[int, list[GroupCall]] = field(default_factory=dict)
    tasks: dict[int, list[Task]] = field(default_factory=dict)

    def launch(self, phase: int, transfers: Iterable[Transfer], *, wait: int) -> None:
        """Launch transfers together in `phase` and wait for them in phase `wait`."""
        together = tuple(transfers)
        if together:
            self.calls.setdefault(phase, []).append(
                GroupCall(communicator=together[0].communicator, transfers=together)
            )
            self.waits.setdefault(wait, []).extend(transfer.id for transfer in together)

    def compute(self, phase: int, task: Task, *, first: bool = False) -> None:
        """Add a task to `phase`."""
        tasks = self.tasks.setdefault(phase, [])
        tasks.insert(0 if first else len(tasks), task)

    def phases(self, order: tuple[str, ...]) -> tuple[Phase, ...]:
        """Return the phases, each with its group calls in the order of the communicators."""
        count = 1 + max([0, *self.waits, *self.calls, *self.tasks])
        return tuple(
            Phase(
                index=index,
                waits=tuple(self.waits.get(index, ())),
                group_calls=tuple(sorted(self.calls.get(index, ()), key=lambda call: order.index(call.communicator))),
                tasks=tuple(self.tasks.get(index, ())),
            )
            for index in range(count)
        )


def _schedule(
    layout: str,
    direction: Direction,
    shape: AttentionShape,
    communicators: list[Communicator],
    buffers: list[Buffer],
    draft: Callable[[int, _Draft], None],
) -> Schedule:
    """Close a layout: add home buffers and the columns' part, and make the program."""
    if shape.columns_capacity:
        communicators = [*communicators, Communicator(name=COLUMNS, groups=(tuple(range(shape.world_size)),))]
    home = [Buffer(name=KV_HOME, kind="kv", capacity_bytes=shape.kv_bytes)]
    if direction == "backward":
        home.append(Buffer(name=DKV_HOME, kind="dkv", capacity_bytes=shape.dkv_bytes))
    home += _columns_buffers(direction, shape)
    order = tuple(communicator.name for communicator in communicators)

    def program(rank: int) -> tuple[Phase, ...]:
        parts = _Draft()
        draft(rank, parts)
        if shape.columns_capacity:
            _add_columns(rank, parts, direction, shape)
        return parts.phases(order)

    return Schedule(
        direction=direction,
        layout=layout,
        world_size=shape.world_size,
        num_heads=shape.heads,
        communicators=tuple(communicators),
        buffers=tuple(home + buffers),
        program=program,
    )


def _columns_buffers(direction: Direction, shape: AttentionShape) -> list[Buffer]:
    if not shape.columns_capacity:
        return []
    buffers = [Buffer(name=COLUMNS_HOME, kind="columns", capacity_bytes=shape.columns_bytes("forward"))]
    if direction == "backward":
        size = shape.columns_bytes("backward")
        buffers.append(Buffer(name=DCOLUMNS_HOME, kind="columns", capacity_bytes=size))
    return buffers


def _add_columns(rank: int, draft: _Draft, direction: Direction, shape: AttentionShape) -> None:
    """Columns are summed over all ranks once. Forward: in flight during phase 0, computed first in phase 1.

    Backward keeps the gathered K and V: computed in phase 0, gradients summed while the rest goes on.
    """
    forward = direction == "forward"
    buffer = COLUMNS_HOME if forward else DCOLUMNS_HOME
    transfer = Transfer(
        kind="columns",
        shard=None,
        source=ALL_RANKS,
        destination=ALL_RANKS,
        sequence=0,
        communicator=COLUMNS,
        transport="all_reduce",
        source_buffer=buffer,
        buffer=buffer,
        capacity_bytes=shape.columns_bytes(direction),
        accumulate_into=None if forward else DKV_HOME,
    )
    task = Task(
        query=ShardId(sequence_part=rank),
        key=None,
        heads=(0, shape.heads),
        key_buffer=COLUMNS_HOME,
        kind="columns",
        grad_buffer=None if forward else DCOLUMNS_HOME,
    )
    last = max([1, *draft.waits, *draft.tasks])
    if forward:
        draft.launch(0, [transfer], wait=1)
        draft.compute(1, task, first=True)
    else:
        draft.compute(0, task)
        draft.launch(1, [transfer], wait=max(2, last))


def _block_task(rank: int, key: int, key_buffer: str, shape: AttentionShape, grad_buffer: str | None) -> Task:
    return Task(
        query=ShardId(sequence_part=rank),
        key=ShardId(sequence_part=key),
        heads=(0, shape.heads),
        key_buffer=key_buffer,
        grad_buffer=grad_buffer,
    )


@dataclass(frozen=True, kw_only=True)
class _Route:
    """Makes the transfers of one kind on one communicator."""

    kind: TransferKind
    communicator: str
    capacity_bytes: int

    def move(
        self, shard: int, source: int, destination: int, sequence: int, source_buffer: str, buffer: str,
        accumulate_into: str | None = None,
    ) -> Transfer:  # fmt: skip
        return Transfer(
            kind=self.kind,
            shard=ShardId(sequence_part=shard),
            source=source,
            destination=destination,
            sequence=sequence,
            communicator=self.communicator,
            transport="p2p",
            source_buffer=source_buffer,
            buffer=buffer,
            capacity_bytes=self.capacity_bytes,
            accumulate_into=accumulate_into,
        )


def _slots(prefix: str, kind: TransferKind, count: int, capacity_bytes: int) -> list[Buffer]:
    return [Buffer(name=f"{prefix}:{slot}", kind=kind, capacity_bytes=capacity_bytes) for slot in range(count)]


def ring(*, shape: AttentionShape, direction: Direction, prefetch: int = 1) -> Schedule:
    """A flat ring: in phase p rank r computes shard r - p while the next `prefetch` shards are on their way.

    Needs prefetch + 1 K/V slots. Backward: dK/dV of a shard travel one phase behind it, gathering contributions, and
    take one more hop home.
    """
    world = shape.world_size
    if prefetch < 1:
        raise InputError(f"must be at least 1, not {prefetch}", field="prefetch")
    depth = min(prefetch, max(world - 1, 1))
    kv = _Route(kind="kv", communicator="ring", capacity_bytes=shape.kv_bytes)
    dkv = _Route(kind="dkv", communicator="ring_grad", capacity_bytes=shape.dkv_bytes)
    everyone = (tuple(range(world)),)
    communicators = [Communicator(name="ring", groups=everyone)]
    buffers = _slots("kv", "kv", min(depth + 1, world - 1), shape.kv_bytes)
    if direction == "backward" and world > 1:
        communicators.append(Communicator(name="ring_grad", groups=everyone))
        buffers += _slots("dkv", "dkv", 2, shape.dkv_bytes) + _slots("landing", "dkv", 1, shape.dkv_bytes)

    def kv_buffer(phase: int) -> str:
        return KV_HOME if phase == 0 else f"kv:{(phase - 1) % (depth + 1)}"

    def draft(rank: int, parts: _Draft) -> None:
        following, previous = (rank + 1) % world, (rank - 1) % world
        for step in range(1, world):  # delivers what phase `step` computes
            sent, received = (rank - step + 1) % world, (rank - step) % world
            source_buffer, buffer = kv_buffer(step - 1), kv_buffer(step)
            calls = [
                kv.move(sent, rank, following, step, source_buffer, buffer),
                kv.move(received, previous, rank, step, source_buffer, buffer),
            ]
            parts.launch(max(step - depth, 0), calls, wait=step)
        for phase in range(world):
            key = (rank - phase) % world
            grad = None if direction == "forward" else DKV_HOME if phase == 0 else f"dkv:{phase % 2}"
            parts.compute(phase, _block_task(rank, key, kv_buffer(phase), shape, grad))
        if direction == "backward":
            for phase in range(2, world + 1):  # the hop after phase - 1 was computed; the last one goes home
                sent, received = (rank - phase + 1) % world, (rank - phase) % world
                into = DKV_HOME if phase == world else f"dkv:{phase % 2}"
                hop = [
                    dkv.move(sent, rank, following, phase, f"dkv:{(phase - 1) % 2}", "landing:0", into),
                    dkv.move(received, previous, rank, phase, f"dkv:{(phase - 1) % 2}", "landing:0", into),
                ]
                parts.launch(phase, hop, wait=phase + 1)

    return _schedule("ring", direction, shape, communicators, buffers, draft)


def gather(*, shape: AttentionShape, direction: Direction, chunks: int = 4) -> Schedule:
    """A pipelined all-gather: every shard goes straight from its owner to all, in `chunks` launches made up front.

    Phase c computes the shards of chunk c together. Needs W - 1 K/V slots. Backward: dK/dV go straight home.
    """
    world = shape.world_size
    if chunks < 1:
        raise InputError(f"must be at least 1, not {chunks}", field="chunks")
    pieces = _split(range(1, world), min(chunks, max(world - 1, 1)))  # offsets of the owners, nearest first
    largest = max((len(piece) for piece in pieces), default=0)
    kv = _Route(kind="kv", communicator="gather", capacity_bytes=shape.kv_bytes)
    dkv = _Route(kind="dkv", communicator="gather_grad", capacity_bytes=shape.dkv_bytes)
    everyone = (tuple(range(world)),)
    communicators = [Communicator(name="gather", groups=everyone)]
    buffers = _slots("kv", "kv", world - 1, shape.kv_bytes)
    if direction == "backward" and world > 1:
        communicators.append(Communicator(name="gather_grad", groups=everyone))
        buffers += _slots("dkv", "dkv", largest * min(2, len(pieces)), shape.dkv_bytes)
        buffers += _slots("landing", "dkv", largest, shape.dkv_bytes)

    def draft(rank: int, parts: _Draft) -> None:
        parts.compute(0, _block_task(rank, rank, KV_HOME, shape, None if direction == "forward" else DKV_HOME))
        for chunk, piece in enumerate(pieces, start=1):
            fetch, homeward = [], []
            for place, offset in enumerate(piece):
                owner, reader = (rank - offset) % world, (rank + offset) % world
                slot, grad = f"kv:{offset - 1}", f"dkv:{place + largest * (chunk % 2 if len(pieces) > 1 else 0)}"
                fetch.append(kv.move(rank, rank, reader, offset, KV_HOME, slot))
                fetch.append(kv.move(owner, owner, rank, offset, KV_HOME, slot))
                homeward.append(dkv.move(owner, rank, owner, offset, grad, f"landing:{place}", DKV_HOME))
                homeward.append(dkv.move(rank, reader, rank, offset, grad, f"landing:{place}", DKV_HOME))
                parts.compute(chunk, _block_task(rank, owner, slot, shape, None if direction == "forward" else grad))
            parts.launch(0, fetch, wait=chunk)
            if direction == "backward":
                parts.launch(chunk + 1, homeward, wait=chunk + 2)

    return _schedule("gather", direction, shape, communicators, buffers, draft)


def hierarchical(*, shape: AttentionShape, direction: Direction, inner_size: int) -> Schedule:
    """Inner rings within groups of `inner_size` ranks, an outer ring between them (MTraining, arXiv 2510.18830).

    Rank r is place l of node n (r = n * inner_size + l). In outer step o and inner step i it computes shard
    (n - o, l - i). While the inner ring turns, the node's shards for the next outer step arrive over the outer ring.
    Backward: dK/dV are summed around the inner ring, then sent straight to their owners in node n - o.
    """
    world = shape.world_size
    if inner_size < 1 or world % inner_size:
        raise InputError(f"{inner_size} does not divide {world} ranks", field="inner_size")
    layout = _Hierarchy(shape=shape, inner=inner_size, outer=world // inner_size, direction=direction)
    return _schedule("hierarchical", direction, shape, layout.communicators(), layout.buffers(), layout.draft)


@dataclass(frozen=True, kw_only=True)
class _Hierarchy:
    """The two nested rings of `hierarchical`."""

    shape: AttentionShape
    inner: int
    outer: int
    direction: Direction

    def rank(self, node: int, place: int) -> int:
        return (node % self.outer) * self.inner + place % self.inner

    def communicators(self) -> list[Communicator]:
        nodes = tuple(tuple(self.rank(n, place) for place in range(self.inner)) for n in range(self.outer))
        rails = tuple(tuple(self.rank(n, place) for n in range(self.outer)) for place in range(self.inner))
        names = [("outer", rails), ("inner", nodes)]
        if self.direction == "backward":
            names += [("outer_grad", rails), ("inner_grad", nodes)]
        return [Communicator(name=name, groups=groups) for name, groups in names]

    def buffers(self) -> list[Buffer]:
        kv_bytes, dkv_bytes = self.shape.kv_bytes, self.shape.dkv_bytes
        buffers = _slots("kv", "kv", min(2, self.inner - 1), kv_bytes)
        buffers += _slots("kv_outer", "kv", min(2, self.outer - 1), kv_bytes)
        if self.direction == "backward":
            if self.inner > 1:
                buffers += _slots("dkv", "dkv", 2, dkv_bytes) + _slots("landing", "dkv", 1, dkv_bytes)
            if self.outer > 1:
                buffers += _slots("dkv_outer", "dkv", 2, dkv_bytes) + _slots("landing_outer", "dkv", 1, dkv_bytes)
        return buffers

    def kv_buffer(self, outer_step: int, inner_step: int) -> str:
        if inner_step:
            return f"kv:{(inner_step - 1) % 2}"
        return KV_HOME if outer_step == 0 else f"kv_outer:{(outer_step - 1) % 2}"

    def base_grad(self, outer_step: int) -> str:
        """Where the contributions to the shard that this rank brought into its node are summed."""
        return DKV_HOME if outer_step == 0 else f"dkv_outer:{outer_step % 2}"

    def draft(self, rank: int, parts: _Draft) -> None:
        node, place = divmod(rank, self.inner)
        for outer_step in range(self.outer):
            self._fetch_outer(parts, node, place, outer_step)
            for inner_step in range(self.inner):
                self._fetch_inner(parts, node, place, outer_step, inner_step)
                self._compute(parts, node, place, outer_step, inner_step)
        if self.direction == "backward":
            for outer_step in range(self.outer):
                self._sum_inner(parts, node, place, outer_step)
                self._send_home(parts, node, place, outer_step)

    def _fetch_outer(self, parts: _Draft, node: int, place: int, outer_step: int) -> None:
        if outer_step == self.outer - 1:
            return
        route = _Route(kind="kv", communicator="outer", capacity_bytes=self.shape.kv_bytes)
        source_buffer, buffer = self.kv_buffer(outer_step, 0), self.kv_buffer(outer_step + 1, 0)
        me, sequence = self.rank(node, place), outer_step * self.inner
        sent, received = self.rank(node - outer_step, place), self.rank(node - outer_step - 1, place)
        calls = [
            route.move(sent, me, self.rank(node + 1, place), sequence, source_buffer, buffer),
            route.move(received, self.rank(node - 1, place), me, sequence, source_buffer, buffer),
        ]
        parts.launch(sequence, calls, wait=sequence + self.inner)

    def _fetch_inner(self, parts: _Draft, node: int, place: int, outer_step: int, inner_step: int) -> None:
        if inner_step == self.inner - 1:
            return
        route = _Route(kind="kv", communicator="inner", capacity_bytes=self.shape.kv_bytes)
        source_buffer = self.kv_buffer(outer_step, inner_step)
        buffer = self.kv_buffer(outer_step, inner_step + 1)
        me, sequence = self.rank(node, place), outer_step * self.inner + inner_step
        sent = self.rank(node - outer_step, place - inner_step)
        received = self.rank(node - outer_step, place - inner_step - 1)
        calls = [
            route.move(sent, me, self.rank(node, place + 1), sequence, source_buffer, buffer),
            route.move(received, self.rank(node, place - 1), me, sequence, source_buffer, buffer),
        ]
        parts.launch(sequence, calls, wait=sequence + 1)

    def _compute(self, parts: _Draft, node: int, place: int, outer_step: int, inner_step: int) -> None:
        phase = outer_step * self.inner + inner_step
        key = self.rank(node - outer_step, place - inner_step)
        grad = None
        if self.direction == "backward":
            grad = self.base_grad(outer_step) if inner_step == 0 else f"dkv:{phase % 2}"
        me, buffer = self.rank(node, place), self.kv_buffer(outer_step, inner_step)
        parts.compute(phase, _block_task(me, key, buffer, self.shape, grad))

    def _sum_inner(self, parts: _Draft, node: int, place: int, outer_step: int) -> None:
        route = _Route(kind="dkv", communicator="inner_grad", capacity_bytes=self.shape.dkv_bytes)
        me, first = self.rank(node, place), outer_step * self.inner
        for inner_step in range(2, self.inner + 1):
            phase = first + inner_step
            source_buffer = f"dkv:{(phase - 1) % 2}"
            into = self.base_grad(outer_step) if inner_step == self.inner else f"dkv:{phase % 2}"
            sent = self.rank(node - outer_step, place - inner_step + 1)
            received = self.rank(node - outer_step, place - inner_step)
            hop = [
                route.move(sent, me, self.rank(node, place + 1), phase, source_buffer, "landing:0", into),
                route.move(received, self.rank(node, place - 1), me, phase, source_buffer, "landing:0", into),
            ]
            parts.launch(phase, hop, wait=phase + 1)

    def _send_home(self, parts: _Draft, node: int, place: int, outer_step: int) -> None:
        if outer_step == 0:
            return
        route = _Route(kind="dkv", communicator="outer_grad", capacity_bytes=self.shape.dkv_bytes)
        me, buffer = self.rank(node, place), self.base_grad(outer_step)
        owner, helper = self.rank(node - outer_step, place), self.rank(node + outer_step, place)
        phase = (outer_step + 1) * self.inner + (self.inner > 1)
        calls = [
            route.move(owner, me, owner, phase, buffer, "landing_outer:0", DKV_HOME),
            route.move(me, helper, me, phase, buffer, "landing_outer:0", DKV_HOME),
        ]
        last = outer_step == self.outer - 1
        parts.launch(phase, calls, wait=phase + 1 if last else (outer_step + 2) * self.inner)


def ulysses(*, shape: AttentionShape, direction: Direction) -> Schedule:
    """Head parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509). Simulated only: `run` refuses it.

    Rank g gathers the whole sequence for head group g of W equal groups, computes it, and sends out (or dq, dk, dv)
    home. Each K/V head goes to every group whose query heads use it.
    """
    world = shape.world_size
    if shape.heads % world:
        raise UnsupportedError(f"{shape.heads} heads cannot be split over {world} ranks", field="ulysses")
    if shape.columns_capacity:
        raise UnsupportedError("columns are not gathered under head parallelism", field="ulysses")
    group_heads = shape.heads // world
    group_kv_heads = -(-group_heads * shape.kv_heads // shape.heads)
    q_bytes = shape.tokens_per_rank * group_heads * shape.head_dim * shape.element_bytes
    kv_bytes = 2 * shape.tokens_per_rank * group_kv_heads * shape.head_dim * shape.element_bytes
    sizes: dict[TransferKind, int] = {"q": q_bytes, "kv": kv_bytes, "out": q_bytes}
    if direction == "backward":  # q travels with dout, and its log-sum-exp and delta
        sizes["q"] = 2 * q_bytes + 8 * shape.tokens_per_rank * group_heads
        sizes["dkv"] = kv_bytes * shape.accumulator_bytes // shape.element_bytes
    buffers: list[Buffer] = [
        Buffer(name=Q_HOME, kind="q", capacity_bytes=world * sizes["q"]),
        Buffer(name=OUT_HOME, kind="out", capacity_bytes=world * sizes["out"]),
    ]
    for kind, size in sizes.items():
        buffers += _slots(kind, kind, world, size)
        if kind in ("out", "dkv"):
            buffers += _slots(f"{kind}_landing", kind, world, size)

    def move(kind: TransferKind, part: int, group: int, source: int, destination: int, source_buffer: str, buffer: str,
             into: str | None = None) -> Transfer:  # fmt: skip
        return Transfer(
            kind=kind,
            shard=ShardId(sequence_part=part, head_group=group),
            source=source,
            destination=destination,
            sequence=0,
            communicator="all_to_all",
            transport="p2p",
            source_buffer=source_buffer,
            buffer=buffer,
            capacity_bytes=sizes[kind],
            accumulate_into=into,
        )

    def draft(rank: int, parts: _Draft) -> None:
        others = [(rank + offset) % world for offset in range(1, world)]
        fetch: list[Transfer] = []
        homeward: list[Transfer] = []
        for other in others:
            inputs: tuple[tuple[TransferKind, str], ...] = (("q", Q_HOME), ("kv", KV_HOME))
            results: tuple[tuple[TransferKind, str], ...] = (("out", OUT_HOME), ("dkv", DKV_HOME))
            for kind, home in inputs:
                fetch.append(move(kind, rank, other, rank, other, home, f"{kind}:{rank}"))
                fetch.append(move(kind, other, rank, other, rank, home, f"{kind}:{other}"))
            for kind, home in results:
                if kind in sizes:
                    landing = f"{kind}_landing:{rank}", f"{kind}_landing:{other}"
                    homeward.append(move(kind, other, rank, rank, other, f"{kind}:{other}", landing[0], home))
                    homeward.append(move(kind, rank, other, other, rank, f"{kind}:{rank}", landing[1], home))
        parts.launch(0, fetch, wait=1)
        parts.launch(2, homeward, wait=3)
        for query in range(world):
            for key in range(world):
                parts.compute(1, task(rank, query, key))

    def task(rank: int, query: int, key: int) -> Task:
        own_query, own_key = query == rank, key == rank
        grad = None
        if direction == "backward":
            grad = DKV_HOME if own_key else f"dkv:{key}"
        return Task(
            query=ShardId(sequence_part=query, head_group=rank),
            key=ShardId(sequence_part=key, head_group=rank),
            heads=(rank * group_heads, (rank + 1) * group_heads),
            key_buffer=KV_HOME if own_key else f"kv:{key}",
            query_buffer=Q_HOME if own_query else f"q:{query}",
            out_buffer=OUT_HOME if own_query else f"out:{query}",
            grad_buffer=grad,
        )

    communicators = [Communicator(name="all_to_all", groups=(tuple(range(world)),))]
    return _schedule("ulysses", direction, shape, communicators, buffers, draft)


LAYOUTS: dict[str, Callable[..., Schedule]] = {
    "ring": ring,
    "gather": gather,
    "hierarchical": hierarchical,
    "ulysses": ulysses,
}
SIMULATED_ONLY = frozenset({"ulysses"})


def build(layout: str, parameters: dict[str, int], *, shape: AttentionShape, direction: Direction) -> Schedule:
    """Build a schedule by name; InputError for an unknown layout or parameter."""
    if layout not in LAYOUTS:
        raise InputError(f"{layout!r} is not one of {sorted(LAYOUTS)}", field="layout")
    try:
        return LAYOUTS[layout](shape=shape, direction=direction, **parameters)
    except TypeError as error:
        raise InputError(f"{parameters} do not fit layout {layout!r}", field="parameters") from error


def _split(items: range, pieces: int) -> list[range]:
    """Cut a range into nearly equal pieces, the smaller ones first so that the first arrives soonest."""
    size, extra = divmod(len(items), pieces) if items else (0, 0)
    cuts = [0]
    for piece in range(pieces if items else 0):
        cuts.append(cuts[-1] + size + (piece >= pieces - extra))
    return [items[start:stop] for start, stop in pairwise(cuts)]
