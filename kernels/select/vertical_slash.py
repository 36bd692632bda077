"""Vertical-slash after MInference (arXiv 2407.02490): the last 64 queries vote for token columns and token distances.

A distance is a *slash*. Heads of one layer may differ in budget and in kind: fixed numbers, or the smallest sets that
hold a share of the attention. Each rank passes its own shard and the collectives; shapes depend on budgets and on where
packed documents lie. These are chosen for one by one: the last queries of each vote on its own columns and distances.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..mask import AttentionMask
from .packed import (
    Choice,
    Document,
    attention_of_documents,
    documents_of,
    mask_of_documents,
    require_whole_blocks,
)
from .probe import (
    Collectives,
    ShardTensors,
    column_sums,
    last_positions,
    probabilities,
    probabilities_of,
    query_rows,
    row_logits,
    slash_sums,
)
from .registry import Selector, count, register, share
from .top import counts_for_mass, diagonals_of, highest, positions_of, take_highest


@dataclass(frozen=True, kw_only=True)
class HeadBudget:
    """What one head keeps: of columns, and of slashes.

    caps: at most so many, and never more than tokens; masses: as few as have this share of the probe's attention, and
    at least one; None: as many as the caps; forced: the first tokens, the nearest distances, which come first.
    """

    caps: tuple[int, int]
    masses: tuple[float, float] | None = None
    forced: tuple[int, int] = (0, 0)


class VerticalSlashSelector(Selector):
    """One budget for all heads. Not causal: queries at the end choose for all rows.

    Packed documents are chosen for one by one, as each would be alone. A document of more than a block that is not
    attended whole anyway must begin with a block; choosing raises ValueError otherwise.
    """

    causal, keeps_documents, lists_documents, recordable = False, True, True, True

    @property
    @abstractmethod
    def budget(self) -> HeadBudget:
        """What every head keeps."""

    @property
    def most_columns(self) -> int:
        """The cap of the columns."""
        return self.budget.caps[0]

    def most_columns_of(
        self, first: NDArray[np.int64], tokens: NDArray[np.int64], block_size: int
    ) -> NDArray[np.int64]:
        """The cap of each, where anything is chosen at all."""
        chosen = tokens > self.most_tokens_anywhere(block_size)
        return np.where(chosen, np.minimum(tokens, self.budget.caps[0]), 0)

    def most_tokens_anywhere(self, block_size: int) -> int:
        """As many as are attended whole."""
        return tokens_attended_whole((self.budget,), block_size)

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        return choose_by_head(shard, (self.budget,) * shard.heads, scale=scale, collectives=collectives)


@register
@dataclass(frozen=True, kw_only=True)
class FixedVerticalSlash(VerticalSlashSelector):
    """The highest column and distance sums, so many of each; the sinks and the nearest distances are among them."""

    name, help = "vertical-slash", "columns and distances, so many of each"
    columns: int = count(1024, "token columns per head", least=0)
    slashes: int = count(1024, "token distances per head", least=0)
    sink_tokens: int = count(30, "first tokens kept", option="--sinks", least=0)
    window_tokens: int = count(100, "nearest tokens kept", option="--window", least=0)

    @property
    def budget(self) -> HeadBudget:
        """Numbers, and what is forced."""
        return HeadBudget(caps=(self.columns, self.slashes), forced=(self.sink_tokens, self.window_tokens))


@register
@dataclass(frozen=True, kw_only=True)
class FlexVerticalSlash(VerticalSlashSelector):
    """The smallest sets of columns and distances with these shares of the probe's attention, each with a cap."""

    name, help = "flex", "columns and distances, as few as hold a share of the attention"
    column_mass: float = share(0.9, "share of attention to keep", option="--p")
    column_cap: int = count(4096, "at most so many columns, and slashes", option="--cap")
    slash_mass: float = share(0.9, "share of attention to keep", option="--p")
    slash_cap: int = count(4096, "at most so many columns, and slashes", option="--cap")

    @property
    def budget(self) -> HeadBudget:
        """Shares with caps."""
        return HeadBudget(caps=(self.column_cap, self.slash_cap), masses=(self.column_mass, self.slash_mass))


@torch.no_grad()
def choose_by_head(
    shard: ShardTensors, heads: Sequence[HeadBudget], *, scale: float, collectives: Collectives
) -> AttentionMask:
    """Return a mask of columns and block diagonals, by the attention of the last valid queries over all keys.

    heads: a budget each. Diagonal 0 is always active. With documents the mask is that of each alone, and lists blocks.
    Raises ValueError when there are not as many budgets as heads, and for documents whose blocks would be others alone.
    """
    if len(heads) != shard.heads:
        raise ValueError(f"budgets: for {len(heads)} heads, the shard has {shard.heads}")
    if shard.documents is None:
        scores = _scores(shard, scale=scale, collectives=collectives)
        return shard.chosen(*_taken(shard, scores, heads))
    limit = tokens_attended_whole(heads, shard.block_size)
    packed = documents_of(shard.documents, shard.seq_len_tokens)
    chosen = [one for one in packed if one.tokens > limit]
    require_whole_blocks(chosen, shard.block_size)
    choices = []
    if chosen:
        scores = _scores_of_documents(shard, chosen, scale=scale, collectives=collectives)
        for one in chosen:
            own = scores[:, :, one.first : one.end].contiguous()
            active, columns = _taken(shard, own, heads)
            choices.append(Choice(document=one, active=active, columns=columns))
    return mask_of_documents(shard, [one for one in packed if one.tokens <= limit], choices)


def tokens_attended_whole(heads: Sequence[HeadBudget], block_size: int) -> int:
    """Up to how many tokens a sequence is attended whole by all heads, whatever it says: nothing need be chosen then.

    A block is; and so is a sequence of no more distances than every head takes.
    """
    return max(block_size, min(0 if head.masses is not None else head.caps[1] for head in heads))


def _taken(shard: ShardTensors, scores: Tensor, heads: Sequence[HeadBudget]) -> tuple[Tensor, Tensor]:
    """(active bool [H, n] block diagonals, columns int32 [H, C]) of scores [2, H, tokens], which are overwritten.

    Of the shard's sequence, or of a document of it.
    """
    tokens, block_size = scores.shape[2], shard.block_size
    (flex, mass, cap), first, most = _budgets(tuple(heads), shard.seq_len_tokens, scores.device)
    cap, capacities = cap.clamp(max=tokens), [min(one, tokens) for one in most]
    for kind, forced in enumerate(first):
        forced = forced[:, :tokens]
        scores[kind, :, : forced.shape[1]].masked_fill_(forced, torch.inf)
    best = highest(scores, max(*capacities, 1))
    counts = torch.where(flex, torch.minimum(counts_for_mass(best, scores.sum(-1), mass), cap), cap)
    if scores.is_cuda:
        from .select_triton import take

        columns, active = take(scores, counts, best, column_capacity=capacities[0], block_size=block_size)
        return active, columns
    kept = take_highest(scores, counts, best)
    return diagonals_of(kept[1], block_size), positions_of(kept[0], capacities[0])


@lru_cache(maxsize=256)
def _budgets(
    heads: tuple[HeadBudget, ...], seq_len_tokens: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor], tuple[int, int]]:
    """One layer's budgets on the device, rows are columns, slashes: [flex, mass, cap], forced, the highest cap of each.

    flex bool [H]; mass float64 [2, H] (1 where unused); cap int64 [2, H]; forced: bool [H, n] of the first tokens, and
    of the nearest distances.
    """
    # Kept: copying them to the device again in every layer would make it wait.
    caps, forced = (
        [[min(getattr(head, name)[kind], seq_len_tokens) for head in heads] for kind in (0, 1)]
        for name in ("caps", "forced")
    )
    masses = [[(head.masses or (1.0, 1.0))[kind] for head in heads] for kind in (0, 1)]
    flex = torch.tensor([head.masses is not None for head in heads], device=device)
    limits = [flex, torch.tensor(masses, dtype=torch.float64, device=device), torch.tensor(caps, device=device)]
    first = [(torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]).to(device) for tokens in forced]
    return limits, first, (max(caps[0]), max(caps[1]))


def _scores(shard: ShardTensors, *, scale: float, collectives: Collectives) -> Tensor:
    """[2, H, seq_len]: column sums and slash sums over all ranks."""
    at = last_positions(shard)
    rows = query_rows(shard, at, collectives)
    if shard.q.is_cuda and shard.softcap is None:
        from .probe_triton import column_and_slash_sums, tile_keys

        if tile_keys(shard, at.shape[0]):  # the same on every rank, as all shards have one shape
            first = shard.seq_len_tokens - at.shape[0]
            sums = column_and_slash_sums(shard, rows, first_row=first, scale=scale, collectives=collectives)
            return collectives.all_reduce_sum(sums)
    p = probabilities(row_logits(shard, rows, at, scale=scale), collectives)
    return collectives.all_reduce_sum(torch.stack([column_sums(shard, p), slash_sums(shard, p, at)]))


def _scores_of_documents(
    shard: ShardTensors, documents: Sequence[Document], *, scale: float, collectives: Collectives
) -> Tensor:
    """[2, H, seq_len]: the sums of each of these documents alone, from its first token on; 0 elsewhere.

    Distances of a document are fewer than its tokens, so both kinds of sums fit into its place.
    """
    parts, logits, places = attention_of_documents(shard, documents, scale, collectives)
    scores = logits[0].new_zeros(2, shard.heads, shard.seq_len_tokens)
    for one, part, at, p in zip(documents, parts, places, probabilities_of(logits, collectives), strict=True):
        scores[0, :, one.first : one.end] = column_sums(part, p)
        scores[1, :, one.first : one.end] = slash_sums(part, p, at - one.first)
    return collectives.all_reduce_sum(scores)
