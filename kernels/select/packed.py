"""Packed documents one by one: where they lie, what a rank holds of each, and the choices for all of them as one mask.

Of two different blocks at most one document has tokens in both. So block pairs off the diagonal belong to one document
each, and choices that are made for every document by itself never meet.
Shape legend: S tokens of a shard, H query heads, N mask blocks of the sequence, n mask blocks of a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..mask import AttentionMask, whole
from ..merge import accumulator_dtype
from .probe import (
    ALONE,
    PROBE_QUERIES,
    Collectives,
    ShardTensors,
    last_positions,
    probabilities_of,
    query_rows,
    row_logits,
)

_ON_HOST: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Document(NamedTuple):
    """The tokens [first, end) of a packed sequence."""

    first: int
    end: int

    @property
    def tokens(self) -> int:
        """How many."""
        return self.end - self.first


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What was chosen for a document as if it were alone.

    active: bool [H, n] block diagonals; columns: int32 [H, C], sorted tokens of the document counted from its first,
    filled up with its length.
    """

    document: Document
    active: Tensor
    columns: Tensor


def documents_of(documents: Tensor, seq_len_tokens: int) -> tuple[Document, ...]:
    """The documents of a sequence, int [>= seq_len_tokens], in order. Waits for the device once per tensor.

    Raises ValueError where they fall, so that one could lie in several places.
    """
    values = on_host(documents)[:seq_len_tokens]
    steps = np.diff(values)
    if (steps < 0).any():
        at = int(np.flatnonzero(steps < 0)[0])
        raise ValueError(f"documents: {values[at + 1]} follows {values[at]}; they must never fall")
    bounds = [0, *(np.flatnonzero(steps) + 1).tolist(), seq_len_tokens]
    return tuple(Document(first, end) for first, end in pairwise(bounds))


def require_whole_blocks(documents: Sequence[Document], block_size: int) -> None:
    """Raise ValueError, naming the first that does not, unless these documents begin with a block each."""
    for one in documents:
        if one.first % block_size:
            raise ValueError(
                f"documents: one of {one.tokens} tokens begins at token {one.first}, within a block of {block_size}: "
                "alone it has other blocks; fill documents up to whole blocks (--align)"
            )


def alone(shard: ShardTensors, document: Document) -> ShardTensors:
    """The part of a document that this rank holds, as if the document were the whole sequence."""
    held = on_host(shard.positions)
    low, high = (int(at) for at in np.searchsorted(held, document))
    run = high - low
    if run and held[high - 1] - held[low] >= run:  # in pieces: the shard's runs, as far as they are whole in it
        run = math.gcd(shard.granularity_tokens, shard.block_size)
        # What follows in the last run lies beyond the document's length: padding of the document alone.
        high = low + -(-(high - low) // run) * run
        pieces = held[low:high]
        if len(pieces) % run or (pieces.reshape(-1, run) - pieces[::run, None] != np.arange(run)).any():
            run, high = 1, low + len(pieces)
    here = slice(low, high)
    return replace(
        shard, q=shard.q[:, here], k=shard.k[:, here], positions=shard.positions[here].long() - document.first,
        seq_len_tokens=document.tokens, granularity_tokens=max(run, 1), documents=None,
    )  # fmt: skip


def last_queries(documents: Sequence[Document]) -> list[int]:
    """How many queries of each document are its probe: the last ones, as of a sequence."""
    return [min(one.tokens, PROBE_QUERIES) for one in documents]


@torch.no_grad()
def kept_mass_of_documents(
    shard: ShardTensors, mask: AttentionMask, *, scale: float, collectives: Collectives = ALONE
) -> Tensor:
    """[H, documents]: the share of the attention of each document's last queries that the mask keeps, a mean of them.

    The mask has all own blocks: documents within a block keep everything. Waits for the device, see `documents_of`.
    """
    assert shard.documents is not None and mask.own_blocks
    documents = documents_of(shard.documents, shard.seq_len_tokens)
    kept = torch.ones(shard.heads, len(documents), dtype=accumulator_dtype(shard.q.dtype), device=shard.q.device)
    longer = [n for n, one in enumerate(documents) if (one.end - 1) // shard.block_size > one.first // shard.block_size]
    if not longer:
        return kept
    parts, logits, places = attention_of_documents(shard, [documents[n] for n in longer], scale, collectives)
    shares = []
    for number, part, p, rows in zip(longer, parts, probabilities_of(logits, collectives), places, strict=True):
        keys = part.positions + documents[number].first
        # Keys that only pad the document belong to others: p is 0 there.
        by_head = [(p[head] * whole(mask, head, rows, keys)).sum() for head in range(shard.heads)]
        shares.append(torch.stack(by_head) / len(rows))
    kept[:, longer] = collectives.all_reduce_sum(torch.stack(shares, dim=1).contiguous())
    return kept


def attention_of_documents(
    shard: ShardTensors, documents: Sequence[Document], scale: float, collectives: Collectives
) -> tuple[list[ShardTensors], list[Tensor], list[Tensor]]:
    """(parts, logits, places) of documents, of which there is at least one.

    parts: see `alone`; logits: local ones of each document's last queries, [H, R, S], before any softmax; places: where
    in the sequence these queries are, int64 [R].
    """
    parts = [alone(shard, one) for one in documents]
    at = [last_positions(part) for part in parts]
    places = [own + one.first for own, one in zip(at, documents, strict=True)]
    rows = query_rows(shard, torch.cat(places), collectives).split([len(own) for own in at], dim=1)
    logits = [row_logits(part, own, its, scale=scale) for part, own, its in zip(parts, rows, at, strict=True)]
    return parts, logits, places


def mask_of_documents(
    shard: ShardTensors, attended_whole: Sequence[Document], choices: Sequence[Choice]
) -> AttentionMask:
    """Return one mask of documents that are attended whole and of choices for all others.

    Choices are of documents that begin with a block. It lists its blocks and holds as many columns as the choices do.
    """
    device, size, blocks = shard.q.device, shard.block_size, shard.blocks
    reach = np.zeros(blocks, dtype=np.int64)  # of each query block back to its document's first, where that is whole
    for one in attended_whole:
        inner = np.arange(one.first // size + 1, (one.end - 1) // size + 1)
        reach[inner] = inner - one.first // size
    block = torch.arange(blocks, device=device)
    distance = block[:, None] - block[None, :]
    base = (distance >= 0) & (distance <= torch.from_numpy(reach).to(device)[:, None])
    active = base.expand(shard.heads, -1, -1).clone()
    columns = []
    for choice in choices:
        first, own = choice.document.first // size, choice.active.shape[1]
        of_own = distance[:own, :own]
        active[:, first : first + own, first : first + own] |= choice.active[:, of_own.clamp(min=0)] & (of_own >= 0)
        empty = choice.columns >= choice.document.tokens
        columns.append((choice.columns + choice.document.first).masked_fill(empty, shard.seq_len_tokens))
    none = torch.zeros(shard.heads, 0, dtype=torch.int32, device=device)
    return shard.chosen(active, torch.cat([none, *columns], dim=1).sort(dim=1).values)


def on_host(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values on the host. Waits for the device once per tensor: they are kept with it."""
    known: dict[int, NDArray[Any]] = _ON_HOST.setdefault(tensor, {})  # pyright: ignore[reportAssignmentType]
    version = 0 if tensor.is_inference() else tensor._version
    if version not in known:
        known.clear()
        known[version] = tensor.detach().cpu().numpy().copy()
    return known[version]
