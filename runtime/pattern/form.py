"""What a layer's attention is beside its pattern of blocks and columns: its own window or chunks, a softcap, sinks.

Shape legend: H query heads, N mask blocks of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...traces.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far back a model lets a layer look, in tokens; 0 where there is no such limit.

    window_tokens: query i attends key j where i - j is less. chunk_tokens: where i // chunk and j // chunk are equal.
    """

    window_tokens: int = 0
    chunk_tokens: int = 0

    def limits(self, seq_len_tokens: int) -> bool:
        """Whether it takes anything away in sequences of so many tokens."""
        return any(0 < tokens < seq_len_tokens for tokens in (self.window_tokens, self.chunk_tokens))

    def allowed(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return bool [S_q, S_k]: what it leaves, whatever causality takes besides."""
        q, k = q_positions.long()[:, None], k_positions.long()[None, :]
        allowed = torch.ones_like(q - k, dtype=torch.bool)
        if self.window_tokens:
            allowed = q - k < self.window_tokens
        if self.chunk_tokens:
            allowed = allowed & (q // self.chunk_tokens == k // self.chunk_tokens)
        return allowed

    def mask(
        self, *, heads: int, seq_len_tokens: int, block_size: int, device: torch.device,
        documents: Tensor | None = None,
    ) -> AttentionMask:  # fmt: skip
        """Return the pattern of a layer that attends all that this leaves, the same for all heads, without columns.

        documents: int32 [>= seq_len_tokens], of packed sequences. UnsupportedError for chunks within documents: models
        do not agree on where these begin.
        """
        blocks = -(-seq_len_tokens // block_size)
        diagonals = torch.arange(blocks)
        is_cut_by_window = 0 < self.window_tokens < seq_len_tokens
        active = torch.zeros(blocks, dtype=torch.bool) if is_cut_by_window else torch.ones(blocks, dtype=torch.bool)
        if 0 < self.chunk_tokens < seq_len_tokens:
            if documents is not None:
                raise UnsupportedError(f"of {self.chunk_tokens} tokens, in packed documents", field="attention chunks")
            documents = (torch.arange(seq_len_tokens) // self.chunk_tokens).to(torch.int32).to(device)
            active &= diagonals <= (self.chunk_tokens + block_size - 2) // block_size
        return AttentionMask(
            seq_len_tokens=seq_len_tokens, block_size=block_size, documents=documents,
            active=active.expand(heads, -1).contiguous().to(device),
            windows=(self.window_tokens,) * heads if is_cut_by_window else None,
            own_blocks=not is_cut_by_window or self.window_tokens >= block_size,
        )  # fmt: skip


WHOLE = Reach()


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionForm:
    """How a layer's scores become weights. softcap: scores are softcap * tanh(score / softcap). sinks [H]: learned.

    reach: what the model itself leaves of the sequence, which the pattern that attention is called with has too.
    """

    softcap: float | None = None
    sinks: Tensor | None = None
    reach: Reach = WHOLE

    def require_plain(self, seq_len_tokens: int, *, about: str) -> None:
        """Raise UnsupportedError, naming what is not, unless this is the plain softmax over all earlier tokens."""
        if self.softcap is not None:
            raise UnsupportedError(f"is {self.softcap}; {about} has none", field="softcap")
        if self.sinks is not None:
            raise UnsupportedError(f"are learned; {about} has none", field="sinks")
        if self.reach.limits(seq_len_tokens):
            tokens = self.reach.window_tokens or self.reach.chunk_tokens
            raise UnsupportedError(f"is {tokens} tokens; {about} attends everything before", field="window")


PLAIN = AttentionForm()
