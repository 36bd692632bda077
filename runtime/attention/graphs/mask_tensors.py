"""A mask taken apart, for recordings: its tensors, whose values change from layer to layer, and all that is fixed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from torch import Tensor

from ....kernels.mask import AttentionMask
from .graphs import Inputs

# What recordings call the tensors of an AttentionMask.
NAMES = {"mask_active": "active", "mask_columns": "columns", "mask_documents": "documents"}


def tensors_of(mask: AttentionMask) -> dict[str, Tensor | None]:
    """Return a mask's tensors by their names in recordings.

    No two recordings may share one: what is derived of a mask is kept with its tensors, and made by one recording.
    """
    return {name: getattr(mask, own) for name, own in NAMES.items()}


def fixed_of(mask: AttentionMask) -> Hashable:
    """Return all that launches depend on beside the values of a mask's tensors."""
    shapes = tuple(None if x is None else (x.shape, x.dtype) for x in tensors_of(mask).values())
    return mask.seq_len_tokens, mask.block_size, shapes, mask.windows, mask.anchors, mask.own_blocks


def with_tensors(mask: AttentionMask, inputs: Inputs) -> AttentionMask:
    """Return a mask that reads a recording's tensors, as `tensors_of` names them. Launches, if there are windows."""
    return replace(mask, **{own: inputs[name] for name, own in NAMES.items()})
