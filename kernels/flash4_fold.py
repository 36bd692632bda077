"""Query heads of one K/V head laid end to end, as one head with a longer sequence, for flash-attn-4's backward.

There one program takes a key tile and one query head, and query heads that share a K/V head meet in atomic additions of
dK and dV in float32, whose sums are zeroed before and converted after. With sparse masks a program has few query tiles,
so that its beginning and those additions weigh: up to a fifth of the launch. Masks here name tiles, not positions, so
nothing keeps a program from walking the tiles of several query heads one after the other: dK and dV then stay in its
registers, are written once, and repeat bit for bit where all heads of a K/V head are together.

Two things speak against it. q and grad_out are copied, which pays where several launches, or one with many keys, share
the copies: in rings, not where a GPU holds everything. And the L2 cache: programs that run together walk the same
head's tiles at first, and drift apart; then q, grad_out and dQ of all their heads pass through it. With 512 query tiles
(64K tokens) eight heads together were quicker on an H100, with 1,024 slower: see docs/kernels.md.

Shape legend: B batch, S tokens, H query heads, f heads end to end, T tokens of whole tiles, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from .passes import add_rows

PROGRAMS_PER_MULTIPROCESSOR = 4  # fewer and the longest of them is waited for
TILES_TOGETHER = 4096  # query tiles of all query heads of a K/V head, beyond which the L2 cache misses too much


@dataclass(frozen=True, kw_only=True)
class Fold:
    """heads: query heads end to end, each with `tokens` tokens, which are whole tiles."""

    heads: int
    tokens: int

    def rows(self, x: Tensor) -> Tensor:
        """Copy [B, S, H, D] to [B, f T, H / f, D], zeros from S to T of every head."""
        batch, _, heads, dim = x.shape
        laid = torch.empty(batch, heads, self.tokens, dim, dtype=x.dtype, device=x.device)
        target = laid.transpose(1, 2)
        add_rows(x, target, target, add=False)
        return laid.view(batch, heads // self.heads, self.heads * self.tokens, dim).transpose(1, 2)

    def values(self, x: Tensor) -> Tensor:
        """[B, H, S] as [B, H / f, f T], zeros from S to T of every head."""
        padded = functional.pad(x, (0, self.tokens - x.shape[2])) if x.shape[2] < self.tokens else x
        return padded.reshape(x.shape[0], x.shape[1] // self.heads, self.heads * self.tokens)

    def unfolded(self, x: Tensor, tokens: int) -> Tensor:
        """View what `rows` made, or a tensor like it, as [B, tokens, H, D]."""
        batch, _, folds, dim = x.shape
        return x.transpose(1, 2).view(batch, folds * self.heads, self.tokens, dim)[:, :, :tokens].transpose(1, 2)


def heads_together(*, group: int, lists: int, tiles: int, wanted: int) -> int:
    """How many of the `group` query heads of a K/V head to lay end to end: as many as leave the programs wanted.

    None where all of them have more than TILES_TOGETHER tiles. lists: programs that there are with one head each, over
    all query heads; tiles: of one head's queries.
    """
    if group * tiles > TILES_TOGETHER:
        return 1
    return max((n for n in range(1, group + 1) if group % n == 0 and lists // n >= wanted), default=1)
