"""How evenly a model's experts are used: which share of all choices each expert of each layer gets, over all ranks.

What is counted is what experts are really called with, bias of the router and all, of tokens and not of padding. It
costs one pass over the choices a layer and one sum over ranks a step, and only in steps that are measured.

Shape legend: T tokens of this rank (all its sequences), S_own tokens of its shard of one sequence, E experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ...traces.errors import InputError
from ..model.router_loss import Total
from ..model.shape import decoder_layers, model_body

CHOICES = ("top_k_index", "router_indices")  # transformers' experts call each token's experts so, int [T, choices]
DIGITS = 6


class ExpertLoad:
    """Counts, while `on`, how often each expert of a model is chosen.

    is_token: bool [S_own], which rows of a sequence are tokens and no padding. total: adds up over all ranks.
    InputError where the model has no experts that are called with their tokens' choices.
    """

    def __init__(self, model: PreTrainedModel, is_token: Tensor, total: Total) -> None:
        self.on = False
        self._is_token, self._total = is_token, total
        experts = require_experts(model)
        self._counts: dict[int, Tensor] = {}  # int64 [E] of each layer that has experts
        self._is_open = False
        body: Module = model_body(model)
        self._hooks = [
            body.register_forward_pre_hook(lambda *_: self._open(True)),
            body.register_forward_hook(lambda *_: self._open(False)),
            *(one.register_forward_pre_hook(self._counting(layer), with_kwargs=True) for layer, one in experts.items()),
        ]

    def detach(self) -> None:
        """See nothing any more."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[str, Any]:
        """Return, and forget, what was counted, as values of metrics. Collective; waits for the device.

        expert_share_per_layer: of each layer with experts, each one's share of all choices. expert_imbalance_per_layer:
        the largest share over the mean one, 1 where all are used alike, None where nothing was chosen.
        """
        layers = [counts for _, counts in sorted(self._counts.items())]
        self._counts.clear()
        whole = self._total(torch.cat(layers)).split([len(counts) for counts in layers])
        shares, imbalances = [], []
        for counts in whole:
            share = counts.double() / counts.sum().clamp(min=1)
            shares.append([round(one, DIGITS) for one in share.tolist()])
            imbalances.append(round((share.max() / share.mean()).item(), DIGITS) if bool(counts.any()) else None)
        return {"expert_imbalance_per_layer": imbalances, "expert_share_per_layer": shares}

    def _open(self, is_open: bool) -> None:
        self._is_open = is_open  # and not when a layer is computed again

    def _counting(self, layer: int) -> Any:
        def count(experts: Any, args: Any, keywords: dict[str, Any]) -> None:
            if not (self.on and self._is_open):
                return
            given = inspect.signature(experts.forward).bind(*args, **keywords).arguments
            chosen: Tensor = next(given[name] for name in CHOICES if name in given)
            tokens = self._is_token.repeat(chosen.shape[0] // self._is_token.numel())
            counts = self._counts.get(layer)
            if counts is None:
                counts = torch.zeros(experts.num_experts, dtype=torch.int64, device=chosen.device)
                self._counts[layer] = counts
            counts.scatter_add_(0, chosen.flatten().long(), tokens.long().repeat_interleave(chosen.shape[1]))

        return count


def require_experts(model: PreTrainedModel) -> dict[int, Module]:
    """Return what holds the experts of each layer that has some, by layer. InputError where there are none to count."""
    experts = {layer: found for layer, one in enumerate(decoder_layers(model)) if (found := _experts(one))}
    if not experts:
        raise InputError(f"is on, but {type(model).__name__} has no experts that are told which tokens chose them",
                         field="metrics.expert_load")  # fmt: skip
    return experts


def _experts(layer: Module) -> Module | None:
    """Return the module of a layer that holds its experts and is called with each token's choices; None without."""
    for module in layer.modules():
        is_told = any(name in inspect.signature(module.forward).parameters for name in CHOICES)
        if is_told and isinstance(getattr(module, "num_experts", None), int):
            return module
    return None
