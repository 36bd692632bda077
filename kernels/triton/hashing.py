"""The kernel behind hashing.hashed_sum."""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

# Argument lists of kernels would take a line an argument.
# fmt: off

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import hashing
from ..jit import run

HASH_MULTIPLIER = tl.constexpr(hashing.HASH_MULTIPLIER)
WORDS = 4096  # of a program


@triton.jit(do_not_specialize=["count", "first"])
def hash_kernel(words, total, count, first, SIZE: tl.constexpr):
    """Add the mixed words of each program to total int64 [1]: integers, in any order the same. Grid (W / SIZE)."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    mixed = (tl.load(words + place, mask=inside, other=0) ^ ((place + first) * HASH_MULTIPLIER)) * HASH_MULTIPLIER
    mixed = (mixed ^ (mixed >> 32)) * HASH_MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * HASH_MULTIPLIER
    tl.atomic_add(total, tl.sum(tl.where(inside, mixed, 0), 0))


def launch_hashed_sum(words: Tensor, first: int) -> Tensor:
    """See hashing.hashed_sum."""
    total = torch.zeros(1, dtype=torch.int64, device=words.device)
    if words.numel():
        run(hash_kernel, (triton.cdiv(words.numel(), WORDS),), words, total, words.numel(), first, SIZE=WORDS)
    return total[0]
