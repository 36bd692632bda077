"""The kernel behind sinks.with_sinks: out is read and written once, in one launch where torch needs many."""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import run
from .views import Rows, Tiles

ROWS = 64


@triton.jit(do_not_specialize=["tokens"])
def sinks_kernel(out, lse, sinks, total, heads, tokens, M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Scale out's rows (Tiles) to a softmax with the head's sink; total: lse with it (Rows). Grid (S / M, B * H)."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    inside = row < tokens
    without = tl.load(lse.data + batch * lse.b + head * lse.h + row, mask=inside, other=float("-inf"))
    sink = tl.load(sinks + head)
    empty = without == float("-inf")
    peak = tl.maximum(tl.where(empty, 0.0, without), sink)  # finite
    beside = peak + tl.log(tl.exp(without - peak) + tl.exp(sink - peak))
    weight = tl.where(empty, 0.0, tl.exp(without - beside))
    tl.store(total.data + batch * total.b + head * total.h + row, tl.where(empty, without, beside), mask=inside)
    at = out.data + batch * out.at.b + head * out.at.h + row.to(tl.int64)[:, None] * out.at.s + d[None, :]
    held = inside[:, None] & (d < D)[None, :]
    x = tl.load(at, mask=held, other=0.0)
    tl.store(at, (x * weight[:, None]).to(x.dtype), mask=held)


def launch_with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """See sinks.with_sinks. out [B, S, H, D] with its elements of a head side by side, lse [B, H, S]."""
    batch, tokens, heads, dim = out.shape
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    total = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if out.numel():
        run(sinks_kernel, (triton.cdiv(tokens, ROWS), batch * heads), Tiles.of(out), Rows.of(lse),
            sinks.to(lse.dtype).contiguous(), Rows.of(total), heads, tokens, M=ROWS, D=dim,
            WIDTH=triton.next_power_of_2(dim))
    return out, total
