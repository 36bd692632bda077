"""Gathering K/V rows of the columns and adding their gradients back, one launch each; see gathered.py for the meaning.

gathered.py does the same with tensor operations on any device; these read K and V once, and add in a fixed order: a
program owns the rows of one tile of one KV head, so that no two additions meet.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head_dims import pieces
from ..index.columns import ColumnTask
from ..jit import run
from .columns import columns_up_to

_SLOTS = 16


@triton.jit
def gather_kernel(k, v, column_k, column_v, columns, tile_of_block, k_b, k_s, k_h, v_b, v_s, v_h, heads, capacity,
                  dim, seq_len, GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    """D elements of column_k, column_v [B, H, C, dim], contiguous: the rows of columns held here, 0 elsewhere.

    Grid (C / SIZE, H, B).
    """
    slots = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    head, batch = tl.program_id(1), tl.program_id(2)
    position = tl.load(columns + head * capacity + slots, mask=slots < capacity, other=2147483647)
    valid = position < seq_len
    tile = tl.load(tile_of_block + position // BLOCK, mask=valid, other=-1)
    held = (tile >= 0)[:, None]
    row, dims = (tile * BLOCK + position % BLOCK).to(tl.int64)[:, None], tl.arange(0, D)[None, :]
    kv_head = (head // GROUP).to(tl.int64)
    k_rows = tl.load(k + batch.to(tl.int64) * k_b + kv_head * k_h + row * k_s + dims, mask=held, other=0.0)
    v_rows = tl.load(v + batch.to(tl.int64) * v_b + kv_head * v_h + row * v_s + dims, mask=held, other=0.0)
    at = ((batch * heads + head).to(tl.int64) * capacity + slots[:, None]) * dim + dims
    tl.store(column_k + at, k_rows, mask=(slots < capacity)[:, None])
    tl.store(column_v + at, v_rows, mask=(slots < capacity)[:, None])


@triton.jit
def scatter_kernel(part_k, part_v, grad_k, grad_v, columns, row_blocks, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h, heads,
                   capacity, dim, seq_len, GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Add D elements of part_k, part_v [B, H, C, dim], contiguous, into the rows of one tile of grad_k, grad_v.

    Grid (T, H_kv, B).
    """
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(row_blocks + tile) * BLOCK
    end = tl.minimum(first + BLOCK, seq_len)
    dims = tl.arange(0, D)
    k_tile = grad_k + batch.to(tl.int64) * dk_b + kv_head.to(tl.int64) * dk_h + tile.to(tl.int64) * BLOCK * dk_s + dims
    v_tile = grad_v + batch.to(tl.int64) * dv_b + kv_head.to(tl.int64) * dv_h + tile.to(tl.int64) * BLOCK * dv_s + dims
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        line = columns + head * capacity
        low = columns_up_to(line, 0, capacity, first - 1)
        high = columns_up_to(line, 0, capacity, end - 1)
        for slot in range(low, high):
            row = tl.load(line + slot) - first
            at = ((batch * heads + head).to(tl.int64) * capacity + slot) * dim + dims
            k_row, v_row = k_tile + row * dk_s, v_tile + row * dv_s
            tl.store(k_row, (tl.load(k_row) + tl.load(part_k + at)).to(grad_k.dtype.element_ty))
            tl.store(v_row, (tl.load(v_row) + tl.load(part_v + at)).to(grad_v.dtype.element_ty))


def gather(k: Tensor, v: Tensor, index: ColumnTask) -> Tensor:
    """[2, B, H, C, D]: columns of the shard k, v [B, S, H_kv, D] that the index's queries belong to; zero elsewhere."""
    batch, tokens, kv_heads, dim = k.shape
    heads, capacity = index.columns.shape
    _check(tokens, heads, kv_heads, index)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    columns = torch.empty(2, batch, heads, capacity, dim, dtype=k.dtype, device=k.device)
    for piece in pieces(dim):
        parts = (x[..., piece] for x in (k, v, columns[0], columns[1]))
        run(
            gather_kernel, (triton.cdiv(capacity, _SLOTS), heads, batch),
            *parts, index.columns, index.q_side.tile_of_block(index.mask.blocks), *k.stride()[:3], *v.stride()[:3],
            heads, capacity, dim, index.mask.seq_len_tokens, GROUP=heads // kv_heads, BLOCK=index.mask.block_size,
            D=piece.stop - piece.start, SIZE=_SLOTS)
    return columns


def scatter(part_k: Tensor, part_v: Tensor, index: ColumnTask, *, grad_k: Tensor, grad_v: Tensor) -> None:
    """Add part_k, part_v [B, H, C, D], summed over a KV head's query heads, into grad_k, grad_v [B, S, H_kv, D]."""
    batch, tokens, kv_heads, dim = grad_k.shape
    heads, capacity = index.columns.shape
    _check(tokens, heads, kv_heads, index)
    if grad_k.stride(-1) != 1 or grad_v.stride(-1) != 1:
        raise ValueError("grad_k, grad_v: rows of D elements are not in one piece")
    part_k, part_v = part_k.contiguous(), part_v.contiguous()
    for piece in pieces(dim):
        parts = (x[..., piece] for x in (part_k, part_v, grad_k, grad_v))
        run(
            scatter_kernel, (len(index.q_side.blocks), kv_heads, batch),
            *parts, index.columns, index.q_side.device_blocks, *grad_k.stride()[:3], *grad_v.stride()[:3], heads,
            capacity, dim, index.mask.seq_len_tokens, GROUP=heads // kv_heads, BLOCK=index.mask.block_size,
            D=piece.stop - piece.start, num_warps=1)


def _check(tokens: int, heads: int, kv_heads: int, index: ColumnTask) -> None:
    if tokens != index.q_side.tokens or heads % kv_heads:
        raise ValueError(f"k: {tokens} tokens, {kv_heads} heads; the column index was built for {index.q_side.tokens} "
                         f"tokens and {heads} query heads")
