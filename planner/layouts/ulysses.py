"""Head parallelism within groups of ranks, sequence parallelism between them (Ulysses x all-gather)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from ..schedule.pairs import Pairs
from ..schedule.schedule import (
    DKV_HOME,
    KV_HOME,
    OUT_HOME,
    Q_HOME,
    Buffer,
    Communicator,
    Direction,
    Schedule,
    ShardId,
    Task,
    Transfer,
    TransferKind,
)
from ..schedule.shape import AttentionShape
from .draft import Builder, Draft, Route, slots
from .layout import Layout, Offers
from .registry import register

GATHER, GATHER_GRAD = "gather", "gather_grad"
# What head parallelism must gain for every rank of a group: each one's queries are launches of their own, which the
# host has to issue. What was predicted for it was further from what was measured than for other layouts, by 2 to 5 %
# with groups of two or four and by 3 to 25 % with eight (docs/measured/rank.md).
MARGIN_PER_RANK = 0.025


@register
@dataclass(frozen=True, kw_only=True)
class Ulysses(Layout):
    """Queries of `degree` neighbouring ranks for a `degree`-th of the heads each, against the K/V of just these heads.

    Ranks of a group exchange queries, so that each has those of all of them for its head group, and fetch from all
    ranks the K/V that these heads use: a `degree`-th of what a gather fetches, as long as there are as many K/V heads.
    out (or dq) goes back within the group, dK/dV home from all. Whole head parallelism is a group of all ranks
    (DeepSpeed-Ulysses, arXiv 2309.14509); smaller ones are its hybrid with sequence parallelism (USP,
    arXiv 2405.07719). Where a group is a node, every head's K/V of a shard enters a node once.

    Forward begins with the own queries and keys while the rest arrives, and ends with the own queries, while results of
    the others go home. Backward ends with the own keys, first those of the others' queries, while dK/dV go home. K/V
    come in `chunks` launches, those of the group first, and one is computed while the next is on its way.
    """

    name: ClassVar[str] = "ulysses"
    words: ClassVar[str] = "head parallelism"
    plainness: ClassVar[int] = 5

    degree: int
    chunks: int = 1

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        built = _HeadParallel(shape=shape, direction=direction, pairs=pairs, degree=self.degree, chunks=self.chunks)
        return built.schedule(self.name)

    def why_not(self, shape: AttentionShape) -> str | None:
        problem = shape.why_not_groups_of(self.degree)
        if problem is None and not shape.splits_heads(self.degree):
            heads = f"{shape.heads} heads ({shape.kv_heads} K/V heads)"
            problem = f"{heads} cannot be split evenly over {self.degree} ranks"
        return problem

    @classmethod
    def candidates(cls, offers: Offers) -> list[Self]:
        """Groups that divide a node, and all ranks; of very many ranks with keys in a chunk for every node alone."""
        degrees = [size for size in range(2, offers.gpus_per_node + 1) if offers.gpus_per_node % size == 0]
        degrees += [offers.world_size] if offers.nodes > 1 else []
        chunks = (offers.nodes,) if offers.very_many else (1, 2, offers.nodes)
        return [cls(degree=degree, chunks=count) for degree in degrees for count in offers.counts(*chunks)]

    @property
    def head_groups(self) -> int:
        return self.degree

    @property
    def margin(self) -> float:
        return MARGIN_PER_RANK * self.degree if self.degree > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class _HeadParallel(Builder):
    drafts_columns: ClassVar[bool] = True

    degree: int
    chunks: int

    @property
    def alike(self) -> int:
        return self.degree

    @property
    def exchange(self) -> str:
        """The communicator of groups: a name for every size, since directions may differ in it."""
        return f"exchange{self.degree}"

    @cached_property
    def sizes(self) -> dict[TransferKind, int]:
        return self.shape.group_bytes(self.direction, self.degree)

    def communicators(self) -> list[Communicator]:
        together = tuple(tuple(range(first, first + self.degree)) for first in range(0, self.world, self.degree))
        gathers = self.everyone(GATHER, *([GATHER_GRAD] if self.backward else []))
        return [Communicator(name=self.exchange, groups=together), *gathers]

    def buffers(self) -> list[Buffer]:
        """Homes of queries and results; q and out of the group's other ranks; K/V and their gradients."""
        others, q_bytes, out_bytes = self.degree - 1, self.sizes["q"], self.sizes["out"]
        found = [Buffer(name=Q_HOME, kind="q", capacity_bytes=self.degree * q_bytes)]
        found += [Buffer(name=OUT_HOME, kind="out", capacity_bytes=self.degree * out_bytes)]
        found += slots("q", "q", others, q_bytes)
        found += slots("out", "out", others, out_bytes) + slots("out_landing", "out", others, out_bytes)
        read = max(map(len, self.reads))
        found += slots("kv", "kv", read, self.sizes["kv"])
        if self.backward:
            found += slots("dkv", "dkv", read, self.sizes["dkv"])
            found += slots("landing", "dkv", max(map(len, self.readers)), self.sizes["dkv"])
        return found

    def members(self, rank: int) -> list[int]:
        """Return the other ranks of a rank's group, those that follow it first."""
        first = rank - rank % self.degree
        return [first + (rank + step) % self.degree for step in range(1, self.degree)]

    def computes(self, query: int, key: int) -> bool:
        """Whether a pair of parts is computed; that of the own keys always is."""
        return query == key or bool(self.pairs.matrix[query, key])

    def _owners(self, rank: int) -> list[int]:
        """All other ranks in the order in which a rank fetches from them: those of its group first, then nearest first.

        Where a group is a node, they are the quickest to arrive.
        """
        owners = [(rank - offset) % self.world for offset in range(1, self.world)]
        return sorted(owners, key=lambda owner: owner // self.degree != rank // self.degree)

    @cached_property
    def reads(self) -> list[list[int]]:
        """By rank, the others whose K/V it reads for its head group, in the order of its slots."""
        groups = [[rank, *self.members(rank)] for rank in range(self.world)]
        return [
            [key for key in self._owners(rank) if any(self.computes(query, key) for query in groups[rank])]
            for rank in range(self.world)
        ]

    @cached_property
    def _chunk_of(self) -> list[dict[int, int]]:
        """By reader and owner, the chunk in which K/V arrive, counted from 1; alike whatever pairs are left out."""
        return [
            {owner: 1 + (place + self._short) // self._size for place, owner in enumerate(self._owners(rank))}
            for rank in range(self.world)
        ]

    @property
    def _size(self) -> int:
        """Owners in a chunk: a divisor of the ranks where there is one, so that no chunk cuts a group."""
        return -(-self.world // max(1, min(self.chunks, self.world - 1)))

    @property
    def _short(self) -> int:
        """How many fewer the first chunk has: the own keys need not be fetched."""
        return 1 if self._size > 1 else 0

    @property
    def pieces(self) -> int:
        """In how many chunks K/V arrive: at least one, which may be empty."""
        return 1 + max(self.world - 2 + self._short, 0) // self._size

    def piece(self, rank: int, chunk: int) -> list[int]:
        """Return those that a rank reads of one chunk."""
        return [owner for owner in self.reads[rank] if self._chunk_of[rank][owner] == chunk]

    @cached_property
    def readers(self) -> list[list[int]]:
        """By owner, the ranks that read its K/V, in the order of its landing slots: by their head groups.

        So what is added up together lands side by side.
        """
        readers: list[list[int]] = [[] for _ in range(self.world)]
        for rank in sorted(range(self.world), key=lambda rank: (rank % self.degree, rank)):
            for owner in self.reads[rank]:
                readers[owner].append(rank)
        return readers

    def draft(self, rank: int, parts: Draft) -> None:
        if self.backward:
            self._draft_backward(rank, parts)
        else:
            self._draft_forward(rank, parts)

    def _draft_forward(self, rank: int, parts: Draft) -> None:
        others, last = self.members(rank), self.pieces
        self._fetch(rank, parts)
        self._compute(parts, 0, rank, rank, [rank])
        for chunk in range(1, last + 1):
            first, keys = chunk == 1, self.piece(rank, chunk)
            for query in others:
                self._compute(parts, chunk, rank, query, [rank] * first + keys, columns=first)
            own = chunk + 1 if chunk == last and others else chunk
            self._compute(parts, own, rank, rank, keys, columns=first)
        parts.launch(last + 1, self._results(rank), wait=last + 2)
        if self.shape.columns_capacity:
            parts.launch(0, [self.columns_transfer()], wait=1)

    def _draft_backward(self, rank: int, parts: Draft) -> None:
        others, last = self.members(rank), self.pieces
        self._fetch(rank, parts)
        self._compute(parts, 0, rank, rank, [], columns=True)
        for chunk in range(1, last + 1):
            keys = self.piece(rank, chunk)
            for query in others:
                self._compute(parts, chunk, rank, query, keys, columns=chunk == 1)
            self._compute(parts, chunk, rank, rank, keys)
            parts.launch(chunk + 1, self._gradients(rank, chunk), wait=last + 3)
        for query in others:
            self._compute(parts, last + 1, rank, query, [rank])
        self._compute(parts, last + 2 if others else last + 1, rank, rank, [rank])
        parts.launch(last + 2, self._results(rank), wait=last + 3)
        if self.shape.columns_capacity:
            parts.launch(2, [self.columns_transfer()], wait=last + 3)

    def _fetch(self, rank: int, parts: Draft) -> None:
        """Launch the exchange of queries, and K/V on their way to all that read them, chunk by chunk."""
        queries = [
            self._move("q", source, source, reader, Q_HOME, self._slot("q", reader, source))
            for source, reader in self._exchanges(rank)
        ]
        parts.launch(0, queries, wait=1)
        for chunk in range(1, self.pieces + 1):
            keys = [self._move("kv", owner, owner, reader, KV_HOME, self._kv("kv", reader, owner))
                    for owner, reader in self._routes(rank, chunk)]  # fmt: skip
            parts.launch(0, keys, wait=chunk)

    def _exchanges(self, rank: int) -> list[tuple[int, int]]:
        """Return (source, destination) of what a rank sends within its group and receives there."""
        return [ends for other in self.members(rank) for ends in ((rank, other), (other, rank))]

    def _routes(self, rank: int, chunk: int) -> list[tuple[int, int]]:
        """Return (owner, reader) of what a rank sends and receives in one chunk."""
        readers = [reader for reader in self.readers[rank] if self._chunk_of[reader][rank] == chunk]
        return [(rank, reader) for reader in readers] + [(owner, rank) for owner in self.piece(rank, chunk)]

    def _results(self, rank: int) -> list[Transfer]:
        """Return what the ranks of a group computed of each other's queries, on its way home."""
        return [
            self._move("out", home, source, home, self._slot("out", source, home),
                       self._slot("out_landing", home, source), OUT_HOME)
            for source, home in self._exchanges(rank)
        ]  # fmt: skip

    def _gradients(self, rank: int, chunk: int) -> list[Transfer]:
        """Return dK/dV of a chunk on their way home, those of the own shard and those of others."""
        return [
            self._move("dkv", owner, reader, owner, self._kv("dkv", reader, owner),
                       f"landing:{self.readers[owner].index(reader)}", DKV_HOME)
            for owner, reader in self._routes(rank, chunk)
        ]  # fmt: skip

    def _move(self, kind: TransferKind, part: int, source: int, destination: int, source_buffer: str, buffer: str,
              into: str | None = None) -> Transfer:  # fmt: skip
        """Return a transfer of a shard for the head group of the rank that computes it."""
        computing = source if kind in ("out", "dkv") else destination
        communicator = {"kv": GATHER, "dkv": GATHER_GRAD}.get(kind, self.exchange)
        route = Route(kind=kind, communicator=communicator, capacity_bytes=self.sizes[kind])
        return route.move(part, source, destination, 0, source_buffer, buffer, into, computing % self.degree)

    def _slot(self, pool: str, holder: int, part: int) -> str:
        """Return the slot of a rank for queries, or results, of (or from) another rank of its group."""
        return f"{pool}:{self.members(holder).index(part)}"

    def _kv(self, pool: str, reader: int, owner: int) -> str:
        return f"{pool}:{self.reads[reader].index(owner)}"

    def _compute(
        self, parts: Draft, phase: int, rank: int, query: int, keys: list[int], *, columns: bool = False
    ) -> None:
        """Add the tasks of a rank over queries of its group and keys, the columns first."""
        heads, group = self.shape.heads // self.degree, rank % self.degree
        own = query == rank
        queries: dict[str, Any] = {
            "query": ShardId(sequence_part=query, head_group=group),
            "heads": (group * heads, (group + 1) * heads),
            "query_buffer": Q_HOME if own else self._slot("q", rank, query),
            "out_buffer": OUT_HOME if own else self._slot("out", rank, query),
        }
        if columns and self.shape.columns_capacity:
            parts.compute(phase, self.columns_task(**queries))
        for key in (key for key in keys if self.computes(query, key)):
            buffers: dict[str, Any] = {"key_buffer": KV_HOME if key == rank else self._kv("kv", rank, key)}
            if self.backward:
                buffers["grad_buffer"] = DKV_HOME if key == rank else self._kv("dkv", rank, key)
            parts.compute(phase, Task(key=ShardId(sequence_part=key, head_group=group), **buffers, **queries))
