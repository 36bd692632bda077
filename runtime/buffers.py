"""A plan's buffers as tensors, allocated once and reused by every layer and both directions.

Slots of one pool ("kv:0", "kv:1", …) are neighbours in one tensor [2, slots, B, S, H_kv, D] (K, then V), so that the
keys of several slots can be read as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..planner.schedule import Schedule

Pair = tuple[Tensor, Tensor]


class Slots:
    """The slots of one schedule: their (K part, V part) by name, and neighbours as one."""

    def __init__(self, pools: dict[str, Tensor], names: frozenset[str]) -> None:
        self._pools, self._names = pools, names

    def __getitem__(self, name: str) -> Pair:
        prefix, number = _parse(name)
        assert name in self._names, f"no buffer {name!r}"
        return self._pools[prefix][0, number], self._pools[prefix][1, number]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def joined(self, names: Sequence[str]) -> Pair:
        """Return neighbouring slots as one pair [1, slots * S, H_kv, D], in order; see `neighbours`."""
        prefix, first = _parse(names[0])
        parts = self._pools[prefix][:, first : first + len(names)]
        assert parts.shape[2] == 1, "slots of several sequences cannot be joined"
        return parts[0].flatten(0, 2)[None], parts[1].flatten(0, 2)[None]


def neighbours(names: Sequence[str]) -> bool:
    """Whether these are slots of one pool, one after the other."""
    if any(name.endswith(":home") for name in names):
        return False
    prefix, first = _parse(names[0])
    return [_parse(name) for name in names] == [(prefix, first + place) for place in range(len(names))]


def _parse(name: str) -> tuple[str, int]:
    prefix, _, number = name.partition(":")
    return prefix, int(number)


class BufferPool:
    """The K/V and dK/dV slots of a plan's schedules on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: dict[str, Tensor] = {}

    def slots(self, schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype]) -> Slots:
        """Return every slot of the schedule that is not the rank's own data.

        shard: [B, S, H_kv, D]; dtypes: by buffer kind ("kv", "dkv").
        """
        kinds = {b.name: b.kind for b in schedule.buffers if not b.name.endswith(":home")}
        counts = Counter(_parse(name)[0] for name in kinds)
        pools = {
            prefix: self._pool(prefix, count, shard, dtypes[kinds[f"{prefix}:0"]]) for prefix, count in counts.items()
        }
        return Slots(pools, frozenset(kinds))

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(pool.nbytes for pool in self._pools.values())

    def _pool(self, prefix: str, count: int, shard: torch.Size, dtype: torch.dtype) -> Tensor:
        pool = self._pools.get(prefix)
        if pool is None or pool.shape[1] < count or pool.shape[2:] != shard or pool.dtype != dtype:
            pool = torch.empty((2, count, *shard), dtype=dtype, device=self._device)
            self._pools[prefix] = pool
        return pool
