"""A selector in one file: each query block attends the nearest blocks, and the earlier ones with the longest keys.

It only registers itself. Capture, the command line, plans and training find it by its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.select.probe import Collectives, ShardTensors
from sparsering.kernels.select.registry import Selector, count, register
from sparsering.kernels.select.top import highest, take_highest


@register
@dataclass(frozen=True, kw_only=True)
class LongKeys(Selector):
    """near_blocks: a query block's own and those before it; long_blocks: past ones with long keys on average."""

    name, causal = "long-keys", True
    help = "nearest blocks, and those with the longest keys"
    near_blocks: int = count(2, "nearest blocks kept")
    long_blocks: int = count(2, "blocks with long keys kept")

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        block = torch.arange(shard.blocks, device=shard.k.device)
        distance = block[:, None] - block[None, :]
        scores = _key_lengths(shard, collectives)[:, None, :].masked_fill(distance < 0, -torch.inf)
        counts = (block + 1).clamp(max=self.long_blocks).expand(scores.shape[:2])
        longest = take_highest(scores, counts, highest(scores, self.long_blocks))
        return shard.chosen(longest | ((distance >= 0) & (distance < self.near_blocks)))


def _key_lengths(shard: ShardTensors, collectives: Collectives) -> Tensor:
    """[H, N]: the mean length of the keys of every block, over all ranks; padding counts nowhere."""
    lengths = shard.k[0].norm(dim=-1)
    blocks = shard.positions.long() // shard.block_size
    target = torch.where(shard.positions < shard.seq_len_tokens, blocks, shard.blocks)
    sums = lengths.new_zeros(shard.blocks + 1, lengths.shape[1]).index_add(0, target, lengths)
    total = collectives.all_reduce_sum(sums[:-1].T.contiguous())
    starts = torch.arange(shard.blocks, device=total.device) * shard.block_size
    means = total / (shard.seq_len_tokens - starts).clamp(max=shard.block_size)
    return means.repeat_interleave(shard.heads // means.shape[0], dim=0)
