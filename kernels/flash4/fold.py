"""Query heads of one K/V head laid end to end, as one head with a longer sequence, for flash-attn-4's backward.

There one program takes a key tile and one query head, and query heads that share a K/V head meet in atomic additions of
dK and dV in float32, whose sums are zeroed before and converted after. With sparse masks a program has few query tiles,
so that its beginning and those additions weigh: up to a fifth of the launch. Masks here name tiles, not positions, so
nothing keeps a program from walking the tiles of several query heads one after the other: dK and dV then stay in its
registers, are written once, and repeat bit for bit where all heads of a K/V head are together.

Two things speak against it. q and grad_out are copied, which pays where several launches, or one with many keys, share
the copies: in rings, not where a GPU holds everything. And the L2 cache: programs that run together walk the same
head's tiles at first, and drift apart; then q, grad_out and dQ of all their heads pass through it. With 512 query tiles
(64K tokens) eight heads together were quicker on an H100, with 1,024 slower: see docs/what-does-not-pay.md.

Shape legend: B batch, S tokens, H query heads, f heads end to end, T tokens of whole tiles, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..triton.passes import add_rows

PROGRAMS_PER_MULTIPROCESSOR = 4  # fewer and the longest of them is waited for
TILES_TOGETHER = 4096  # query tiles of all query heads of a K/V head, beyond which the L2 cache misses too much


# q, grad_out [B, H, T, D] and lse, grad_lse [B, H, T] of all queries, copied head by head, zeros from S to T.
LaidQueries = tuple[Tensor, Tensor, Tensor, Tensor]


def lay_queries(q: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor, *, tokens: int) -> LaidQueries:
    """Copy q, grad_out [B, S, H, D] and lse, grad_lse [B, H, S] to whole tiles, S <= T = tokens: launches view them."""
    missing = tokens - q.shape[1]
    padded_lse, padded_grad_lse = (functional.pad(x, (0, missing)).contiguous() for x in (lse, grad_lse))
    return _laid(q, tokens), _laid(grad_out, tokens), padded_lse, padded_grad_lse


def _laid(x: Tensor, tokens: int) -> Tensor:
    batch, _, heads, dim = x.shape
    laid = torch.empty(batch, heads, tokens, dim, dtype=x.dtype, device=x.device)
    target = laid.transpose(1, 2)
    add_rows(x, target, target, add=False)
    return laid


def end_to_end(laid: LaidQueries, heads: slice, together: int) -> LaidQueries:
    """View q, grad_out [B, f T, H', D], lse, grad_lse [B, H', f T] of some heads, f = together."""
    q, grad_out, lse, grad_lse = (x[:, heads].unflatten(1, (-1, together)).flatten(2, 3) for x in laid)
    return q.transpose(1, 2), grad_out.transpose(1, 2), lse, grad_lse


def heads_apart(x: Tensor, *, together: int, tokens: int) -> Tensor:
    """View [B, f T, H / f, D], laid as `end_to_end` lays q, as [B, tokens, H, D]; f = together."""
    batch, rows, lists, dim = x.shape
    return x.transpose(1, 2).view(batch, lists * together, rows // together, dim)[:, :, :tokens].transpose(1, 2)


def heads_together(*, group: int, lists: int, tiles: int, wanted: int) -> int:
    """How many of the `group` query heads of a K/V head to lay end to end: as many as leave the programs wanted.

    None where all of them have more than TILES_TOGETHER tiles. lists: programs that there are with one head each, over
    all query heads; tiles: of one head's queries.
    """
    if group * tiles > TILES_TOGETHER:
        return 1
    return max((n for n in range(1, group + 1) if group % n == 0 and lists // n >= wanted), default=1)
