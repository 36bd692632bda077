"""A layer's transfers: which tensors each of them reads and fills on this rank, and what becomes of what landed.

Nothing here knows what is computed from it, nor how tensors travel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...planner.schedule.schedule import COLUMNS_HOME, DCOLUMNS_HOME, KV_HOME, Transfer, slots_from
from .buffers import Pair, staged
from .heads import group_of
from .layer import Layer, Tensors


class LayerTransfers:
    """The transfers of one pass of a layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self._slots, self._sums = layer, layer.slots, layer.sums
        self._ranks = len(layer.indexes.positions)

    def outgoing(self, transfer: Transfer) -> Tensors:
        """Return the tensors that the transfer reads."""
        layer = self._layer
        if transfer.source_buffer == COLUMNS_HOME:
            return (layer.gather_columns(),)
        if transfer.source_buffer == DCOLUMNS_HOME:
            assert layer.grad_columns is not None
            return (layer.grad_columns,)
        if transfer.kind == "q":
            return layer.own_queries(layer.program.groups.queries(group_of(transfer)))
        if transfer.kind == "out":
            assert transfer.shard is not None
            return layer.finished[transfer.shard]
        if transfer.transport == "reduce_scatter":
            return self._slots.block(transfer.source_buffer, self._ranks)
        pair = self._source(transfer)
        return tuple(part.to(layer.queries[0].dtype) for part in pair) if transfer.narrow else pair

    def incoming(self, transfer: Transfer) -> Tensors:
        """Return the tensors that the transfer fills."""
        if transfer.transport == "all_gather":
            return self._slots.block(transfer.buffer, self._ranks)
        if transfer.kind in ("q", "out"):
            return self._layer.room_for(transfer)
        if transfer.kind == "dkv":
            assert self._sums is not None
            return self._sums.landing(transfer)
        return self._slots[transfer.buffer]

    def origins(self, transfer: Transfer) -> tuple[Tensor | None, ...]:
        """Return the tensors that the pull reads, in the memory of its source."""
        at_home = transfer.source_buffer == KV_HOME
        return self._slots.of_peer(self._staged(transfer) if at_home else transfer.source_buffer, transfer.source)

    def sent(self, transfer: Transfer) -> None:
        """Learn that a transfer from here is complete: what moved is no longer here."""
        if transfer.kind == "kv" and transfer.source_buffer == KV_HOME:
            self._layer.drop_own_keys(group_of(transfer))
        elif transfer.kind == "out":
            assert transfer.shard is not None
            del self._layer.finished[transfer.shard]
        elif transfer.kind == "dkv":
            assert self._sums is not None
            several = transfer.transport == "reduce_scatter"
            self._sums.forget(slots_from(transfer.source_buffer, self._ranks if several else 1))

    def received(self, transfers: Sequence[Transfer]) -> None:
        """Learn that transfers to here have landed, and add them where they belong."""
        for transfer in transfers:
            if transfer.kind == "out":
                self._layer.take_landed(transfer)
        if self._sums is None:
            return
        self._sums.land([transfer for transfer in transfers if transfer.kind == "dkv"])
        if any(transfer.source_buffer == DCOLUMNS_HOME for transfer in transfers):
            assert self._layer.grad_columns is not None
            self._layer.indexes.add_to_own_rows(self._layer.grad_columns, self._sums.at_home())

    def _source(self, transfer: Transfer) -> Pair:
        if transfer.source_buffer != KV_HOME:
            return self._slots[transfer.source_buffer]
        if transfer.transport == "pull":
            return self._slots[self._staged(transfer)]
        return self._layer.own_keys(group_of(transfer))

    def _staged(self, transfer: Transfer) -> str:
        return staged(self._layer.program.groups.key_part(group_of(transfer)))
