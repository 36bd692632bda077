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

from ..head_dims import pieces
from ..jit import run
from ..merge import accumulator_dtype

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
            left, right, sums, *left.stride()[:3], *right.stride()[:3], heads, tokens, ROWS=_ROWS, D=dim)
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
    if not parts.is_contiguous() or (not target.is_contiguous() and not _is_some_heads(target)):
        raise ValueError("add_up: parts are not contiguous, or target is no run of heads of what is")
    if len(parts):
        _add_flat(parts, target, target, add=add)
    elif not add:
        target.zero_()


def _is_some_heads(x: Tensor) -> bool:
    """Whether x is [B, S, some heads, D] of a contiguous tensor."""
    return x.dim() == 4 and x.stride()[2:] == (x.shape[3], 1) and x.stride(0) == x.shape[1] * x.stride(1)


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
def add_rows_kernel(part, prior, target, p_b, p_s, p_h, e_b, e_s, e_h, t_b, t_s, t_h, heads, tokens, part_tokens,
                    ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """target = (ADD: prior +) part, which is 0 from part_tokens on. Grid (tokens / ROWS, B * H)."""
    pair = tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, dims, row = (rows < tokens)[:, None], tl.arange(0, D)[None, :], rows.to(tl.int64)[:, None]
    at = part + batch * p_b + head * p_h + row * p_s + dims
    total = tl.load(at, mask=(rows < part_tokens)[:, None], other=0.0).to(ACC)
    if ADD:
        total += tl.load(prior + batch * e_b + head * e_h + row * e_s + dims, mask=inside, other=0.0).to(ACC)
    tl.store(target + batch * t_b + head * t_h + row * t_s + dims, total.to(target.dtype.element_ty), mask=inside)


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
            part, prior, target, *part.stride()[:3], *prior.stride()[:3], *target.stride()[:3], heads, tokens,
            part.shape[1], ADD=add, ACC=_sums(target, prior, part), ROWS=_ROWS, D=dim)


def _sums(*tensors: Tensor) -> tl.dtype:
    """The type to add in."""
    return tl.float64 if any(x.dtype == torch.float64 for x in tensors) else tl.float32
