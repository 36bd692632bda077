"""A plan's buffers as tensors, allocated once and used in turn by every layer and both directions.

Slots of one pool ("kv:0", "kv:1", …) are neighbours in one tensor [2, slots, B, S, H_kv, D] (K, then V), so that the
keys of several slots can be read as one. Where a schedule's ranks pull, the slots lie in memory that all of them can
read, alike on every rank: communication shapes follow the plan alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...planner.schedule.launches import neighbours, parse_slot
from ...planner.schedule.schedule import HOMES, KEPT, KV_HOME, Schedule
from ..comm.pull import Arena, PeerMemory

Pair = tuple[Tensor, Tensor]
KEPT_POOL = KEPT.removesuffix(":")
STAGED = "staged:"  # copies of the rank's own K/V, where others can read them: the model's tensors lie elsewhere
ALIGNMENT_BYTES = 512  # what torch's allocator gives every tensor of its own


class Slots:
    """The slots of one schedule: their (K part, V part) by name, and neighbours as one.

    Views are made once, and serve all layers. shared: the slots that these are, but for a layer's own kept ones.
    """

    def __init__(
        self, pools: dict[str, Tensor], names: frozenset[str], arena: Arena, shared: Slots | None = None
    ) -> None:
        self._pools, self._names, self._arena, self._shared = pools, names, arena, shared
        self._views: dict[tuple[str, str, int], Pair] = {}

    def __getitem__(self, name: str) -> Pair:
        return self._view("slot", name, 1)

    def with_kept(self, kept: Tensor) -> Slots:
        """Return these slots and a layer's own kept ones; kept: [2, count, B, S, H_kv, D]."""
        names = frozenset(f"{KEPT_POOL}:{number}" for number in range(kept.shape[1]))
        return Slots({KEPT_POOL: kept}, self._names | names, self._arena, self)

    def stage(self, kv: Pair) -> None:
        """Copy the rank's own K/V, all heads, to where others pull them from, if the schedule has such a place."""
        if staged(0) not in self._names:
            return
        count = self[staged(0)][0].shape[2]
        for part in range(kv[0].shape[2] // count):
            for room, own in zip(self[staged(part)], kv, strict=True):
                room.copy_(own.narrow(2, part * count, count))

    def of_peer(self, name: str, rank: int) -> tuple[Tensor | None, Tensor | None]:
        """Return another rank's slot of that name, in its memory; None where that cannot be read."""
        first, second = self[name]
        return self._arena.of_peer(first, rank), self._arena.of_peer(second, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def joined(self, names: Sequence[str]) -> Pair:
        """Return neighbouring slots as one pair [1, slots * S, H_kv, D], in order; see `launches.neighbours`."""
        return self._view("joined", names[0], len(names))

    def block(self, first: str, count: int) -> Pair:
        """Return `count` neighbouring slots as one pair [count, B, S, H_kv, D]: what a collective fills or takes."""
        return self._view("block", first, count)

    def _view(self, form: str, first: str, count: int) -> Pair:
        if self._shared is not None and not first.startswith(KEPT):
            return self._shared._view(form, first, count)
        key = form, first, count
        if key not in self._views:
            self._views[key] = self._made(form, first, count)
        return self._views[key]

    def _made(self, form: str, first: str, count: int) -> Pair:
        assert first in self._names, f"no buffer {first!r}"
        prefix, number = parse_slot(first)
        parts = self._pools[prefix][:, number : number + count]
        if form == "slot":
            return parts[0, 0], parts[1, 0]
        if form == "block":
            return parts[0], parts[1]
        assert parts.shape[2] == 1, "slots of several sequences cannot be joined"
        return parts[0].flatten(0, 2)[None], parts[1].flatten(0, 2)[None]


def staged(part: int) -> str:
    """Return the slot that others pull a part of this rank's K/V heads from; parts are as large as slots."""
    return f"{STAGED}{part}"


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
        key = self._schedules.index(schedule), shard
        if key not in self._slots:
            kv_heads = self._kv_heads or [shard[2]] * len(self._schedules)
            wanted = [_pools(one, shard, dtypes, count) for one, count in zip(self._schedules, kv_heads, strict=True)]
            needed = max(sum(pool.room_bytes for pool in pools.values()) for pools in wanted)
            if self.nbytes < needed:
                self._slots.clear()
                self._arena = self._nothing()  # freed before more is asked for
                self._arena = self._allocate(needed)
            self._slots[key] = self._cut(wanted[key[0]])
        return self._slots[key]

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return self._arena.memory.nbytes

    @property
    def uncounted_bytes(self) -> int:
        """Those of them that torch's allocator does not know of: memory that other ranks read."""
        return self.nbytes if self._peers is not None else 0

    def _nothing(self) -> Arena:
        return Arena(memory=torch.empty(0, dtype=torch.uint8, device=self._device))

    def _allocate(self, nbytes: int) -> Arena:
        if self._peers is not None:
            return self._peers.allocate(nbytes)
        return Arena(memory=torch.empty(nbytes, dtype=torch.uint8, device=self._device))

    def _cut(self, wanted: dict[str, _Pool]) -> Slots:
        pools, start = {}, 0
        for prefix, pool in wanted.items():
            part = self._arena.memory[start : start + pool.nbytes]
            pools[prefix] = part.view(pool.dtype).view(2, pool.count, *pool.shard)
            start += pool.room_bytes
        names = {f"{prefix}:{number}" for prefix, pool in wanted.items() for number in range(pool.count)}
        return Slots(pools, frozenset(names), self._arena)


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """`count` slots for (K, V) or (dK, dV) of one shard [B, S, H_kv, D] each."""

    count: int
    shard: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return 2 * self.count * self.shard.numel() * self.dtype.itemsize

    @property
    def room_bytes(self) -> int:
        return -(-self.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _pools(schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype], kv_heads: int) -> dict[str, _Pool]:
    """Return the pools of a schedule by name; rounded gradients have the type of K/V.

    Queries and results that change ranks are no pairs of one shape: they live with their layer (layer.py).
    """
    kinds = {
        buffer.name: "kv" if buffer.narrow else buffer.kind
        for buffer in schedule.buffers
        if buffer.name not in HOMES and not buffer.name.startswith(KEPT) and buffer.kind in ("kv", "dkv")
    }
    if any(buffer.shared and buffer.name == KV_HOME for buffer in schedule.buffers):
        kinds |= {staged(part): "kv" for part in range(shard[2] // kv_heads)}
    counts = Counter(parse_slot(name)[0] for name in kinds)
    of_slot = torch.Size((*shard[:2], kv_heads, shard[3]))
    return {
        prefix: _Pool(count=count, shard=of_slot, dtype=dtypes[kinds[f"{prefix}:0"]])
        for prefix, count in counts.items()
    }
