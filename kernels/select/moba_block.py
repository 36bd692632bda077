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

    The own chunk is always taken and counts; later chunks never. Ties go to the lower chunk. Packed documents are
    chosen for one by one: a block looks for the document that it begins in, of which a chunk before it can only hold
    what lies at its end; means are of these tokens alone, and chunks without any are not candidates. Choosing raises
    ValueError when the chunk is no multiple of the block.
    """

    name, causal, keeps_documents, listed, recordable = "moba-block", True, True, True, True
    help = "key chunks by their mean key"
    chunk_tokens: int = count(512, "tokens of a key chunk", option="--chunk")
    top_chunks: int = count(8, "chunks per query block")

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        if self.chunk_tokens % shard.block_size:
            raise ValueError(
                f"chunk_tokens: {self.chunk_tokens} is no multiple of the block of {shard.block_size} tokens"
            )
        of_blocks = _document_at(shard, shard.block_size, last=False)
        of_chunks = _document_at(shard, self.chunk_tokens, last=True)
        queries = _means(shard, shard.q, shard.block_size, of_blocks, collectives)
        keys = _means(shard, shard.k, self.chunk_tokens, of_chunks, collectives)
        group = queries.shape[0] // keys.shape[0]
        gate = torch.einsum("hnd,hcd->hnc", queries, keys.repeat_interleave(group, dim=0))
        block = torch.arange(shard.blocks, device=gate.device)
        own = block * shard.block_size // self.chunk_tokens
        chunks = torch.arange(gate.shape[2], device=gate.device)
        is_own, candidates = chunks[None, :] == own[:, None], chunks[None, :] <= own[:, None]
        if of_blocks is not None and of_chunks is not None:
            candidates = candidates & ((of_blocks[:, None] == of_chunks[None, :]) | is_own)
        gate = gate.masked_fill(~candidates, -torch.inf).masked_fill(is_own, torch.inf)
        counts = candidates.sum(1).clamp(max=self.top_chunks).expand(gate.shape[:2])
        taken = take_highest(gate, counts, highest(gate, self.top_chunks))
        return shard.chosen(taken[:, :, own] & (block[None, :] <= block[:, None]))


def _document_at(shard: ShardTensors, tokens: int, *, last: bool) -> Tensor | None:
    """int [ceil(seq_len / tokens)]: the document of each stretch's first valid token, or its last; None without."""
    if shard.documents is None:
        return None
    at = torch.arange(-(-shard.seq_len_tokens // tokens), device=shard.documents.device) * tokens
    return shard.documents[(at + tokens - 1).clamp(max=shard.seq_len_tokens - 1) if last else at]


def _means(shard: ShardTensors, x: Tensor, tokens: int, documents: Tensor | None, collectives: Collectives) -> Tensor:
    """[H, ceil(seq_len / tokens), D]: means of x [1, S, H, D] over the valid tokens of each stretch of the sequence.

    documents [stretches]: over those of this document alone; None: over all.
    """
    stretches = -(-shard.seq_len_tokens // tokens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Local tokens come in runs of consecutive ones: add those of one stretch first, then the few sums that meet.
    run = math.gcd(shard.granularity_tokens, tokens)
    positions = shard.positions.long()
    counted = positions < shard.seq_len_tokens
    if documents is not None and shard.documents is not None:
        inside = positions.clamp(max=shard.seq_len_tokens - 1)
        counted = counted & (shard.documents[inside] == documents[inside // tokens])
    valid = torch.where(counted[:, None, None], x[0], x.new_zeros(()))
    sums = valid.unflatten(0, (-1, run)).sum(1, dtype=dtype).transpose(0, 1)
    target = (positions[::run] // tokens).clamp(max=stretches)
    total = torch.zeros(x.shape[2], stretches + 1, x.shape[3], device=x.device, dtype=dtype)
    total.index_add_(1, target, sums)
    total = collectives.all_reduce_sum(total[:, :-1].contiguous())
    starts = torch.arange(stretches, device=x.device) * tokens
    lengths = (shard.seq_len_tokens - starts).clamp(max=tokens)
    if documents is not None and shard.documents is not None:
        stretch = torch.arange(shard.seq_len_tokens, device=x.device) // tokens
        same = shard.documents[: shard.seq_len_tokens] == documents[stretch]
        lengths = torch.zeros_like(lengths).index_add_(0, stretch, same.to(lengths.dtype))
    return total / lengths[:, None]
