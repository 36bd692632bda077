"""A model under evaluation: what runs it densely and sparsely, and what is read from its hidden states.

Shape legend: S tokens, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.select.registry import Selector
from .attention import OneDeviceAttention, Watch, hidden_states
from .head import Head
from .heldout import Text, pieces
from .result import Arm


@dataclass(frozen=True, kw_only=True, eq=False)
class Runner:
    """Runs one model as it stands. selector: of the sparse arm, None where there is none; dense: whether that is run.

    ran: what computed attention in each arm.
    """

    model: PreTrainedModel
    selector: Selector | None
    block_size: int
    dense: bool
    head: Head
    ran: dict[Arm, set[str]] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Dense attention, sparse attention, or both."""
        if self.selector is None:
            return ("dense",)
        return ("dense", "sparse") if self.dense else ("sparse",)

    def hidden(self, arm: Arm, text: Text, watch: Watch | None = None) -> Tensor:
        """Return the last hidden states [S, E] of a sequence. watch: is told of every mask that is chosen."""
        documents = None if text.documents is None else text.documents.to(self.model.device)
        return self._run(arm, text.ids, positions=text.positions, documents=documents, watch=watch)

    def cut_losses(self, arm: Arm, text: Text, context_tokens: int) -> Tensor:
        """Return the losses [S], on the host, of a sequence that is read in pieces of context_tokens."""
        losses = torch.zeros(text.ids.shape[0], dtype=torch.float64)
        for first, until, counted in pieces(text.ids.shape[0], context_tokens):
            piece = text.piece(first, until)
            rows = slice(counted - first, until - first)
            losses[counted:until] = self.head.losses(self.hidden(arm, piece)[rows], piece.labels[rows])
        return losses

    def best(self, arm: Arm, ids: Tensor, rows: Tensor) -> Tensor:
        """Return int64 [S] on the host: the most likely token after each of some rows of ids [S]; -1 elsewhere."""
        hidden = self._run(arm, ids)
        best = torch.full_like(ids, -1)
        best[rows] = self.head.best(hidden[rows.to(hidden.device)])
        return best

    def _run(
        self, arm: Arm, ids: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:  # fmt: skip
        attention = OneDeviceAttention(
            selector=self.selector if arm == "sparse" else None, block_size=self.block_size, documents=documents,
            watch=watch, ran=self.ran.setdefault(arm, set()),
        )  # fmt: skip
        return hidden_states(self.model, ids, attention, positions=positions)
