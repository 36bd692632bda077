"""Token ids to the summed loss without logits: a model's body, its head, its scale and cap, and the cross-entropy.

Shape legend: B sequences, S_own tokens of this rank's shard.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from .losses import LossName, linear_cross_entropy_sum
from .shape import ROUTER_LOGITS, asks_for_router_loss, head_form, model_body


class ModelWithLoss(Module):
    """The loss that the model itself computes (the audit compares), over chunks of tokens: full logits never exist."""

    def __init__(self, model: PreTrainedModel, implementation: LossName, *, chunk_tokens: int) -> None:
        super().__init__()
        if getattr(model.get_output_embeddings(), "weight", None) is None:
            raise UnsupportedError(f"{type(model).__name__} has no output embedding", field="model")
        self.model = model
        self._body = [model_body(model)]  # in a list: it is a part of `model` already, not another module
        self._has_neck = bool(_parameters_between(model, self._body[0]))
        self._scale, self._softcap = head_form(model.config)
        # Attached routers are summed up in each layer: their logits need not be kept for all of them.
        self._asked = {ROUTER_LOGITS: False} if asks_for_router_loss(model) else {}
        self._settings: Any = {"implementation": implementation, "chunk_tokens": chunk_tokens}

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the token losses of this rank's shard. All int64 [B, S_own]; labels are shifted already."""
        head: Any = self.model.get_output_embeddings()
        given = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **self._asked}
        hidden = _before_head(self.model, head, given) if self._has_neck else self._body[0](**given)[0]
        bias = getattr(head, "bias", None)
        if self._scale != 1.0:
            hidden = hidden * self._scale
            bias = None if bias is None else bias * self._scale
        return linear_cross_entropy_sum(
            hidden.flatten(0, 1), head.weight.to(hidden.dtype), labels.flatten(), softcap=self._softcap,
            bias=None if bias is None else bias.to(hidden.dtype), **self._settings,
        )  # fmt: skip


def _parameters_between(model: PreTrainedModel, body: Module) -> list[Tensor]:
    """Return the parameters of what stands between body and head (BERT's transform before its vocabulary)."""
    head: Any = model.get_output_embeddings()
    known = {id(parameter) for module in (body, head) for parameter in module.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in known]


def _before_head(model: PreTrainedModel, head: Module, given: dict[str, Any]) -> Tensor:
    """Return what a model hands to its head, by its own forward, in which the head does nothing."""
    seen: list[Tensor] = []

    def nothing(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    head.forward = nothing
    try:
        model(**given)
    finally:
        del head.forward
    return seen[0]
