"""Masks on the device as the patterns of a trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...kernels.mask import AttentionMask
from ...planner.schedule.pairs import documents_share
from ...planner.specs import MODEL
from ...traces.dataset.rows import HeadChoice
from ...traces.pattern import BlockMask, HeadPattern, LayerPattern, windowed
from .form import Reach


def pattern_of(mask: AttentionMask) -> LayerPattern:
    """Return a mask's patterns on the host."""
    active = mask.active.cpu().numpy()
    columns = None if mask.columns is None else mask.columns.cpu().numpy()
    heads: list[HeadPattern] = []
    for head in range(mask.heads):
        chosen = np.zeros(0, np.int32) if columns is None else columns[head][columns[head] < mask.seq_len_tokens]
        if mask.is_toeplitz:
            window = 0 if mask.windows is None else mask.windows[head]
            whole = np.flatnonzero(active[head])
            heads.append(
                windowed(window, block_size=mask.block_size, blocks=mask.blocks, columns=chosen, diagonals=whole)
            )
        else:
            assert mask.windows is None, "no selector gives block pairs and windows at once"
            heads.append(BlockMask(bits=active[head], columns=chosen))
    documents = None if mask.documents is None else mask.documents.cpu().numpy()[: mask.seq_len_tokens]
    return LayerPattern(
        seq_len_tokens=mask.seq_len_tokens, block_size=mask.block_size, heads=tuple(heads), documents=documents,
        anchor_tokens=mask.anchors,
    )  # fmt: skip


def own_pattern(mask: AttentionMask, reach: Reach) -> LayerPattern:
    """Return the pattern of a layer that the model itself limits, as a trace takes it.

    Chunks are documents of this layer alone, where a trace has one set of documents for all layers of a step: they
    become the blocks that share a chunk. Runs do not take them from there, but from the model.
    """
    pattern = pattern_of(mask)
    if not 0 < reach.chunk_tokens < mask.seq_len_tokens:
        return pattern
    blocks = pattern.num_blocks
    bits = [
        documents_share(pattern.documents, mask.block_size, mask.seq_len_tokens, head.block_bits(blocks))
        for head in pattern.heads
    ]
    return replace(pattern, heads=tuple(BlockMask(bits=one) for one in bits), documents=None)


def own_choice(reach: Reach) -> HeadChoice:
    """Return what a trace says of a pattern that is the model's own."""
    lengths = {"window_tokens": reach.window_tokens, "chunk_tokens": reach.chunk_tokens}
    return HeadChoice(selector=MODEL, settings={name: tokens for name, tokens in lengths.items() if tokens})
