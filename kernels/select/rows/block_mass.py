"""Key blocks that a row's own queries pay a share of their attention; block_mass_triton.py has the GPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..probe import ShardTensors, float_matmul
from ..registry import count, register, share
from .probed import ProbedRows
from .selector import LOGITS_AT_ONCE, RowBlockSelector, first_blocks


@register
@dataclass(frozen=True, kw_only=True)
class BlockMass(RowBlockSelector):
    """Per query block, every key block that gets `least_mass` of the attention of its queries, on average.

    Every probe_stride-th query of the block attends all keys before it exactly, softmaxed; what they pay the tokens of
    a key block is averaged over them. The own block and the first one are always taken. So a row has at most
    1 / least_mass blocks besides, however long the sequence is; heads that attend widely get few, those that attend to
    a few places get these.
    Of packed documents each row goes by the one that its block begins with: later ones see nothing outside of the
    block. So a document that begins with a block gets what it would get alone.
    Choosing raises ValueError when the stride does not divide the block, and when local tokens are not whole blocks.
    """

    name, help = "block-mass", "key blocks that get a least share of a row's attention"
    probe_stride: int = count(2, "of the queries of a block, every so many are asked")
    least_mass: float = share(0.005, "least share of a row's attention that a block is kept for")

    def _check(self, shard: ShardTensors) -> None:
        if shard.block_size % self.probe_stride:
            raise ValueError(
                f"probe_stride: {self.probe_stride} does not divide the block of {shard.block_size} tokens"
            )
        super()._check(shard)

    def _rows(self, shard: ShardTensors, blocks: Tensor, keys: Tensor, *, scale: float) -> Iterator[Tensor]:
        rows = ProbedRows.of(shard, blocks, self.probe_stride)
        if shard.q.is_cuda:
            from .block_mass_triton import active_rows, applies

            if applies(shard, self.probe_stride, scale=scale):  # the same on every rank: all shards have one shape
                yield from active_rows(shard, rows, keys, scale=scale, least_mass=self.least_mass)
                return
        first, key_blocks = first_blocks(shard), torch.arange(shard.blocks, device=keys.device)
        at_once = max(1, LOGITS_AT_ONCE // (shard.heads * rows.positions.shape[1] * keys.shape[1]))
        for start in range(0, blocks.shape[0], at_once):
            part = rows.some(slice(start, start + at_once))
            mean = _block_mass(shard, part, keys, scale=scale) / rows.positions.shape[1]
            own, first_of = part.blocks, first[part.blocks.clamp(max=shard.blocks - 1)]
            forced = (key_blocks == own[:, None]) | (key_blocks == first_of[:, None])
            yield (mean >= self.least_mass) | forced


def _block_mass(shard: ShardTensors, rows: ProbedRows, keys: Tensor, *, scale: float) -> Tensor:
    """[H, t, N]: the attention of the probes of t tiles to the tokens of every key block, summed over the probes.

    keys [H_kv, N * block_size, D].
    """
    (tiles, probes), kv_heads, dim = rows.positions.shape, keys.shape[0], keys.shape[2]
    queries = shard.q[0, rows.local.flatten()].transpose(0, 1)
    logits = float_matmul(queries.reshape(kv_heads, -1, dim), keys.transpose(1, 2)).mul_(scale)
    logits = logits.view(shard.heads, tiles * probes, -1)
    if shard.softcap is not None:
        logits = logits.div_(shard.softcap).tanh_().mul_(shard.softcap)
    at, key_at = rows.positions.flatten()[:, None], torch.arange(keys.shape[1], device=keys.device)[None, :]
    hidden = key_at > at
    if shard.documents is not None:
        limit = shard.seq_len_tokens - 1
        hidden = hidden | (shard.documents[at.clamp(max=limit)] != shard.documents[key_at.clamp(max=limit)])
    p = torch.softmax(logits.masked_fill_(hidden, -torch.inf), dim=-1)
    return p.view(shard.heads, tiles, probes, shard.blocks, -1).sum((2, 4))
