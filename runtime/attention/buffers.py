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
from ...planner.schedule.schedule import HOMES, KEPT, KV_HOME, Schedule
from ..comm.pull import Arena, PeerMemory

Pair = tuple[Tensor, Tensor]
KEPT_POOL = KEPT.removesuffix(":")
STAGED_POOL = "staged"  # copies of the rank's own K/V, where others can read them: the model's tensors lie elsewhere
ALIGNMENT_BYTES = 512  # what torch's allocator gives every tensor of its own


class Slots:
    """The slots of one schedule: their (K part, V part) by name, and neighbours as one.

    Views are made once, and serve all layers. shared: the slots that these are, but for a layer's own kept ones.
    """

    def __init__(self, pools: dict[str, Tensor], arena: Arena, shared: Slots | None = None) -> None:
        self._pools, self._arena, self._shared = pools, arena, shared
        self._views: dict[tuple[str, str, int], Pair] = {}

    def __getitem__(self, name: str) -> Pair:
        return self._view("slot", name, 1)

    def with_kept(self, kept: Tensor) -> Slots:
        """Return these slots and a layer's own kept ones; kept: [2, count, B, S, H_kv, D]."""
        return Slots(self._pools | {KEPT_POOL: kept}, self._arena, self)

    def stage(self, kv: Pair) -> None:
        """Copy the rank's own K/V, all heads, to where others pull them from, if the schedule has such a place."""
        if STAGED_POOL not in self._pools:
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
        return iter(sorted(f"{pool}:{number}" for pool, x in self._pools.items() for number in range(x.shape[1])))

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
            assert first in self, f"no buffer {first!r}"
            prefix, number = parse_slot(first)
            parts = self._pools[prefix][:, number : number + count]
            if form == "slot":
                parts = parts[:, 0]
            elif form == "joined":
                assert parts.shape[2] == 1, "slots of several sequences cannot be joined"
                parts = parts.flatten(1, 3)[:, None]
            self._views[key] = parts[0], parts[1]
        return self._views[key]


def staged(part: int) -> str:
    """Return the slot that others pull a part of this rank's K/V heads from; parts are as large as slots."""
    return f"{STAGED_POOL}:{part}"


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
    not give this memory, does not count it. generation: another number as soon as slots lie in other memory.
    """

    generation: int = 0

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
        self._arena = self._allocate(0)
        self._slots: dict[tuple[int, torch.Size], Slots] = {}

    def slots(self, schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype]) -> Slots:
        """Return every slot of one of the schedules that is not the rank's own data.

        shard: [B, S, H_kv, D] of all heads; dtypes: by buffer kind ("kv", "dkv").
        """
        key = self._schedules.index(schedule), shard
        if key not in self._slots:
            kv_heads = self._kv_heads or [shard[2]] * len(self._schedules)
            wanted = [_pools(one, shard, dtypes, count) for one, count in zip(self._schedules, kv_heads, strict=True)]
            needed = max(sum(_room_bytes(*pool) for pool in pools.values()) for pools in wanted)
            if self._arena.memory.nbytes < needed:
                self._slots.clear()
                self._arena = self._allocate(0)  # freed before more is asked for
                self._arena = self._allocate(needed)
            pools, rest = {}, self._arena.memory
            for name, (shape, dtype) in wanted[key[0]].items():
                pools[name] = rest[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
                rest = rest[_room_bytes(shape, dtype) :]
            self._slots[key] = Slots(pools, self._arena)
        return self._slots[key]

    @property
    def uncounted_bytes(self) -> int:
        """Bytes allocated so far that torch's allocator does not know of: memory that other ranks read."""
        return self._arena.memory.nbytes if self._peers is not None else 0

    def _allocate(self, nbytes: int) -> Arena:
        self.generation += 1
        if self._peers is not None and nbytes:
            return self._peers.allocate(nbytes)
        return Arena(memory=torch.empty(nbytes, dtype=torch.uint8, device=self._device))


def _room_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return -(-shape.numel() * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _pools(
    schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype], kv_heads: int
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the (shape [2, slots, B, S, H_kv, D], dtype) of a schedule's pools; rounded gradients have that of K/V.

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
    return {
        prefix: (torch.Size((2, count, *shard[:2], kv_heads, shard[3])), dtypes[kinds[f"{prefix}:0"]])
        for prefix, count in counts.items()
    }
