"""How exact a backend is on the device at hand: its errors beside those of plain torch in the same data type.

The reference is float64; the bar is twice the error of dense attention in plain torch, of the same 16-bit inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..api import full_attention
from ..mask import AttentionMask, whole
from ..plain.reference import reference_attention, reference_gradients

MASKS = ("toeplitz", "toeplitz+columns", "blocks")
NAMES = ("out", "dq", "dk", "dv")
ALLOWED_RATIO = 2.0
TOKENS = 1000  # no multiple of a tile
# Head dim and mask block; heads of 96 and 80 are computed as 128, those of 192 as 256, padded.
SHAPES = ((128, 128), (128, 64), (64, 128), (64, 64), (96, 128), (80, 64), (192, 128), (256, 64), (512, 128))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: dtype, head dim, block, (query, KV) heads, and which kind of mask."""

    dtype: torch.dtype
    head_dim: int
    block_size: int
    heads: tuple[int, int]
    mask: str  # of MASKS

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.heads[0]}:{self.heads[1]}"
        return f"{dtype:8} D {self.head_dim:3} block {self.block_size:3} {heads:5} {self.mask}"


def cases() -> Iterator[Case]:
    """Every kind of problem that the kernels promise."""
    dtypes, heads = (torch.bfloat16, torch.float16), ((16, 2), (32, 8), (4, 4))
    for dtype, (head_dim, block_size), some, mask in product(dtypes, SHAPES, heads, MASKS):
        yield Case(dtype=dtype, head_dim=head_dim, block_size=block_size, heads=some, mask=mask)


def error_ratios(case: Case, backend: str, device: torch.device) -> dict[str, float]:
    """Largest error of out, dq, dk and dv over that of plain torch; at most ALLOWED_RATIO is right, NaN never is."""
    generator, (heads, kv_heads) = torch.Generator().manual_seed(0), case.heads
    grad_out, q, k, v = (
        torch.randn(1, TOKENS, n, case.head_dim, generator=generator).to(device, case.dtype)
        for n in (heads, heads, kv_heads, kv_heads)
    )
    mask, scale = _mask(case).to(device), case.head_dim**-0.5
    leaves = q_leaf, k_leaf, v_leaf = tuple(x.clone().requires_grad_() for x in (q, k, v))
    out, _ = full_attention(q_leaf, k_leaf, v_leaf, mask, scale=scale, backend=backend)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    plain = _plain(grad_out, q, k, v, mask, scale)
    exact_out, _ = reference_attention(q, k, v, mask, scale=scale)
    exact = [exact_out, *reference_gradients(grad_out, q, k, v, mask, scale=scale)]
    return {
        name: float((a.double() - right).abs().max() / (b.double() - right).abs().max())
        for name, a, b, right in zip(NAMES, ours, plain, exact, strict=True)
    }


def _mask(case: Case) -> AttentionMask:
    generator = torch.Generator().manual_seed(1)
    heads, blocks = case.heads[0], -(-TOKENS // case.block_size)
    shape = (heads, blocks, blocks) if case.mask == "blocks" else (heads, blocks)
    active = torch.rand(shape, generator=generator) < 0.4
    own = active.diagonal(dim1=1, dim2=2) if case.mask == "blocks" else active[:, 0]
    own[:] = True
    columns = None
    if case.mask == "toeplitz+columns":
        drawn = [torch.randperm(TOKENS, generator=generator)[:70].sort().values for _ in range(heads)]
        columns = torch.stack(drawn).int()
    return AttentionMask(seq_len_tokens=TOKENS, block_size=case.block_size, active=active, columns=columns)


def _plain(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> list[Tensor]:
    """out, dq, dk, dv of dense attention in plain torch, in the inputs' own dtype."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    queries, keys, values = (x[0].transpose(0, 1) for x in leaves)
    group = queries.shape[0] // keys.shape[0]
    positions = torch.arange(q.shape[1], device=q.device)
    allowed = torch.stack([whole(mask, head, positions, positions) for head in range(mask.heads)])
    scores = (queries @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale).masked_fill(~allowed, -torch.inf)
    out = (torch.softmax(scores, -1) @ values.repeat_interleave(group, 0)).transpose(0, 1)[None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
