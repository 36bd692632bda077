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

from ..mask import AttentionMask
from .choose_blocks import choose_moba_block, choose_xattention
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
    """One layer's budgets on the device, made once by vertical_slash_budgets: first of columns, then of slashes.

    flex bool [H]; mass float64 [2, H] (1 for fixed heads, unused there); cap int64 [2, H], the count itself for fixed
    heads; capacities: the highest cap of each kind.
    """

    flex: Tensor
    mass: Tensor
    cap: Tensor
    capacities: tuple[int, int]


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
    caps = [
        [min(h.column_cap if isinstance(h, FlexBudget) else h.columns, seq_len_tokens) for h in heads],
        [min(h.slash_cap if isinstance(h, FlexBudget) else h.slashes, seq_len_tokens) for h in heads],
    ]
    mass = [[getattr(h, name, 1.0) for h in heads] for name in ("column_mass", "slash_mass")]
    return VerticalSlashBudgets(
        flex=torch.tensor([isinstance(h, FlexBudget) for h in heads], device=device),
        mass=torch.tensor(mass, dtype=torch.float64, device=device),
        cap=torch.tensor(caps, device=device),
        capacities=(max(caps[0]), max(caps[1])),
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
    scores = _scores(
        shard, budgets.flex, scale=scale, collectives=collectives, compat=compat, probe_queries=probe_queries
    )
    fixed = ~budgets.flex[:, None]
    scores[0, :, :sink_tokens].masked_fill_(fixed, torch.inf)
    scores[1, :, :window_tokens].masked_fill_(fixed, torch.inf)
    counts, best = _counts(scores, budgets, compat)
    columns, active = _taken(scores, counts, best, column_capacity=budgets.capacities[0], block_size=shard.block_size)
    mask = AttentionMask(
        seq_len_tokens=shard.seq_len_tokens,
        block_size=shard.block_size,
        active=active,
        columns=columns,
        own_blocks=True,
    )
    return Choice(mask=mask, column_counts=counts[0], slash_counts=counts[1])


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
        own_blocks=True,
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
) -> Tensor:
    """[2, H, seq_len]: column sums and slash sums over all ranks."""
    at = last_positions(shard, probe_queries)
    rows = query_rows(shard, at, collectives)
    if compat is None and _kernels_apply(shard, at.shape[0]):
        from .probe_triton import column_and_slash_sums

        first = max(shard.seq_len_tokens - probe_queries, 0)
        sums = column_and_slash_sums(shard, rows, first_row=first, scale=scale, collectives=collectives)
        return collectives.all_reduce_sum(sums)
    logits = row_logits(shard, rows, at, scale=scale)
    raw = logits.clone() if compat == "mtraining" else None
    p = probabilities(logits, collectives)
    sums = torch.stack([column_sums(shard, p), slash_sums(shard, p, at)])
    if raw is not None:
        unseen = raw.masked_fill(raw == -torch.inf, 0.0)
        raw_sums = torch.stack([column_sums(shard, unseen), slash_sums(shard, unseen, at)])
        sums = torch.where(flex[None, :, None], sums / at.shape[0], raw_sums)
    sums = collectives.all_reduce_sum(sums)
    if raw is not None:
        # A probe query that cannot see a key adds -inf to that key's sum of raw logits.
        hidden = torch.arange(shard.seq_len_tokens, device=at.device) > at[0]
        sums[0].masked_fill_(hidden[None, :] & ~flex[:, None], -torch.inf)
    return sums


def _kernels_apply(shard: ShardTensors, probe_queries: int) -> bool:
    """Whether the Triton kernels compute the sums; the same on every rank, as all shards have one shape."""
    if not shard.q.is_cuda:
        return False
    from .probe_triton import tile_keys

    return tile_keys(shard, probe_queries) > 0


def _counts(scores: Tensor, budgets: VerticalSlashBudgets, compat: str | None) -> tuple[Tensor, Tensor]:
    """(int64 [2, H] how many of each head's scores are kept, [2, H, c] the highest scores in descending order)."""
    best = highest(scores, max(*budgets.capacities, 1))
    if compat == "mtraining":
        by_mass = (best.cumsum(-1) < budgets.mass[..., None]).sum(-1)
    else:
        by_mass = counts_for_mass(best, scores.sum(-1), budgets.mass)
    return torch.where(budgets.flex, torch.minimum(by_mass, budgets.cap), budgets.cap), best


def _taken(
    scores: Tensor, counts: Tensor, best: Tensor, *, column_capacity: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """(columns int32 [H, column_capacity], active bool [H, N]) of the highest scores [2, H, seq_len]."""
    if scores.is_cuda:
        from .select_triton import take

        return take(scores, counts, best, column_capacity=column_capacity, block_size=block_size)
    kept = take_highest(scores, counts, best)
    return positions_of(kept[0], column_capacity), diagonals_of(kept[1], block_size)
