"""The loss of classes that compute it themselves: over a shard, their mean would be of the shard's own labels.

transformers' loss functions divide by `num_items_in_batch` and take labels that are shifted already; older classes call
torch's cross-entropy in their forward. Attached, these are called without labels, and get the same sum over the
shard's labels, divided by those of all ranks.

Shape legend: B batch, S_own tokens of this rank's shard, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from ....traces.errors import UnsupportedError
from ..losses import IGNORED_LABEL

OWN = {"CrossEntropyLoss", "cross_entropy"}
LABELS = ("labels", "shift_labels", "num_items_in_batch")


def computes_own_loss(model: Module, body: Module) -> bool:
    """Whether a class, or a head of it, calls torch's cross-entropy, rather than the loss that transformers gives it.

    body: what computes hidden states, where no loss is.
    """
    heads = [child for child in model.children() if all(module is not child for module in body.modules())]
    heads = [child for child in heads if all(module is not body for module in child.modules())]
    for module in (model, *heads):
        names = set(inspect.unwrap(type(module).forward).__code__.co_names)
        if names & OWN and "loss_function" not in names:
            return True
    return False


def token_loss(logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    """Return the sum of cross-entropies divided by count: logits [B, S_own, V], labels [B, S_own] as they are."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = torch.nn.functional.cross_entropy(wide, labels.flatten().to(wide.device), ignore_index=IGNORED_LABEL,
                                              reduction="sum")  # fmt: skip
    return total / count


class OwnLoss:
    """Takes over the loss of an attached model where its class computes it. A deep copy of the model shares it."""

    def __init__(self, model: Module, body: Module) -> None:
        self.is_taken_over = computes_own_loss(model, body)
        self._waiting: tuple[Tensor, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies are called one after the other."""
        return self

    def before_model(self, module: Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep labels and their count from the class."""
        self._waiting = None
        if not self.is_taken_over or keywords.get("shift_labels") is None:
            return args, keywords
        if keywords.get("return_dict") is False:
            raise UnsupportedError("is off; the loss is added by name", field="return_dict")
        self._waiting = (keywords["shift_labels"], keywords["num_items_in_batch"])
        return args, {name: value for name, value in keywords.items() if name not in LABELS}

    def after_model(self, output: Any) -> Any:
        """Add the loss of this shard to what the model returns."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            output["loss"] = token_loss(output.logits, *waiting)
        return output
