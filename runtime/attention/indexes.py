"""The mask of one layer call, and the kernels' indexes into it.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import api
from ...planner.schedule.schedule import ShardId, Task
from .buffers import Pair
from .heads import Heads

MaskSource = Callable[[], api.AttentionMask]


@dataclass(eq=False, kw_only=True)
class Indexes:
    """Indexes of one shard's queries, made when first needed and kept for backward.

    positions: int64 [S] of every rank's tokens; joined_positions: those of several ranks, kept by the caller; rank:
    whose queries. The mask may be chosen while the first transfers are in flight; `chosen` is told when it is.
    """

    source: api.AttentionMask | MaskSource | None
    positions: list[Tensor]
    rank: int
    backend: str
    columns_capacity: int
    joined_positions: dict[tuple[int, ...], Tensor]
    chosen: Callable[[api.AttentionMask], None]
    _mask: api.AttentionMask | None = None
    _blocks: dict[tuple[int, ...], api.BlockIndex] = field(default_factory=dict)
    _columns: api.ColumnIndex | None = None
    _parts: dict[tuple[int, Heads], Indexes] = field(default_factory=dict)

    def part(self, query: ShardId, heads: Heads) -> Indexes:
        """Those of a shard's queries, for some heads of the same mask."""
        rank = query.sequence_part
        key = rank, heads
        if key not in self._parts:
            if rank == self.rank and heads == (0, self.mask.heads):
                return self
            self._parts[key] = Indexes(
                source=lambda: self.mask.of_heads(slice(*heads)),
                positions=self.positions,
                rank=rank,
                backend=self.backend,
                columns_capacity=self.columns_capacity,
                joined_positions=self.joined_positions,
                chosen=lambda mask: None,
            )
        return self._parts[key]

    @property
    def known(self) -> bool:
        """Whether the mask need not be chosen first."""
        return self._mask is not None or isinstance(self.source, api.AttentionMask)

    @property
    def mask(self) -> api.AttentionMask:
        """The layer's mask; ValueError when it has another number of column slots than the plan."""
        if self._mask is None:
            assert self.source is not None
            mask = self.source if isinstance(self.source, api.AttentionMask) else self.source()
            if mask.column_capacity != self.columns_capacity:
                raise ValueError(f"the mask has {mask.column_capacity} column slots, the plan {self.columns_capacity}")
            self._mask = mask
            self.chosen(mask)
            self.source = None  # it holds q and k, which must not live until backward
        return self._mask

    def block(self, tasks: Sequence[Task]) -> api.BlockIndex:
        """The index of the queries against the key shards of these tasks, one after the other."""
        parts = tuple(task.key.sequence_part for task in tasks if task.key is not None)
        if parts not in self._blocks:
            own, keys = self.positions[self.rank], self._positions_of(parts)
            self._blocks[parts] = api.block_index(self.mask, own, keys, backend=self.backend)
        return self._blocks[parts]

    def _positions_of(self, parts: tuple[int, ...]) -> Tensor:
        if len(parts) == 1:
            return self.positions[parts[0]]
        if parts not in self.joined_positions:
            self.joined_positions[parts] = torch.cat([self.positions[part] for part in parts])
        return self.joined_positions[parts]

    def columns(self) -> api.ColumnIndex:
        """The index of the queries against the gathered columns."""
        if self._columns is None:
            self._columns = api.column_index(self.mask, self.positions[self.rank], backend=self.backend)
        return self._columns

    def own_columns(self, kv: Pair) -> Tensor:
        """Return the own rows of the columns [2, B, H, C, D], zero elsewhere. kv: the rank's own (K, V)."""
        return api.gather_columns(*kv, self.columns())

    def add_to_own_rows(self, grad_columns: Tensor, grad_kv: Pair) -> None:
        """Add the gradients of all columns [2, B, H, C, D] to those of the own rows, which hold a sum."""
        into = api.KeyGradients(k=grad_kv[0], v=grad_kv[1], add=True)
        api.scatter_columns((grad_columns[0], grad_columns[1]), self.columns(), into)
