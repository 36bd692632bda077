"""Forward and backward of one layer on one rank, as stages that `ring.play` plays.

Shape legend: B batch, S tokens of a shard, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import api
from ...planner.schedule.launches import launches_of
from ...planner.schedule.schedule import COLUMNS_HOME, DCOLUMNS_HOME, DKV_HOME, KV_HOME, Task, Transfer, slots_from
from .buffers import Pair, Slots, narrowed, runs_of_neighbours, source_slot

MaskSource = Callable[[], api.AttentionMask]


def split_columns(tasks: Sequence[Task]) -> tuple[bool, list[Task]]:
    """Return whether a launch attends the columns, and its tasks over key shards."""
    keyed = [task for task in tasks if task.key is not None]
    return len(keyed) < len(tasks), keyed


@dataclass(eq=False)
class Indexes:
    """The mask of one layer call and the kernels' indexes into it, made when first needed and kept for backward.

    positions: int64 [S] of every rank's tokens; joined_positions: those of several ranks, kept by the caller.
    The mask may be chosen while the first transfers are in flight; `chosen` is told when it is.
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
    _parts: dict[tuple[int, int, int], Indexes] = field(default_factory=dict)

    def part(self, rank: int, heads: tuple[int, int]) -> Indexes:
        """Those of another rank's queries, for query heads [heads[0], heads[1]) of the same mask."""
        key = rank, *heads
        if key not in self._parts:
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
        """The index of the own queries against the key shards of these tasks, one after the other."""
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
        """The index of the own queries against the gathered columns."""
        if self._columns is None:
            self._columns = api.column_index(self.mask, self.positions[self.rank], backend=self.backend)
        return self._columns

    def own_columns(self, kv: Pair) -> Tensor:
        """Return the own rows of the columns [2, B, H, C, D], zero elsewhere. kv: the rank's own (K, V)."""
        return api.gather_column_pair(*kv, self.mask, self.positions[self.rank], self.columns())

    def add_to_own_rows(self, grad_columns: Tensor, grad_kv: Pair) -> None:
        """Add the gradients of all columns [2, B, H, C, D] to those of the own rows."""
        parts, (grad_k, grad_v) = (grad_columns[0], grad_columns[1]), grad_kv
        positions = self.positions[self.rank]
        api.scatter_column_pair(parts, self.mask, positions, self.columns(), grad_k=grad_k, grad_v=grad_v)


@dataclass(eq=False)
class ForwardStage:
    """Accumulates out and lse over the tasks. q [B, S, H, D]; kv the rank's own (K, V), contiguous.

    tasks: how many this rank computes; with the last one, `result` becomes (out in q's dtype, lse).
    """

    q: Tensor
    kv: Pair
    slots: Slots
    indexes: Indexes
    scale: float
    tasks: int
    gathered: Tensor | None = None
    result: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        """Put K/V where others pull them from."""
        self.slots.stage(self.kv)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return (out in q's dtype, lse)."""
        assert self.result is not None
        return self.result

    @property
    def computes_at_once(self) -> bool:
        """See `ring.Stage`: while a pattern is being chosen, K and V had better travel."""
        return self.q.is_cuda and self.indexes.known

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer reads."""
        if transfer.source_buffer == COLUMNS_HOME:
            self.gathered = self.indexes.own_columns(self.kv)
            return (self.gathered,)
        return self._pair(source_slot(transfer))

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer fills."""
        if transfer.transport == "all_gather":
            return self.slots.block(transfer.buffer, len(self.indexes.positions))
        return self._pair(transfer.buffer)

    def origins(self, transfer: Transfer) -> tuple[Tensor | None, ...]:
        """Return the tensors that the pull reads, in the memory of its source."""
        return self.slots.of_peer(source_slot(transfer), transfer.source)

    def sent(self, transfer: Transfer) -> None:
        """K/V stay where they are."""

    def received(self, transfers: Sequence[Transfer]) -> None:
        """K/V are used where they landed."""

    def launches(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """Cut a phase's tasks into kernel launches."""
        return launches_of(tasks, backend=self.indexes.backend, batch=self.q.shape[0])

    def compute(self, tasks: tuple[Task, ...]) -> None:
        """Compute the tasks of one launch and merge them into the result."""
        self.tasks -= len(tasks)
        common: dict[str, Any] = {"scale": self.scale, "backend": self.indexes.backend}
        common |= {"into": self.result, "final": self.tasks == 0}
        with_columns, keyed = split_columns(tasks)
        columns = None
        if with_columns:
            assert self.gathered is not None
            columns = self.gathered[0], self.gathered[1], self.indexes.columns()
            if not keyed:
                self.result = api.column_forward(self.q, *columns, **common)
                return
        names = [task.key_buffer for task in keyed]
        k, v = self._pair(names[0]) if len(names) == 1 else self.slots.joined(names)
        self.result = api.block_forward(self.q, k, v, self.indexes.block(keyed), columns=columns, **common)

    def _pair(self, name: str) -> Pair:
        return self.kv if name == KV_HOME else self.slots[name]


@dataclass(eq=False)
class BackwardStage:
    """Accumulates dq, and the dk and dv of the rank's own shard. Gradients are in the accumulator's type.

    tasks: how many this rank computes; with the last one, `grad_q` becomes dq in q's dtype. grad_kv: where the rank's
    own (dK, dV) are summed, holding nothing yet; None where no task adds to them. gathered: the columns
    [2, B, H, C, D] kept from forward. scratch: see
    api.block_backward; None where a single key shard is computed.
    """

    q: Tensor
    kv: Pair
    grad_out: Tensor
    lse: Tensor
    delta: Tensor
    slots: Slots
    indexes: Indexes
    scale: float
    tasks: int
    grad_kv: Pair | None
    gathered: Tensor | None
    grad_q: Tensor | None = None
    grad_gathered: Tensor | None = None
    filled: set[str] = field(default_factory=set)
    scratch: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Put K/V where others pull them from."""
        self.slots.stage(self.kv)

    @property
    def computes_at_once(self) -> bool:
        """See `ring.Stage`."""
        return self.q.is_cuda

    def outgoing(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer reads."""
        if transfer.source_buffer == DCOLUMNS_HOME:
            assert self.grad_gathered is not None
            return (self.grad_gathered,)
        if transfer.transport == "reduce_scatter":
            return self.slots.block(transfer.source_buffer, len(self.indexes.positions))
        pair = self._pair(source_slot(transfer))
        return tuple(part.to(self.q.dtype) for part in pair) if transfer.narrow else pair

    def incoming(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Return the tensors that the transfer fills."""
        if transfer.transport == "all_gather":
            return self.slots.block(transfer.buffer, len(self.indexes.positions))
        if transfer.kind == "dkv" and transfer.accumulate_into is None:
            self.filled.add(transfer.buffer)  # from here on: it may have been sent on before it is waited for
        pair = self._pair(transfer.buffer)
        return tuple(narrowed(part, self.q.dtype) for part in pair) if transfer.narrow else pair

    def origins(self, transfer: Transfer) -> tuple[Tensor | None, ...]:
        """Return the tensors that the pull reads, in the memory of its source."""
        return self.slots.of_peer(source_slot(transfer), transfer.source)

    def sent(self, transfer: Transfer) -> None:
        """dK/dV that went on are no longer here."""
        if transfer.transport == "reduce_scatter":
            self.filled.difference_update(slots_from(transfer.source_buffer, len(self.indexes.positions)))
        elif transfer.kind == "dkv":
            self.filled.discard(transfer.source_buffer)

    def received(self, transfers: Sequence[Transfer]) -> None:
        """Add what landed to where it belongs; what lies side by side, in one pass."""
        landed: dict[str, list[str]] = {}
        for transfer in transfers:
            if transfer.narrow and self.slots[transfer.buffer][0].dtype != self.q.dtype:
                self._add_landed(landed)  # its sum may lie in a slot that one of them landed in
                self._add_narrow(transfer)
            elif transfer.accumulate_into is not None and transfer.source_buffer != DCOLUMNS_HOME:
                landed.setdefault(transfer.accumulate_into, []).append(transfer.buffer)
        self._add_landed(landed)
        if any(transfer.source_buffer == DCOLUMNS_HOME for transfer in transfers):
            assert self.grad_gathered is not None
            self._fill(DKV_HOME)
            self.indexes.add_to_own_rows(self.grad_gathered, self._pair(DKV_HOME))

    def launches(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """Cut a phase's tasks into kernel launches."""
        return launches_of(tasks, backend=self.indexes.backend, batch=self.q.shape[0])

    def compute(self, tasks: tuple[Task, ...]) -> None:
        """Add dq, dk and dv of the tasks of one launch."""
        with_columns, keyed = split_columns(tasks)
        of_query = self._query_gradient(len(tasks))
        columns: dict[str, Any] = {}
        if with_columns:
            assert self.gathered is not None
            self.grad_gathered = torch.zeros_like(self.gathered, dtype=api.accumulator_dtype(self.q.dtype))
            if not keyed:
                self._compute_columns(self.gathered, self.grad_gathered, of_query)
                return
            columns["columns"] = self.gathered[0], self.gathered[1], self.indexes.columns()
            columns["grad_columns"] = self.grad_gathered.unbind()
        k, v = self._joined([task.key_buffer for task in keyed])
        (grad_k, grad_v), add = self._grads(keyed)
        inputs = self.grad_out, self.q, k, v, self.lse, self.delta, self.indexes.block(keyed)
        into = {"grad_k": grad_k, "grad_v": grad_v, "add_kv": add} | of_query | columns
        api.block_backward(*inputs, **into, **self._common(), scratch=self.scratch)
        if self.tasks == 0:
            self.scratch = None  # what kernels kept of the queries is as large as they

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq (in q's dtype), dk and dv (the accumulator's); what nothing was added to is zero."""
        if self.grad_q is None:
            self.grad_q = torch.zeros_like(self.q)
        self._fill(DKV_HOME)
        return self.grad_q, *self._pair(DKV_HOME)

    def _query_gradient(self, tasks: int) -> dict[str, Any]:
        """Return where this launch's dq goes: the first one begins the sum, the last one ends it in q's dtype."""
        self.tasks -= tasks
        add = self.grad_q is not None
        total = self.grad_q
        if total is None:
            total = torch.empty_like(self.q, dtype=api.accumulator_dtype(self.q.dtype))
        self.grad_q, given = total, {"grad_q": total, "add_q": add}
        if self.tasks == 0 and total.dtype != self.q.dtype:
            self.grad_q = given["final_q"] = torch.empty_like(self.q)
        return given

    def _compute_columns(self, gathered: Tensor, grad_gathered: Tensor, of_query: dict[str, Any]) -> None:
        (k, v), (grad_k, grad_v), index = gathered.unbind(), grad_gathered.unbind(), self.indexes.columns()
        inputs = self.grad_out, self.q, k, v, self.lse, self.delta, index
        api.column_backward(*inputs, grad_column_k=grad_k, grad_column_v=grad_v, **of_query, **self._common())

    def _common(self) -> dict[str, Any]:
        return {"scale": self.scale, "backend": self.indexes.backend}

    def _joined(self, names: list[str]) -> Pair:
        return self._pair(names[0]) if len(names) == 1 else self.slots.joined(names)

    def _grads(self, tasks: Sequence[Task]) -> tuple[Pair, bool]:
        """Return where the tasks add dk and dv, and whether something is there already."""
        names = [task.grad_buffer for task in tasks if task.grad_buffer is not None]
        assert len(names) == len(tasks)
        add = any(name in self.filled for name in names)
        if add:
            for name in names:
                self._fill(name)
        self.filled.update(names)
        return self._joined(names), add

    def _fill(self, name: str) -> None:
        """Zero a buffer that holds nothing yet."""
        if name not in self.filled:
            for part in self._pair(name):
                part.zero_()
        self.filled.add(name)

    def _add_landed(self, landed: dict[str, list[str]]) -> None:
        """Add what landed for every target into it, and forget it."""
        for target, names in landed.items():
            for together in runs_of_neighbours(names):
                self._add_up(target, together)
        landed.clear()

    def _add_narrow(self, transfer: Transfer) -> None:
        """Add what landed in q's type in a slot that is wider."""
        target = transfer.accumulate_into
        assert target is not None
        for into, part in zip(self._pair(target), self.incoming(transfer), strict=True):
            api.add_up(into, part[None], add=target in self.filled, backend=self.indexes.backend)
        self.filled.add(target)

    def _add_up(self, target: str, landed: list[str]) -> None:
        """Add the contents of neighbouring slots into a buffer."""
        add, backend = target in self.filled, self.indexes.backend
        for into, parts in zip(self._pair(target), self.slots.block(landed[0], len(landed)), strict=True):
            api.add_up(into, parts, add=add, backend=backend)
        self.filled.add(target)

    def _pair(self, name: str) -> Pair:
        if name == KV_HOME:
            return self.kv
        if name != DKV_HOME:
            return self.slots[name]
        assert self.grad_kv is not None
        return self.grad_kv
