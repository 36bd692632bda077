"""The load-balancing loss of routers, over all ranks whose tokens a model alone would see together.

Switch Transformers (arXiv 2101.03961, equations 4 to 6), as transformers computes it over the routers of all layers:

    E * sum over experts e of (choices of e / rows) * (sum of e's probabilities / rows),    rows: tokens * layers

A product of two means: those of a shard do not add up to it. But the number of choices has no gradient. Once ranks have
added up their choices and rows, the loss is linear in the probabilities, so each rank's part, with its own
probabilities, has exactly the gradients of its own tokens, and the parts add up to the loss. Only E + 1 whole numbers
travel. The sums are taken inside of each layer, so that checkpointed layers keep nothing for them but E numbers.

Shape legend: T tokens of this rank (all its sequences), S_own tokens of its shard of one sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from .shape import (
    EXPERTS_OF_A_TOKEN,
    ROUTER_LOGITS,
    asks_for_router_loss,
    model_body,
    positive_settings,
    setting,
    text_config,
)

COEFFICIENT = "router_aux_loss_coef"
Total = Callable[[Tensor], Tensor]  # adds up a tensor of whole numbers over ranks; collective


class RouterLoss:
    """What the routers of one model choose in a forward pass, and this rank's part of their loss.

    is_token: bool [S_own], which rows of a sequence are tokens and no padding. total: adds up over all ranks. A deep
    copy of the model shares this object. UnsupportedError where the model's routers are not known.
    """

    def __init__(self, model: PreTrainedModel, is_token: Tensor, total: Total) -> None:
        config = text_config(model.config)
        coefficient, chosen = setting(config, COEFFICIENT), positive_settings(config, EXPERTS_OF_A_TOKEN)
        if not isinstance(coefficient, int | float):
            raise UnsupportedError(f"is on, but {COEFFICIENT} is {coefficient}: what the model makes of its routers' "
                                   "logits is not known", field=ROUTER_LOGITS)  # fmt: skip
        if not chosen:
            raise UnsupportedError("is on, but the configuration does not say how many experts a token visits",
                                   field=ROUTER_LOGITS)  # fmt: skip
        self.coefficient, self._top_k = float(coefficient), next(iter(chosen.values()))
        self._is_token, self._total = is_token, total
        self._tokens, self._rows = int(is_token.sum()), 0
        routers, self._index = _routers(model)
        self._expected = len(routers)
        self._trains = [parameter for router in routers for parameter in router.parameters()]
        self._seen: list[tuple[Tensor, Tensor]] = []  # (choices int64 [E], sums of probabilities [E]) of each layer
        self._is_open = False
        uncompiled: Any = torch.compiler.disable
        body: Module = model_body(model)
        self._hooks = [
            body.register_forward_pre_hook(uncompiled(lambda *_: self._begin())),
            body.register_forward_hook(uncompiled(lambda *_: self._end())),
            *(router.register_forward_hook(uncompiled(lambda _, __, out: self._note(out))) for router in routers),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterLoss:
        """A copy of the model notes its choices here: ranks must call copies in the same order."""
        return self

    def detach(self) -> None:
        """See nothing any more."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """Return this rank's part of the last forward pass's loss, a scalar; parts of all ranks add up. Collective."""
        seen, self._seen = self._seen, []
        if len(seen) != self._expected:
            raise UnsupportedError(
                f"is on, but {len(seen)} of {self._expected} routers were asked", field=ROUTER_LOGITS
            )
        choices = torch.stack([one for one, _ in seen]).sum(0)
        mass = torch.stack([one for _, one in seen]).sum(0)
        if torch.is_grad_enabled() and not mass.requires_grad and any(p.requires_grad for p in self._trains):
            raise UnsupportedError("is on, but no gradient reaches the routers: checkpoint layers with "
                                   "use_reentrant=False", field=ROUTER_LOGITS)  # fmt: skip
        rows = self._rows * self._expected
        counted = self._total(torch.cat([choices, torch.full_like(choices[:1], rows)])).to(mass.dtype)
        experts = choices.numel()
        return experts * ((counted[:experts] / counted[experts]) * (mass / counted[experts])).sum()

    def _begin(self) -> None:
        self._seen, self._is_open = [], True

    def _end(self) -> None:
        self._is_open = False

    def _note(self, output: Any) -> None:
        """Sum up what a router says of its tokens. Runs again where a layer is recomputed, and is then not kept."""
        logits: Tensor = output[self._index] if isinstance(output, tuple) else output
        # In the logits' type, as transformers has it: which experts are counted must not depend on more digits.
        shares = torch.nn.functional.softmax(logits.flatten(0, -2), dim=-1)
        counts = self._is_token.to(shares.device).repeat(shares.shape[0] // self._is_token.numel())
        wide = shares.to(torch.promote_types(shares.dtype, torch.float32))
        mass = (wide * counts[:, None]).sum(0)
        if not self._is_open:
            return
        with torch.no_grad():
            experts = torch.topk(shares, self._top_k, dim=-1).indices
            choices = torch.zeros(shares.shape[1], dtype=torch.int64, device=shares.device)
            choices.scatter_add_(0, experts.flatten(), counts.long().repeat_interleave(self._top_k))
        self._rows = self._tokens * (shares.shape[0] // self._is_token.numel())
        self._seen.append((choices, mass))


def router_loss_of(model: PreTrainedModel, is_token: Tensor, total: Total) -> RouterLoss | None:
    """Return the loss of a model's routers, None where its configuration does not ask for one."""
    return RouterLoss(model, is_token, total) if asks_for_router_loss(model) else None


def _routers(model: PreTrainedModel) -> tuple[list[Module], int]:
    """Return a model's routers and which of their outputs the logits are, as transformers records them."""
    recorded: Any = getattr(model_body(model), "_can_record_outputs", None) or {}
    found = recorded.get(ROUTER_LOGITS.removeprefix("output_"))
    kind, index = getattr(found, "target_class", None), getattr(found, "index", None)
    routers = [] if not isinstance(kind, type) else [one for one in model.modules() if isinstance(one, kind)]
    if not routers or not isinstance(index, int):
        raise UnsupportedError(f"is on, but {type(model).__name__} does not say which modules its routers are",
                               field=ROUTER_LOGITS)  # fmt: skip
    return routers, index
