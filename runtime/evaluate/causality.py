"""Whether what a model computes for a token depends on later tokens: the promise of a causal selector, tried out.

Shape legend: S tokens, V vocabulary, H query heads, N mask blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.mask import AttentionMask, whole
from ...kernels.select.probe import ShardTensors
from ...kernels.select.registry import Selector
from ...traces.errors import InputError
from ..hf.capture import in_eval_mode
from .attention import OneDeviceAttention, hidden_states
from .head import Head


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What changed of the tokens before the change.

    logits: the largest difference; rows: pairs of a layer and a head in which some of these tokens attend other keys.
    """

    logits: float
    rows: int


def seen_ahead(model: PreTrainedModel, ids: Tensor, selector: Selector, *, changed: Tensor, block_size: int) -> Ahead:
    """Return how tokens depend on later ones that differ between ids and changed, both int64 [S].

    The first of these must begin a block: rows of the block that it lies in may depend on it. Takes [S, S] values a
    head, so it is for short sequences. InputError where nothing differs, or where what does begins within a block.
    """
    differs = (ids != changed).nonzero()
    first = int(differs[0]) if differs.numel() else ids.shape[0]
    if first == ids.shape[0] or first % block_size:
        raise InputError(f"first differ at token {first}, which begins no block of {block_size}", field="changed")
    head = Head(model)
    with in_eval_mode(model):
        before, after = (_run(model, one, selector, block_size) for one in (ids, changed))
    logits = head.logits(before[0][:first]) - head.logits(after[0][:first])
    rows = sum(_rows_differ(*masks, first) for masks in zip(before[1], after[1], strict=True))
    return Ahead(logits=float(logits.abs().max()) if first else 0.0, rows=rows)


def _run(
    model: PreTrainedModel, ids: Tensor, selector: Selector, block_size: int
) -> tuple[Tensor, list[AttentionMask]]:
    """Return hidden states [S, E], and the masks that were chosen on the way."""
    masks: list[AttentionMask] = []

    def note(layer: int, mask: AttentionMask, shard: ShardTensors, scale: float) -> None:
        masks.append(mask)

    attention = OneDeviceAttention(selector=selector, block_size=block_size, watch=note)
    return hidden_states(model, ids, attention), masks


def _rows_differ(one: AttentionMask, other: AttentionMask, first: int) -> int:
    """Return in how many heads any of the first tokens attends other keys."""
    rows = torch.arange(first, device=one.active.device)
    return sum(
        not torch.equal(whole(one, head, rows, rows), whole(other, head, rows, rows)) for head in range(one.heads)
    )
