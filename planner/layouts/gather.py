"""The pipelined all-gather."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError
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
    Transport,
    keeps_nothing,
)
from ..schedule.shape import AttentionShape
from .draft import Draft, Route, block_task, close_schedule, slots


def gather(
    *, shape: AttentionShape, direction: Direction, pairs: Pairs | None = None, chunks: int = 4, keep_kv: int = 0,
    pull: int = 0, narrow_grads: int = 0,
) -> Schedule:  # fmt: skip
    """A pipelined all-gather: every shard goes straight from its owner to all that need it, in `chunks` launches.

    A phase computes the shards of one chunk together. Needs as many K/V slots as a rank needs other shards. Forward
    begins with the own shard, while others arrive. Backward ends with it: dK/dV go straight home meanwhile, and they
    are twice as many bytes as K/V, which arrive while columns are computed. keep_kv: 1 keeps what forward gathered for
    backward, which then fetches nothing; 0 gathers again. pull: 1 lets every rank copy from its peers' memory, by copy
    engines on the GPUs of one host; 0 sends and receives. narrow_grads: 1 rounds what a rank adds to dK/dV of another's
    shard to the type of q, k and v, once, where its kernel writes it: half the bytes; owners sum in the accumulator's.
    """
    for name, value in (("keep_kv", keep_kv), ("pull", pull), ("narrow_grads", narrow_grads)):
        if value not in (0, 1):
            raise InputError(f"is 0 or 1, not {value}", field=name)
    if chunks < 1:
        raise InputError(f"must be at least 1, not {chunks}", field="chunks")
    needed = (pairs or Pairs.all_of(shape.world_size)).distances
    layout = _Gather(
        shape=shape,
        direction=direction,
        needed=needed,
        chunks=chunks,
        keep_kv=bool(keep_kv),
        transport="pull" if pull else "p2p",
        narrow_grads=bool(narrow_grads),
    )
    parts = layout.communicators(), layout.buffers(), layout.draft
    kept = layout.kept if keep_kv else keeps_nothing
    return close_schedule("gather", direction, shape, *parts, kept=kept, shared=layout.shared())


@dataclass(frozen=True, kw_only=True)
class _Gather:
    """The all-gather of `gather`. needed: bool [owner, offset], whether the rank at that offset reads the shard."""

    shape: AttentionShape
    direction: Direction
    needed: NDArray[np.bool_]
    chunks: int
    keep_kv: bool
    transport: Transport
    narrow_grads: bool

    @property
    def world(self) -> int:
        return self.shape.world_size

    @property
    def fetches(self) -> bool:
        """Whether K/V are gathered in this direction."""
        return self.direction == "forward" or not self.keep_kv

    @property
    def grad_bytes(self) -> int:
        """dK and dV of one shard on their way home."""
        return self.shape.kv_bytes if self.narrow_grads else self.shape.dkv_bytes

    @property
    def kv_pool(self) -> str:
        return KEPT.removesuffix(":") if self.keep_kv else "kv"

    def kept(self, rank: int) -> dict[str, ShardId]:
        """Return what a rank keeps: every shard that it reads but its own."""
        offsets = [offset for offset in range(1, self.world) if self.reads[rank, offset]]
        return {self.kv_slot(rank, offset): ShardId(sequence_part=(rank - offset) % self.world) for offset in offsets}

    @cached_property
    def pieces(self) -> list[list[int]]:
        """Offsets of the owners that any rank reads from, nearest first, cut into chunks."""
        offsets = [offset for offset in range(1, self.world) if self.needed[:, offset].any()]
        return [
            offsets[piece.start : piece.stop]
            for piece in _split(range(len(offsets)), min(self.chunks, max(len(offsets), 1)))
        ]

    @cached_property
    def reads(self) -> NDArray[np.bool_]:
        """bool [reader, offset]: whether the rank reads the shard of the rank that is `offset` before it."""
        reader, offset = np.indices((self.world, self.world))
        return self.needed[(reader - offset) % self.world, offset]

    def communicators(self) -> list[Communicator]:
        names = ["gather"] if self.fetches or self.world == 1 else []
        names += ["gather_grad"] if self.direction == "backward" and self.world > 1 else []
        return [Communicator(name=name, groups=(tuple(range(self.world)),)) for name in names]

    def buffers(self) -> list[Buffer]:
        fetched = int(self.reads[:, 1:].sum(axis=1).max())
        buffers = slots(self.kv_pool, "kv", fetched, self.shape.kv_bytes)
        if self.direction == "backward" and fetched:
            count, narrow = self.largest * min(2, len(self.pieces)), self.narrow_grads
            buffers += slots("dkv", "dkv", count, self.grad_bytes, narrow=narrow)
            landing = max(int(self.needed[:, piece].sum(axis=1).max()) for piece in self.pieces)
            buffers += slots("landing", "dkv", landing, self.grad_bytes, narrow=narrow)
        return buffers

    def shared(self) -> frozenset[str]:
        """Return the buffers that others pull from: the own K/V where they are gathered, and their own gradients."""
        if self.transport != "pull" or not self.pieces:
            return frozenset()
        gradients = {buffer.name for buffer in self.buffers() if buffer.name.startswith("dkv:")}
        return frozenset(gradients | ({KV_HOME} if self.fetches else set()))

    @cached_property
    def largest(self) -> int:
        """The most shards that a rank reads in a chunk."""
        return max((int(self.reads[:, piece].sum(axis=1).max()) for piece in self.pieces), default=0)

    @cached_property
    def _read_before(self) -> NDArray[np.int64]:
        """int64 [reader, offset]: shards that the rank reads at offsets 1 to `offset`."""
        return self.reads.cumsum(axis=1) - 1

    @cached_property
    def _served_before(self) -> NDArray[np.int64]:
        """int64 [owner, offset]: ranks at offsets 1 to `offset` that read the shard."""
        return self.needed.cumsum(axis=1) - 1

    def kv_slot(self, reader: int, offset: int) -> str:
        return f"{self.kv_pool}:{self._read_before[reader, offset - 1]}"

    def grad_slot(self, reader: int, offset: int, chunk: int) -> str:
        place = self._read_before[reader, offset - 1] - self._read_before[reader, self.pieces[chunk - 1][0] - 1]
        return f"dkv:{place + self.largest * (chunk % 2 if len(self.pieces) > 1 else 0)}"

    def landing(self, owner: int, offset: int, chunk: int) -> str:
        place = self._served_before[owner, offset - 1] - self._served_before[owner, self.pieces[chunk - 1][0] - 1]
        return f"landing:{place}"

    def draft(self, rank: int, parts: Draft) -> None:
        """Drop a rank's transfers and tasks into their phases."""
        backward = self.direction == "backward"
        begins = 1 if self.fetches else 0  # the phase of the first chunk
        for chunk, piece in enumerate(self.pieces, start=1):
            phase = begins + chunk - 1
            fetch: list[Transfer] = []
            homeward: list[Transfer] = []
            for offset in piece:
                owner, reader = (rank - offset) % self.world, (rank + offset) % self.world
                serves, reads = bool(self.needed[rank, offset]), bool(self.reads[rank, offset])
                fetch += [self._fetch(rank, reader, offset)] * serves + [self._fetch(owner, rank, offset)] * reads
                homeward += [self._return(owner, rank, offset, chunk)] * reads
                homeward += [self._return(rank, reader, offset, chunk)] * serves
                if reads:
                    grad = self.grad_slot(rank, offset, chunk) if backward else None
                    parts.compute(phase, block_task(rank, owner, self.kv_slot(rank, offset), self.shape, grad))
            if self.fetches:
                parts.launch(0, fetch, wait=phase)
            if backward:
                parts.launch(phase + 1, homeward, wait=phase + 2)
        own_phase = begins + len(self.pieces) if backward and self.pieces else 0
        parts.compute(own_phase, block_task(rank, rank, KV_HOME, self.shape, DKV_HOME if backward else None))

    def _fetch(self, owner: int, reader: int, offset: int) -> Transfer:
        capacity_bytes = self.shape.kv_bytes
        kv = Route(kind="kv", communicator="gather", capacity_bytes=capacity_bytes, transport=self.transport)
        return kv.move(owner, owner, reader, offset, KV_HOME, self.kv_slot(reader, offset))

    def _return(self, owner: int, reader: int, offset: int, chunk: int) -> Transfer:
        dkv = Route(
            kind="dkv", communicator="gather_grad", capacity_bytes=self.grad_bytes, transport=self.transport,
            narrow=self.narrow_grads,
        )  # fmt: skip
        source_buffer, buffer = self.grad_slot(reader, offset, chunk), self.landing(owner, offset, chunk)
        return dkv.move(owner, reader, owner, offset, source_buffer, buffer, DKV_HOME)


def _split(items: range, pieces: int) -> list[range]:
    """Cut a range into nearly equal pieces, the smaller ones first so that the first arrives soonest."""
    size, extra = divmod(len(items), pieces) if items else (0, 0)
    cuts = [0]
    for piece in range(pieces if items else 0):
        cuts.append(cuts[-1] + size + (piece >= pieces - extra))
    return [items[start:stop] for start, stop in pairwise(cuts)]
