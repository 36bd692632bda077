"""XAttention (arXiv 2503.16428): key blocks by their antidiagonal scores; xattention_triton.py has the GPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..probe import ShardTensors, float_matmul
from ..registry import count, register, share
from .selector import LOGITS_AT_ONCE, RowBlockSelector, fewest_blocks, first_blocks


@register
@dataclass(frozen=True, kw_only=True)
class XAttention(RowBlockSelector):
    """Per query block, the fewest key blocks whose antidiagonal mass reaches `mass`.

    The antidiagonal of a stride x stride cell is summed (query stride-1-s with key s), divided by the stride, softmaxed
    over the row's cells, and summed to blocks. The own block and, as in the authors' code, the first one are always
    taken and count first; ties go to the lower block. Every rank gathers all keys (one sum in their own dtype).
    Packed documents are chosen for one by one: cells of two documents, and cells that hold tokens of several, have no
    score, and the first block is that of the document that the query block begins in. A document that begins and ends
    with a block gets what it would get alone.
    Choosing raises ValueError when the stride does not divide the block, and when local tokens are not whole blocks.
    """

    name, help = "xattention", "key blocks by their antidiagonals"
    stride: int = count(16, "stride of the antidiagonals")
    mass: float = share(0.9, "share of attention to keep", option="--p")

    def _check(self, shard: ShardTensors) -> None:
        if shard.block_size % self.stride:
            raise ValueError(f"stride: {self.stride} does not divide the block of {shard.block_size} tokens")
        super()._check(shard)

    def _rows(self, shard: ShardTensors, blocks: Tensor, keys: Tensor, *, scale: float) -> Iterator[Tensor]:
        """Some local query tiles after the other, which are these blocks [T]: their active key blocks [H, t, N]."""
        if shard.q.is_cuda:
            from .xattention_triton import active_rows, applies

            # The same on every rank, as all shards have one shape.
            if shard.documents is None and applies(shard, self.stride):
                yield from active_rows(shard, blocks, keys, scale=scale, stride=self.stride, mass=self.mass)
                return
        (heads, dim), cells = shard.q.shape[2:], shard.block_size // self.stride
        keys = keys.view(keys.shape[0], -1, self.stride * dim)
        valid = (shard.positions < shard.seq_len_tokens)[:, None, None]
        rows = torch.where(valid, shard.q[0], shard.q.new_zeros(())).transpose(0, 1)  # padding zeroed
        rows = pad(rows, (0, 0, 0, -rows.shape[1] % shard.block_size))
        queries = rows.unflatten(1, (-1, cells, self.stride)).flip(3).flatten(3)
        at_once = max(1, LOGITS_AT_ONCE // (heads * cells * keys.shape[1]))
        first, cell_documents = first_blocks(shard), _cell_documents(shard, self.stride, keys.shape[1])
        for part, part_blocks in zip(queries.split(at_once, dim=1), blocks.split(at_once), strict=True):
            given = {"scale": scale / self.stride, "stride": self.stride, "documents": cell_documents}
            scores = _strided_mass(shard, part, part_blocks, keys, **given)
            yield fewest_blocks(scores, part_blocks, first[part_blocks.clamp(max=shard.blocks - 1)], mass=self.mass)


def _strided_mass(
    shard: ShardTensors, queries: Tensor, blocks: Tensor, keys: Tensor, *, scale: float, stride: int,
    documents: Tensor | None,
) -> Tensor:  # fmt: skip
    """[H, t, N]: strided mass of queries [H, t, cells, stride * D] at these blocks [t] on every key block.

    keys [H_kv, N * cells, stride * D]; documents: see `_cell_documents`.
    """
    heads, tiles, cells, width = queries.shape
    logits = float_matmul(queries.reshape(keys.shape[0], -1, width), keys.transpose(1, 2)).mul_(scale)
    logits = logits.view(heads, tiles, cells, -1)
    q_cells = blocks[:, None] * cells + torch.arange(cells, device=blocks.device)
    k_cells = torch.arange(keys.shape[1], device=blocks.device)
    valid_cells = -(-shard.seq_len_tokens // stride)
    hidden, without = k_cells > q_cells[..., None], q_cells >= valid_cells
    if documents is not None:
        own = documents[q_cells.clamp(max=documents.shape[0] - 1)]
        hidden = hidden | (own[..., None] != documents)
        without = without | (own < 0)
    p = torch.softmax(logits.masked_fill_(hidden, -torch.inf), dim=-1)
    p = p.masked_fill_(without[..., None], 0.0)
    return p.sum(2).unflatten(-1, (-1, cells)).sum(-1)


def _cell_documents(shard: ShardTensors, stride: int, cells: int) -> Tensor | None:
    """int64 [cells]: the document of each cell's tokens, negative and of no other cell where they are of several.

    None without documents. Padding is of the last document.
    """
    if shard.documents is None:
        return None
    documents = shard.documents[: shard.seq_len_tokens].long()
    padded = torch.cat([documents, documents[-1:].expand(cells * stride - documents.shape[0])]).view(cells, stride)
    several = -1 - torch.arange(cells, device=padded.device)
    return torch.where(padded[:, 0] == padded[:, -1], padded[:, 0], several)
