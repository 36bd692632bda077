"""Held-out sequences as the model is given them: tokens, what they are to predict, positions, pieces with less context.

Shape legend: S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.shards import TokenData, TokenSequence, sequence_index
from ..model.losses import IGNORED_LABEL
from .settings import Documents


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """One sequence. All int64 [S], documents int32 or None, on the host.

    labels: the token after each, -100 where nothing is predicted. positions: for the model. seen: how many tokens each
    can see before it. documents: which attention stays within.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    seen: Tensor
    documents: Tensor | None

    def piece(self, first: int, until: int) -> Text:
        """Return some of its tokens as a sequence of their own, whose positions begin at 0."""
        part = slice(first, until)
        own = torch.arange(until - first)
        documents = None if self.documents is None else self.documents[part] - self.documents[first]
        return Text(
            ids=self.ids[part], labels=self.labels[part], documents=documents,
            positions=torch.minimum(self.positions[part], own), seen=torch.minimum(self.seen[part], own),
        )  # fmt: skip


def text_of(sequence: TokenSequence, documents: Documents) -> Text:
    """Return a sequence of the data, with the ends of its documents counted as asked."""
    ids, of = torch.from_numpy(sequence.tokens), torch.from_numpy(sequence.documents)
    targets = ids.clone()
    begins = torch.from_numpy(np.append(True, np.diff(sequence.documents) != 0))
    if documents.loss:
        targets[begins] = IGNORED_LABEL
    if sequence.padding is not None:
        targets[torch.from_numpy(sequence.padding)] = IGNORED_LABEL
    labels = torch.cat([targets[1:], targets.new_full((1,), IGNORED_LABEL)])
    places = torch.arange(ids.shape[0])
    within = places - torch.where(begins, places, 0).cummax(0).values
    return Text(
        ids=ids, labels=labels, positions=within if documents.positions else places,
        seen=within if documents.attention else places, documents=of if documents.attention else None,
    )  # fmt: skip


def drawn(data: TokenData, *, count: int, seq_len_tokens: int, seed: int) -> list[TokenSequence]:
    """Return `count` different sequences of the data, which has as many, drawn by the seed."""
    there = data.sequences(seq_len_tokens)
    assert count <= there
    places = [sequence_index(number, count=there, seed=seed) for number in range(count)]
    return [data.sequence(place, seq_len_tokens) for place in places]


def pieces(seq_len_tokens: int, context_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, end, first token that counts) of pieces of at most context_tokens, which is even.

    Each begins half a piece after the one before, and counts what that did not have: every token counts once, and sees
    all tokens before it, or at least half of context_tokens and less than all.
    """
    half, first, counted = context_tokens // 2, 0, 0
    while counted < seq_len_tokens:
        until = min(first + context_tokens, seq_len_tokens)
        yield first, until, counted
        first, counted = first + half, until
