"""A plan's buffers as tensors, allocated once and used in turn by every layer and both directions.

Slots of one pool ("kv:0", "kv:1", …) are neighbours in one tensor [2, slots, B, S, H_kv, D] (K, then V), so that the
keys of several slots can be read as one. Where a schedule's ranks pull, the slots lie in memory that all of them can
read, alike on every rank: communication shapes follow the plan alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...planner.schedule.launches import neighbours, parse_slot
from ...planner.schedule.schedule import HOMES, KEPT, KV_HOME, Schedule, Transfer
from ..comm.pull import Arena, PeerMemory

Pair = tuple[Tensor, Tensor]
KEPT_POOL = KEPT.removesuffix(":")
STAGED = "staged:0"  # a copy of the rank's own K/V, where others can read it: the model's tensors lie elsewhere
ALIGNMENT_BYTES = 512  # what torch's allocator gives every tensor of its own


class Slots:
    """The slots of one schedule: their (K part, V part) by name, and neighbours as one."""

    def __init__(self, pools: dict[str, Tensor], names: frozenset[str], arena: Arena) -> None:
        self._pools, self._names, self._arena = pools, names, arena

    def __getitem__(self, name: str) -> Pair:
        prefix, number = parse_slot(name)
        assert name in self._names, f"no buffer {name!r}"
        return self._pools[prefix][0, number], self._pools[prefix][1, number]

    def with_kept(self, kept: Tensor) -> Slots:
        """Return these slots and a layer's own kept ones; kept: [2, count, B, S, H_kv, D]."""
        names = frozenset(f"{KEPT_POOL}:{number}" for number in range(kept.shape[1]))
        return Slots(self._pools | {KEPT_POOL: kept}, self._names | names, self._arena)

    def stage(self, kv: Pair) -> None:
        """Copy the rank's own K/V to where others pull them from, if the schedule has such a place."""
        if STAGED in self._names:
            for room, part in zip(self[STAGED], kv, strict=True):
                room.copy_(part)

    def of_peer(self, name: str, rank: int) -> tuple[Tensor | None, Tensor | None]:
        """Return another rank's slot of that name, in its memory; None where that cannot be read."""
        first, second = self[name]
        return self._arena.of_peer(first, rank), self._arena.of_peer(second, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def joined(self, names: Sequence[str]) -> Pair:
        """Return neighbouring slots as one pair [1, slots * S, H_kv, D], in order; see `launches.neighbours`."""
        prefix, first = parse_slot(names[0])
        parts = self._pools[prefix][:, first : first + len(names)]
        assert parts.shape[2] == 1, "slots of several sequences cannot be joined"
        return parts[0].flatten(0, 2)[None], parts[1].flatten(0, 2)[None]

    def block(self, first: str, count: int) -> Pair:
        """Return `count` neighbouring slots as one pair [count, B, S, H_kv, D]: what a collective fills or takes."""
        prefix, number = parse_slot(first)
        parts = self._pools[prefix][:, number : number + count]
        return parts[0], parts[1]


def source_slot(transfer: Transfer) -> str:
    """Return the name of the buffer that a transfer is read from: of a pull, one that others can read."""
    return STAGED if transfer.transport == "pull" and transfer.source_buffer == KV_HOME else transfer.source_buffer


def narrowed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the first bytes of a slot's contiguous tensor as one of the same shape in a type no wider than its own."""
    return part.flatten().view(dtype)[: part.numel()].view(part.shape)


def runs_of_neighbours(names: Sequence[str]) -> list[list[str]]:
    """Cut names into runs of neighbouring slots, in order."""
    runs: list[list[str]] = []
    for name in names:
        if runs and neighbours([*runs[-1], name]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


class BufferPool:
    """The K/V and dK/dV slots of a plan's schedules on one device.

    One arena, as large as the most demanding schedule needs: directions take turns on it. What a slot held is gone once
    another direction has been played, and every transfer is waited for before a direction ends.
    kv_heads: how many K/V heads a slot of each schedule has, where that is not all of them.
    peers: where to allocate when ranks pull; it makes growing the arena collective, and torch's allocator, which does
    not give this memory, does not count it.
    """

    def __init__(
        self,
        device: torch.device,
        schedules: Sequence[Schedule],
        peers: PeerMemory | None = None,
        *,
        kv_heads: Sequence[int] | None = None,
    ) -> None:
        self._device, self._schedules = device, tuple(schedules)
        self._kv_heads = kv_heads
        self._peers = peers if any(schedule.shares for schedule in schedules) else None
        self._arena = self._nothing()
        self._slots: dict[tuple[int, torch.Size], Slots] = {}

    def slots(self, schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype]) -> Slots:
        """Return every slot of one of the schedules that is not the rank's own data.

        shard: [B, S, H_kv, D] of all heads; dtypes: by buffer kind ("kv", "dkv").
        """
        shards = [self._slot_shape(number, shard) for number in range(len(self._schedules))]
        needed = max(_arena_bytes(one, of_one, dtypes) for one, of_one in zip(self._schedules, shards, strict=True))
        if self.nbytes < needed:
            self._slots.clear()
            self._arena = self._nothing()  # freed before more is asked for
            self._arena = self._allocate(needed)
        number = self._schedules.index(schedule)
        key = (number, shard)
        if key not in self._slots:
            self._slots[key] = self._cut(schedule, shards[number], dtypes)
        return self._slots[key]

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return self._arena.memory.nbytes

    @property
    def uncounted_bytes(self) -> int:
        """Those of them that torch's allocator does not know of: memory that other ranks read."""
        return self.nbytes if self._peers is not None else 0

    def _slot_shape(self, number: int, shard: torch.Size) -> torch.Size:
        if self._kv_heads is None:
            return shard
        batch, tokens, _, head_dim = shard
        return torch.Size((batch, tokens, self._kv_heads[number], head_dim))

    def _nothing(self) -> Arena:
        return Arena(memory=torch.empty(0, dtype=torch.uint8, device=self._device))

    def _allocate(self, nbytes: int) -> Arena:
        if self._peers is not None:
            return self._peers.allocate(nbytes)
        return Arena(memory=torch.empty(nbytes, dtype=torch.uint8, device=self._device))

    def _cut(self, schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype]) -> Slots:
        pools, start = {}, 0
        for prefix, (count, dtype) in _pools(schedule, dtypes).items():
            nbytes = _pool_bytes(count, shard, dtype)
            pools[prefix] = self._arena.memory[start : start + nbytes].view(dtype).view(2, count, *shard)
            start += _aligned(nbytes)
        return Slots(pools, frozenset(_kinds(schedule)), self._arena)


def _kinds(schedule: Schedule) -> dict[str, str]:
    """Return the kind of content in whose type each slot is; rounded gradients have that of K/V.

    Queries and results that change ranks are no K/V pairs: they live with their stage (head_stages.py).
    """
    own = [
        buffer
        for buffer in schedule.buffers
        if buffer.name in HOMES or buffer.name.startswith(KEPT) or buffer.kind in ("q", "out")
    ]
    others = [buffer for buffer in schedule.buffers if buffer not in own]
    kinds: dict[str, str] = {buffer.name: "kv" if buffer.narrow else buffer.kind for buffer in others}
    pulled_from_home = any(buffer.shared and buffer.name == KV_HOME for buffer in own)
    return kinds | ({STAGED: "kv"} if pulled_from_home else {})


def _pools(schedule: Schedule, dtypes: dict[str, torch.dtype]) -> dict[str, tuple[int, torch.dtype]]:
    """Return how many slots each pool has, and their type."""
    kinds = _kinds(schedule)
    counts = Counter(parse_slot(name)[0] for name in kinds)
    return {prefix: (count, dtypes[kinds[f"{prefix}:0"]]) for prefix, count in counts.items()}


def _arena_bytes(schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype]) -> int:
    return sum(_aligned(_pool_bytes(count, shard, dtype)) for count, dtype in _pools(schedule, dtypes).values())


def _pool_bytes(count: int, shard: torch.Size, dtype: torch.dtype) -> int:
    return 2 * count * shard.numel() * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
