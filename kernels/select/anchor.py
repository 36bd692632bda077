"""Whole documents and a first token that all of them share (AnchorAttention, arXiv 2411.13476)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..mask import AttentionMask
from .packed import documents_of
from .probe import Collectives, ShardTensors
from .registry import Selector, count, register
from .top import positions_of


@register
@dataclass(frozen=True, kw_only=True)
class Anchor(Selector):
    """Everything before a token in its document, and the first anchor_tokens of the sequence from all documents.

    The anchors end with the first document. Without documents it is dense attention.
    """

    name, causal, keeps_documents, recordable = "anchor", True, True, True
    help = "whole documents, and first tokens that all of them attend"
    anchor_tokens: int = count(1, "first tokens that all documents attend", option="--anchors")

    @property
    def most_columns(self) -> int:
        """The anchors."""
        return self.anchor_tokens

    def most_columns_of(
        self, first: NDArray[np.int64], tokens: NDArray[np.int64], block_size: int
    ) -> NDArray[np.int64]:
        """Those of the sequence's first document."""
        return np.where(first == 0, np.minimum(tokens, self.anchor_tokens), 0)

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        active = torch.ones(shard.heads, shard.blocks, dtype=torch.bool, device=shard.q.device)
        if shard.documents is None:
            return shard.chosen(active)
        anchors = min(self.anchor_tokens, documents_of(shard.documents, shard.seq_len_tokens)[0].end)
        tokens = torch.arange(shard.seq_len_tokens, device=shard.q.device).expand(shard.heads, -1)
        return shard.chosen(active, positions_of(tokens < anchors, anchors), anchors=anchors)
