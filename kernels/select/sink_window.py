"""Sink + window: the first tokens and the nearest ones, whatever the data says; as wide as the sequence it is dense."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..mask import AttentionMask
from .packed import documents_of
from .probe import Collectives, ShardTensors
from .registry import Selector, count, register
from .top import diagonals_of, positions_of


@register
@dataclass(frozen=True, kw_only=True)
class SinkWindow(Selector):
    """The first sink_tokens as columns and all distances below window_tokens, for every head.

    Distances become whole block diagonals, so the window is at least window_tokens wide. Packed documents have first
    tokens of their own.
    """

    name, causal, keeps_documents, recordable = "sink-window", True, True, True
    help = "first and nearest tokens"
    sink_tokens: int = count(30, "first tokens kept", option="--sinks", least=0)
    window_tokens: int = count(1024, "nearest tokens kept", option="--window")

    @property
    def most_columns(self) -> int:
        """The sinks."""
        return self.sink_tokens

    def most_columns_of(
        self, first: NDArray[np.int64], tokens: NDArray[np.int64], block_size: int
    ) -> NDArray[np.int64]:
        """The sinks of each."""
        return np.minimum(tokens, self.sink_tokens)

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        tokens = torch.arange(shard.seq_len_tokens, device=shard.q.device).expand(shard.heads, -1)
        first, capacity = torch.zeros_like(tokens), min(self.sink_tokens, shard.seq_len_tokens)
        if shard.documents is not None and self.sink_tokens:
            packed = documents_of(shard.documents, shard.seq_len_tokens)
            capacity = sum(min(self.sink_tokens, one.tokens) for one in packed)
            documents = shard.documents[: shard.seq_len_tokens].contiguous()
            first = torch.searchsorted(documents, documents)
        columns = positions_of(tokens - first < self.sink_tokens, capacity)
        return shard.chosen(diagonals_of(tokens < self.window_tokens, shard.block_size), columns)


def dense(seq_len_tokens: int) -> SinkWindow:
    """Return the selector under which every token of a sequence sees all before it."""
    return SinkWindow(sink_tokens=0, window_tokens=seq_len_tokens)
