"""Choosing patterns: vertical-slash (fixed and flex budgets), sink + window; choose_blocks.py has the block selectors.

No gradient flows through a choice. Each rank passes its own shard and the collectives; all get the same mask. Nothing
waits for the device, and shapes depend on budgets alone. Vertical-slash follows MInference (arXiv 2407.02490): the
last 64 queries vote for token columns and for token distances (slashes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .choose_blocks import choose_moba_block, choose_xattention
from .mask import AttentionMask
from .probe import (
    ALONE,
    PROBE_QUERIES,
    Collectives,
    ShardTensors,
    column_sums,
    kept_mass,
    kept_mass_probe,
    kept_mass_sampled,
    last_positions,
    probabilities,
    query_rows,
    row_logits,
    slash_sums,
)
from .top import counts_for_mass, diagonals_of, highest, positions_of, take_highest

__all__ = [
    "ALONE",
    "Choice",
    "Collectives",
    "FixedBudget",
    "FlexBudget",
    "HeadBudget",
    "ShardTensors",
    "VerticalSlashBudgets",
    "choose_moba_block",
    "choose_vertical_slash",
    "choose_xattention",
    "kept_mass",
    "kept_mass_probe",
    "kept_mass_sampled",
    "sink_window",
    "vertical_slash_budgets",
]

SINK_TOKENS = 30
WINDOW_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class FixedBudget:
    """A head keeps so many token columns and token distances; the sinks and the nearest distances are among them."""

    columns: int
    slashes: int


@dataclass(frozen=True, kw_only=True)
class FlexBudget:
    """A head keeps the smallest sets with these shares of the probe's attention (0 to 1), at least 1, at most cap."""

    column_mass: float
    column_cap: int
    slash_mass: float
    slash_cap: int


HeadBudget = FixedBudget | FlexBudget


@dataclass(frozen=True, kw_only=True)
class VerticalSlashBudgets:
    """One layer's budgets as tensors [H] on the device, made once by vertical_slash_budgets.

    column_mass, slash_mass float64 (1 for fixed heads, unused there); column_cap, slash_cap int64, the count itself
    for fixed heads; flex bool. column_capacity, slash_capacity: the highest caps.
    """

    flex: Tensor
    column_mass: Tensor
    column_cap: Tensor
    slash_mass: Tensor
    slash_cap: Tensor
    column_capacity: int
    slash_capacity: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a selector chose: the mask, and how many token columns and token distances each head kept, int64 [H]."""

    mask: AttentionMask
    column_counts: Tensor
    slash_counts: Tensor


def vertical_slash_budgets(
    heads: Sequence[HeadBudget], *, seq_len_tokens: int, device: torch.device | str = "cpu"
) -> VerticalSlashBudgets:
    """Budgets of a layer's heads, which may differ in kind. Caps end at the sequence's length.

    Raises ValueError for a negative count, a cap below 1 or a mass outside ]0, 1].
    """
    for number, head in enumerate(heads):
        _check_budget(number, head)
    columns = [min(h.column_cap if isinstance(h, FlexBudget) else h.columns, seq_len_tokens) for h in heads]
    slashes = [min(h.slash_cap if isinstance(h, FlexBudget) else h.slashes, seq_len_tokens) for h in heads]
    mass = {
        name: torch.tensor([getattr(h, name, 1.0) for h in heads], dtype=torch.float64, device=device)
        for name in ("column_mass", "slash_mass")
    }
    return VerticalSlashBudgets(
        flex=torch.tensor([isinstance(h, FlexBudget) for h in heads], device=device),
        **mass,
        column_cap=torch.tensor(columns, device=device),
        slash_cap=torch.tensor(slashes, device=device),
        column_capacity=max(columns),
        slash_capacity=max(slashes),
    )


@torch.no_grad()
def choose_vertical_slash(
    shard: ShardTensors,
    budgets: VerticalSlashBudgets,
    *,
    scale: float,
    collectives: Collectives = ALONE,
    compat: str | None = None,
    probe_queries: int = PROBE_QUERIES,
    sink_tokens: int = SINK_TOKENS,
    window_tokens: int = WINDOW_TOKENS,
) -> Choice:
    """Columns and block diagonals by the attention of the last probe_queries valid queries over all keys.

    Fixed heads take the highest column and distance sums, sink_tokens and window_tokens first; flex heads the
    smallest sets with the budget's mass. compat="mtraining" counts as the research code does: fixed heads by raw
    logits (which leaves out keys that some probe query cannot see), flex heads (cumsum < p).sum(), which may be 0.
    Diagonal 0 is always active. Raises ValueError with packed documents: they share no last queries.
    """
    if shard.documents is not None:
        raise ValueError("documents: vertical-slash is not chosen per document yet")
    if compat not in (None, "mtraining"):
        raise ValueError(f"compat: {compat!r} is neither None nor 'mtraining'")
    if budgets.flex.shape[0] != shard.heads:
        raise ValueError(f"budgets: for {budgets.flex.shape[0]} heads, the shard has {shard.heads}")
    columns, slashes = _scores(
        shard, budgets.flex, scale=scale, collectives=collectives, compat=compat, probe_queries=probe_queries
    )
    fixed = ~budgets.flex[:, None]
    columns[:, :sink_tokens] = columns[:, :sink_tokens].masked_fill(fixed, torch.inf)
    slashes[:, :window_tokens] = slashes[:, :window_tokens].masked_fill(fixed, torch.inf)
    kept_columns, column_counts = _take(
        columns, budgets.flex, budgets.column_mass, budgets.column_cap, capacity=budgets.column_capacity, compat=compat
    )
    kept_slashes, slash_counts = _take(
        slashes, budgets.flex, budgets.slash_mass, budgets.slash_cap, capacity=budgets.slash_capacity, compat=compat
    )
    mask = AttentionMask(
        seq_len_tokens=shard.seq_len_tokens,
        block_size=shard.block_size,
        active=diagonals_of(kept_slashes, shard.block_size),
        columns=positions_of(kept_columns, budgets.column_capacity),
    )
    return Choice(mask=mask, column_counts=column_counts, slash_counts=slash_counts)


def sink_window(
    *,
    heads: int,
    seq_len_tokens: int,
    block_size: int,
    sink_tokens: int,
    window_tokens: int,
    documents: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Choice:
    """The first sink_tokens as columns and all distances below window_tokens, for every head: no data is looked at.

    Distances become whole block diagonals, so the window is at least window_tokens wide. A window as long as the
    sequence is dense attention.
    """
    if sink_tokens < 0 or window_tokens < 1:
        raise ValueError(f"sink_tokens, window_tokens: {sink_tokens}, {window_tokens} are not >= 0 and >= 1")
    tokens = torch.arange(seq_len_tokens, device=device).expand(heads, -1)
    mask = AttentionMask(
        seq_len_tokens=seq_len_tokens,
        block_size=block_size,
        active=diagonals_of(tokens < window_tokens, block_size),
        columns=positions_of(tokens < sink_tokens, min(sink_tokens, seq_len_tokens)),
        documents=documents,
    )
    counts = [torch.full((heads,), min(n, seq_len_tokens), device=device) for n in (sink_tokens, window_tokens)]
    return Choice(mask=mask, column_counts=counts[0], slash_counts=counts[1])


def _check_budget(number: int, head: HeadBudget) -> None:
    if isinstance(head, FixedBudget):
        if head.columns < 0 or head.slashes < 0:
            raise ValueError(f"budget of head {number}: {head} has a negative count")
        return
    if head.column_cap < 1 or head.slash_cap < 1:
        raise ValueError(f"budget of head {number}: {head} has a cap below 1")
    if not (0 < head.column_mass <= 1 and 0 < head.slash_mass <= 1):
        raise ValueError(f"budget of head {number}: {head} has a mass outside ]0, 1]")


def _scores(
    shard: ShardTensors, flex: Tensor, *, scale: float, collectives: Collectives, compat: str | None, probe_queries: int
) -> tuple[Tensor, Tensor]:
    """(column sums, slash sums), each [H, seq_len], over all ranks."""
    at = last_positions(shard, probe_queries)
    logits = row_logits(shard, query_rows(shard, at, collectives), at, scale=scale)
    raw = logits.clone() if compat == "mtraining" else None
    p = probabilities(logits, collectives)
    sums = torch.stack([column_sums(shard, p), slash_sums(shard, p, at)])
    if raw is not None:
        unseen = raw.masked_fill(raw == -torch.inf, 0.0)
        raw_sums = torch.stack([column_sums(shard, unseen), slash_sums(shard, unseen, at)])
        sums = torch.where(flex[None, :, None], sums / at.shape[0], raw_sums)
    columns, slashes = collectives.all_reduce_sum(sums)
    if raw is not None:
        # A probe query that cannot see a key adds -inf to that key's sum of raw logits.
        hidden = torch.arange(shard.seq_len_tokens, device=at.device) > at[0]
        columns = columns.masked_fill(hidden[None, :] & ~flex[:, None], -torch.inf)
    return columns.clone(), slashes.clone()


def _take(
    scores: Tensor, flex: Tensor, mass: Tensor, cap: Tensor, *, capacity: int, compat: str | None
) -> tuple[Tensor, Tensor]:
    """(bool [H, n] kept, int64 [H] counts) of one kind of scores."""
    if not capacity:
        return torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(cap)
    best = highest(scores, capacity)
    if compat == "mtraining":
        by_mass = (best.cumsum(-1) < mass[:, None]).sum(-1)
    else:
        by_mass = counts_for_mass(best, scores.sum(-1), mass)
    counts = torch.where(flex, torch.minimum(by_mass, cap), cap)
    return take_highest(scores, counts, best), counts
