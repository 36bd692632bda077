"""The entry points of every backend: partial attention over a key shard, over gathered columns, and their gradients.

Layout: q [B, S_q, H, D], k and v [B, S_k, H_kv, D], out [B, S_q, H, D], lse [B, H, S_q] (natural log); query head h
uses KV head h // (H // H_kv). out, lse and gradients are in the accumulator dtype promote(input, float32). Rows with
nothing to attend have out 0 and lse -inf. Backends: "reference" (float64 dense mask, the definition of correct),
"blockwise" (torch, any device), "triton" (GPU), "flash4" (Hopper GPUs, where the flash-attn-4 wheels are installed).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .mask import AttentionMask
from .merge import accumulator_dtype, merge
from .plain.gathered import gather_columns, scatter_columns
from .plain.row_sums import plain_row_products

__all__ = [
    "BACKENDS",
    "FUSING_BACKENDS",
    "AttentionMask",
    "BlockIndex",
    "ColumnIndex",
    "ColumnPart",
    "Partial",
    "accumulator_dtype",
    "add_up",
    "block_backward",
    "block_forward",
    "block_index",
    "column_backward",
    "column_forward",
    "column_index",
    "fastest_backend",
    "full_attention",
    "gather_column_pair",
    "gather_columns",
    "merge",
    "row_products",
    "scatter_column_pair",
    "scatter_columns",
]

# Imported at first use: triton cannot be imported everywhere.
BACKENDS = {
    "reference": ".plain.reference",
    "blockwise": ".plain.blockwise",
    "triton": ".triton.backend",
    "flash4": ".flash4.backend",
}

# Backends that attend columns in the launch of a block part.
FUSING_BACKENDS = frozenset({"triton"})
# Backends whose launches may begin an accumulator, and end it in the inputs' dtype; else that is done around them.
WRITING_BACKENDS = frozenset({"triton", "flash4"})
# Backends whose backward keeps something of the queries from launch to launch.
KEEPING_BACKENDS = frozenset({"flash4"})

Partial = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """What one backend needs to find the active tiles of one (query shard, key shard) task. `data` is its own."""

    backend: str
    data: Any


@dataclass(frozen=True, kw_only=True)
class ColumnIndex:
    """What one backend needs to mask the gathered columns for one query shard. `data` is its own."""

    backend: str
    data: Any


# column_k, column_v [B, H, C, D] (per query head) and their index.
ColumnPart = tuple[Tensor, Tensor, ColumnIndex]


def block_index(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor, *, backend: str) -> BlockIndex:
    """The index of one task's block part, built once and used by forward and backward.

    q_positions [S_q], k_positions [S_k]: int32 or int64 global positions of the local tokens, ascending.
    Raises ValueError when the backend is unknown or cannot do this mask or placement.
    """
    for name, positions in (("q_positions", q_positions), ("k_positions", k_positions)):
        _check_positions(name, positions)
    return BlockIndex(backend=backend, data=_backend(backend).block_index(mask, q_positions, k_positions))


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float,
    backend: str,
    into: Partial | None = None,
    columns: ColumnPart | None = None,
    final: bool = False,
) -> Partial:
    """(out, lse) of the block part of one task: attention of the query shard over the key shard's active blocks.

    into: (out, lse) of earlier partials over other keys; they are merged, and may be overwritten: use what returns.
    columns: the column part of the same queries, attended as well; in one launch where the backend can.
    final: nothing will be merged with what returns, so out has q's dtype.
    """
    _check_qkv(q, k, v)
    found, data = _backend(backend), _data(index, backend)
    given: dict[str, Any] = {"scale": scale, "into": into}
    if columns is not None and backend in FUSING_BACKENDS:
        given["columns"] = *columns[:2], _data(columns[2], backend)
    elif columns is not None:
        given["into"] = column_forward(q, *columns, scale=scale, backend=backend, into=into)
    return _forward(found.block_forward, backend, q, k, v, data, final=final, given=given)


def _forward(
    function: Callable[..., Partial], backend: str, q: Tensor, *inputs: Any, final: bool, given: dict[str, Any]
) -> Partial:
    if not final:
        return function(q, *inputs, **given)
    if backend in WRITING_BACKENDS:
        return function(q, *inputs, **given, out_dtype=q.dtype)
    out, lse = function(q, *inputs, **given)
    return out.to(q.dtype), lse


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: BlockIndex,
    *,
    scale: float,
    backend: str,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    columns: ColumnPart | None = None,
    grad_columns: Partial | None = None,
    add_q: bool = True,
    add_kv: bool = True,
    final_q: Tensor | None = None,
    scratch: dict[str, Any] | None = None,
) -> None:
    """Add one task's block part into grad_q [B, S_q, H, D], grad_k and grad_v [B, S_k, H_kv, D] (accumulator dtype).

    lse and delta [B, H, S_q] are those of the whole (merged) attention; delta = rowsum(grad_out * out). columns: the
    column part of the same queries too, its gradients added into grad_columns (two tensors [B, H, C, D]).
    add_q, add_kv: False where the accumulators hold nothing yet: they are overwritten, and then grad_k and grad_v may
    have q's dtype, to which the task's sums are rounded once. final_q: [B, S_q, H, D] in q's dtype and grad_q's
    strides, where the task is the last one: the total is written there, and grad_q means no more. scratch: empty at
    first, then shared by calls with the same queries (grad_out, q, lse, delta and q_positions of the index), of which
    some backends keep something there; None where no other call follows, for which that would not pay.
    """
    _check_qkv(q, k, v)
    _check_key_gradients(q, grad_k, grad_v, add=add_kv)
    found, data = _backend(backend), _data(index, backend)
    inputs = grad_out, q, k, v, lse, delta, data
    into: dict[str, Any] = {"scale": scale, "grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    if columns is not None and grad_columns is None:
        raise ValueError("grad_columns: None, though there are columns")
    if columns is not None and grad_columns is not None:
        if backend in FUSING_BACKENDS:
            into |= {"columns": (*columns[:2], _data(columns[2], backend)), "grad_columns": grad_columns}
        else:
            of_columns: dict[str, Any] = {"grad_column_k": grad_columns[0], "grad_column_v": grad_columns[1]}
            of_columns |= {"grad_q": grad_q, "scale": scale, "backend": backend, "add_q": add_q}
            column_backward(grad_out, q, *columns[:2], lse, delta, columns[2], **of_columns)
            add_q = True
    if backend in KEEPING_BACKENDS:
        into["scratch"] = scratch
    if backend in WRITING_BACKENDS:
        found.block_backward(*inputs, **into, add_q=add_q, add_kv=add_kv, final_q=final_q)
        return
    rounded = {} if grad_k.dtype == grad_q.dtype else {"grad_k": grad_k, "grad_v": grad_v}
    into |= {name: torch.empty_like(grad, dtype=grad_q.dtype) for name, grad in rounded.items()}
    for grad in ([] if add_q else [grad_q]) + ([] if add_kv else [into["grad_k"], into["grad_v"]]):
        grad.zero_()
    found.block_backward(*inputs, **into)
    for name, grad in rounded.items():
        grad.copy_(into[name])
    if final_q is not None:
        final_q.copy_(grad_q)


def column_index(mask: AttentionMask, q_positions: Tensor, *, backend: str) -> ColumnIndex:
    """The index of one query shard's column part. Raises ValueError when the backend cannot do it."""
    _check_positions("q_positions", q_positions)
    return ColumnIndex(backend=backend, data=_backend(backend).column_index(mask, q_positions))


def column_forward(
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    index: ColumnIndex,
    *,
    scale: float,
    backend: str,
    into: Partial | None = None,
    final: bool = False,
) -> Partial:
    """(out, lse) of the column part: attention over gathered column_k, column_v [B, H, C, D] (per query head).

    into, final: as in block_forward.
    """
    function, given = _backend(backend).column_forward, {"scale": scale, "into": into}
    return _forward(function, backend, q, column_k, column_v, _data(index, backend), final=final, given=given)


def column_backward(
    grad_out: Tensor,
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: ColumnIndex,
    *,
    scale: float,
    backend: str,
    grad_q: Tensor,
    grad_column_k: Tensor,
    grad_column_v: Tensor,
    add_q: bool = True,
    final_q: Tensor | None = None,
) -> None:
    """Add the column part into grad_q [B, S_q, H, D] and grad_column_k, grad_column_v [B, H, C, D].

    add_q, final_q: as in block_backward.
    """
    found, inputs = _backend(backend), (grad_out, q, column_k, column_v, lse, delta, _data(index, backend))
    into = {"scale": scale, "grad_q": grad_q, "grad_column_k": grad_column_k, "grad_column_v": grad_column_v}
    if backend in WRITING_BACKENDS:
        found.column_backward(*inputs, **into, add_q=add_q, final_q=final_q)
        return
    if not add_q:
        grad_q.zero_()
    found.column_backward(*inputs, **into)
    if final_q is not None:
        final_q.copy_(grad_q)


def row_products(left: Tensor, right: Tensor, *, backend: str) -> Tensor:
    """[B, H, S] in the accumulator's dtype: the sums over D of the products of two [B, S, H, D]; delta of backward."""
    found = _backend(backend)
    if hasattr(found, "row_products"):
        return found.row_products(left, right)
    return plain_row_products(left, right)


def add_up(target: Tensor, parts: Tensor, *, add: bool, backend: str) -> None:
    """target (add: +=) the sum over the first dimension of parts [n, *target.shape], in order; repeatable."""
    found = _backend(backend)
    if hasattr(found, "add_up"):
        found.add_up(target, parts, add=add)
        return
    if not add:
        target.zero_()
    for part in parts:
        target += part


def gather_column_pair(k: Tensor, v: Tensor, mask: AttentionMask, k_positions: Tensor, index: ColumnIndex) -> Tensor:
    """[2, B, H, C, D]: rows of the columns owned here, of k and v [B, S_k, H_kv, D], zero elsewhere.

    index: the column index of the queries at the same positions. Otherwise as gather_columns.
    """
    found = _backend(index.backend)
    if hasattr(found, "gather_columns"):
        return found.gather_columns(k, v, index.data)
    return torch.stack([gather_columns(x, mask, k_positions) for x in (k, v)])


def scatter_column_pair(
    grad_columns: Partial,
    mask: AttentionMask,
    k_positions: Tensor,
    index: ColumnIndex,
    *,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Add the owner's rows of both gradients [B, H, C, D] into grad_k and grad_v, as scatter_columns; repeatable."""
    found = _backend(index.backend)
    if hasattr(found, "scatter_columns"):
        found.scatter_columns(*grad_columns, index.data, grad_k=grad_k, grad_v=grad_v)
        return
    for part, grad in zip(grad_columns, (grad_k, grad_v), strict=True):
        scatter_columns(part, mask, k_positions, grad=grad)


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of a whole sequence on one device, differentiable in q, k, v: block part + column part.

    Token t of the tensors is global position t; S may exceed mask.seq_len_tokens (padding). Returns out in q's dtype
    and lse in the accumulator dtype; lse carries no gradient.
    """
    _check_qkv(q, k, v)
    out, lse = _FullAttention.apply(q, k, v, mask, scale, backend)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse


class _FullAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Return (out, lse), and keep what backward reads."""
        positions = torch.arange(q.shape[1], device=q.device)
        index = block_index(mask, positions, positions, backend=backend)
        columns = None
        if mask.column_capacity:
            of_columns = column_index(mask, positions, backend=backend)
            column_k, column_v = gather_column_pair(k, v, mask, positions, of_columns)
            columns = column_k, column_v, of_columns
        out, lse = block_forward(q, k, v, index, scale=scale, backend=backend, columns=columns, final=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given = mask, scale, backend, positions, index, columns and columns[2]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return dq, dk, dv and nothing for the rest. Columns are gathered again. ValueError under create_graph."""
        if torch.is_grad_enabled():
            raise ValueError("create_graph: gradients of gradients of attention are not supported")
        q, k, v, out, lse = ctx.saved_tensors
        mask, scale, backend, positions, index, of_columns = ctx.given
        grad_out, dtype = grads[0], accumulator_dtype(q.dtype)
        delta = row_products(grad_out, out, backend=backend)
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        into: dict[str, Any] = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "add_q": False, "add_kv": False}
        if dtype != q.dtype:
            into["final_q"] = grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_columns: Partial | None = None
        if of_columns is not None:
            column_k, column_v = gather_column_pair(k, v, mask, positions, of_columns)
            into["columns"] = column_k, column_v, of_columns
            grad_columns = torch.zeros_like(column_k, dtype=dtype), torch.zeros_like(column_v, dtype=dtype)
            into["grad_columns"] = grad_columns
        block_backward(grad_out, q, k, v, lse, delta, index, scale=scale, backend=backend, **into)
        if grad_columns is not None and of_columns is not None:
            scatter_column_pair(grad_columns, mask, positions, of_columns, grad_k=grad_k, grad_v=grad_v)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def fastest_backend(device: torch.device, *, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """The fastest backend for a device: flash4 where it is installed and supported, else triton; blockwise on CPUs.

    flash4 is not bitwise repeatable; triton is.
    """
    if device.type != "cuda":
        return "blockwise"
    flash4 = _backend("flash4")
    return "flash4" if flash4.takes(device, dtype=dtype, head_dim=head_dim, block_size=block_size) else "triton"


def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name], __package__)


def _data(index: BlockIndex | ColumnIndex, backend: str) -> Any:
    if index.backend != backend:
        raise ValueError(f"index: built for backend {index.backend!r}, used with {backend!r}")
    return index.data


def _check_key_gradients(q: Tensor, grad_k: Tensor, grad_v: Tensor, *, add: bool) -> None:
    for name, grad in (("grad_k", grad_k), ("grad_v", grad_v)):
        if add and grad.dtype != accumulator_dtype(q.dtype):
            raise ValueError(f"{name}: sums go on in {accumulator_dtype(q.dtype)}, not {grad.dtype}")
        if grad.dtype != grad_k.dtype or grad.dtype not in (accumulator_dtype(q.dtype), q.dtype):
            raise ValueError(f"{name}: dtype {grad.dtype} is neither {accumulator_dtype(q.dtype)} nor q's {q.dtype}")


def _check_positions(name: str, positions: Tensor) -> None:
    if positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: shape {tuple(positions.shape)}, dtype {positions.dtype} is not int32 or int64 [S]")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q, k, v: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} are not [B, S, H, D]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q, k: shapes {tuple(q.shape)}, {tuple(k.shape)} differ in B or D, or H % H_kv is not 0")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ")
