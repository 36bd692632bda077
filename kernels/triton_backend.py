"""The Triton backend: checks, launches, and nothing else. Contracts are those of api.py.

On a CPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before triton was imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .backward import grad_kv_kernel, grad_q_kernel, prepare_from_out_kernel, prepare_kernel
from .columns import column_forward_kernel, column_grad_kv_kernel, column_grad_q_kernel
from .forward import LOG2_E, forward_kernel
from .index import COLUMN_TILE, BlockTask, ColumnTask, block_task, column_task
from .mask import AttentionMask
from .merge import accumulator_dtype

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 128)
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# Query tiles that one column dK/dV program walks: fewer give more programs and more partial sums.
COLUMN_CHUNK_TILES = 128
PREPARE_ROWS, PREPARE_OUT_ROWS = 1024, 64


def block_index(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> BlockTask:
    """See api.block_index. Raises ValueError for block sizes other than 16 to 128 and for tiles that split a block."""
    _check_block_size(mask)
    return block_task(mask, q_positions, k_positions)


def column_index(mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
    """See api.column_index."""
    _check_block_size(mask)
    return column_task(mask, q_positions)


def block_forward(q: Tensor, k: Tensor, v: Tensor, index: BlockTask, *, scale: float,
                  into: tuple[Tensor, Tensor] | None = None, out_dtype: torch.dtype | None = None
                  ) -> tuple[Tensor, Tensor]:
    """See api.block_forward. `into`: (out, lse) of earlier partials, merged with this one in place and returned.

    out_dtype: of a fresh out, where the caller will not merge it; default the accumulator's.
    """
    _check_task(q, k, index)
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    out, lse = into or _empty_partial(q, out_dtype)
    lists = index.queries
    launch = _launch(tuning.FORWARD, q, index.mask)
    grid = (_programs(q, index.q_side.blocks, index.mask.block_size, launch.m),)
    if grid[0]:
        forward_kernel[grid](
            _source(q, index.q_valid_tokens, launch.m, launch), *_kv_sources(k, v, index.k_valid_tokens, launch),
            out, lse, lists.rows, lists.entries, lists.order, index.q_documents, index.k_documents,
            scale * LOG2_E.value, *_strides(q, k, v, out), *lse.stride()[:2], q.shape[2], len(index.q_side.blocks),
            q.shape[1], index.q_valid_tokens, index.k_valid_tokens,
            GROUP=q.shape[2] // k.shape[2], SIGN=lists.sign, DOCUMENTS=index.q_documents is not None,
            MERGE=into is not None, **_common(q, index.mask, launch))
    return out, lse


def block_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: BlockTask, *,
                   scale: float, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """See api.block_backward. Bitwise repeatable: every accumulator element has one owner and one order."""
    _check_task(q, k, index)
    if not index.q_valid_tokens or not index.k_valid_tokens:
        return
    q, k, v, grad_out = (_inner_contiguous(x) for x in (q, k, v, grad_out.to(q.dtype)))
    row_values = _row_values(lse, delta, index, scale)
    with _accumulators(grad_q, grad_k, grad_v) as (into_q, into_k, into_v):
        _block_grad_q(grad_out, q, k, v, row_values, index, scale, into_q, add=True)
        _block_grad_kv(grad_out, q, k, v, row_values, index, scale, into_k, into_v, add=True)


def block_gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: BlockTask, *,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtype of q where this one task is all there is: nothing is accumulated or converted.

    out [B, S_q, H, D] (any float dtype) and lse [B, H, S_q] are the forward's; delta is computed here.
    """
    _check_task(q, k, index)
    q, k, v, grad_out, out = (_inner_contiguous(x) for x in (q, k, v, grad_out.to(q.dtype), out))
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for grad, valid in zip(grads, (index.q_valid_tokens, index.k_valid_tokens, index.k_valid_tokens), strict=True):
        grad[:, valid:] = 0
    if index.q_valid_tokens and index.k_valid_tokens:
        lse = lse if lse.stride(-1) == 1 else lse.contiguous()
        values = _empty_row_values(lse, index)
        batch, _, heads, dim = q.shape
        prepare_from_out_kernel[(triton.cdiv(values.shape[1], PREPARE_OUT_ROWS), batch * heads)](
            out, grad_out, lse, values, *_strides(out, grad_out), *lse.stride()[:2], heads, index.q_valid_tokens,
            values.shape[1], scale, SIZE=PREPARE_OUT_ROWS, D=dim)
        _block_grad_q(grad_out, q, k, v, values, index, scale, grads[0], add=False)
        _block_grad_kv(grad_out, q, k, v, values, index, scale, grads[1], grads[2], add=False)
    return grads


def _block_grad_q(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, row_values: Tensor, index: BlockTask,
                  scale: float, grad_q: Tensor, *, add: bool) -> None:
    lists, launch = index.queries, _launch(tuning.GRAD_Q, q, index.mask)
    grid = (_programs(q, index.q_side.blocks, index.mask.block_size, launch.m),)
    grad_q_kernel[grid](
        _source(q, index.q_valid_tokens, launch.m, launch), *_kv_sources(k, v, index.k_valid_tokens, launch),
        _source(grad_out, index.q_valid_tokens, launch.m, launch), row_values,
        _source(grad_q, index.q_valid_tokens, launch.m, launch), lists.rows, lists.entries, lists.order,
        index.q_documents, index.k_documents, scale, scale * LOG2_E.value, *_strides(q, k, v, grad_out, grad_q),
        q.shape[2], len(index.q_side.blocks), row_values.shape[-1], index.q_valid_tokens, index.k_valid_tokens,
        GROUP=q.shape[2] // k.shape[2], SIGN=lists.sign, DOCUMENTS=index.q_documents is not None,
        ADD=add, **_common(q, index.mask, launch))


def _block_grad_kv(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, row_values: Tensor, index: BlockTask,
                   scale: float, grad_k: Tensor, grad_v: Tensor, *, add: bool) -> None:
    lists, launch = index.keys, _launch(tuning.GRAD_KV, q, index.mask)
    grid = (_programs(k, index.k_side.blocks, index.mask.block_size, launch.n),)
    grad_kv_kernel[grid](
        _source(q, index.q_valid_tokens, launch.m, launch), *_kv_sources(k, v, index.k_valid_tokens, launch),
        _source(grad_out, index.q_valid_tokens, launch.m, launch), _line_source(row_values, launch),
        *_kv_sources(grad_k, grad_v, index.k_valid_tokens, launch), lists.rows, lists.entries, lists.order,
        index.q_documents, index.k_documents, scale, scale * LOG2_E.value,
        *_strides(q, k, v, grad_out, grad_k, grad_v), k.shape[2], len(index.k_side.blocks), row_values.shape[-1],
        index.q_valid_tokens, index.k_valid_tokens, GROUP=q.shape[2] // k.shape[2], SIGN=lists.sign,
        DOCUMENTS=index.q_documents is not None, ADD=add, **_common(q, index.mask, launch))


def column_forward(q: Tensor, column_k: Tensor, column_v: Tensor, index: ColumnTask, *, scale: float,
                   into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """See api.column_forward. `into`: (out, lse) of earlier partials, merged with this one in place and returned."""
    _check_columns(q, column_k, index)
    q, k, v = (_inner_contiguous(x) for x in (q, column_k, column_v))
    out, lse = into or _empty_partial(q, None)
    launch = _launch(tuning.COLUMN_FORWARD, q, index.mask)
    grid = (_programs(q, index.q_side.blocks, index.mask.block_size, launch.m),)
    if grid[0]:
        column_forward_kernel[grid](
            _source(q, index.q_valid_tokens, launch.m, launch), _column_source(k, launch), _column_source(v, launch),
            out, lse, index.columns, index.reach, *_column_tables(index), index.order, index.q_documents,
            index.column_documents, scale * LOG2_E.value, *_strides(q), *k.stride()[:3], *v.stride()[:3],
            *_strides(out), *lse.stride()[:2], q.shape[2], len(index.q_side.blocks), q.shape[1],
            *_column_sizes(index), MERGE=into is not None, **_column_flags(index), **_common(q, index.mask, launch))
    return out, lse


def column_backward(grad_out: Tensor, q: Tensor, column_k: Tensor, column_v: Tensor, lse: Tensor, delta: Tensor,
                    index: ColumnTask, *, scale: float, grad_q: Tensor, grad_column_k: Tensor,
                    grad_column_v: Tensor) -> None:
    """See api.column_backward. Bitwise repeatable: partial sums of query chunks are added in a fixed order."""
    _check_columns(q, column_k, index)
    if not index.q_valid_tokens or not column_k.shape[2]:
        return
    q, k, v, grad_out = (_inner_contiguous(x) for x in (q, column_k, column_v, grad_out.to(q.dtype)))
    row_values = _row_values(lse, delta, index, scale)
    with _accumulators(grad_q) as (into_q,):
        _column_grad_q(grad_out, q, k, v, row_values, index, scale, into_q)
    grad_k, grad_v = _column_grad_kv(grad_out, q, k, v, row_values, index, scale)
    grad_column_k += grad_k
    grad_column_v += grad_v


def _column_grad_q(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, row_values: Tensor, index: ColumnTask,
                   scale: float, grad_q: Tensor) -> None:
    launch = _launch(tuning.COLUMN_GRAD_Q, q, index.mask)
    grid = (_programs(q, index.q_side.blocks, index.mask.block_size, launch.m),)
    column_grad_q_kernel[grid](
        _source(q, index.q_valid_tokens, launch.m, launch), _column_source(k, launch), _column_source(v, launch),
        _source(grad_out, index.q_valid_tokens, launch.m, launch), row_values,
        _source(grad_q, index.q_valid_tokens, launch.m, launch), index.columns, index.reach, *_column_tables(index),
        index.order, index.q_documents, index.column_documents, scale, scale * LOG2_E.value, *_strides(q),
        *k.stride()[:3], *v.stride()[:3], *_strides(grad_out, grad_q), q.shape[2], len(index.q_side.blocks),
        row_values.shape[-1], *_column_sizes(index), **_column_flags(index), **_common(q, index.mask, launch))


def _column_grad_kv(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, row_values: Tensor, index: ColumnTask,
                    scale: float) -> tuple[Tensor, Tensor]:
    """(dK, dV) [B, H, C, D] of the columns: sums over chunks of query tiles, added in a fixed order."""
    launch = _launch(tuning.COLUMN_GRAD_KV, q, index.mask)
    assert COLUMN_TILE % launch.n == 0, f"column tile {COLUMN_TILE} is no multiple of {launch.n}"
    batch, heads, capacity, dim = k.shape
    tiles = len(index.q_side.blocks)
    chunks, column_tiles = triton.cdiv(tiles, COLUMN_CHUNK_TILES), triton.cdiv(capacity, launch.n)
    first_tile = index.first_tile.repeat_interleave(COLUMN_TILE // launch.n, 1)[:, :column_tiles].contiguous()
    parts = torch.empty(2, chunks * batch * heads, capacity, dim, dtype=accumulator_dtype(q.dtype), device=q.device)
    column_grad_kv_kernel[(column_tiles, batch * heads, chunks)](
        _source(q, index.q_valid_tokens, launch.m, launch), _column_source(k, launch), _column_source(v, launch),
        _source(grad_out, index.q_valid_tokens, launch.m, launch), _line_source(row_values, launch),
        _part_source(parts[0], launch), _part_source(parts[1], launch), index.columns, first_tile,
        *_column_tables(index), index.q_documents, index.column_documents, scale, scale * LOG2_E.value, *_strides(q),
        *k.stride()[:3], *v.stride()[:3], *_strides(grad_out), heads, tiles, row_values.shape[-1],
        *_column_sizes(index), column_tiles, COLUMN_CHUNK_TILES, **_column_flags(index),
        **_common(q, index.mask, launch))
    grad_k, grad_v = parts.view(2, chunks, batch, heads, capacity, dim).sum(1)
    return grad_k, grad_v


def _column_tables(index: ColumnTask) -> tuple[Tensor, Tensor]:
    return index.mask.active.view(torch.uint8), index.q_side.device_blocks.to(index.columns.device)


def _column_sizes(index: ColumnTask) -> tuple[int, int, int, int]:
    return index.q_valid_tokens, index.columns.shape[1], index.mask.seq_len_tokens, index.mask.blocks


def _column_flags(index: ColumnTask) -> dict[str, bool]:
    return {"TOEPLITZ": index.mask.is_toeplitz, "DOCUMENTS": index.q_documents is not None}


def _launch(kernel: str, q: Tensor, mask: AttentionMask) -> tuning.Launch:
    return tuning.launch_for(kernel, capability=tuning.capability_of(q.device), block_size=mask.block_size,
                             head_dim=q.shape[3], itemsize=q.element_size())


def _common(q: Tensor, mask: AttentionMask, launch: tuning.Launch) -> dict[str, Any]:
    return {"BLOCK": mask.block_size, "M": launch.m, "N": launch.n, "D": q.shape[3], "TMA": launch.tma,
            "ACC": _ACC[accumulator_dtype(q.dtype)], "PRECISION": "ieee" if q.element_size() > 2 else "tf32",
            "num_warps": launch.warps, "num_stages": launch.stages}


def _programs(x: Tensor, blocks: Any, block_size: int, rows: int) -> int:
    return x.shape[0] * x.shape[2] * len(blocks) * (block_size // rows)


def _source(x: Tensor, limit: int, rows: int, launch: tuning.Launch) -> Tensor | TensorDescriptor:
    """What a kernel loads tiles of x [B, S, H, D] from: itself, or a descriptor of [B, H, limit, D] that ends there."""
    if not launch.tma:
        return x
    batch, _, heads, dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    return TensorDescriptor(x, [batch, heads, max(limit, 1), dim], strides, [1, 1, rows, dim])


def _kv_sources(k: Tensor, v: Tensor, limit: int, launch: tuning.Launch) -> list[Tensor | TensorDescriptor]:
    return [_source(x, limit, launch.n, launch) for x in (k, v)]


def _column_source(x: Tensor, launch: tuning.Launch) -> Tensor | TensorDescriptor:
    """The same for [B, H, C, D]."""
    return _source(x.transpose(1, 2), x.shape[2], launch.n, launch) if launch.tma else x


def _line_source(row_values: Tensor, launch: tuning.Launch) -> Tensor | TensorDescriptor:
    """row_values [B * H * 2, padded], one line's M values at a time."""
    if not launch.tma:
        return row_values
    return TensorDescriptor(row_values, list(row_values.shape), list(row_values.stride()), [1, launch.m])


def _part_source(parts: Tensor, launch: tuning.Launch) -> Tensor | TensorDescriptor:
    """Partial sums [parts, C, D], one tile of N columns at a time."""
    if not launch.tma:
        return parts
    return TensorDescriptor(parts, list(parts.shape), list(parts.stride()), [1, launch.n, parts.shape[2]])


def _row_values(lse: Tensor, delta: Tensor, index: BlockTask | ColumnTask, scale: float) -> Tensor:
    """lse and scale * delta [B, H, S_q] as the backward kernels read them: [B * H * 2, tokens of whole tiles]."""
    lse, delta = (x if x.stride(-1) == 1 else x.contiguous() for x in (lse, delta))
    batch, heads, _ = lse.shape
    values = _empty_row_values(lse, index)
    padded = values.shape[1]
    prepare_kernel[(triton.cdiv(padded, PREPARE_ROWS), batch * heads)](
        lse, delta, values, *lse.stride()[:2], *delta.stride()[:2], heads, index.q_valid_tokens, padded, scale,
        SIZE=PREPARE_ROWS)
    return values


def _empty_row_values(lse: Tensor, index: BlockTask | ColumnTask) -> Tensor:
    padded = len(index.q_side.blocks) * index.mask.block_size
    return torch.empty(lse.shape[0] * lse.shape[1] * 2, padded, dtype=lse.dtype, device=lse.device)


@contextmanager
def _accumulators(*grads: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The given accumulators, or aligned copies of them that are written back at the end."""
    for grad in grads:
        if grad.dtype not in _ACC:
            raise ValueError(f"gradient accumulator: dtype {grad.dtype} is neither float32 nor float64")
    used = tuple(_inner_contiguous(grad) for grad in grads)
    yield used
    for grad, copy in zip(grads, used, strict=True):
        if copy is not grad:
            grad.copy_(copy)


def _strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of [B, S, H, D] tensors."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _empty_partial(q: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    accumulator = accumulator_dtype(q.dtype)
    batch, tokens, heads, _ = q.shape
    lse = torch.empty(batch, heads, tokens, dtype=accumulator, device=q.device)
    return torch.empty(q.shape, dtype=out_dtype or accumulator, device=q.device), lse


def _inner_contiguous(x: Tensor) -> Tensor:
    """Rows of D elements in one piece, 16-byte aligned: what both kinds of loads need."""
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _check_block_size(mask: AttentionMask) -> None:
    if mask.block_size not in BLOCK_SIZES:
        raise ValueError(f"mask.block_size: {mask.block_size} is not one of {BLOCK_SIZES} (triton backend)")


def _check_shapes(q: Tensor, heads: int, q_tokens: int) -> None:
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q: head dim {q.shape[3]} is not one of {HEAD_DIMS} (triton backend)")
    if q.shape[2] != heads or q.shape[1] != q_tokens:
        raise ValueError(f"q: {q.shape[2]} heads and {q.shape[1]} tokens; the index was built for {heads} and {q_tokens}")


def _check_task(q: Tensor, k: Tensor, index: BlockTask) -> None:
    _check_shapes(q, index.mask.heads, index.q_side.tokens)
    if k.shape[1] != index.k_side.tokens:
        raise ValueError(f"k: {k.shape[1]} tokens; the index was built for {index.k_side.tokens}")


def _check_columns(q: Tensor, column_k: Tensor, index: ColumnTask) -> None:
    _check_shapes(q, index.mask.heads, index.q_side.tokens)
    if column_k.shape[1:3] != index.columns.shape:
        raise ValueError(f"column_k: shape {tuple(column_k.shape)} is not [B, H, C, D] of columns "
                         f"{tuple(index.columns.shape)}")

