"""One rank's share of a training sequence: ids, positions, labels, and documents where they are honoured.

Nothing is to predict a token that only fills a block up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...planner.plan import Plan
from ..data.shards import TokenSequence
from ..model.shard import IGNORED_LABEL, shard
from .config import TrainConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """This rank's shard of one sequence. valid: labels that count; documents int32 [S]: for attention, or None."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    valid: int
    documents: Tensor | None


def cut(config: TrainConfig, sequence: TokenSequence, plan: Plan, *, rank: int, device: torch.device) -> Microbatch:
    """Cut one sequence for one rank, honouring documents as the configuration asks."""
    asked = config.data.documents
    ids = torch.from_numpy(sequence.tokens)[None]
    labels = ids.clone()
    starts = np.flatnonzero(np.diff(sequence.documents)) + 1
    if asked.loss:
        labels[0, torch.from_numpy(starts)] = IGNORED_LABEL
    if sequence.padding is not None:
        labels[0, torch.from_numpy(sequence.padding)] = IGNORED_LABEL
    part = shard({"input_ids": ids, "labels": labels}, plan, rank)
    positions = part["position_ids"]
    if asked.positions:
        first = torch.from_numpy(np.append(0, starts)[np.searchsorted(starts, positions.numpy(), side="right")])
        positions = torch.where(positions < plan.seq_len_tokens, positions - first, positions)  # padding keeps its own
    return Microbatch(
        input_ids=part["input_ids"].to(device),
        position_ids=positions.to(device),
        labels=part["labels"].to(device),
        valid=int((part["labels"] != IGNORED_LABEL).sum()),
        documents=torch.from_numpy(sequence.documents).to(device) if asked.attention else None,
    )
