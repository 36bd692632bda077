"""Seeded cases of what decides element by element: windows, softcaps, sinks, with slashes, columns and documents."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from dense_definition import Attended, Inputs
from sparsering.kernels.mask import AttentionMask


@dataclass(frozen=True, kw_only=True)
class ElementCase:
    """One attention: by its definition, and as a mask."""

    attended: Attended
    given: Inputs
    mask: AttentionMask


def element_case(seed: int, *, blocks: tuple[int, ...] = (16, 32), head_dim: int = 16) -> ElementCase:
    """Return a case; windows lie on, just before and just after edges of blocks among others."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block, tokens = draw.choice(blocks), draw.choice([96, 128, 150, 200])
    heads, kv_heads = draw.choice([(2, 1), (2, 2), (4, 2)])
    count = -(-tokens // block)
    lengths = [0, 1, 2, block - 1, block, block + 1, block + 2, 3 * block - 1, 40, 64, 100, tokens, tokens + 50]
    windows = tuple(draw.choice(lengths) for _ in range(heads))
    share = draw.choice([0, 0.2, 0.5])
    listed = draw.random() < 0.4
    active = torch.rand(heads, *(count,) * (2 if listed else 1), generator=generator) < share
    columns = tuple(tuple(sorted(draw.sample(range(tokens), draw.choice([0, 5, 40])))) for _ in range(heads))
    capacity = max(map(len, columns))
    slots = torch.tensor([[*own, *(tokens,) * (capacity - len(own))] for own in columns], dtype=torch.int32)
    documents = None
    if draw.random() < 0.4:
        documents = torch.randint(0, 4, (tokens,), generator=generator).sort().values.int()
    mask = AttentionMask(
        seq_len_tokens=tokens, block_size=block, active=active.tril() if listed else active, windows=windows,
        columns=slots if capacity else None, documents=documents,
    )  # fmt: skip
    attended = Attended(
        seq_len_tokens=tokens, block_size=block, active=active, windows=windows, columns=columns, documents=documents
    )
    padded = tokens + draw.choice([0, 0, 8, 20])
    sizes = heads, kv_heads, kv_heads, heads
    q, k, v, grad_out = (
        torch.randn(1, padded, count, head_dim, generator=generator, dtype=torch.float64) for count in sizes
    )
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64) if draw.random() < 0.6 else None
    softcap = draw.choice([None, 1.5, 5.0])
    given = Inputs(q=q, k=k, v=v, grad_out=grad_out, scale=0.3, softcap=softcap, sinks=sinks)
    return ElementCase(attended=attended, given=given, mask=mask)
