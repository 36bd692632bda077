"""The queries of a row of blocks that are asked what they attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..probe import ShardTensors


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedRows:
    """The queries that are asked. Shapes: T local tiles, P probes of a tile.

    blocks int64 [T]: the tiles' global blocks, those of padding past the sequence; positions int64 [T, P]: global
    positions; local int64 [T, P]: where they are in the shard. A block's probes end where the document that it begins
    with, or the sequence, ends: the last one stands in for those behind it.
    """

    blocks: Tensor
    positions: Tensor
    local: Tensor

    @classmethod
    def of(cls, shard: ShardTensors, blocks: Tensor, probe_stride: int) -> ProbedRows:
        """Return the last one of every probe_stride queries of the shard's tiles."""
        size = shard.block_size
        inside = torch.arange(probe_stride - 1, size, probe_stride, device=blocks.device)
        starts, last = blocks[:, None] * size, _last_positions(shard)[blocks.clamp(max=shard.blocks - 1)]
        inside = torch.minimum(inside, last[:, None] - blocks.clamp(max=shard.blocks - 1)[:, None] * size)
        tiles = torch.arange(blocks.shape[0], device=blocks.device)[:, None] * size
        return cls(blocks=blocks, positions=starts + inside, local=tiles + inside)

    def some(self, tiles: slice) -> ProbedRows:
        """Return those of some of the tiles."""
        return ProbedRows(blocks=self.blocks[tiles], positions=self.positions[tiles], local=self.local[tiles])


def _last_positions(shard: ShardTensors) -> Tensor:
    """int64 [N]: of each block, the last token of the document that it begins with."""
    starts = torch.arange(shard.blocks, device=shard.q.device) * shard.block_size
    if shard.documents is None:
        return (starts + shard.block_size).clamp(max=shard.seq_len_tokens) - 1
    at = starts[:, None] + torch.arange(shard.block_size, device=starts.device)
    its = shard.documents[at.clamp(max=shard.seq_len_tokens - 1)]
    same = (its == its[:, :1]) & (at < shard.seq_len_tokens)
    return starts + same.int().cumprod(1).sum(1) - 1
