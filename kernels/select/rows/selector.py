"""Selectors that choose for every row of blocks by itself: what they share.

A row is a mask block of queries. Each rank scores the rows that it holds, against the keys of the whole sequence; a sum
assembles the rows. Shape legend: T local query tiles (a block of tokens each), N mask blocks of the sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mask import AttentionMask
from ..probe import Collectives, ShardTensors
from ..registry import Selector
from ..top import highest, take_highest

# Scores computed at once in plain torch (float32): bounds the memory of long sequences.
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True)
class RowBlockSelector(Selector):
    """Key blocks for each row of query blocks, from its own queries. Every rank gathers all keys, in their own dtype.

    Choosing raises ValueError when local tokens are not whole blocks.
    """

    causal, keeps_documents, listed, recordable = True, True, True, True

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        self._check(shard)
        blocks = shard.positions.long()[:: shard.block_size] // shard.block_size
        parts = self._rows(shard, blocks, all_keys(shard, collectives), scale=scale)
        active = torch.cat(list(parts), dim=1)
        # Padding blocks land in one more row, which is dropped. Each row has one owner, so the sum assembles them.
        rows = torch.zeros(shard.heads, shard.blocks + 1, shard.blocks, dtype=torch.uint8, device=active.device)
        rows[:, blocks.clamp(max=shard.blocks)] = active.to(torch.uint8)
        return shard.chosen(collectives.all_reduce_sum(rows[:, :-1].contiguous()).bool())

    def _check(self, shard: ShardTensors) -> None:
        whole_sequence = shard.positions.shape[0] >= shard.seq_len_tokens
        if shard.granularity_tokens % shard.block_size and not whole_sequence:
            raise ValueError(
                f"granularity_tokens: {shard.granularity_tokens} is no multiple of the block of "
                f"{shard.block_size} tokens, which {self.name} scores whole"
            )

    @abstractmethod
    def _rows(self, shard: ShardTensors, blocks: Tensor, keys: Tensor, *, scale: float) -> Iterator[Tensor]:
        """Some local query tiles after the other, which are these blocks [T]: their active key blocks [H, t, N].

        keys [H_kv, N * block_size, D]: of the whole sequence, zero past its end.
        """


def all_keys(shard: ShardTensors, collectives: Collectives) -> Tensor:
    """[H_kv, N * block_size, D]: the keys of the whole sequence, zero past its end, in their own dtype."""
    length = shard.blocks * shard.block_size
    rows = shard.k.new_zeros(shard.k.shape[2], length + 1, shard.k.shape[3])
    positions = shard.positions.long()
    target = torch.where(positions < shard.seq_len_tokens, positions, length)
    rows[:, target] = shard.k[0].transpose(0, 1)
    return collectives.all_reduce_sum(rows[:, :-1].contiguous())


def first_blocks(shard: ShardTensors) -> Tensor:
    """int64 [N]: the block in which the document begins that a block's first token is of; 0 without documents."""
    blocks = torch.arange(shard.blocks, device=shard.q.device)
    if shard.documents is None:
        return torch.zeros_like(blocks)
    documents = shard.documents[: shard.seq_len_tokens].contiguous()
    return torch.searchsorted(documents, documents[blocks * shard.block_size]) // shard.block_size


def fewest_blocks(scores: Tensor, blocks: Tensor, first: Tensor, *, mass: float) -> Tensor:
    """bool [H, T, N]: own and first block [T], then the fewest others that bring the row to mass * its total."""
    key_blocks = torch.arange(scores.shape[2], device=scores.device)
    forced = (key_blocks == blocks[:, None]) | (key_blocks == first[:, None])
    candidates = scores.masked_fill(forced | (key_blocks > blocks[:, None]), -1.0)
    best = highest(candidates, scores.shape[2])
    reached = (scores.double() * forced).sum(-1, keepdim=True)
    before = reached + best.double().clamp(min=0).cumsum(-1) - best.double().clamp(min=0)
    wanted = mass * scores.double().sum(-1, keepdim=True)
    counts = ((before < wanted) & (best > 0)).sum(-1)
    return take_highest(candidates, counts, best) | forced
