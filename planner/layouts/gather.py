"""The pipelined all-gather."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ..schedule.pairs import Pairs
from ..schedule.schedule import (
    DKV_HOME,
    KEPT,
    KV_HOME,
    Buffer,
    Communicator,
    Direction,
    Schedule,
    ShardId,
    Transfer,
    TransferKind,
    Transport,
)
from ..schedule.shape import AttentionShape
from .draft import Builder, Draft, Route, slots
from .layout import Entering, Layout, Offers, Transfers
from .registry import register


@register
@dataclass(frozen=True, kw_only=True)
class Gather(Layout):
    """A pipelined all-gather: every shard goes straight from its owner to all that need it, in `chunks` launches.

    A phase computes the shards of one chunk together. Needs as many K/V slots as a rank needs other shards. Forward
    begins with the own shard, while others arrive. Backward ends with it: dK/dV go straight home meanwhile, and they
    are twice as many bytes as K/V, which arrive while columns are computed.

    keep_kv: what forward gathered is kept for backward, which then fetches nothing; else it is gathered again.
    pull: every rank copies from its peers' memory, by copy engines on the GPUs of one host; else ranks send.
    narrow_gradients: what a rank adds to dK/dV of another's shard is rounded to the type of q, k and v, once, where its
    kernel writes it: half the bytes; owners sum in the accumulator's type.
    """

    name: ClassVar[str] = "gather"
    words: ClassVar[str] = "an all-gather"
    plainness: ClassVar[int] = 0

    chunks: int = 1
    keep_kv: bool = False
    pull: bool = False
    narrow_gradients: bool = False

    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        return _Gather(shape=shape, direction=direction, pairs=pairs, layout=self).schedule(self.name)

    @classmethod
    def candidates(cls, offers: Offers) -> list[Self]:
        """Pulls and rounded gradients with few chunks: more are more launches, and hid nothing more when measured."""
        found = [
            cls(chunks=count, keep_kv=keep_kv)
            for keep_kv in (False, True)
            for count in offers.counts(1, 2, 4, offers.world_size)
        ]
        ways = [Transfers(narrow=True)] * offers.rounds_parts
        if offers.pulls:
            ways += [Transfers(pull=True, narrow=one.narrow) for one in (Transfers(), *ways)]
        return found + [
            cls(chunks=count, keep_kv=keep_kv, pull=way.pull, narrow_gradients=way.narrow)
            for way in ways
            for keep_kv in (False, True)
            for count in offers.counts(1, 2)
        ]

    @classmethod
    def baselines(cls, offers: Offers) -> list[tuple[str, Self]]:
        return [("striped", cls(chunks=count)) for count in offers.counts(1, 2, 4, offers.world_size)]

    def entering(self, pairs: Pairs, *, ranks_per_node: int) -> Entering:
        """Each rank fetches all that it needs by itself, and each owner is sent as many sums."""
        away = pairs.between_nodes(ranks_per_node)
        return Entering(kv=away.sum(axis=1), dkv=away.sum(axis=0))

    @property
    def kept_slots(self) -> object | None:
        return self.name if self.keep_kv else None

    @property
    def transfers(self) -> Transfers:
        return Transfers(pull=self.pull, narrow=self.narrow_gradients)


@dataclass(frozen=True, kw_only=True)
class _Gather(Builder):
    layout: Gather

    @property
    def alike(self) -> int:
        return 1

    @property
    def needed(self) -> NDArray[np.bool_]:
        """bool [owner, offset]: whether the rank at that offset reads the shard."""
        return self.pairs.distances

    @property
    def fetches(self) -> bool:
        """Whether K/V are gathered in this direction."""
        return not (self.backward and self.layout.keep_kv)

    @property
    def grad_bytes(self) -> int:
        """dK and dV of one shard on their way home."""
        return self.shape.kv_bytes if self.layout.narrow_gradients else self.shape.dkv_bytes

    @property
    def kv_pool(self) -> str:
        return KEPT.removesuffix(":") if self.layout.keep_kv else "kv"

    def route(self, kind: TransferKind, communicator: str, capacity_bytes: int, *, narrow: bool = False) -> Route:
        """Return what makes the transfers of one kind, sent or pulled."""
        way: Transport = "pull" if self.layout.pull else "p2p"
        return Route(kind=kind, communicator=communicator, capacity_bytes=capacity_bytes, narrow=narrow, transport=way)

    def kept(self, rank: int) -> dict[str, ShardId]:
        """Return what a rank keeps: every shard that it reads but its own."""
        if not self.layout.keep_kv:
            return {}
        offsets = [offset for offset in range(1, self.world) if self.reads[rank, offset]]
        return {self.kv_slot(rank, offset): ShardId(sequence_part=(rank - offset) % self.world) for offset in offsets}

    @cached_property
    def pieces(self) -> list[list[int]]:
        """Offsets of the owners that any rank reads from, nearest first, cut into chunks."""
        offsets = [offset for offset in range(1, self.world) if self.needed[:, offset].any()]
        # The smaller ones first, so that the first arrives soonest: array_split puts the larger ones first.
        cut = np.array_split(offsets[::-1], min(self.layout.chunks, max(len(offsets), 1)))
        return [piece[::-1].tolist() for piece in reversed(cut) if piece.size]

    @cached_property
    def reads(self) -> NDArray[np.bool_]:
        """bool [reader, offset]: whether the rank reads the shard of the rank that is `offset` before it."""
        reader, offset = np.indices((self.world, self.world))
        return self.needed[(reader - offset) % self.world, offset]

    def communicators(self) -> list[Communicator]:
        names = ["gather"] if self.fetches or self.world == 1 else []
        return self.everyone(*names, *(["gather_grad"] if self.backward and self.world > 1 else []))

    def buffers(self) -> list[Buffer]:
        fetched = int(self.reads[:, 1:].sum(axis=1).max())
        buffers = slots(self.kv_pool, "kv", fetched, self.shape.kv_bytes)
        if self.backward and fetched:
            count, narrow = self.largest * min(2, len(self.pieces)), self.layout.narrow_gradients
            buffers += slots("dkv", "dkv", count, self.grad_bytes, narrow=narrow)
            landing = max(int(self.needed[:, piece].sum(axis=1).max()) for piece in self.pieces)
            buffers += slots("landing", "dkv", landing, self.grad_bytes, narrow=narrow)
        return buffers

    def shared(self) -> frozenset[str]:
        """Return the buffers that others pull from: the own K/V where they are gathered, and their own gradients."""
        if not self.layout.pull or not self.pieces:
            return frozenset()
        gradients = {buffer.name for buffer in self.buffers() if buffer.name.startswith("dkv:")}
        return frozenset(gradients | ({KV_HOME} if self.fetches else set()))

    @cached_property
    def largest(self) -> int:
        """The most shards that a rank reads in a chunk."""
        return max((int(self.reads[:, piece].sum(axis=1).max()) for piece in self.pieces), default=0)

    @cached_property
    def _read_before(self) -> NDArray[np.int64]:
        """int64 [reader, offset]: shards that the rank reads at offsets below."""
        return self.reads.cumsum(axis=1) - self.reads

    @cached_property
    def _served_before(self) -> NDArray[np.int64]:
        """int64 [owner, offset]: ranks at offsets below that read the shard."""
        return self.needed.cumsum(axis=1) - self.needed

    def kv_slot(self, reader: int, offset: int) -> str:
        return f"{self.kv_pool}:{self._read_before[reader, offset] - 1}"

    def grad_slot(self, reader: int, offset: int, chunk: int) -> str:
        place = self._read_before[reader, offset] - self._read_before[reader, self.pieces[chunk - 1][0]]
        return f"dkv:{place + self.largest * (chunk % 2 if len(self.pieces) > 1 else 0)}"

    def landing(self, owner: int, offset: int, chunk: int) -> str:
        return f"landing:{self._served_before[owner, offset] - self._served_before[owner, self.pieces[chunk - 1][0]]}"

    def draft(self, rank: int, parts: Draft) -> None:
        begins = 1 if self.fetches else 0  # the phase of the first chunk
        for chunk, piece in enumerate(self.pieces, start=1):
            phase = begins + chunk - 1
            routes = self._routes(rank, piece)
            for owner, reader, offset in routes:
                if reader == rank:
                    grad = self.grad_slot(rank, offset, chunk) if self.backward else None
                    parts.compute(phase, self.block_task(rank, owner, self.kv_slot(rank, offset), grad))
            if self.fetches:
                parts.launch(0, [self._fetch(*route) for route in routes], wait=phase)
            if self.backward:
                homeward = [self._return(*route, chunk) for route in self._routes(rank, piece, reads_first=True)]
                parts.launch(phase + 1, homeward, wait=phase + 2)
        own_phase = begins + len(self.pieces) if self.backward and self.pieces else 0
        parts.compute(own_phase, self.block_task(rank, rank, KV_HOME, DKV_HOME))

    def _routes(self, rank: int, piece: list[int], *, reads_first: bool = False) -> list[tuple[int, int, int]]:
        """Return (owner, reader, offset) of what a rank serves and reads of a chunk."""
        found = []
        for offset in piece:
            serves = [(rank, (rank + offset) % self.world, offset)] * bool(self.needed[rank, offset])
            reads = [((rank - offset) % self.world, rank, offset)] * bool(self.reads[rank, offset])
            found += reads + serves if reads_first else serves + reads
        return found

    def _fetch(self, owner: int, reader: int, offset: int) -> Transfer:
        kv = self.route("kv", "gather", self.shape.kv_bytes)
        return kv.move(owner, owner, reader, offset, KV_HOME, self.kv_slot(reader, offset))

    def _return(self, owner: int, reader: int, offset: int, chunk: int) -> Transfer:
        dkv = self.route("dkv", "gather_grad", self.grad_bytes, narrow=self.layout.narrow_gradients)
        source_buffer, buffer = self.grad_slot(reader, offset, chunk), self.landing(owner, offset, chunk)
        return dkv.move(owner, reader, owner, offset, source_buffer, buffer, DKV_HOME)
