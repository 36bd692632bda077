"""Choosing block masks: XAttention's antidiagonal scores, and a block-level variant of MoBA's gate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..mask import AttentionMask
from .probe import ALONE, Collectives, ShardTensors, float_matmul
from .top import highest, take_highest

# Strided logits computed at once (float32): bounds the memory of long sequences.
LOGITS_AT_ONCE = 1 << 26


@torch.no_grad()
def choose_xattention(
    shard: ShardTensors,
    *,
    scale: float,
    stride: int = 16,
    mass: float = 0.9,
    first_block: bool = True,
    collectives: Collectives = ALONE,
) -> AttentionMask:
    """XAttention (arXiv 2503.16428): per query block, the fewest key blocks whose antidiagonal mass reaches `mass`.

    The antidiagonal of a stride x stride cell is summed (query stride-1-s with key s), divided by the stride, softmaxed
    over the row's cells, and summed to blocks. The own block and, as in the authors' code, the first one are always
    taken and count first; ties go to the lower block. Every rank gathers all keys (one sum in their own dtype).
    Raises ValueError when the stride does not divide the block, when local tokens are not whole blocks, for a mass
    outside ]0, 1], and with packed documents.
    """
    _check_shard(shard, "xattention")
    if not 0 < mass <= 1:
        raise ValueError(f"mass: {mass} is outside ]0, 1]")
    if stride < 1 or shard.block_size % stride:
        raise ValueError(f"stride: {stride} does not divide the block of {shard.block_size} tokens")
    whole_sequence = shard.positions.shape[0] >= shard.seq_len_tokens
    if shard.granularity_tokens % shard.block_size and not whole_sequence:
        raise ValueError(
            f"granularity_tokens: {shard.granularity_tokens} is no multiple of the block of "
            f"{shard.block_size} tokens, which xattention scores whole"
        )
    blocks = _query_blocks(shard)
    keys = _all_keys(shard, collectives)
    if _kernels_apply(shard, stride):
        from .xattention_triton import active_rows

        budget = {"stride": stride, "mass": mass, "first_block": first_block}
        active = torch.cat(list(active_rows(shard, blocks, keys, scale=scale, **budget)), dim=1)
    else:
        parts = [
            _fewest_blocks(scores, part, mass=mass, first_block=first_block)
            for scores, part in _antidiagonal_scores(shard, blocks, keys, scale=scale, stride=stride)
        ]
        active = torch.cat(parts, dim=1)
    # Padding blocks land in one more row, which is dropped. Each row has one owner, so the sum assembles them.
    rows = torch.zeros(shard.heads, shard.blocks + 1, shard.blocks, dtype=torch.uint8, device=active.device)
    rows[:, blocks.clamp(max=shard.blocks)] = active.to(torch.uint8)
    rows = collectives.all_reduce_sum(rows[:, :-1].contiguous())
    return AttentionMask(
        seq_len_tokens=shard.seq_len_tokens, block_size=shard.block_size, active=rows.bool(), own_blocks=True
    )


@torch.no_grad()
def choose_moba_block(
    shard: ShardTensors, *, chunk_tokens: int, top_chunks: int, collectives: Collectives = ALONE
) -> AttentionMask:
    """Per query block, the top_chunks key chunks by (mean query of the block) . (mean key of the chunk).

    The own chunk is always taken and counts; later chunks never. Block-level: MoBA itself (arXiv 2502.13189) gates
    every token. Ties go to the lower chunk. Raises ValueError when the chunk is no multiple of the block, when
    top_chunks < 1, and with packed documents.
    """
    _check_shard(shard, "moba-block")
    if chunk_tokens < 1 or chunk_tokens % shard.block_size:
        raise ValueError(f"chunk_tokens: {chunk_tokens} is no multiple of the block of {shard.block_size} tokens")
    if top_chunks < 1:
        raise ValueError(f"top_chunks: {top_chunks} is below 1")
    queries = _means(shard, shard.q, shard.block_size, collectives)
    keys = _means(shard, shard.k, chunk_tokens, collectives)
    group = queries.shape[0] // keys.shape[0]
    gate = torch.einsum("hnd,hcd->hnc", queries, keys.repeat_interleave(group, dim=0))
    own = torch.arange(shard.blocks, device=gate.device) * shard.block_size // chunk_tokens
    chunks = torch.arange(gate.shape[2], device=gate.device)
    gate = gate.masked_fill(chunks[None, :] > own[:, None], -torch.inf)
    gate = gate.masked_fill(chunks[None, :] == own[:, None], torch.inf)
    counts = (own + 1).clamp(max=top_chunks).expand(gate.shape[:2])
    taken = take_highest(gate, counts, highest(gate, top_chunks))
    block = torch.arange(shard.blocks, device=gate.device)
    active = taken[:, :, own] & (block[None, :] <= block[:, None])
    return AttentionMask(
        seq_len_tokens=shard.seq_len_tokens, block_size=shard.block_size, active=active, own_blocks=True
    )


def _check_shard(shard: ShardTensors, selector: str) -> None:
    if shard.documents is not None:
        raise ValueError(f"documents: {selector} is not chosen per document yet")


def _query_blocks(shard: ShardTensors) -> Tensor:
    """int64 [T]: the global block of each local tile of block_size tokens (the last tile may be short)."""
    return shard.positions.long()[:: shard.block_size] // shard.block_size


def _kernels_apply(shard: ShardTensors, stride: int) -> bool:
    """Whether the Triton kernels score and choose; the same on every rank, as all shards have one shape."""
    if not shard.q.is_cuda:
        return False
    from .xattention_triton import applies

    return applies(shard, stride)


def _antidiagonal_scores(
    shard: ShardTensors, blocks: Tensor, keys: Tensor, *, scale: float, stride: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some local query blocks after the other: their strided mass on every key block [H, t, N], and which [t]."""
    heads, dim = shard.q.shape[2:]
    cells = shard.block_size // stride
    keys = keys.view(keys.shape[0], -1, stride * dim)
    queries = _tiles(shard).unflatten(2, (cells, stride)).flip(3).flatten(3)
    at_once = max(1, LOGITS_AT_ONCE // (heads * cells * keys.shape[1]))
    for part, part_blocks in zip(queries.split(at_once, dim=1), blocks.split(at_once), strict=True):
        yield _strided_mass(shard, part, part_blocks, keys, scale=scale / stride, stride=stride), part_blocks


def _strided_mass(
    shard: ShardTensors, queries: Tensor, blocks: Tensor, keys: Tensor, *, scale: float, stride: int
) -> Tensor:
    """[H, t, N] of queries [H, t, cells, stride * D] at these blocks [t] and keys [H_kv, N * cells, stride * D]."""
    heads, tiles, cells, width = queries.shape
    logits = float_matmul(queries.reshape(keys.shape[0], -1, width), keys.transpose(1, 2)).mul_(scale)
    logits = logits.view(heads, tiles, cells, -1)
    q_cells = blocks[:, None] * cells + torch.arange(cells, device=blocks.device)
    k_cells = torch.arange(keys.shape[1], device=blocks.device)
    valid_cells = -(-shard.seq_len_tokens // stride)
    p = torch.softmax(logits.masked_fill_(k_cells > q_cells[..., None], -torch.inf), dim=-1)
    p = p.masked_fill_((q_cells >= valid_cells)[..., None], 0.0)
    return p.sum(2).unflatten(-1, (-1, cells)).sum(-1)


def _all_keys(shard: ShardTensors, collectives: Collectives) -> Tensor:
    """[H_kv, N * block_size, D]: the keys of the whole sequence, zero past its end, in their own dtype."""
    length = shard.blocks * shard.block_size
    rows = shard.k.new_zeros(shard.k.shape[2], length + 1, shard.k.shape[3])
    positions = shard.positions.long()
    target = torch.where(positions < shard.seq_len_tokens, positions, length)
    rows[:, target] = shard.k[0].transpose(0, 1)
    return collectives.all_reduce_sum(rows[:, :-1].contiguous())


def _tiles(shard: ShardTensors) -> Tensor:
    """[H, T, block_size, D]: local queries by tile, padding zeroed."""
    valid = (shard.positions < shard.seq_len_tokens)[:, None, None]
    rows = torch.where(valid, shard.q[0], shard.q.new_zeros(())).transpose(0, 1)
    return pad(rows, (0, 0, 0, -rows.shape[1] % shard.block_size)).unflatten(1, (-1, shard.block_size))


def _fewest_blocks(scores: Tensor, blocks: Tensor, *, mass: float, first_block: bool) -> Tensor:
    """bool [H, T, N]: own and first block, then the fewest others that bring the row to mass * its total."""
    key_blocks = torch.arange(scores.shape[2], device=scores.device)
    forced = key_blocks == blocks[:, None]
    if first_block:
        forced |= key_blocks == 0
    candidates = scores.masked_fill(forced | (key_blocks > blocks[:, None]), -1.0)
    best = highest(candidates, scores.shape[2])
    reached = (scores.double() * forced).sum(-1, keepdim=True)
    before = reached + best.double().clamp(min=0).cumsum(-1) - best.double().clamp(min=0)
    wanted = mass * scores.double().sum(-1, keepdim=True)
    counts = ((before < wanted) & (best > 0)).sum(-1)
    return take_highest(candidates, counts, best) | forced


def _means(shard: ShardTensors, x: Tensor, tokens: int, collectives: Collectives) -> Tensor:
    """[H, ceil(seq_len / tokens), D]: means of x [1, S, H, D] over the valid tokens of each stretch of the sequence."""
    stretches = -(-shard.seq_len_tokens // tokens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Local tokens come in runs of consecutive ones: add those of one stretch first, then the few sums that meet.
    run = math.gcd(shard.granularity_tokens, tokens)
    positions = shard.positions.long()
    valid = torch.where((positions < shard.seq_len_tokens)[:, None, None], x[0], x.new_zeros(()))
    sums = valid.unflatten(0, (-1, run)).sum(1, dtype=dtype).transpose(0, 1)
    target = (positions[::run] // tokens).clamp(max=stretches)
    total = torch.zeros(x.shape[2], stretches + 1, x.shape[3], device=x.device, dtype=dtype)
    total.index_add_(1, target, sums)
    total = collectives.all_reduce_sum(total[:, :-1].contiguous())
    starts = torch.arange(stretches, device=x.device) * tokens
    return total / (shard.seq_len_tokens - starts).clamp(max=tokens)[:, None]
