"""Cutting a batch of whole sequences for one rank: ids, positions, labels shifted over the whole sequence, their count.

Shape legend: B batch, S tokens of the whole sequence, S_own this rank's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...planner.plan import Plan
from ...traces.errors import InputError, UnsupportedError
from .losses import IGNORED_LABEL


def shard(batch: dict[str, Tensor], plan: Plan, rank: int, *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Cut a batch of whole sequences for one rank, once, in the data loader.

    batch: "input_ids" [B, S] with S the plan's seq_len_tokens, optionally "labels" [B, S] (default: the ids).
    Returns what `model(**part)` takes, in the rank's order of tokens:

    - "input_ids", "position_ids" [B, S_own];
    - "labels" [B, S_own], shifted over the whole sequence: entry t is what token t must predict, so no loss may shift
      again (the last token and padding have -100); "shift_labels" is the same tensor, under the name by which
      transformers' losses skip their own shift;
    - "num_items_in_batch", a scalar: the valid labels of all ranks, at least 1. transformers' losses divide the sum
      over this rank's tokens by it, so that the losses and gradients of all ranks *add up* to those of the whole batch.

    Raises InputError for another length, and UnsupportedError for a padding mask: `shard` pads by itself.
    """
    if not 0 <= rank < plan.world_size:
        raise InputError(f"must be below {plan.world_size}, not {rank}", field="rank")
    unknown = set(batch) - {"input_ids", "labels", "attention_mask"}
    if unknown:
        raise UnsupportedError(f"{sorted(unknown)} cannot be sharded", field="batch")
    if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
        raise UnsupportedError("marks padding; give whole sequences, shard() pads", field="attention_mask")
    ids = batch["input_ids"]
    labels = batch.get("labels", ids)
    if ids.dim() != 2 or ids.shape[1] != plan.seq_len_tokens or labels.shape != ids.shape:
        raise InputError(f"shapes {tuple(ids.shape)}, {tuple(labels.shape)} are not [B, {plan.seq_len_tokens}]",
                         field="input_ids, labels")  # fmt: skip
    placement = plan.make_placement()
    missing = placement.padded_tokens - plan.seq_len_tokens
    positions = torch.from_numpy(placement.positions(rank)).to(ids.device)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, missing + 1), value=IGNORED_LABEL)
    own_labels = shifted[:, positions]
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, missing), value=pad_token_id)[:, positions],
        "position_ids": positions.expand(ids.shape[0], -1),
        "labels": own_labels,
        "shift_labels": own_labels,
        "num_items_in_batch": (shifted != IGNORED_LABEL).sum().clamp(min=1),
    }
