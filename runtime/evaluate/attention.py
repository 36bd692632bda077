"""One forward pass on one device: hidden states of a sequence, attended densely or as a selector chooses.

Shape legend: S tokens, E hidden size, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.api import full_attention
from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ShardTensors
from ...kernels.select.registry import Selector
from ...traces.errors import UnsupportedError
from ..hf.capture import dense_causal, sparse_backend
from ..model.attached import Attached
from ..model.shape import ROUTER_LOGITS, asks_for_router_loss, model_body
from ..pattern.form import PLAIN, AttentionForm
from ..pattern.selectors import chosen_mask

TORCHS_OWN = "torch scaled_dot_product_attention"
Watch = Callable[[int, AttentionMask, ShardTensors, float], None]  # layer, its chosen mask, queries and keys, scale


@dataclass(kw_only=True, eq=False)
class OneDeviceAttention:
    """In the place of a model's attention (`model.attached.Attention`): all of a sequence on one device.

    selector: chooses the layers' patterns; None: dense. Layers that the model itself limits keep their own pattern.
    documents: int32 [S], which attention stays within; or None. watch: is told of every chosen mask. ran: names of what
    computed attention, once each.
    """

    selector: Selector | None
    block_size: int
    documents: Tensor | None = None
    watch: Watch | None = None
    ran: set[str] = field(default_factory=set)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return attention [1, S, H, D] of q [1, S, H, D], k and v [1, S, H_kv, D]."""
        if layer is None or q.shape[0] != 1:
            raise UnsupportedError(f"is {q.shape[0]}; one sequence at a time is evaluated", field="batch size")
        factor = float(q.shape[3] ** -0.5 if scale is None else scale)
        limited = form.reach.limits(q.shape[1])
        if self.selector is not None and not limited:
            chosen = self._choose(self.selector, q, k, layer=layer, scale=factor, form=form)
        elif limited or form.softcap is not None or form.sinks is not None or self.documents is not None:
            chosen = form.reach.mask(
                heads=q.shape[2], seq_len_tokens=q.shape[1], block_size=self.block_size, device=q.device,
                documents=self.documents,
            )  # fmt: skip
        else:
            self.ran.add(TORCHS_OWN)
            return dense_causal(q, k, v, scale=factor)
        backend = sparse_backend(q.device)
        self.ran.add(backend)
        given = {"softcap": form.softcap, "sinks": form.sinks}
        return full_attention(q, k, v, chosen, scale=factor, backend=backend, **given)[0]

    def close(self) -> None:
        """Nothing is held."""

    def _choose(
        self, selector: Selector, q: Tensor, k: Tensor, *, layer: int, scale: float, form: AttentionForm
    ) -> AttentionMask:
        shard = ShardTensors.whole(q, k, block_size=self.block_size, softcap=form.softcap, documents=self.documents)
        mask = chosen_mask(selector, shard, layer=layer, scale=scale)
        if self.watch is not None:
            self.watch(layer, mask, shard, scale)
        return mask


def hidden_states(
    model: PreTrainedModel, ids: Tensor, attention: OneDeviceAttention, *, positions: Tensor | None = None
) -> Tensor:
    """Return the last hidden states [S, E], below the head, of token ids [S]; the model is left as it was.

    positions: int64 [S]; None: 0, 1, 2, … Without gradients; the caller sees to eval mode.
    """
    positions = torch.arange(ids.shape[0]) if positions is None else positions
    positions = positions.to(model.device)
    asked = {ROUTER_LOGITS: False} if asks_for_router_loss(model) else {}
    attached = Attached(model, attention, positions=positions, seq_len_tokens=ids.shape[0])
    try:
        with torch.no_grad():
            body = model_body(model)
            given = {"input_ids": ids[None].to(model.device), "position_ids": positions[None]}
            return body(**given, use_cache=False, **asked)[0][0]
    finally:
        attached.detach()
