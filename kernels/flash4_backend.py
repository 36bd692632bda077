"""The flash4 backend: the block part by the flash-attn-4 wheels, the column part by the Triton kernels.

Contracts are those of api.py, and the extra keywords those of triton_backend.py. Optional: `pip install --pre
'sparsering[flash4]'`; imported at first use. Compute capability 9.0, mask blocks of 128 tokens, head dims 64 and 128,
float16 and bfloat16; anything else raises ValueError, and so does 10.0, where the wheels' forward wants blocks of 256.

A partial is rounded to the inputs' dtype before it is merged in float32, and so are a task's gradients before they are
added. Repeatability: out, lse, dK and dV of a KV head with one query head repeat bit for bit; dQ, and with grouped
queries dK and dV, are added up by atomics in float32 in an order that varies from run to run (a few ulps in 16 bits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import launching, triton_backend
from .column_copies import gather as gather_columns
from .column_copies import scatter as scatter_columns
from .column_index import ColumnTask, column_task
from .flash4_index import Flash4Task, TileTables, flash4_task, head_groups
from .flash4_masks import documents_mask, own_block_mask
from .flash4_merge import merge_part
from .launching import loadable
from .mask import AttentionMask
from .merge import accumulator_dtype

BLOCK_SIZE = 128  # the tile of flash-attn-4's backward along keys
HEAD_DIMS = (64, 128)
CAPABILITIES = ((9, 0),)

__all__ = [
    "block_backward",
    "block_forward",
    "block_index",
    "column_backward",
    "column_forward",
    "column_index",
    "full_gradients",
    "gather_columns",
    "scatter_columns",
]

Columns = tuple[Tensor, Tensor, ColumnTask]
Partial = tuple[Tensor, Tensor]


def block_index(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Flash4Task:
    """See api.block_index. Raises ValueError where the wheels, the GPU or the block size are missing."""
    _check_here(mask)
    return flash4_task(mask, q_positions, k_positions)


def column_index(mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
    """See api.column_index: the Triton backend's. Raises ValueError as block_index does."""
    _check_here(mask)
    return column_task(mask, q_positions)


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Flash4Task,
    *,
    scale: float,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
    columns: Columns | None = None,
) -> Partial:
    """See api.block_forward. `into` is merged in place and returned.

    out_dtype: of a fresh out, where the caller will not merge it; default the accumulator's. columns: (column_k,
    column_v, index) of the same queries, attended by a Triton launch before.
    """
    _check_tensors(q, k, index)
    wanted = into[0].dtype if into else out_dtype or accumulator_dtype(q.dtype)
    if into is not None:
        launching.check_partial(*into, q)
    if columns is not None:
        into = triton_backend.column_forward(q, *columns, scale=scale, into=into)
    if into is None and wanted == q.dtype:
        return _written(q, k, v, index, scale)
    valid = index.task.q_valid_tokens
    part = _empty(q, valid)
    _attend(q, k, v, index, scale, *part)
    return merge_part(part, into, tokens=q.shape[1], out_dtype=wanted)


def column_forward(
    q: Tensor, column_k: Tensor, column_v: Tensor, index: ColumnTask, *, scale: float, into: Partial | None = None
) -> Partial:
    """See api.column_forward: the Triton backend's."""
    return triton_backend.column_forward(q, column_k, column_v, index, scale=scale, into=into)


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: Flash4Task,
    *,
    scale: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """See api.block_backward. Not bitwise repeatable: see the module.

    flash-attn-4 computes delta = rowsum(grad_out * out) - grad_lse itself: it gets out = 0 and grad_lse = -delta.
    """
    _check_tensors(q, k, index)
    out = torch.zeros(q.shape[3], dtype=q.dtype, device=q.device).expand(q.shape)
    inputs = _Inputs(q=q, k=k, v=v, grad_out=grad_out.to(q.dtype), out=out, lse=lse, grad_lse=-delta)
    for part in _parts(inputs, index, scale):
        part.add_to(grad_q, grad_k, grad_v)


def column_backward(
    grad_out: Tensor,
    q: Tensor,
    column_k: Tensor,
    column_v: Tensor,
    lse: Tensor,
    delta: Tensor,
    index: ColumnTask,
    *,
    scale: float,
    grad_q: Tensor,
    grad_column_k: Tensor,
    grad_column_v: Tensor,
) -> None:
    """See api.column_backward: the Triton backend's."""
    triton_backend.column_backward(
        grad_out,
        q,
        column_k,
        column_v,
        lse,
        delta,
        index,
        scale=scale,
        grad_q=grad_q,
        grad_column_k=grad_column_k,
        grad_column_v=grad_column_v,
    )


def full_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Flash4Task,
    *,
    scale: float,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor, Tensor, Partial | None]:
    """(dq, dk, dv, (grad_column_k, grad_column_v) or None) where this one task and its columns are all there is.

    dq (of both parts), dk, dv (of the block part) have q's dtype; columns' gradients [B, H, C, D] the accumulator's.
    out [B, S_q, H, D] (any float dtype) and lse [B, H, S_q] are the forward's; delta is computed here.
    """
    _check_tensors(q, k, index)
    grad_out, out = grad_out.to(q.dtype), out.to(q.dtype)
    inputs = _Inputs(q=q, k=k, v=v, grad_out=grad_out, out=out, lse=lse, grad_lse=None)
    grads = _whole_gradients(inputs, index, scale)
    if columns is None:
        return *grads, None
    return *grads, _add_columns(inputs, columns, scale, grads[0])


def _whole_gradients(inputs: _Inputs, index: Flash4Task, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype: written in place where one launch holds all query heads of its KV heads."""
    q, k, v = inputs.q, inputs.k, inputs.v
    groups = _groups(q, k, index, transposed=True)
    if groups and groups[0][1] - groups[0][0] < q.shape[2] // k.shape[2]:
        sums = [torch.zeros(x.shape, dtype=accumulator_dtype(q.dtype), device=q.device) for x in (q, k, v)]
        for part in _parts(inputs, index, scale):
            part.add_to(*sums)
        grad_q, grad_k, grad_v = (x.to(q.dtype) for x in sums)
        return grad_q, grad_k, grad_v
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q_end, k_end = (index.task.q_valid_tokens, index.task.k_valid_tokens) if groups else (0, 0)
    for grad, end in ((grad_q, q_end), (grad_k, k_end), (grad_v, k_end)):
        grad[:, end:] = 0
    for _ in _parts(inputs, index, scale, (grad_q, grad_k, grad_v)):
        pass
    return grad_q, grad_k, grad_v


def _add_columns(inputs: _Inputs, columns: Columns, scale: float, grad_q: Tensor) -> Partial:
    """Add the columns' part into grad_q [B, S_q, H, D] and return that of column_k and column_v [B, H, C, D]."""
    task, grad_out = columns[2], loadable(inputs.grad_out)
    q, valid = loadable(inputs.q), columns[2].q_valid_tokens
    values = launching.row_values_from_out(loadable(inputs.out), grad_out, inputs.lse, task, scale)
    of_columns = torch.empty(q.shape, dtype=accumulator_dtype(q.dtype), device=q.device)
    triton_backend.grad_query(grad_out, q, None, None, values, None, columns, scale, of_columns, add=False)
    grad_q[:, :valid] += of_columns[:, :valid]
    return triton_backend.grad_columns(grad_out, q, columns, values, scale)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a backward launch reads: see block_backward and full_gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Gradients of the valid tokens of some heads, q's dtype, and which heads these are."""

    heads: slice
    kv_heads: slice
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor

    def add_to(self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add into accumulators of all tokens and heads."""
        grad_q[:, : self.grad_q.shape[1], self.heads] += self.grad_q
        grad_k[:, : self.grad_k.shape[1], self.kv_heads] += self.grad_k
        grad_v[:, : self.grad_v.shape[1], self.kv_heads] += self.grad_v


def _written(q: Tensor, k: Tensor, v: Tensor, index: Flash4Task, scale: float) -> Partial:
    """A fresh partial in q's dtype, written by flash-attn-4 itself."""
    valid = index.task.q_valid_tokens
    out, lse = _empty(q, q.shape[1])
    out[:, valid:], lse[:, :, valid:] = 0, -torch.inf
    _attend(q, k, v, index, scale, out[:, :valid], lse[:, :, :valid])
    return out, lse


def _empty(q: Tensor, tokens: int) -> Partial:
    batch, _, heads, dim = q.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, index: Flash4Task, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write out [B, S, H, D] in q's dtype and lse [B, H, S] of the S valid queries."""
    interface, _ = _wheels()
    q, (k, v) = q[:, : out.shape[1]], (x[:, : index.task.k_valid_tokens] for x in (k, v))
    groups = _groups(q, k, index, transposed=False)
    if not groups:
        out.zero_()
        lse.fill_(-torch.inf)
    for first, last in groups:
        heads, kv_heads = _slices(first, last, q.shape[2] // k.shape[2])
        interface._flash_attn_fwd(
            q[:, :, heads],
            k[:, :, kv_heads],
            v[:, :, kv_heads],
            softmax_scale=scale,
            pack_gqa=False,
            out=out[:, :, heads],
            lse=lse[:, heads],
            block_sparse_tensors=_sparse(index.tables(first, last, transposed=False)),
            **_mask(index),
        )


def _parts(
    inputs: _Inputs, index: Flash4Task, scale: float, grads: tuple[Tensor, Tensor, Tensor] | None = None
) -> Iterator[_Part]:
    """Launch the backward by groups of heads, each when its turn comes; it writes into grads where they are given."""
    interface, _ = _wheels()
    q_end, k_end = index.task.q_valid_tokens, index.task.k_valid_tokens
    for first, last in _groups(inputs.q, inputs.k, index, transposed=True):
        heads, kv_heads = _slices(first, last, inputs.q.shape[2] // inputs.k.shape[2])
        queries, keys = (slice(None), slice(q_end), heads), (slice(None), slice(k_end), kv_heads)
        lines = (slice(None), heads, slice(q_end))
        given = {}
        if grads is not None:
            given = {"dq": grads[0][queries], "dk": grads[1][keys], "dv": grads[2][keys]}
        grad_q, grad_k, grad_v = interface._flash_attn_bwd(
            inputs.q[queries],
            inputs.k[keys],
            inputs.v[keys],
            inputs.out[queries],
            inputs.grad_out[queries],
            inputs.lse[lines],
            softmax_scale=scale,
            dlse=None if inputs.grad_lse is None else inputs.grad_lse[lines],
            block_sparse_tensors=_sparse(index.tables(first, last, transposed=True)),
            **given,
            **_mask(index),
        )
        yield _Part(heads=heads, kv_heads=kv_heads, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)


def _groups(q: Tensor, k: Tensor, index: Flash4Task, *, transposed: bool) -> list[tuple[int, int]]:
    """Heads of each launch; none where there is nothing to compute."""
    if not (q.shape[0] and index.task.q_valid_tokens and index.task.k_valid_tokens):
        return []
    return head_groups(q.shape[2], q.shape[2] // k.shape[2], index.table_bytes_of_a_head(transposed=transposed))


def _slices(first: int, last: int, group: int) -> tuple[slice, slice]:
    """Query heads first .. last - 1 and their KV heads."""
    return slice(first, last), slice(first // group, (last - 1) // group + 1)


def _sparse(tables: TileTables) -> Any:
    return _wheels()[1].BlockSparseTensorsTorch(
        mask_block_cnt=tables.partial_counts,
        mask_block_idx=tables.partial_tiles,
        full_block_cnt=tables.full_counts,
        full_block_idx=tables.full_tiles,
        block_size=(BLOCK_SIZE, BLOCK_SIZE),
    )


def _mask(index: Flash4Task) -> dict[str, Any]:
    """The element mask of partial tiles and what it reads."""
    q, k = index.q_documents, index.k_documents
    if q is None or k is None:
        return {"mask_mod": own_block_mask()}
    return {"mask_mod": documents_mask(), "aux_tensors": [q.positions, k.positions, q.tokens, k.tokens]}


@cache
def _wheels() -> tuple[Any, Any]:
    """flash-attn-4's interface and block-sparsity modules. Raises ValueError where they cannot be imported."""
    try:
        return import_module("flash_attn.cute.interface"), import_module("flash_attn.cute.block_sparsity")
    except (ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"backend flash4: the flash-attn-4 wheels cannot be imported ({reason}): pip install --pre "
            "'sparsering[flash4]'"
        ) from error


def _check_here(mask: AttentionMask) -> None:
    """Raise ValueError for what keeps this backend from running a mask here."""
    if mask.block_size != BLOCK_SIZE:
        raise ValueError(f"mask.block_size: {mask.block_size} is not {BLOCK_SIZE} (flash4 backend)")
    _wheels()
    device = mask.active.device
    if device.type != "cuda":
        raise ValueError(f"mask.active: on {device}, the flash4 backend needs a CUDA device")
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise ValueError(
            f"backend flash4: compute capability {capability[0]}.{capability[1]} of {device} is not {known}"
        )


def _check_tensors(q: Tensor, k: Tensor, index: Flash4Task) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q: dtype {q.dtype} is neither float16 nor bfloat16 (flash4 backend)")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q: head dim {q.shape[3]} is not one of {HEAD_DIMS} (flash4 backend)")
    launching.check_query(q, index.task)
    launching.check_keys(k, index.task)
