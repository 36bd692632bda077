"""What attention launches are given, as values: queries, keys, gathered columns, and where gradients go.

Shape legend: B batch, S_q and S_k tokens of a query and a key shard, H query heads, H_kv K/V heads (query head h reads
K/V head h // (H // H_kv)), D elements of a head, C columns. The accumulator's dtype is promote(input, float32).
Everything here raises ValueError, naming the tensor, for shapes and dtypes that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .mask import AttentionMask
from .merge import accumulator_dtype

# out [B, S_q, H, D] and lse [B, H, S_q] (natural log) over some of the keys; see merge.py.
Partial = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """What the named backend needs to find the active tiles of a query shard and a key shard; `data` is its own."""

    backend: str
    data: Any


@dataclass(frozen=True, kw_only=True)
class ColumnIndex:
    """What the named backend needs to mask the gathered columns for a query shard; `data` is its own.

    positions [S_q]: global positions of the shard's tokens, whose keys may be columns of the mask.
    """

    backend: str
    mask: AttentionMask
    positions: Tensor
    data: Any


@dataclass(frozen=True, kw_only=True)
class Queries:
    """q [B, S_q, H, D], and how scores are made: scale * (q k), with a softcap softcap * tanh(scale * (q k) / softcap).

    The factor of the gradient of scores that a softcap adds, 1 - tanh^2, is the backends' to apply.
    """

    q: Tensor
    scale: float
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.q.dim() != 4:
            raise ValueError(f"q: shape {tuple(self.q.shape)} is not [B, S, H, D]")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: {self.softcap} is not positive")


@dataclass(frozen=True, kw_only=True)
class BackwardQueries(Queries):
    """Queries with what their gradients need of the whole attention, merged over all keys.

    grad_out [B, S_q, H, D]; lse and delta = rowsum(grad_out * out) [B, H, S_q], in the accumulator's dtype.
    scratch: empty at first, shared by all launches of these queries, of which some backends keep something there; None
    where a single launch follows, for which that would not pay.
    """

    grad_out: Tensor
    lse: Tensor
    delta: Tensor
    scratch: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Keys:
    """k, v [B, S_k, H_kv, D] of a key shard, and the index that queries find their active blocks with."""

    k: Tensor
    v: Tensor
    index: BlockIndex

    def __post_init__(self) -> None:
        if self.k.dim() != 4 or self.k.shape != self.v.shape:
            raise ValueError(f"k, v: shapes {tuple(self.k.shape)}, {tuple(self.v.shape)} are not the same [B, S, H, D]")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """k, v [B, H, C, D] of the gathered columns, for each query head, and the queries' index into them."""

    k: Tensor
    v: Tensor
    index: ColumnIndex


@dataclass(frozen=True, kw_only=True)
class QueryGradient:
    """Where dQ goes: into `total`, or where a launch is the last one, with what is there into `final`.

    total [B, S_q, H, D] in the accumulator's dtype, holding earlier launches' sum where `add`, else overwritten.
    final: the same shape and strides, in q's dtype; `total` means no more afterwards.
    """

    total: Tensor
    add: bool
    final: Tensor | None = None

    def __post_init__(self) -> None:
        if self.total.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gradient accumulator: dtype {self.total.dtype} is neither float32 nor float64")
        total, final = self.total, self.total if self.final is None else self.final
        if (final.shape, final.stride()) != (total.shape, total.stride()):
            raise ValueError(f"final_q: shape {tuple(final.shape)}, strides {final.stride()} are not those of grad_q")

    @property
    def target(self) -> Tensor:
        """What the launch writes."""
        return self.total if self.final is None else self.final

    def finish_rows(self, valid_tokens: int) -> None:
        """Write the rows from valid_tokens on, which no launch writes."""
        rest = self.target[:, valid_tokens:]
        if not rest.shape[1]:
            return
        if not self.add:
            rest.zero_()
        elif self.final is not None:
            rest.copy_(self.total[:, valid_tokens:])

    def take(self, fresh: Tensor) -> None:
        """Write what a launch computed apart [B, S_q, H, D], in the accumulator's dtype, all rows: rounded once."""
        if self.add:
            torch.add(self.total, fresh, out=self.target)
        else:
            self.target.copy_(fresh)


@dataclass(frozen=True, kw_only=True)
class KeyGradients:
    """Where dK and dV go: of keys [B, S_k, H_kv, D] or of columns [B, H, C, D], in the accumulator's dtype.

    add: they hold a sum that goes on; else they hold nothing yet and are overwritten, and then those of keys may have
    q's dtype, to which the launch's sums are rounded once.
    """

    k: Tensor
    v: Tensor
    add: bool

    def put(self, grad_k: Tensor, grad_v: Tensor) -> None:
        """Write, or add, what was computed apart; of the same shapes."""
        for target, grad in ((self.k, grad_k), (self.v, grad_v)):
            if self.add:
                target += grad
            else:
                target.copy_(grad)


KV = TypeVar("KV", Keys, Columns, KeyGradients)


def with_kv(part: KV | None, change: Callable[[Tensor], Tensor]) -> KV | None:
    """The same keys, columns or gradients, k and v of which are changed; None where there are none."""
    return part and replace(part, k=change(part.k), v=change(part.v))


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Where a launch's gradients go: dQ, and dK and dV of the keys and of the columns that it attends."""

    query: QueryGradient
    keys: KeyGradients | None = None
    columns: KeyGradients | None = None


def check_inputs(queries: Queries, keys: Keys | None) -> None:
    """Raise ValueError where keys do not fit the queries."""
    if keys is None:
        return
    q, k, v = queries.q, keys.k, keys.v
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q, k: shapes {tuple(q.shape)}, {tuple(k.shape)} differ in B or D, or H % H_kv is not 0")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ")


def check_gradients(queries: Queries, keys: Keys | None, columns: Columns | None, into: Gradients) -> None:
    """Raise ValueError where there is no room for a gradient, or where it has a dtype that it cannot have."""
    for name, given, room in (("keys", keys, into.keys), ("columns", columns, into.columns)):
        if (given is None) != (room is None):
            raise ValueError(f"gradients.{name}: {'not given' if room is None else 'given'}, unlike {name}")
    if into.keys is None:
        return
    dtype, wide = queries.q.dtype, accumulator_dtype(queries.q.dtype)
    for name, grad in (("grad_k", into.keys.k), ("grad_v", into.keys.v)):
        if into.keys.add and grad.dtype != wide:
            raise ValueError(f"{name}: sums go on in {wide}, not {grad.dtype}")
        if grad.dtype != into.keys.k.dtype or grad.dtype not in (wide, dtype):
            raise ValueError(f"{name}: dtype {grad.dtype} is neither {wide} nor q's {dtype}")


def check_positions(name: str, positions: Tensor) -> None:
    """Raise ValueError unless positions are int32 or int64 [S]."""
    if positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: shape {tuple(positions.shape)}, dtype {positions.dtype} is not int32 or int64 [S]")
