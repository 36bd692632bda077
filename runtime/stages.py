"""Forward and backward of one layer on one rank, as stages that `ring.play` plays.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import api
from ..planner.schedule import COLUMNS_HOME, DCOLUMNS_HOME, DKV_HOME, KV_HOME, Task, Transfer
from .buffers import Pair

MaskSource = Callable[[], api.AttentionMask]


@dataclass(eq=False)
class Indexes:
    """The mask of one layer call and the kernels' indexes into it, made when first needed and kept for backward.

    positions: int64 [S] of every rank's tokens. The mask may be chosen while the first transfers are in flight.
    """

    source: MaskSource
    positions: list[Tensor]
    rank: int
    backend: str
    columns_capacity: int
    _mask: api.AttentionMask | None = None
    _blocks: dict[int, api.BlockIndex] = field(default_factory=dict)
    _columns: api.ColumnIndex | None = None

    @property
    def mask(self) -> api.AttentionMask:
        """The layer's mask; ValueError when it has another number of column slots than the plan."""
        if self._mask is None:
            mask = self.source()
            if mask.column_capacity != self.columns_capacity:
                raise ValueError(f"the mask has {mask.column_capacity} column slots, the plan {self.columns_capacity}")
            self._mask = mask
        return self._mask

    def block(self, key_part: int) -> api.BlockIndex:
        """The index of the own queries against one key shard."""
        if key_part not in self._blocks:
            own, keys = self.positions[self.rank], self.positions[key_part]
            self._blocks[key_part] = api.block_index(self.mask, own, keys, backend=self.backend)
        return self._blocks[key_part]

    def columns(self) -> api.ColumnIndex:
        """The index of the own queries against the gathered columns."""
        if self._columns is None:
            self._columns = api.column_index(self.mask, self.positions[self.rank], backend=self.backend)
        return self._columns


@dataclass(eq=False)
class ForwardStage:
    """Accumulates out and lse over the tasks. q [B, S, H, D]; kv the rank's own (K, V), contiguous."""

    q: Tensor
    kv: Pair
    slots: dict[str, Pair]
    indexes: Indexes
    scale: float
    gathered: Tensor | None = None
    result: tuple[Tensor, Tensor] | None = None

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer reads."""
        if transfer.source_buffer == COLUMNS_HOME:
            return (self._own_columns(),)
        return self._pair(transfer.source_buffer)

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer fills."""
        return self._pair(transfer.buffer)

    def sent(self, transfer: Transfer) -> None:
        """K/V stay where they are."""

    def received(self, transfer: Transfer) -> None:
        """K/V are used where they landed."""

    def compute(self, task: Task) -> None:
        """Compute a task and merge it into the result."""
        common = {"scale": self.scale, "backend": self.indexes.backend, "into": self.result}
        if task.key is None:
            assert self.gathered is not None
            column_k, column_v = self.gathered
            self.result = api.column_forward(self.q, column_k, column_v, self.indexes.columns(), **common)
            return
        k, v = self._pair(task.key_buffer)
        self.result = api.block_forward(self.q, k, v, self.indexes.block(task.key.sequence_part), **common)

    def _pair(self, name: str) -> Pair:
        return self.kv if name == KV_HOME else self.slots[name]

    def _own_columns(self) -> Tensor:
        mask, positions = self.indexes.mask, self.indexes.positions[self.indexes.rank]
        self.gathered = torch.stack([api.gather_columns(part, mask, positions) for part in self.kv])
        return self.gathered


@dataclass(eq=False)
class BackwardStage:
    """Accumulates dq, and the dk and dv of the rank's own shard. Gradients are in the accumulator's type.

    grad_kv: the rank's own (dK, dV), zeroed; gathered: the columns [2, B, H, C, D] kept from forward.
    """

    q: Tensor
    kv: Pair
    grad_out: Tensor
    lse: Tensor
    delta: Tensor
    slots: dict[str, Pair]
    indexes: Indexes
    scale: float
    grad_q: Tensor
    grad_kv: Pair
    gathered: Tensor | None
    grad_gathered: Tensor | None = None
    filled: set[str] = field(default_factory=lambda: {DKV_HOME})

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer reads."""
        if transfer.source_buffer == DCOLUMNS_HOME:
            assert self.grad_gathered is not None
            return (self.grad_gathered,)
        return self._pair(transfer.source_buffer)

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer fills."""
        return self._pair(transfer.buffer)

    def sent(self, transfer: Transfer) -> None:
        """dK/dV that went on are no longer here."""
        if transfer.kind == "dkv":
            self.filled.discard(transfer.source_buffer)

    def received(self, transfer: Transfer) -> None:
        """Add what landed to where it belongs."""
        if transfer.accumulate_into is None:
            return
        if transfer.source_buffer == DCOLUMNS_HOME:
            self._scatter_columns()
            return
        target = self._pair(transfer.accumulate_into)
        landed = self._pair(transfer.buffer)
        add = transfer.accumulate_into in self.filled
        for into, part in zip(target, landed, strict=True):
            into.add_(part) if add else into.copy_(part)
        self.filled.add(transfer.accumulate_into)

    def compute(self, task: Task) -> None:
        """Add a task's dq, dk and dv."""
        assert task.grad_buffer is not None
        common = {"scale": self.scale, "backend": self.indexes.backend, "grad_q": self.grad_q}
        if task.key is None:
            assert self.gathered is not None
            self.grad_gathered = torch.zeros_like(self.gathered, dtype=self.grad_q.dtype)
            api.column_backward(
                self.grad_out, self.q, self.gathered[0], self.gathered[1], self.lse, self.delta,
                self.indexes.columns(), grad_column_k=self.grad_gathered[0], grad_column_v=self.grad_gathered[1],
                **common,
            )  # fmt: skip
            return
        k, v = self._pair(task.key_buffer)
        grad_k, grad_v = self._pair(task.grad_buffer)
        if task.grad_buffer not in self.filled:
            grad_k.zero_()
            grad_v.zero_()
            self.filled.add(task.grad_buffer)
        index = self.indexes.block(task.key.sequence_part)
        api.block_backward(
            self.grad_out, self.q, k, v, self.lse, self.delta, index, grad_k=grad_k, grad_v=grad_v, **common
        )

    def _pair(self, name: str) -> Pair:
        if name == KV_HOME:
            return self.kv
        return self.grad_kv if name == DKV_HOME else self.slots[name]

    def _scatter_columns(self) -> None:
        assert self.grad_gathered is not None
        mask, positions = self.indexes.mask, self.indexes.positions[self.indexes.rank]
        for part, into in zip(self.grad_gathered, self.grad_kv, strict=True):
            api.scatter_columns(part, mask, positions, grad=into)
