"""How far back patterns reach: the share of keys that no far later query attends, which get no gradient from there.

A key *has far queries* at a distance of D tokens if a query of its document stands more than D tokens behind it; an
anchor's are those of all documents. It is *unreached* if none of these attends it. All follows from one number for each
key, the last query that attends it.

Shape legend: S tokens, N mask blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks.mask import BlockMask
from .dataset.store import Trace
from .output import Table
from .pattern import HeadPattern, LayerPattern
from .progress import Progress, no_progress

FAR_TOKENS = (8192, 32768)
STRIP_BLOCKS = 64  # rows of a mask that are looked at together: half a megabyte at 4096 blocks


@dataclass(frozen=True, kw_only=True)
class HeadReach:
    """Of one head at one distance: keys that have far queries, and how many of them none of these attends."""

    keys: int
    unreached: int

    @property
    def share(self) -> float | None:
        """Unreached keys over keys with far queries; None where there are none."""
        return self.unreached / self.keys if self.keys else None


def head_reaches(pattern: LayerPattern, head: int, far_tokens: Sequence[int] = FAR_TOKENS) -> list[HeadReach]:
    """Return a head's reach at every distance."""
    keys = np.arange(pattern.seq_len_tokens)
    possible = _ends(pattern) - 1 - keys
    attended = last_queries(pattern, head) - keys
    return [
        HeadReach(keys=int((possible > far).sum()), unreached=int(((possible > far) & (attended <= far)).sum()))
        for far in far_tokens
    ]


def last_queries(pattern: LayerPattern, head: int) -> NDArray[np.int64]:
    """Return int64 [S]: the last query that attends each key, -1 where none does. Memory grows with S alone."""
    keys, ends, of_head = np.arange(pattern.seq_len_tokens), _ends(pattern), pattern.heads[head]
    blocks = _last_blocks(of_head, keys // pattern.block_size, (_document_ends(pattern) - 1) // pattern.block_size)
    last = np.where(blocks < 0, -1, np.minimum((blocks + 1) * pattern.block_size, _document_ends(pattern)) - 1)
    if of_head.window_tokens:
        last = np.maximum(last, np.minimum(keys + of_head.window_tokens, _document_ends(pattern)) - 1)
    last[of_head.columns] = ends[of_head.columns] - 1
    return last


def trace_reaches(
    trace: Trace, far_tokens: Sequence[int] = FAR_TOKENS, *, progress: Progress = no_progress
) -> Iterator[dict[str, Any]]:
    """Yield one summary for each training step, layer and distance of a trace, as plain JSON values.

    training_step, layer, far_tokens; keys: how many have far queries; unreached_per_head: the share of them that is
    unreached, of each head, and unreached_mean: the mean of these; None where no key has far queries.
    """
    recorded = [(step, layer) for step in trace.steps for layer in trace.layers]
    for number, (step, layer) in enumerate(recorded):
        progress("looking how far patterns reach", number, len(recorded))
        pattern = trace.layer_pattern(step, layer)
        heads = [head_reaches(pattern, head, far_tokens) for head in range(pattern.num_heads)]
        for far, reaches in zip(far_tokens, zip(*heads, strict=True), strict=True):
            shares = [one.share for one in reaches if one.share is not None]
            yield {
                "training_step": step, "layer": layer, "far_tokens": far, "keys": reaches[0].keys,
                "unreached_per_head": shares or None,
                "unreached_mean": float(np.mean(shares)) if shares else None,
            }  # fmt: skip
    progress("looking how far patterns reach", len(recorded), len(recorded))


def reach_tables(summaries: Sequence[dict[str, Any]]) -> list[Table]:
    """Return what `trace_reaches` yields as tables: the training steps, and the layers of the last one."""
    distances = list(dict.fromkeys(one["far_tokens"] for one in summaries))
    steps = list(dict.fromkeys(one["training_step"] for one in summaries))
    last = [one for one in summaries if one["training_step"] == steps[-1]]
    note = ("unreached: share of the keys with queries of their document more than so many tokens later that none of "
            "these attends, mean, lowest and highest of the heads")  # fmt: skip
    names = [f"{name} {far:,}" for far in distances for name in ("unreached", "min", "max")]
    tables = []
    for title, key, chosen in (("training steps", "training_step", summaries), (f"step {steps[-1]:,}", "layer", last)):
        groups = dict.fromkeys(one[key] for one in chosen)
        rows = [
            (f"{group:,}", *(cell for far in distances for cell in _cells(chosen, key, group, far))) for group in groups
        ]
        tables.append(Table(columns=(key.split("_")[-1], *names), rows=rows, title=title, note=note))
    return tables


def _cells(summaries: Sequence[dict[str, Any]], key: str, group: int, far: int) -> tuple[str, ...]:
    """Return mean, lowest and highest share of all heads of a step or of a layer at one distance."""
    chosen = [one["unreached_per_head"] or [] for one in summaries if one[key] == group and one["far_tokens"] == far]
    shares = [share for heads in chosen for share in heads]
    return tuple(f"{value:.1%}" for value in (np.mean(shares), min(shares), max(shares))) if shares else ("–",) * 3


def _document_ends(pattern: LayerPattern) -> NDArray[np.int64]:
    """Return int64 [S]: behind which token each token's document ends."""
    tokens, documents = pattern.seq_len_tokens, pattern.documents
    if documents is None:
        return np.full(tokens, tokens)
    return np.searchsorted(documents, documents, side="right").astype(np.int64)


def _ends(pattern: LayerPattern) -> NDArray[np.int64]:
    """Return int64 [S]: behind which token the queries end that may attend each key."""
    ends = _document_ends(pattern)
    ends[: pattern.anchor_tokens] = pattern.seq_len_tokens
    return ends


def _last_blocks(head: HeadPattern, block: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64 [S]: the last query block, at most `most`, whose pair with a key's block is active; -1 for none."""
    if isinstance(head, BlockMask):
        return _last_of_mask(head, block, most)
    distance = most - block
    nearest = np.full(int(distance.max()) + 1, -1)  # the largest whole diagonal that is no farther than each distance
    diagonals = head.whole[head.whole < nearest.size]
    nearest[diagonals] = diagonals
    found = np.maximum.accumulate(nearest)[distance]
    return np.where(found < 0, -1, block + found)


def _last_of_mask(head: BlockMask, block: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Go through a mask's rows a strip at a time, remembering for each key block the last row that was active."""
    blocks = head.rows.shape[0]
    pairs = most * blocks + block  # in rising order, as documents follow each other
    begins = np.diff(pairs, prepend=-1) > 0
    limit, key = np.divmod(pairs[begins], blocks)
    number = np.int16 if blocks < 1 << 15 else np.int32
    found, last = np.full(limit.size, -1), np.full(blocks, -1, dtype=number)
    for first in range(0, blocks, STRIP_BLOCKS):
        bits = np.unpackbits(head.rows[first : first + STRIP_BLOCKS], axis=1, count=blocks).view(bool)
        rows = np.where(bits, np.arange(first, first + len(bits), dtype=number)[:, None], last)
        here = slice(*np.searchsorted(limit, [first, first + len(bits)]))
        if here.start < here.stop:
            np.maximum.accumulate(rows, axis=0, out=rows)
            found[here] = rows[limit[here] - first, key[here]]
        last = rows.max(axis=0)
    return found[np.cumsum(begins) - 1]
