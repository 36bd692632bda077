"""Masks that a model made of its configuration and keeps in its layers, held to what the configuration says now."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from ..model.shape import decoder_layers, layer_reaches

SAMPLED_ROWS = 64


def refuse_other_masks(model: PreTrainedModel) -> None:
    """Raise UnsupportedError for a mask that is not causal attention within the reach that the layer has.

    Attention over ranks goes by the configuration: a model that was made with another window would look otherwise.
    """
    reaches = layer_reaches(model.config)
    for number, layer in enumerate(decoder_layers(model)[: len(reaches)]):
        for name, mask in _masks_of(layer):
            rows = torch.linspace(0, mask.shape[-1] - 1, min(SAMPLED_ROWS, mask.shape[-1]), device=mask.device).long()
            keys = torch.arange(mask.shape[-1], device=mask.device)
            wanted = (keys[None, :] <= rows[:, None]) & reaches[number].allowed(rows, keys)
            if not bool((mask[..., rows, :].bool() == wanted).all()):
                told = "is not the mask that the configuration gives: it was changed since the model was made"
                raise UnsupportedError(told, field=f"layer {number}.{name}")


def _masks_of(layer: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a layer, by name, that have a flag for every query and key."""
    for name, buffer in layer.named_buffers():
        square = buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1
        if square and buffer.dtype in (torch.bool, torch.uint8) and not buffer.is_meta:
            yield name, buffer
