"""What a backend is: an object with plain defaults, registered by its name.

A backend of one's own is one file: a subclass of Backend with the six methods that raise NotImplementedError here, and
`register(MyBackend())`. All else has a default in plain torch that works on any device; what a backend can do better in
one launch (attend columns together with keys, begin or round a sum, keep something of the queries) it overrides.
planner/schedule/backends.py holds what plans must know of a backend. Shape legend: see values.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .gathered import gather_columns, scatter_columns
from .mask import AttentionMask
from .merge import accumulator_dtype, merge_into, plain_row_products
from .sinks import with_sinks
from .values import BackwardQueries, ColumnIndex, Columns, Gradients, KeyGradients, Keys, Partial, Queries, with_kv

# Modules of the backends that come along, which register themselves when they are imported: at first use, since triton
# cannot be imported everywhere.
SHIPPED = {
    "reference": ".plain.reference",
    "blockwise": ".plain.blockwise",
    "triton": ".triton.backend",
    "flash4": ".flash4.backend",
}
_REGISTERED: dict[str, Backend] = {}


class Backend:
    """One way to compute attention of a query shard over a key shard, over gathered columns, and the gradients.

    `name` is what plans and callers say. Methods are called with values that were checked to fit together, with
    indexes that this backend made, and raise ValueError for what it cannot do.
    """

    name: str

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Any:
        """Whatever attend_keys needs of the mask for queries and keys at these ascending global positions [S]."""
        raise NotImplementedError

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> Any:
        """Whatever attend_columns needs of the mask for queries at these ascending global positions [S_q]."""
        raise NotImplementedError

    def attend_keys(self, queries: Queries, keys: Keys) -> Partial:
        """Fresh (out, lse) in the accumulator's dtype over the active blocks; 0 and -inf in rows without any."""
        raise NotImplementedError

    def attend_columns(self, queries: Queries, columns: Columns) -> Partial:
        """The same over the columns, without those that an active block covers."""
        raise NotImplementedError

    def add_key_gradients(self, queries: BackwardQueries, keys: Keys, grad_q: Tensor, into: KeyGradients) -> None:
        """Add the block part's gradients into grad_q and into.k, into.v, all in the accumulator's dtype."""
        raise NotImplementedError

    def add_column_gradients(
        self, queries: BackwardQueries, columns: Columns, grad_q: Tensor, into: KeyGradients
    ) -> None:
        """Add the column part's gradients into grad_q and into.k, into.v, all in the accumulator's dtype."""
        raise NotImplementedError

    def forward(
        self, queries: Queries, keys: Keys | None, columns: Columns | None, *, earlier: Partial | None, final: bool
    ) -> Partial:
        """See api.forward. By default columns and keys are attended one after the other, and merged."""
        partial = earlier
        if columns is not None:
            partial = merge_into(partial, *self.attend_columns(queries, columns))
        if keys is not None:
            partial = merge_into(partial, *self.attend_keys(queries, keys))
        assert partial is not None
        return (partial[0].to(queries.q.dtype), partial[1]) if final else partial

    def backward(self, queries: BackwardQueries, keys: Keys | None, columns: Columns | None, into: Gradients) -> None:
        """See api.backward. By default sums are begun, and rounded where they end, around the additions."""
        total, wide, dtype = into.query.total, into.keys, accumulator_dtype(queries.q.dtype)
        if wide is not None and wide.k.dtype != dtype:
            wide = with_kv(wide, lambda x: torch.empty_like(x, dtype=dtype))
        begun = [] if into.query.add else [total]
        begun += [part for room in (wide, into.columns) if room and not room.add for part in (room.k, room.v)]
        for part in begun:
            part.zero_()
        if columns is not None and into.columns is not None:
            self.add_column_gradients(queries, columns, total, into.columns)
        if keys is not None and wide is not None:
            self.add_key_gradients(queries, keys, total, wide)
        if into.keys is not None and wide is not None and wide is not into.keys:
            into.keys.put(wide.k, wide.v)
        if into.query.final is not None:
            into.query.final.copy_(total)

    def row_products(self, left: Tensor, right: Tensor) -> Tensor:
        """[B, H, S] in the accumulator's dtype: sums over D of the products of two [B, S, H, D]; delta of backward."""
        return plain_row_products(left, right)

    def with_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> Partial:
        """See sinks.with_sinks."""
        return with_sinks(out, lse, sinks)

    def add_up(self, target: Tensor, parts: Tensor, *, add: bool) -> None:
        """target (add: +=) the sum over the first dimension of parts [n, *target.shape], in order; repeatable."""
        if not add:
            target.zero_()
        for part in parts:
            target += part

    def gather_columns(self, k: Tensor, v: Tensor, index: ColumnIndex) -> Tensor:
        """See api.gather_columns."""
        return torch.stack([gather_columns(x, index.mask, index.positions) for x in (k, v)])

    def scatter_columns(self, grad_columns: tuple[Tensor, Tensor], index: ColumnIndex, into: KeyGradients) -> None:
        """See api.scatter_columns."""
        for part, grad in zip(grad_columns, (into.k, into.v), strict=True):
            scatter_columns(part, index.mask, index.positions, grad=grad)

    def takes(self, device: torch.device, *, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
        """Whether it can be imported and runs such attention on that device."""
        return True


def register(backend: Backend) -> None:
    """Make a backend known by its name. Raises ValueError when another class has it."""
    known = _REGISTERED.setdefault(backend.name, backend)
    if type(known) is not type(backend):
        raise ValueError(f"backend: {backend.name!r} is registered already, as {type(known).__name__}")


def backend_of(name: str) -> Backend:
    """The backend of this name. Raises ValueError when there is none, ImportError when its libraries are missing."""
    if name not in _REGISTERED and name in SHIPPED:
        importlib.import_module(SHIPPED[name], __package__)
    if name not in _REGISTERED:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(backend_names())}")
    return _REGISTERED[name]


def backend_names() -> tuple[str, ...]:
    """The backends that come along, and those registered since."""
    return tuple(dict.fromkeys((*SHIPPED, *_REGISTERED)))
