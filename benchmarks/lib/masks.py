"""Seeded masks for the benchmarks, self-contained: vertical-slash at a target density, XAttention-like, MoBA-like,
packed documents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask


def slash_mask(
    seq_len: int, density: float, columns: int, *, heads: int = 16, block: int = 128, seed: int = 0
) -> AttentionMask:
    """Toeplitz mask of about `density`: a local window with 30 % of the slashes, the others drawn at random.

    A slash at token distance i * block + block / 2 touches block diagonals i and i + 1. Each head draws its diagonals,
    then its columns, from one generator.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = seq_len // block
    local, far = max(1, int(blocks * density * 0.3)), int(blocks * density * 0.7 / 2)
    active = torch.zeros(heads, blocks, dtype=torch.bool)
    chosen = torch.empty(heads, columns, dtype=torch.int32)
    for head in range(heads):
        slashes = set(range(local)) | {int(x) for x in torch.randperm(blocks, generator=generator)[:far]}
        active[head, [d for s in slashes for d in (s, s + 1) if d < blocks]] = True
        chosen[head] = torch.sort(torch.randperm(seq_len, generator=generator)[:columns]).values.int()
    return AttentionMask(seq_len_tokens=seq_len, block_size=block, active=active, columns=chosen if columns else None)


def xattention_like_mask(
    seq_len: int, density: float, *, heads: int = 16, block: int = 128, seed: int = 0
) -> AttentionMask:
    """Block mask: sinks, a local band, some vertical stripes and slashes, and isolated blocks, per head."""
    generator = torch.Generator().manual_seed(seed)
    blocks = seq_len // block
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    share = max(1, int(blocks * density / 8))
    active = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for head in range(heads):
        stripes = torch.randperm(blocks, generator=generator)[:share]
        slashes = torch.randperm(blocks, generator=generator)[: 2 * share]
        active[head] = (key < 2) | (query - key < share) | torch.isin(query - key, slashes)
        active[head][:, stripes] = True
        active[head] |= torch.rand(blocks, blocks, generator=generator) < density / 2
    return AttentionMask(seq_len_tokens=seq_len, block_size=block, active=active & (key <= query))


def moba_like_mask(
    seq_len: int, density: float, *, heads: int = 16, block: int = 128, chunk_blocks: int = 4, seed: int = 0
) -> AttentionMask:
    """Block mask: every query block picks its own chunk and top-k earlier chunks of chunk_blocks blocks at random."""
    generator = torch.Generator().manual_seed(seed)
    blocks = seq_len // block
    chunks = -(-blocks // chunk_blocks)
    chosen = max(1, int(chunks * density / 2))
    own = torch.arange(blocks) // chunk_blocks
    key = torch.arange(blocks)
    active = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for head in range(heads):
        score = torch.rand(blocks, chunks, generator=generator)
        score[torch.arange(chunks)[None, :] >= own[:, None]] = -1.0
        top = torch.topk(score, min(chosen, chunks), dim=1)
        picked = torch.zeros(blocks, chunks, dtype=torch.bool)
        picked.scatter_(1, top.indices, top.values >= 0)
        picked[torch.arange(blocks), own] = True
        active[head] = picked[:, key // chunk_blocks]
    return AttentionMask(seq_len_tokens=seq_len, block_size=block, active=active & (key[None, :] <= key[:, None]))


def documents_mask(seq_len: int, density: float, *, heads: int = 16, block: int = 128, seed: int = 0) -> AttentionMask:
    """Packed documents, dense causal attention within each; their lengths are exponential, rounded up to tokens.

    Documents of mean length L fill about 2 L / seq_len of the causal half: L follows from `density`.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, lengths = max(1.0, seq_len * density / 2), []
    while sum(lengths) < seq_len:
        lengths.append(1 + int(-mean * torch.log1p(-torch.rand(1, generator=generator)).item()))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[:seq_len].int()
    first, last = documents[::block], documents[block - 1 :: block]
    last = torch.nn.functional.pad(last, (0, len(first) - len(last)), value=int(documents[-1]))
    active = torch.tril(last[None, :] >= first[:, None])  # shares a document; as bits, so that others are skipped
    return AttentionMask(
        seq_len_tokens=seq_len, block_size=block, active=active.repeat(heads, 1, 1), documents=documents
    )


def window_mask(seq_len: int, density: float, *, heads: int = 16, block: int = 128, seed: int = 0) -> AttentionMask:
    """A sliding window of about `density`, whose edge lies within blocks, the same for all heads; nothing is drawn."""
    window = max(1, round(seq_len * density / 2)) // 2 * 2 + 1
    nothing = torch.zeros(heads, seq_len // block, dtype=torch.bool)
    return AttentionMask(seq_len_tokens=seq_len, block_size=block, active=nothing, windows=(window,) * heads)


def band_mask(seq_len: int, density: float, *, heads: int = 16, block: int = 128, seed: int = 0) -> AttentionMask:
    """What `window_mask` computes, as whole blocks: the diagonals of the window and of its edge; nothing is drawn."""
    windowed = window_mask(seq_len, density, heads=heads, block=block, seed=seed)
    return AttentionMask(seq_len_tokens=seq_len, block_size=block, active=computed_blocks(windowed))


# of one signature, but for the columns that only slash masks have
MASKS: dict[str, Callable[..., AttentionMask]] = {
    "slash": slash_mask, "xattention": xattention_like_mask, "moba": moba_like_mask, "documents": documents_mask,
    "window": window_mask, "band": band_mask,
}  # fmt: skip


def split_diagonal(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Return bool [H, N, N], the active pairs of a query block and an earlier one, and bool [H, N], the own blocks."""
    block = torch.arange(mask.blocks, device=mask.active.device)
    earlier = block[:, None] > block[None, :]
    if mask.is_toeplitz:
        active = mask.active[:, (block[:, None] - block[None, :]).clamp(min=0)]
        return active & earlier, mask.active[:, :1].expand(-1, mask.blocks)
    return mask.active & earlier, mask.active[:, block, block]


def computed_blocks(mask: AttentionMask) -> Tensor:
    """Return `mask.active` with the blocks that a window cuts, which are computed whole."""
    edges = mask.edges()
    if edges is None:
        return mask.active
    distance = torch.arange(mask.blocks, device=mask.active.device)
    cut = (distance == edges[:, :1]) | (distance == edges[:, 1:])
    if mask.is_toeplitz:
        return mask.active | cut
    return mask.active | cut[:, (distance[:, None] - distance[None, :]).clamp(min=0)]


def active_block_pairs(mask: AttentionMask) -> int:
    """Active causal block pairs over all heads, diagonal pairs, and those that a window cuts, whole."""
    active = computed_blocks(mask)
    if mask.is_toeplitz:
        weights: Tensor = mask.blocks - torch.arange(mask.blocks, device=mask.active.device)
        return int((active * weights).sum())
    return int(torch.tril(active).sum())


def density_of(mask: AttentionMask) -> float:
    """Active causal block pairs over all causal block pairs of all heads."""
    return active_block_pairs(mask) / (mask.heads * mask.blocks * (mask.blocks + 1) / 2)


def forward_flops(mask: AttentionMask, head_dim: int) -> float:
    """Matmul FLOPs of one forward: active blocks whole; 4 D for each causal (query, column) pair, covered or not."""
    flops = 4.0 * mask.block_size * mask.block_size * head_dim * active_block_pairs(mask)
    if mask.columns is not None:
        valid = mask.columns < mask.seq_len_tokens
        flops += 4.0 * head_dim * float(((mask.seq_len_tokens - mask.columns.double()) * valid).sum())
    return flops
