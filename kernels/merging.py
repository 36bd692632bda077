"""Merging two partial results in one pass over memory.

The forward kernel could add into an earlier partial in its epilogue; on Hopper the registers that this takes cost a third
of its speed (docs/kernels.md), so a partial is written fresh and merged here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def merge_kernel(out, lse, added_out, added_lse, tokens, heads, rows,
                 ROWS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (batch, token, head), head fastest
    here = row < rows
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    at_lse = (batch * heads + head) * tokens + token
    old = tl.load(lse + at_lse, mask=here, other=float("-inf"))
    new = tl.load(added_lse + at_lse, mask=here, other=float("-inf"))
    top = tl.maximum(old, new)
    safe = tl.where(top == float("-inf"), 0.0, top)  # two empty rows: no NaN
    old_share, new_share = tl.exp(old - safe), tl.exp(new - safe)
    total = old_share + new_share
    at_out = row[:, None] * D + tl.arange(0, D)[None, :]
    kept = tl.load(out + at_out, mask=here[:, None], other=0.0)
    extra = tl.load(added_out + at_out, mask=here[:, None], other=0.0)
    weight = tl.where(total == 0.0, 1.0, total)
    merged = (kept * old_share[:, None] + extra * new_share[:, None]) / weight[:, None]
    tl.store(out + at_out, merged, mask=here[:, None])
    tl.store(lse + at_lse, tl.where(total == 0.0, float("-inf"), safe + tl.log(weight)), mask=here)


def merge_in_place(into: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge `part` into `into`, both (out [B, S, H, D], lse [B, H, S]) contiguous in the accumulator's dtype."""
    (out, lse), (added_out, added_lse) = into, part
    for tensor in (out, lse, added_out, added_lse):
        if not tensor.is_contiguous():
            raise ValueError(f"partial result: shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    batch, tokens, heads, dim = out.shape
    rows = batch * tokens * heads
    if rows:
        merge_kernel[(triton.cdiv(rows, ROWS),)](
            out, lse, added_out, added_lse, tokens, heads, rows, ROWS=ROWS, D=dim, num_warps=4
        )
    return into
