"""Merging flash-attn-4's partial (16-bit out, float32 lse) into earlier partials, or widening it, in one pass."""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..jit import run
from ..triton.views import Rows, Tiles
from ..values import Partial

_ROWS = 32


@triton.jit(do_not_specialize=["heads", "tokens", "part_tokens"])
def merge_kernel(part, part_lse, earlier, earlier_lse, out, lse, heads, tokens, part_tokens, MERGE: tl.constexpr,
                 ROWS: tl.constexpr, D: tl.constexpr):
    """out, lse = part merged with earlier, or part alone; part ends at part_tokens. Grid (tokens / ROWS, B * H).

    part, earlier, out: views.Tiles; their lse: views.Rows.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    dims, inside, has_part = tl.arange(0, D)[None, :], rows < tokens, rows < part_tokens
    row = rows.to(tl.int64)[:, None]
    lse_at = part_lse.data + batch * part_lse.b + head * part_lse.h + rows
    new_lse = tl.load(lse_at, mask=has_part, other=float("-inf"))
    at = part.data + batch * part.at.b + head * part.at.h + row * part.at.s + dims
    new = tl.load(at, mask=has_part[:, None], other=0.0).to(tl.float32)
    if MERGE:
        old_lse_at = earlier_lse.data + batch * earlier_lse.b + head * earlier_lse.h + rows
        old_lse = tl.load(old_lse_at, mask=inside, other=float("-inf")).to(tl.float32)
        old_at = earlier.data + batch * earlier.at.b + head * earlier.at.h + row * earlier.at.s + dims
        old = tl.load(old_at, mask=inside[:, None], other=0.0)
        top = tl.maximum(old_lse, new_lse)
        shift = tl.where(top == float("-inf"), 0.0, top)
        old_weight, new_weight = tl.exp(old_lse - shift), tl.exp(new_lse - shift)
        total = old_weight + new_weight
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        new = (old.to(tl.float32) * (old_weight / total)[:, None]) + new * (new_weight / total)[:, None]
        new_lse = tl.where(empty, float("-inf"), shift + tl.log(total))
    place = out.data + batch * out.at.b + head * out.at.h + row * out.at.s + dims
    tl.store(place, new.to(out.data.dtype.element_ty), mask=inside[:, None])
    tl.store(lse.data + batch * lse.b + head * lse.h + rows, new_lse, mask=inside)


def merge_part(part: Partial, earlier: Partial | None, *, tokens: int, out_dtype: torch.dtype) -> Partial:
    """(out [B, S, H, D], lse [B, H, S]) of part [B, S', H, D], S' <= S = tokens, merged with earlier partials.

    Rows beyond S' are earlier's, or out 0 and lse -inf. Merges in place, unless out_dtype differs from earlier's.
    """
    (part_out, part_lse), (batch, _, heads, dim) = part, part[0].shape
    if earlier is not None and earlier[0].dtype == out_dtype:
        (out, lse), tokens = earlier, part_out.shape[1]  # the others stay as they are
    else:
        out = torch.empty(batch, tokens, heads, dim, dtype=out_dtype, device=part_out.device)
        lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=part_out.device)
    old, old_lse = earlier or (out, lse)
    if tokens:
        run(
            merge_kernel, (triton.cdiv(tokens, _ROWS), batch * heads),
            Tiles.of(part_out), Rows.of(part_lse), Tiles.of(old), Rows.of(old_lse), Tiles.of(out), Rows.of(lse), heads,
            tokens, part_out.shape[1], MERGE=earlier is not None, ROWS=_ROWS, D=dim)
    return out, lse
