"""A plan's buffers as tensors, allocated once and reused by every layer and both directions.

Slots of one pool ("kv:0", "kv:1", …) are neighbours in one tensor [2, slots, B, S, H_kv, D] (K, then V), so that the
keys of several slots can be read as one.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..planner.schedule import Schedule

Pair = tuple[Tensor, Tensor]


class BufferPool:
    """The K/V and dK/dV slots of a schedule on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: dict[str, Tensor] = {}

    def slots(self, schedule: Schedule, shard: torch.Size, dtypes: dict[str, torch.dtype]) -> dict[str, Pair]:
        """Return (K part, V part) of every slot that is not the rank's own data.

        shard: [B, S, H_kv, D]; dtypes: by buffer kind ("kv", "dkv").
        """
        counts: dict[str, int] = defaultdict(int)
        kinds: dict[str, str] = {}
        for buffer in schedule.buffers:
            prefix, _, slot = buffer.name.partition(":")
            if slot != "home":
                counts[prefix] += 1
                kinds[prefix] = buffer.kind
        slots: dict[str, Pair] = {}
        for prefix, count in counts.items():
            pool = self._pool(prefix, count, shard, dtypes[kinds[prefix]])
            slots |= {f"{prefix}:{number}": (pool[0, number], pool[1, number]) for number in range(count)}
        return slots

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
