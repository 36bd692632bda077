"""From hidden states to losses, best tokens and differences of distributions, without the logits of a whole sequence.

Shape legend: S tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from ..model.losses import IGNORED_LABEL
from ..model.shape import head_form

LOGITS_AT_ONCE = 1 << 26  # elements: 256 MB in float32


class Head:
    """A model's head: its matrix, bias, scale and cap, as `head_loss.py` has them; the audit compares that loss.

    logits_at_once: the most elements of logits that exist at a time, of one sequence.
    """

    def __init__(self, model: PreTrainedModel, *, logits_at_once: int = LOGITS_AT_ONCE) -> None:
        head: Any = model.get_output_embeddings()
        if getattr(head, "weight", None) is None:
            raise UnsupportedError(f"{type(model).__name__} has no output embedding", field="model")
        self._weight, self._bias = head.weight, getattr(head, "bias", None)
        self._scale, self._softcap = head_form(model.config)
        self._rows = max(1, logits_at_once // self._weight.shape[0])

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [S, V] of hidden states [S, E], in promote(their type, float32)."""
        scores = hidden * self._scale if self._scale != 1.0 else hidden
        scores = scores @ self._weight.to(hidden.dtype).T
        if self._bias is not None:
            scores = scores + (self._bias * self._scale).to(scores.dtype)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores if self._softcap is None else self._softcap * torch.tanh(scores / self._softcap)

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return float64 [S] on the host: -log softmax(logits)[label] of each token, 0 where the label is -100."""
        labels = labels.to(hidden.device)
        parts = []
        for rows in self._chunks(hidden.shape[0]):
            scores, valid = self.logits(hidden[rows]), labels[rows] != IGNORED_LABEL
            target = torch.where(valid, labels[rows], 0)[:, None]
            losses = torch.logsumexp(scores, dim=-1) - scores.gather(1, target)[:, 0]
            parts.append(torch.where(valid, losses, 0).double())
        return torch.cat(parts).cpu()

    def best(self, hidden: Tensor) -> Tensor:
        """Return int64 [S] on the host: the most likely next token after each; ties go to the lower id."""
        return torch.cat([self.logits(hidden[rows]).argmax(-1) for rows in self._chunks(hidden.shape[0])]).cpu()

    def divergence(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return, float64 [S] on the host, KL(first || second) of the next tokens, and 1 where the best is the same."""
        apart, same = [], []
        for rows in self._chunks(first.shape[0]):
            one, other = self.logits(first[rows]), self.logits(second[rows])
            same.append((one.argmax(-1) == other.argmax(-1)).double())
            p, q = one.log_softmax(-1), other.log_softmax(-1)
            apart.append((p.exp() * (p - q)).sum(-1).double())
        return torch.cat(apart).cpu(), torch.cat(same).cpu()

    def _chunks(self, count: int) -> Iterator[slice]:
        return (slice(first, first + self._rows) for first in range(0, count, self._rows))
