"""A block-level variant of MoBA's gate (arXiv 2502.13189, which gates every token by itself)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask import AttentionMask
from .probe import Collectives, ShardTensors
from .registry import Selector, count, register
from .top import highest, take_highest


@register
@dataclass(frozen=True, kw_only=True)
class MobaBlock(Selector):
    """Per query block, the top_chunks key chunks by (mean query of the block) . (mean key of the chunk).

    The own chunk is always taken and counts; later chunks never. Ties go to the lower chunk. Choosing raises ValueError
    when the chunk is no multiple of the block.
    """

    name, causal, listed = "moba-block", True, True
    help = "key chunks by their mean key"
    chunk_tokens: int = count(512, "tokens of a key chunk", option="--chunk")
    top_chunks: int = count(8, "chunks per query block")

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        if self.chunk_tokens % shard.block_size:
            raise ValueError(
                f"chunk_tokens: {self.chunk_tokens} is no multiple of the block of {shard.block_size} tokens"
            )
        queries = _means(shard, shard.q, shard.block_size, collectives)
        keys = _means(shard, shard.k, self.chunk_tokens, collectives)
        group = queries.shape[0] // keys.shape[0]
        gate = torch.einsum("hnd,hcd->hnc", queries, keys.repeat_interleave(group, dim=0))
        block = torch.arange(shard.blocks, device=gate.device)
        own = block * shard.block_size // self.chunk_tokens
        chunks = torch.arange(gate.shape[2], device=gate.device)
        gate = gate.masked_fill(chunks[None, :] > own[:, None], -torch.inf)
        gate = gate.masked_fill(chunks[None, :] == own[:, None], torch.inf)
        counts = (own + 1).clamp(max=self.top_chunks).expand(gate.shape[:2])
        taken = take_highest(gate, counts, highest(gate, self.top_chunks))
        return shard.chosen(taken[:, :, own] & (block[None, :] <= block[:, None]))


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
