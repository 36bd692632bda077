"""Attention by its definition alone: every pair told apart by a loop-free bool matrix, softmax by torch, gradients by
autograd. Nothing of the package is used, so that agreeing with it means something.

Shape legend: S tokens, H query heads, H_kv K/V heads, D head dim, N mask blocks, C columns of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Who attends whom. active: bool [H, N] by distance in blocks, or [H, N, N]; windows [H] in tokens, 0 for none.

    columns: token positions of each head; documents: int [seq_len], or None.
    """

    seq_len_tokens: int
    block_size: int
    active: Tensor
    windows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]
    documents: Tensor | None = None

    def pairs(self, tokens: int) -> Tensor:
        """Return bool [H, tokens, tokens]; tokens from seq_len_tokens on are padding."""
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
        allowed = (j <= i) & (i < self.seq_len_tokens) & (j < self.seq_len_tokens)
        if self.documents is not None:
            padded = torch.cat([self.documents, self.documents[-1:].expand(tokens - self.seq_len_tokens)])
            allowed = allowed & (padded[:, None] == padded[None, :])
        blocks = self.active.shape[-1]
        query, key = (i // self.block_size).clamp(max=blocks - 1), (j // self.block_size).clamp(max=blocks - 1)
        heads = []
        for head, active in enumerate(self.active):
            in_block = active[(query - key).clamp(min=0)] if active.dim() == 1 else active[query, key]
            is_column = torch.isin(j, torch.tensor(self.columns[head] or (-1,)))
            heads.append(allowed & (in_block | is_column | (i - j < self.windows[head])))
        return torch.stack(heads)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, grad_out [1, S, H, D], k, v [1, S, H_kv, D], float64; how scores become weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(attended: Attended, given: Inputs) -> dict[str, Tensor]:
    """Return out [1, S, H, D], lse [1, H, S] with the sinks in it, dq, dk, dv, and dsinks [H] where there are sinks."""
    leaves = {"dq": given.q, "dk": given.k, "dv": given.v}
    if given.sinks is not None:
        leaves["dsinks"] = given.sinks
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    q, tokens, heads = leaves["dq"], given.q.shape[1], given.q.shape[2]
    k, v = (leaves[name].repeat_interleave(heads // given.k.shape[2], dim=2) for name in ("dk", "dv"))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * given.scale
    if given.softcap is not None:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    pairs = attended.pairs(tokens)
    alive = pairs.any(-1)
    # A row that attends nothing would be NaN: it attends itself here, and is taken out below.
    scores = scores.masked_fill(~(pairs | (torch.eye(tokens, dtype=torch.bool) & ~alive[..., None])), -torch.inf)
    if given.sinks is not None:
        sink = leaves["dsinks"][None, :, None, None].expand(1, heads, tokens, 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~alive, -torch.inf)
    weights = torch.softmax(scores, dim=-1)[..., :tokens] * alive[..., None]
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    found = torch.autograd.grad((out * given.grad_out).sum(), list(leaves.values()))
    results = {"out": out, "lse": lse} | dict(zip(leaves, found, strict=True))
    return {name: value.detach() for name, value in results.items()}
