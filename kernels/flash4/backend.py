"""The flash4 backend: the block part by the flash-attn-4 wheels, the column part by the Triton kernels.

Contracts are those of api.py, and the extra keywords those of triton_backend.py. Optional: `pip install --pre
'sparsering[flash4]'`; imported at first use. Compute capabilities 9.0 and 10.0 (of which 9.0 was at hand), mask blocks
of 128 tokens, head dims 64 and 128, float16 and bfloat16; anything else raises ValueError.

A partial is rounded to the inputs' dtype before it is merged in float32, and so are a task's gradients before they are
added. Repeatability: out, lse, and dK and dV of KV heads whose query heads one program walks (flash4_fold.py) repeat
bit for bit; dQ, and other dK and dV, are added up by atomics in float32 in an order that varies from run to run (a few
ulps in 16 bits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..index.columns import ColumnTask, column_task
from ..mask import AttentionMask
from ..merge import accumulator_dtype
from ..triton import launching
from ..triton.backend import column_backward, column_forward
from ..triton.column_copies import gather as gather_columns
from ..triton.column_copies import scatter as scatter_columns
from ..triton.gradients import grad_columns, grad_query
from ..triton.launching import loadable
from ..triton.partials import QueryGradient, check_partial
from ..triton.passes import add_rows, add_up, row_products
from .index import Flash4Task, flash4_task
from .launch import BLOCK_SIZE, Inputs, attend, gradient_parts, launch_groups, wheels, zeros_like_rows
from .merge import merge_part

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITIES = ((9, 0), (10, 0))

__all__ = [
    "add_up",
    "block_backward",
    "block_forward",
    "block_index",
    "column_backward",
    "column_forward",
    "column_index",
    "full_gradients",
    "gather_columns",
    "row_products",
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
    """See api.block_forward. `into` is merged in place where it has the dtype wanted.

    out_dtype: of what is merged; default the accumulator's. A fresh out is in q's dtype, to which the wheels round.
    columns: (column_k, column_v, index) of the same queries, attended by a Triton launch before.
    """
    _check_tensors(q, k, index)
    wanted = out_dtype or accumulator_dtype(q.dtype)
    if into is not None:
        check_partial(*into, q)
    if columns is not None:
        into = column_forward(q, *columns, scale=scale, into=into)
    if into is None:
        return _written(q, k, v, index, scale)
    valid = index.task.q_valid_tokens
    part = _empty(q, valid)
    attend(q, k, v, index, scale, *part)
    return merge_part(part, into, tokens=q.shape[1], out_dtype=wanted)


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
    add_q: bool = True,
    add_kv: bool = True,
    final_q: Tensor | None = None,
    scratch: dict[str, Any] | None = None,
) -> None:
    """See api.block_backward. Not bitwise repeatable: see the module.

    flash-attn-4 computes delta = rowsum(grad_out * out) - grad_lse itself: it gets out = 0 and grad_lse = -delta.
    """
    _check_tensors(q, k, index)
    of_query = QueryGradient(total=grad_q, add=add_q, final=final_q)
    groups = launch_groups(q, k, index, transposed=True)
    shared = bool(groups) and groups[0][1] - groups[0][0] < q.shape[2] // k.shape[2]  # KV heads in several launches
    if not add_kv:
        written = 0 if shared or not groups else index.task.k_valid_tokens
        grad_k[:, written:], grad_v[:, written:] = 0, 0
    of_query.finish_rows(index.task.q_valid_tokens if groups else 0)
    inputs = Inputs(q=q, k=k, v=v, grad_out=grad_out.to(q.dtype), out=zeros_like_rows(q), lse=lse, grad_lse=-delta)
    rounded = grad_k.dtype == q.dtype
    if rounded and not shared:  # written where it belongs
        for part in gradient_parts(inputs, index, scale, {"dk": grad_k, "dv": grad_v}, scratch):
            part.add_query_to(of_query)
        return
    wide = [torch.zeros_like(x, dtype=grad_q.dtype) for x in (grad_k, grad_v)] if rounded else [grad_k, grad_v]
    for part in gradient_parts(inputs, index, scale, scratch=scratch):
        part.add_query_to(of_query)
        part.add_keys_to(*wide, add=add_kv or shared)
    if rounded:
        grad_k.copy_(wide[0])
        grad_v.copy_(wide[1])


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
    inputs = Inputs(q=q, k=k, v=v, grad_out=grad_out, out=out, lse=lse, grad_lse=None)
    grads = _whole_gradients(inputs, index, scale)
    if columns is None:
        return *grads, None
    return *grads, _add_columns(inputs, columns, scale, grads[0])


def _whole_gradients(inputs: Inputs, index: Flash4Task, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in q's dtype: written in place where one launch holds all query heads of its KV heads."""
    q, k, v = inputs.q, inputs.k, inputs.v
    groups = launch_groups(q, k, index, transposed=True)
    if groups and groups[0][1] - groups[0][0] < q.shape[2] // k.shape[2]:
        sums = [torch.zeros(x.shape, dtype=accumulator_dtype(q.dtype), device=q.device) for x in (q, k, v)]
        for part in gradient_parts(inputs, index, scale):
            part.add_query_to(QueryGradient(total=sums[0], add=True))
            part.add_keys_to(*sums[1:], add=True)
        grad_q, grad_k, grad_v = (x.to(q.dtype) for x in sums)
        return grad_q, grad_k, grad_v
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q_end, k_end = (index.task.q_valid_tokens, index.task.k_valid_tokens) if groups else (0, 0)
    for grad, end in ((grad_q, q_end), (grad_k, k_end), (grad_v, k_end)):
        grad[:, end:] = 0
    for _ in gradient_parts(inputs, index, scale, {"dq": grad_q, "dk": grad_k, "dv": grad_v}):
        pass
    return grad_q, grad_k, grad_v


def _add_columns(inputs: Inputs, columns: Columns, scale: float, grad_q: Tensor) -> Partial:
    """Add the columns' part into grad_q [B, S_q, H, D] and return that of column_k and column_v [B, H, C, D]."""
    task, grad_out = columns[2], loadable(inputs.grad_out)
    q, valid = loadable(inputs.q), columns[2].q_valid_tokens
    values = launching.row_values_from_out(loadable(inputs.out), grad_out, inputs.lse, task, scale)
    of_columns = torch.empty(q.shape, dtype=accumulator_dtype(q.dtype), device=q.device)
    grad_query(grad_out, q, None, None, values, None, columns, scale, of_columns, add=False)
    prior = grad_q[:, :valid]
    add_rows(of_columns[:, :valid], prior, prior, add=True)
    return grad_columns(grad_out, q, columns, values, scale)


def _written(q: Tensor, k: Tensor, v: Tensor, index: Flash4Task, scale: float) -> Partial:
    """A fresh partial in q's dtype, written by flash-attn-4 itself."""
    valid = index.task.q_valid_tokens
    out, lse = _empty(q, q.shape[1])
    out[:, valid:], lse[:, :, valid:] = 0, -torch.inf
    attend(q, k, v, index, scale, out[:, :valid], lse[:, :, :valid])
    return out, lse


def _empty(q: Tensor, tokens: int) -> Partial:
    batch, _, heads, dim = q.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)


def takes(device: torch.device, *, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether this backend is installed and runs such attention on that device."""
    if dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return False
    try:
        _check_device(device, block_size)
    except ValueError:
        return False
    return True


def _check_here(mask: AttentionMask) -> None:
    """Raise ValueError for what keeps this backend from running a mask here."""
    _check_device(mask.active.device, mask.block_size)


def _check_device(device: torch.device, block_size: int) -> None:
    if block_size != BLOCK_SIZE:
        raise ValueError(f"mask.block_size: {block_size} is not {BLOCK_SIZE} (flash4 backend)")
    wheels()
    if device.type != "cuda":
        raise ValueError(f"mask.active: on {device}, the flash4 backend needs a CUDA device")
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise ValueError(
            f"backend flash4: compute capability {capability[0]}.{capability[1]} of {device} is not {known}"
        )


def _check_tensors(q: Tensor, k: Tensor, index: Flash4Task) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype {q.dtype} is neither float16 nor bfloat16 (flash4 backend)")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q: head dim {q.shape[3]} is not one of {HEAD_DIMS} (flash4 backend)")
    launching.check_query(q, index.task)
    launching.check_keys(k, index.task)
