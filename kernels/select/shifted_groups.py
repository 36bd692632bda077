"""Shifted groups: LongLoRA's S2-Attn (arXiv 2309.12307) as patterns of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..mask import AttentionMask
from .probe import Collectives, ShardTensors
from .registry import Selector, count, register


@register
@dataclass(frozen=True, kw_only=True)
class ShiftedGroups(Selector):
    """Queries attend their group of group_tokens; groups of the second half of the heads begin half a group earlier.

    The paper's code rolls the sequence, so that a shifted group holds its last and its first tokens, of which the first
    attend what comes after them; here both are half groups. Choosing raises ValueError where half a group is no
    multiple of the block.
    """

    name, causal, listed, recordable = "shifted-groups", True, True, True
    help = "groups of tokens, shifted by half for half of the heads"
    group_tokens: int = count(2048, "tokens of a group", option="--group")

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        if self.group_tokens % (2 * shard.block_size):
            raise ValueError(
                f"group_tokens: half of {self.group_tokens} is no multiple of the block of {shard.block_size} tokens"
            )
        group = self.group_tokens // shard.block_size
        block, head = (torch.arange(n, device=shard.q.device) for n in (shard.blocks, shard.heads))
        shift = (head >= shard.heads // 2) * (group // 2)
        groups = (block[None, :] + shift[:, None]) // group
        causal = block[None, :] <= block[:, None]
        return shard.chosen((groups[:, :, None] == groups[:, None, :]) & causal)
