"""The entry points of every backend: attention over a key shard and over gathered columns, and its gradients.

Layout: q [B, S_q, H, D], k and v [B, S_k, H_kv, D], out [B, S_q, H, D], lse [B, H, S_q] (natural log); query head h
uses KV head h // (H // H_kv). out, lse and gradients are in the accumulator dtype promote(input, float32). Rows with
nothing to attend have out 0 and lse -inf. Backends: "reference" (float64 dense mask, the definition of correct),
"blockwise" (torch, any device), "triton" (GPU), "flash4" (Hopper GPUs, where the flash-attn-4 wheels are installed),
and what registers itself (backend.py). An index is made for one backend, which then computes all that it is used for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backend import Backend, backend_names, backend_of, register
from .mask import AttentionMask
from .merge import accumulator_dtype, merge
from .sinks import check_sinks, sink_gradients
from .values import (
    BackwardQueries,
    BlockIndex,
    ColumnIndex,
    Columns,
    Gradients,
    KeyGradients,
    Keys,
    Partial,
    Queries,
    QueryGradient,
    check_gradients,
    check_inputs,
    check_positions,
)

__all__ = [
    "AttentionMask",
    "Backend",
    "BackwardQueries",
    "BlockIndex",
    "ColumnIndex",
    "Columns",
    "Gradients",
    "KeyGradients",
    "Keys",
    "Partial",
    "Queries",
    "QueryGradient",
    "WholeAttention",
    "accumulator_dtype",
    "backend_names",
    "backend_of",
    "backward",
    "block_index",
    "column_index",
    "fastest_backend",
    "forward",
    "full_attention",
    "gather_columns",
    "merge",
    "register",
    "scatter_columns",
]


def block_index(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor, *, backend: str) -> BlockIndex:
    """The index of one task's block part, built once and used by forward and backward.

    q_positions [S_q], k_positions [S_k]: int32 or int64 global positions of the local tokens, ascending.
    Raises ValueError when the backend is unknown or cannot do this mask or placement.
    """
    for name, positions in (("q_positions", q_positions), ("k_positions", k_positions)):
        check_positions(name, positions)
    return BlockIndex(backend=backend, data=backend_of(backend).block_index(mask, q_positions, k_positions))


def column_index(mask: AttentionMask, q_positions: Tensor, *, backend: str) -> ColumnIndex:
    """The index of one query shard's column part. Raises ValueError when the backend cannot do it."""
    check_positions("q_positions", q_positions)
    data = backend_of(backend).column_index(mask, q_positions)
    return ColumnIndex(backend=backend, mask=mask, positions=q_positions, data=data)


def forward(
    queries: Queries,
    keys: Keys | None = None,
    columns: Columns | None = None,
    *,
    earlier: Partial | None = None,
    final: bool = False,
) -> Partial:
    """(out, lse) of the queries over the keys' active blocks, over the columns, or over both.

    In one launch where the backend can. earlier: (out, lse) of partials over other keys; they are merged, and may be
    overwritten: use what returns. final: nothing will be merged with what returns, so out has q's dtype.
    Raises ValueError for tensors that do not fit together or that the backend does not take.
    """
    check_inputs(queries, keys)
    return _backend(keys, columns).forward(queries, keys, columns, earlier=earlier, final=final)


def backward(queries: BackwardQueries, keys: Keys | None, columns: Columns | None, into: Gradients) -> None:
    """Add the gradients of the keys' active blocks, of the columns, or of both, into where they go.

    into.keys is given with keys, into.columns with columns. Raises ValueError as forward does.
    """
    check_inputs(queries, keys)
    check_gradients(queries, keys, columns, into)
    _backend(keys, columns).backward(queries, keys, columns, into)


def gather_columns(k: Tensor, v: Tensor, index: ColumnIndex) -> Tensor:
    """[2, B, H, C, D]: rows of the columns owned here, of k and v [B, S_k, H_kv, D], zero elsewhere.

    k and v are of the tokens at index.positions. The sum over the ranks of a partition of the sequence is all columns.
    """
    return backend_of(index.backend).gather_columns(k, v, index)


def scatter_columns(grad_columns: tuple[Tensor, Tensor], index: ColumnIndex, into: KeyGradients) -> None:
    """Add the owner's rows of both gradients [B, H, C, D], summed over a KV head's query heads; repeatable.

    into: of the keys at index.positions, whose sum goes on.
    """
    if not into.add:
        raise ValueError("scatter_columns: gradients of columns are added to those of keys, which hold nothing yet")
    backend_of(index.backend).scatter_columns(grad_columns, index, into)


@dataclass(frozen=True, kw_only=True)
class WholeAttention:
    """Attention of whole sequences on one device, block part and column part in the launches that ranks use too.

    Token t of the tensors is global position t. block, column: the indexes; None without columns.
    """

    block: BlockIndex
    column: ColumnIndex | None

    @classmethod
    def of(cls, mask: AttentionMask, tokens: int, *, device: torch.device, backend: str) -> WholeAttention:
        """Build the indexes for sequences of so many tokens, which may exceed mask.seq_len_tokens (padding)."""
        positions = torch.arange(tokens, device=device)
        return cls(
            block=block_index(mask, positions, positions, backend=backend),
            column=column_index(mask, positions, backend=backend) if mask.column_capacity else None,
        )

    def forward(self, queries: Queries, k: Tensor, v: Tensor) -> Partial:
        """(out in q's dtype, lse in the accumulator's)."""
        return forward(queries, Keys(k=k, v=v, index=self.block), self._columns(k, v), final=True)

    def backward(self, queries: Queries, k: Tensor, v: Tensor, of_out: Partial, grad_out: Tensor) -> tuple[Tensor, ...]:
        """(dq, dk, dv) in the inputs' dtype; of_out: what forward gave. Columns are gathered again."""
        (out, lse), q, keys, columns = of_out, queries.q, Keys(k=k, v=v, index=self.block), self._columns(k, v)
        wide = accumulator_dtype(q.dtype)
        total = q.new_empty(q.shape, dtype=wide)
        rounded = q.new_empty(q.shape) if wide != q.dtype else None
        of_keys = _room(k, wide if columns else k.dtype)
        of_columns = _room(columns.k, wide) if columns else None
        into = Gradients(query=QueryGradient(total=total, add=False, final=rounded), keys=of_keys, columns=of_columns)
        delta = backend_of(self.block.backend).row_products(grad_out, out)
        given = BackwardQueries(
            q=q, scale=queries.scale, softcap=queries.softcap, grad_out=grad_out, lse=lse, delta=delta
        )
        backward(given, keys, columns, into)
        if of_columns is not None and self.column is not None:
            scatter_columns((of_columns.k, of_columns.v), self.column, replace(of_keys, add=True))
        return into.query.target, of_keys.k.to(k.dtype), of_keys.v.to(v.dtype)

    def _columns(self, k: Tensor, v: Tensor) -> Columns | None:
        if self.column is None:
            return None
        column_k, column_v = gather_columns(k, v, self.column)
        return Columns(k=column_k, v=column_v, index=self.column)


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, backend: str, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of a whole sequence on one device, differentiable in q, k, v and sinks: block part + column part.

    Token t of the tensors is global position t; S may exceed mask.seq_len_tokens (padding). softcap: see Queries;
    sinks [H]: learned logits, see sinks.py. Returns out in q's dtype and lse in the accumulator dtype; lse carries no
    gradient.
    """
    if sinks is not None:
        check_sinks(sinks, q.shape[2])
    whole = WholeAttention.of(mask, q.shape[1], device=q.device, backend=backend)
    out, lse = _FullAttention.apply(q, k, v, sinks, whole, scale, softcap)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse


class _FullAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, whole: WholeAttention, scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return (out, lse), and keep what backward reads."""
        out, lse = whole.forward(Queries(q=q, scale=scale, softcap=softcap), k, v)
        if sinks is not None:
            out, lse = backend_of(whole.block.backend).with_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.given = whole, scale, softcap
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return dq, dk, dv, those of the sinks, and nothing for the rest. ValueError under create_graph."""
        if torch.is_grad_enabled():
            raise ValueError("create_graph: gradients of gradients of attention are not supported")
        q, k, v, out, lse, sinks = ctx.saved_tensors
        whole, scale, softcap = ctx.given
        grad_sinks = None
        if sinks is not None:
            delta = backend_of(whole.block.backend).row_products(grads[0], out)
            grad_sinks = sink_gradients(lse, delta, sinks).to(sinks.dtype)
        queries = Queries(q=q, scale=scale, softcap=softcap)
        return *whole.backward(queries, k, v, (out, lse), grads[0]), grad_sinks, None, None, None


def fastest_backend(
    device: torch.device, *, dtype: torch.dtype, head_dim: int, block_size: int, elements: bool = False
) -> str:
    """The fastest backend for a device: flash4 where it is installed and supported, else triton; blockwise on CPUs.

    elements: for masks with windows, or scores with a softcap, which flash4 does not compute. flash4 is not bitwise
    repeatable; triton is.
    """
    if device.type != "cuda":
        return "blockwise"
    if elements:
        return "triton"
    flash4 = backend_of("flash4")
    return "flash4" if flash4.takes(device, dtype=dtype, head_dim=head_dim, block_size=block_size) else "triton"


def _backend(keys: Keys | None, columns: Columns | None) -> Backend:
    """The backend that the indexes were made for."""
    names = {part.index.backend for part in (keys, columns) if part is not None}
    if len(names) != 1:
        made = " and ".join(sorted(names)) or "none: neither keys nor columns are given"
        raise ValueError(f"index: made for one backend each, not for {made}")
    return backend_of(names.pop())


def _room(x: Tensor, dtype: torch.dtype) -> KeyGradients:
    """Room for gradients of keys or columns of this shape, which holds nothing yet."""
    return KeyGradients(k=x.new_empty(x.shape, dtype=dtype), v=x.new_empty(x.shape, dtype=dtype), add=False)
