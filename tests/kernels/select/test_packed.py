"""Packed documents chosen for one by one: what each gets is what it gets alone, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from select_cases import on_ranks, shard_of
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.select.anchor import Anchor
from sparsering.kernels.select.packed import documents_of, kept_mass_of_documents, last_queries
from sparsering.kernels.select.probe import ALONE, Collectives, kept_mass_probe
from sparsering.kernels.select.shifted_groups import ShiftedGroups
from sparsering.kernels.select.sink_window import SinkWindow
from sparsering.kernels.select.vertical_slash import FixedVerticalSlash, FlexVerticalSlash, choose_by_head

BLOCK, SCALE = 16, 0.4
# Long ones begin with a block; ends are ragged, and what fills the last block is of other documents: of one token, and
# of less than a block across a block's end.
LENGTHS = (100, 1, 14, 13, 134, 10, 70, 10, 80, 16, 1, 15, 48)
TOKENS = sum(LENGTHS)
FIRSTS = np.cumsum((0, *LENGTHS[:-1])).tolist()
FIXED = FixedVerticalSlash(columns=9, slashes=12, sink_tokens=2, window_tokens=3)
FLEX = FlexVerticalSlash(column_mass=0.5, column_cap=11, slash_mass=0.3, slash_cap=40)
RANKS = pytest.mark.parametrize(("ranks", "granularity"), [(1, 512), (2, 16), (4, 1), (4, 32), (4, 128)])


def drawn(tokens: int = 512, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q [S, H, D] and k [S, H / 2, D] whose attention differs from token to token."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(tokens, n, 8, generator=generator, dtype=torch.float64) for n in (heads, heads // 2))
    return 2 * q, 2 * k


def packed(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()


def attended(mask: AttentionMask, head: int) -> torch.Tensor:
    at = torch.arange(mask.seq_len_tokens)
    return whole(mask, head, at, at)


@RANKS
@pytest.mark.parametrize("selector", [FIXED, FLEX, SinkWindow(sink_tokens=3, window_tokens=20)], ids=lambda s: s.name)
def test_every_document_gets_what_it_gets_alone(ranks: int, granularity: int, selector: Any) -> None:
    (q, k), documents = drawn(), packed(LENGTHS)

    def choose(rank: int, collectives: Collectives) -> AttentionMask:
        shard = shard_of(q, k, block_size=BLOCK, ranks=ranks, rank=rank, granularity=granularity, seq_len=TOKENS,
                         documents=documents)  # fmt: skip
        return selector.choose(shard, scale=SCALE, collectives=collectives)

    masks = on_ranks(ranks, choose)
    wanted = torch.zeros(4, TOKENS, TOKENS, dtype=torch.bool)
    for first, length in zip(FIRSTS, LENGTHS, strict=True):
        here = slice(first, first + length)
        alone = selector.choose(shard_of(q[here], k[here], block_size=BLOCK), scale=SCALE)
        wanted[:, here, here] = torch.stack([attended(alone, head) for head in range(4)])
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & (documents[:, None] == documents[None, :])
    assert wanted.sum() < 4 * causal.sum(), "something is left out"
    given = np.array(FIRSTS), np.array(LENGTHS), BLOCK
    for mask in masks:
        for head in range(4):
            assert torch.equal(attended(mask, head), wanted[head])
        assert mask.own_blocks and mask.column_capacity == selector.most_columns_of(*given).sum()
        assert torch.equal(mask.columns, masks[0].columns) and torch.equal(mask.active, masks[0].active)


def test_heads_of_other_budgets_in_one_layer() -> None:
    (q, k), documents = drawn(TOKENS), packed(LENGTHS)
    budgets = [FIXED.budget, FLEX.budget, FLEX.budget, FixedVerticalSlash(columns=0, slashes=70).budget]
    mask = choose_by_head(
        shard_of(q, k, block_size=BLOCK, documents=documents), budgets, scale=SCALE, collectives=ALONE
    )
    for first, length in zip(FIRSTS, LENGTHS, strict=True):
        here = slice(first, first + length)
        alone = choose_by_head(shard_of(q[here], k[here], block_size=BLOCK), budgets, scale=SCALE, collectives=ALONE)
        for head in range(4):
            assert torch.equal(attended(mask, head)[here, here], attended(alone, head))


def test_documents_that_have_other_blocks_alone_are_refused() -> None:
    q, k = drawn(160)
    shard = shard_of(q, k, block_size=BLOCK, documents=packed((70, 90)))
    for selector in (FIXED, FLEX):
        with pytest.raises(ValueError, match=r"of 90 tokens begins at token 70, within a block of 16.*--align"):
            selector.choose(shard, scale=SCALE)
    # As many distances as tokens: attended whole, wherever the blocks are.
    everything = FixedVerticalSlash(columns=1, slashes=90, sink_tokens=0, window_tokens=0)
    mask = everything.choose(shard, scale=SCALE)
    assert attended(mask, 0)[70:, 70:].sum() == 90 * 91 // 2 and not attended(mask, 0)[70:, :70].any()
    assert everything.most_tokens_anywhere(BLOCK) == 90 and FLEX.most_tokens_anywhere(BLOCK) == BLOCK


def test_documents_never_fall() -> None:
    with pytest.raises(ValueError, match="documents: 0 follows 1; they must never fall"):
        documents_of(torch.tensor([0, 1, 0]), 3)
    found = documents_of(torch.tensor([4, 4, 7, 9, 9]), 4)
    assert [tuple(one) for one in found] == [(0, 2), (2, 3), (3, 4)] and last_queries(found) == [2, 1, 1]


@RANKS
def test_kept_mass_of_a_document_is_that_of_its_probe_alone(ranks: int, granularity: int) -> None:
    (q, k), documents = drawn(), packed(LENGTHS)

    def kept(rank: int, collectives: Collectives) -> torch.Tensor:
        shard = shard_of(q, k, block_size=BLOCK, ranks=ranks, rank=rank, granularity=granularity, seq_len=TOKENS,
                         documents=documents)  # fmt: skip
        mask = FLEX.choose(shard, scale=SCALE, collectives=collectives)
        return kept_mass_of_documents(shard, mask, scale=SCALE, collectives=collectives)

    found = on_ranks(ranks, kept)
    for number, (first, length) in enumerate(zip(FIRSTS, LENGTHS, strict=True)):
        here = slice(first, first + length)
        alone = shard_of(q[here], k[here], block_size=BLOCK)
        wanted = kept_mass_probe(alone, FLEX.choose(alone, scale=SCALE), scale=SCALE)
        assert (wanted < 0.98).any() == (length > BLOCK)
        for one in found:
            torch.testing.assert_close(one[:, number], wanted)


@pytest.mark.parametrize("anchors", [1, 3, 500])
def test_all_documents_attend_the_anchors(anchors: int) -> None:
    """They end with the first document."""
    q, k = drawn(TOKENS)
    documents, at, selector = packed(LENGTHS), torch.arange(TOKENS), Anchor(anchor_tokens=anchors)
    mask = selector.choose(shard_of(q, k, block_size=BLOCK, documents=documents), scale=SCALE)
    causal = at[None, :] <= at[:, None]
    wanted = causal & ((documents[:, None] == documents[None, :]) | (at[None, :] < min(anchors, LENGTHS[0])))
    assert all(torch.equal(attended(mask, head), wanted) for head in range(4))
    needed = selector.most_columns_of(np.array(FIRSTS), np.array(LENGTHS), BLOCK)
    assert needed.sum() == mask.column_capacity == mask.anchors
    alone = selector.choose(shard_of(q, k, block_size=BLOCK), scale=SCALE)
    assert torch.equal(attended(alone, 0), causal) and not alone.anchors


def test_groups_are_shifted_for_half_of_the_heads() -> None:
    """Block by block: groups of 64 tokens, those of heads 2 and 3 begin at 32, 96, ..."""
    (q, k), at = drawn(200), torch.arange(200)
    mask = ShiftedGroups(group_tokens=64).choose(shard_of(q, k, block_size=16), scale=SCALE)
    assert mask.own_blocks
    for head, shift in enumerate((0, 0, 32, 32)):
        group, block = (at + shift) // 64, at // 16
        same_block_or_earlier = block[None, :] <= block[:, None]
        wanted = (group[:, None] == group[None, :]) & same_block_or_earlier & (at[None, :] <= at[:, None])
        assert torch.equal(attended(mask, head), wanted)
    with pytest.raises(ValueError, match="group_tokens: half of 48 is no multiple of the block of 16 tokens"):
        ShiftedGroups(group_tokens=48).choose(shard_of(q, k, block_size=16), scale=SCALE)
    with pytest.raises(ValueError, match="documents: shifted-groups is not chosen per document"):
        ShiftedGroups().choose(shard_of(q, k, block_size=16, documents=packed((200,))), scale=SCALE)
