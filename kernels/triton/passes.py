"""Passes over whole tensors that would take torch several: row sums of products, sums of parts, copies of columns.

They move bytes and compute next to nothing, so each reads its inputs once and writes its result once. Columns: one
launch gathers K/V rows of theirs, one adds their gradients back, as gathered.py does on any device; a program owns the
rows of one tile of one KV head, so that no two additions meet, and adds in a fixed order.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head_dims import pieces
from ..index.columns import ColumnTask
from ..jit import run
from ..merge import accumulator_dtype
from .columns import columns_up_to
from .tiles import load_pair, load_tile, write_tile
from .views import Strides, Tiles

_ROWS, _ELEMENTS, _SLOTS = 32, 4096, 16


@triton.jit(do_not_specialize=["heads", "tokens"])
def row_products_kernel(left, right, sums, heads, tokens, ROWS: tl.constexpr, D: tl.constexpr):
    """sums [B, H, S] contiguous; left, right: views.Tiles. Grid (S / ROWS, B * H)."""
    pair, first = tl.program_id(1), tl.program_id(0) * ROWS
    batch, head = pair // heads, pair % heads
    a, b = load_pair(left.data, right.data, left.at, right.at, batch, head, first, tokens, ROWS, D, False, True)
    rows = first + tl.arange(0, ROWS)
    total = tl.sum(a.to(sums.dtype.element_ty) * b.to(sums.dtype.element_ty), 1)
    tl.store(sums + pair.to(tl.int64) * tokens + rows, total, mask=rows < tokens)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """See api.row_products. A head dim that is no power of two is summed in pieces that are."""
    first, *others = pieces(left.shape[3])
    sums = _row_products(left[..., first], right[..., first])
    for piece in others:
        sums += _row_products(left[..., piece], right[..., piece])
    return sums


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """The same; D is a power of two."""
    left, right = (x if x.stride(-1) == 1 else x.contiguous() for x in (left, right))
    batch, tokens, heads, dim = left.shape
    sums = torch.empty(batch, heads, tokens, dtype=accumulator_dtype(left.dtype), device=left.device)
    if sums.numel():
        run(
            row_products_kernel, (triton.cdiv(tokens, _ROWS), batch * heads),
            Tiles.of(left), Tiles.of(right), sums, heads, tokens, ROWS=_ROWS, D=dim)
    return sums


@triton.jit(do_not_specialize=["width", "parts"])
def add_up_kernel(target, prior, part, width, parts, row, distance, ADD: tl.constexpr, ACC: tl.constexpr,
                  SIZE: tl.constexpr, ROWS_APART: tl.constexpr):
    """target = (ADD: prior +) all parts, `width` elements each, one after the other. Grid (width / SIZE).

    ROWS_APART: rows of `row` elements of target and prior begin `distance` elements apart.
    """
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside, place = at < width, at
    if ROWS_APART:
        place = at // row * distance + at % row
    if ADD:
        total = tl.load(prior + place, mask=inside, other=0.0).to(ACC)
    else:
        total = tl.zeros([SIZE], ACC)
    for number in range(0, parts):
        total += tl.load(part + tl.cast(number, tl.int64) * width + at, mask=inside, other=0.0).to(ACC)
    tl.store(target + place, total.to(target.dtype.element_ty), mask=inside)


def add_up(target: Tensor, parts: Tensor, *, add: bool) -> None:
    """See api.add_up: in the order of the parts. target may be some heads of a contiguous [B, S, H, D]."""
    # Some heads of a contiguous [B, S, H, D]?
    apart = target.dim() == 4 and target.stride()[2:] == (target.shape[3], 1)
    apart = apart and target.stride(0) == target.shape[1] * target.stride(1)
    if not parts.is_contiguous() or not (target.is_contiguous() or apart):
        raise ValueError("add_up: parts are not contiguous, or target is no run of heads of what is")
    if len(parts):
        _add_flat(parts, target, target, add=add)
    elif not add:
        target.zero_()


def _add_flat(parts: Tensor, prior: Tensor, target: Tensor, *, add: bool) -> None:
    """target = (add: prior +) the sum of parts [n, *target.shape], in one piece; so are the others, or their rows."""
    width, apart = target.numel(), not target.is_contiguous()
    row, distance = (target.shape[2] * target.shape[3], target.stride(1)) if apart else (width, width)
    if width:
        run(
            add_up_kernel, (triton.cdiv(width, _ELEMENTS),),
            target, prior, parts, width, len(parts), row, distance, ADD=add, ACC=_sums(target, prior, parts),
            SIZE=_ELEMENTS, ROWS_APART=apart)


@triton.jit(do_not_specialize=["heads", "tokens", "part_tokens"])
def add_rows_kernel(part, prior, target, heads, tokens, part_tokens, ADD: tl.constexpr, ACC: tl.constexpr,
                    ROWS: tl.constexpr, D: tl.constexpr):
    """target = (ADD: prior +) part, which is 0 from part_tokens on; views.Tiles. Grid (tokens / ROWS, B * H)."""
    pair, first = tl.program_id(1), tl.program_id(0) * ROWS
    batch, head = pair // heads, pair % heads
    total = load_tile(part.data, part.at, batch, head, first, part_tokens, ROWS, D, False, True).to(ACC)
    if ADD:
        total += load_tile(prior.data, prior.at, batch, head, first, tokens, ROWS, D, False, True).to(ACC)
    write_tile(target.data, target.at, total, batch, head, first, tokens, ROWS, D, False, False)


def add_rows(part: Tensor, prior: Tensor, target: Tensor, *, add: bool) -> None:
    """target [B, S, H, D] = (add: prior +) part, rounded once.

    part [B, S', H, D], S' <= S, counts as 0 from S' on. D is a power of two. Quick where a row's elements are side by
    side; heads and tokens may lie in any order.
    """
    batch, tokens, heads, dim = target.shape
    if any(x.stride(3) != 1 for x in (part, prior, target)):
        wide = torch.promote_types(part.dtype, prior.dtype)
        total = prior.to(wide, copy=True) if add else torch.zeros_like(prior, dtype=wide)
        total[:, : part.shape[1]] += part
        target.copy_(total)
    elif part.shape == target.shape and all(x.is_contiguous() for x in (part, prior, target)):
        _add_flat(part[None], prior, target, add=add)
    elif target.numel():
        run(
            add_rows_kernel, (triton.cdiv(tokens, _ROWS), batch * heads),
            Tiles.of(part), Tiles.of(prior), Tiles.of(target), heads, tokens, part.shape[1], ADD=add,
            ACC=_sums(target, prior, part), ROWS=_ROWS, D=dim)


def _sums(*tensors: Tensor) -> tl.dtype:
    """The type to add in."""
    return tl.float64 if any(x.dtype == torch.float64 for x in tensors) else tl.float32


@triton.jit
def gather_kernel(k, v, column_k, column_v, columns, tile_of_block, k_at, v_at, heads, capacity, dim, seq_len,
                  GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    """D elements of column_k, column_v [B, H, C, dim], contiguous: the rows of columns held here, 0 elsewhere.

    Grid (C / SIZE, H, B). k_at, v_at: views.Strides.
    """
    slots = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    head, batch = tl.program_id(1), tl.program_id(2)
    position = tl.load(columns + head * capacity + slots, mask=slots < capacity, other=2147483647)
    valid = position < seq_len
    tile = tl.load(tile_of_block + position // BLOCK, mask=valid, other=-1)
    held = (tile >= 0)[:, None]
    row, dims = (tile * BLOCK + position % BLOCK).to(tl.int64)[:, None], tl.arange(0, D)[None, :]
    kv_head = (head // GROUP).to(tl.int64)
    k_rows = tl.load(k + batch.to(tl.int64) * k_at.b + kv_head * k_at.h + row * k_at.s + dims, mask=held, other=0.0)
    v_rows = tl.load(v + batch.to(tl.int64) * v_at.b + kv_head * v_at.h + row * v_at.s + dims, mask=held, other=0.0)
    at = ((batch * heads + head).to(tl.int64) * capacity + slots[:, None]) * dim + dims
    tl.store(column_k + at, k_rows, mask=(slots < capacity)[:, None])
    tl.store(column_v + at, v_rows, mask=(slots < capacity)[:, None])


@triton.jit
def scatter_kernel(part_k, part_v, grad_k, grad_v, columns, row_blocks, k_at, v_at, heads, capacity, dim, seq_len,
                   GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Add D elements of part_k, part_v [B, H, C, dim], contiguous, into the rows of one tile of grad_k, grad_v.

    Grid (T, H_kv, B). k_at, v_at: views.Strides of the gradients.
    """
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(row_blocks + tile) * BLOCK
    end = tl.minimum(first + BLOCK, seq_len)
    dims = tl.arange(0, D)
    start, kv_head_64 = tile.to(tl.int64) * BLOCK, kv_head.to(tl.int64)
    k_tile = grad_k + batch.to(tl.int64) * k_at.b + kv_head_64 * k_at.h + start * k_at.s + dims
    v_tile = grad_v + batch.to(tl.int64) * v_at.b + kv_head_64 * v_at.h + start * v_at.s + dims
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        line = columns + head * capacity
        low = columns_up_to(line, 0, capacity, first - 1)
        high = columns_up_to(line, 0, capacity, end - 1)
        for slot in range(low, high):
            row = tl.load(line + slot) - first
            at = ((batch * heads + head).to(tl.int64) * capacity + slot) * dim + dims
            k_row, v_row = k_tile + row * k_at.s, v_tile + row * v_at.s
            tl.store(k_row, (tl.load(k_row) + tl.load(part_k + at)).to(grad_k.dtype.element_ty))
            tl.store(v_row, (tl.load(v_row) + tl.load(part_v + at)).to(grad_v.dtype.element_ty))


def gather(k: Tensor, v: Tensor, index: ColumnTask) -> Tensor:
    """[2, B, H, C, D]: columns of the shard k, v [B, S, H_kv, D] that the index's queries belong to; zero elsewhere."""
    heads, capacity = index.columns.shape
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    columns = torch.empty(2, k.shape[0], heads, capacity, k.shape[3], dtype=k.dtype, device=k.device)
    grid = triton.cdiv(capacity, _SLOTS), heads, k.shape[0]
    tiles = index.q_side.tile_of_block(index.mask.blocks)
    _copy_columns(gather_kernel, grid, (k, v, columns[0], columns[1]), tiles, (k, v), index, SIZE=_SLOTS)
    return columns


def scatter(part_k: Tensor, part_v: Tensor, index: ColumnTask, *, grad_k: Tensor, grad_v: Tensor) -> None:
    """Add part_k, part_v [B, H, C, D], summed over a KV head's query heads, into grad_k, grad_v [B, S, H_kv, D]."""
    if grad_k.stride(-1) != 1 or grad_v.stride(-1) != 1:
        raise ValueError("grad_k, grad_v: rows of D elements are not in one piece")
    grid = len(index.q_side.blocks), grad_k.shape[2], grad_k.shape[0]
    tensors = part_k.contiguous(), part_v.contiguous(), grad_k, grad_v
    _copy_columns(scatter_kernel, grid, tensors, index.q_side.device_blocks, (grad_k, grad_v), index, num_warps=1)


def _copy_columns(kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], blocks: Tensor,
                  shard: tuple[Tensor, Tensor], index: ColumnTask, **named: int) -> None:
    """Once for each piece of a head dim; shard: those [B, S, H_kv, D] of the tensors."""
    (heads, capacity), mask, (_, tokens, kv_heads, dim) = index.columns.shape, index.mask, shard[0].shape
    if tokens != index.q_side.tokens or heads % kv_heads:
        raise ValueError(f"k: {tokens} tokens, {kv_heads} heads; the column index was built for {index.q_side.tokens} "
                         f"tokens and {heads} query heads")
    for piece in pieces(dim):
        run(
            kernel, grid, *(x[..., piece] for x in tensors), index.columns, blocks, *map(Strides.of, shard), heads,
            capacity, dim, mask.seq_len_tokens, GROUP=heads // kv_heads, BLOCK=mask.block_size,
            D=piece.stop - piece.start, **named)
