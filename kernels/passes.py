"""Passes over whole tensors that would take torch several: row sums of products, sums of parts.

They move bytes and compute next to nothing, so each reads its inputs once and writes its result once.
"""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merge import accumulator_dtype
from .triton_run import run

_ROWS, _ELEMENTS = 32, 4096


@triton.jit(do_not_specialize=["heads", "tokens"])
def row_products_kernel(left, right, sums, l_b, l_s, l_h, r_b, r_s, r_h, heads, tokens, ROWS: tl.constexpr,
                        D: tl.constexpr):
    """sums [B, H, S] contiguous. Grid (S / ROWS, B * H)."""
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, dims = rows < tokens, tl.arange(0, D)[None, :]
    row = rows.to(tl.int64)[:, None]
    a = tl.load(left + batch * l_b + head * l_h + row * l_s + dims, mask=inside[:, None], other=0.0)
    b = tl.load(right + batch * r_b + head * r_h + row * r_s + dims, mask=inside[:, None], other=0.0)
    total = tl.sum(a.to(sums.dtype.element_ty) * b.to(sums.dtype.element_ty), 1)
    tl.store(sums + pair.to(tl.int64) * tokens + rows, total, mask=inside)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """See api.row_products; D is a power of two."""
    left, right = (x if x.stride(-1) == 1 else x.contiguous() for x in (left, right))
    batch, tokens, heads, dim = left.shape
    sums = torch.empty(batch, heads, tokens, dtype=accumulator_dtype(left.dtype), device=left.device)
    if sums.numel():
        run(
            row_products_kernel, (triton.cdiv(tokens, _ROWS), batch * heads),
            left, right, sums, *left.stride()[:3], *right.stride()[:3], heads, tokens, ROWS=_ROWS, D=dim)
    return sums


@triton.jit(do_not_specialize=["width", "chunks", "parts"])
def add_up_kernel(target, prior, part, t_r, p_r, part_r, part_stride, width, chunks, parts, ADD: tl.constexpr,
                  ACC: tl.constexpr, SIZE: tl.constexpr):
    """target = (ADD: prior +) all parts, by rows of `width` elements. Grid (rows * chunks): `chunks` programs a row."""
    program = tl.program_id(0).to(tl.int64)
    row, at = program // chunks, program % chunks * SIZE + tl.arange(0, SIZE)
    inside = at < width
    if ADD:
        total = tl.load(prior + row * p_r + at, mask=inside, other=0.0).to(ACC)
    else:
        total = tl.zeros([SIZE], ACC)
    source = part + row * part_r + at
    for number in range(0, parts):
        total += tl.load(source + tl.cast(number, tl.int64) * part_stride, mask=inside, other=0.0).to(ACC)
    tl.store(target + row * t_r + at, total.to(target.dtype.element_ty), mask=inside)


def add_up(target: Tensor, parts: Tensor, *, add: bool) -> None:
    """See api.add_up: in the order of the parts."""
    if not (target.is_contiguous() and parts.is_contiguous()):
        raise ValueError("add_up: target and parts are not contiguous")
    if len(parts):
        _add_flat(parts, target, target, add=add)
    elif not add:
        target.zero_()


def add_rows(part: Tensor, prior: Tensor, target: Tensor, *, add: bool) -> None:
    """target = (add: prior +) part, all [B, S, H, D], rounded once; quick where a row's heads are together."""
    batch, tokens, heads, dim = part.shape
    if part.is_contiguous() and prior.is_contiguous() and target.is_contiguous():
        _add_flat(part[None], prior, target, add=add)
        return
    if any(x.stride(3) != 1 or x.stride(2) != dim for x in (part, prior, target)):
        wide = torch.promote_types(part.dtype, prior.dtype)
        target.copy_(prior.to(wide) + part if add else part)
        return
    width = heads * dim
    size = min(_ELEMENTS, triton.next_power_of_2(width))
    for entry in range(batch if tokens else 0):
        given = target[entry], prior[entry], part[entry], target.stride(1), prior.stride(1), part.stride(1), 0
        _launch(given, rows=tokens, width=width, size=size, parts=1, add=add)


def _add_flat(parts: Tensor, prior: Tensor, target: Tensor, *, add: bool) -> None:
    """target = (add: prior +) the sum of parts [n, *target.shape]; everything is in one piece."""
    width = target.numel()
    if width:
        given = target, prior, parts, 0, 0, 0, width
        _launch(given, rows=1, width=width, size=_ELEMENTS, parts=len(parts), add=add)


def _launch(given: tuple[Tensor | int, ...], *, rows: int, width: int, size: int, parts: int, add: bool) -> None:
    """One program per `size` elements of a row, along the grid's first axis: the others end at 65,535."""
    chunks = triton.cdiv(width, size)
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in given)
    run(
        add_up_kernel, (rows * chunks,),
        *given, width, chunks, parts, ADD=add, ACC=tl.float64 if wide else tl.float32, SIZE=size)
