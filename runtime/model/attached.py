"""Making a Hugging Face model use a plan: `attach` replaces its attention, and guards how the model is called.

Shape legend: B batch, S_own tokens of this rank's shard, H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...kernels.mask import AttentionMask
from ...traces.errors import InputError, UnsupportedError
from ..attention.heads import Chooser
from ..pattern.form import PLAIN, AttentionForm
from .calls.asked import attention_form, key_bias, refuse_masks
from .calls.own_loss import OwnLoss
from .calls.placing import Placing, arguments
from .calls.positions import PositionGuard
from .calls.written_out import BODY_CALLS, WrittenOutLayers, zero_masks
from .head_sizes import biased, falling, fitted
from .shape import (
    ROUTER_LOGITS,
    asks_for_router_loss,
    attention_modules,
    decoder_layers,
    layer_reaches,
    model_body,
    model_shape,
)

# transformers gives names that contain "flash" or "sdpa" a meaning of its own; this one has none.
ATTENTION_NAME = "sparsering_planned"
# Of classes that write their attention out and ask nobody.
WRITTEN_OUT_NAME = "sparsering_written_out"
OUR_NAMES = (ATTENTION_NAME, WRITTEN_OUT_NAME)
# What the model's own loss needs beside labels, and what it would do without.
LOSS_ARGUMENTS = {"shift_labels": "shift them again", "num_items_in_batch": "be this rank's own mean"}
OTHER_SEQUENCES = ("encoder_hidden_states", "pixel_values")
LayerMask = Callable[[int], AttentionMask | Chooser]
FirstLoss = Callable[[Module, dict[str, Any]], None]  # of the model and its arguments, see `first_loss.py`


class Attention(Protocol):
    """Attention over many ranks: `PlannedAttention`, or a baseline that ignores the mask."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return out [B, S_own, H, D] of one of the model's layers."""
        ...

    def close(self) -> None:
        """Free what it holds."""


class Routers(Protocol):
    """The loss of a model's routers over all ranks: `router_loss.RouterLoss`."""

    coefficient: float

    def take(self) -> Tensor:
        """Return this rank's part of the last forward pass's loss; parts of all ranks add up. Collective."""
        ...

    def detach(self) -> None:
        """See nothing any more."""


class Attached:
    """A model whose attention runs by a plan. Hand every rank's model its own shard of the batch (see `shard`).

    masks: of every layer; without them attention is called with None. positions: int64 [S_own], this rank's tokens of
    the seq_len_tokens of a sequence: every call is held to them. one_sequence: whether patterns are chosen by data,
    which takes one sequence at a time. first_loss: called when the model first computes a loss, to compare ranks.
    router: the loss of the model's routers over all ranks; without it a model that adds one is refused. A deep copy of
    the model shares this object.
    """

    def __init__(
        self, model: PreTrainedModel, planned: Attention, masks: LayerMask | None = None, *, positions: Tensor,
        seq_len_tokens: int, one_sequence: bool = False, first_loss: FirstLoss | None = None,
        router: Routers | None = None,
    ) -> None:  # fmt: skip
        if model.config._attn_implementation in OUR_NAMES:
            raise InputError("is attached already: detach it first", field="model")
        self.model, self.planned, self.masks = model, planned, masks
        self.positions, self.seq_len_tokens = PositionGuard(positions), seq_len_tokens
        self._first_loss, self._one_sequence, self._detached = first_loss, one_sequence, False
        self._before = model.config._attn_implementation or "eager"
        self._modules, self.reaches = attention_modules(model), layer_reaches(model.config)
        self.shape = model_shape(model.config)
        self._hooks: list[Any] = []
        self._written_out: WrittenOutLayers | None = None
        self._name = self._take_over(model)
        for module in self._modules:
            module._sparsering = self
        self.router, self._adds_router_loss = router, False
        self._hooks += self._hooked(model, model_body(model))

    def _take_over(self, model: PreTrainedModel) -> str:
        """Have the model ask for its attention here; return the name under which it knows of that."""
        if self._modules and model._can_set_attn_implementation():
            model.set_attn_implementation(ATTENTION_NAME)
            if model.config._attn_implementation == ATTENTION_NAME:
                return ATTENTION_NAME
        self._modules = []
        self._written_out = WrittenOutLayers(decoder_layers(model), self.shape.heads, self._asked)
        self._hooks += self._written_out.hooks
        model.config._attn_implementation = WRITTEN_OUT_NAME  # masks are asked for by this name
        return WRITTEN_OUT_NAME

    def _hooked(self, model: PreTrainedModel, body: Module) -> list[Any]:
        """Watch and complete the calls of the model and of its body, in this order."""
        self._placing, self._own_loss = Placing(model, body), OwnLoss(model, body)
        uncompiled: Any = torch.compiler.disable  # the hooks look at values

        def before(module: Module, *steps: Any) -> list[Any]:
            return [module.register_forward_pre_hook(uncompiled(step), with_kwargs=True) for step in steps]

        def after(module: Module, *steps: Any) -> list[Any]:
            return [module.register_forward_hook(uncompiled(_of_output(step))) for step in steps]

        placing, loss = self._placing, self._own_loss
        return [
            *self._watch_written_out(body),
            *before(model, self._check_labels, self._take_over_routers, loss.before_model, placing.before_model),
            *after(model, loss.after_model, self._add_router_loss),
            *before(body, placing.before_body, self._check_call, placing.place),
            *after(body, lambda output: self.positions.settle()),
            *placing.hooks(),
        ]

    def _watch_written_out(self, body: Module) -> list[Any]:
        """Know when the body is called, whatever ends the call; what an interrupted one left open is closed."""
        layers = self._written_out
        if layers is None:
            return []

        def begin(module: Module, args: Any) -> None:
            layers.close()
            BODY_CALLS.begin()

        def end(module: Module, args: Any, output: Any) -> None:
            BODY_CALLS.end()

        uncompiled: Any = torch.compiler.disable
        return [
            body.register_forward_pre_hook(uncompiled(begin)),
            body.register_forward_hook(uncompiled(end), always_call=True),
        ]

    def _asked(
        self, module: Module, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None
    ) -> Tensor:
        """Attention that a class writes out."""
        if slopes is not None:
            at, length = self._placing.current, self.seq_len_tokens
            q, k = falling(q, k, slopes=slopes, scale=scale, positions=at, seq_len_tokens=length)
        return _attend(self, module, q, k, v, None, layer=layer, scaling=scale)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the model attends through the same channels: ranks must call copies in the same order."""
        return self

    def detach(self) -> None:
        """Give the model its own attention back. Channels stay, for what is attached next (comm/reuse.py)."""
        self._detached = True
        if self._written_out is not None:
            self._written_out.close()
            BODY_CALLS.end()
        if self._name == ATTENTION_NAME:
            self.model.set_attn_implementation(self._before)
        else:
            self.model.config._attn_implementation = self._before
        for module in self._modules:
            del module._sparsering
        for hook in self._hooks:
            hook.remove()
        if self.router is not None:
            self.router.detach()
        self.planned.close()

    def _check_labels(self, module: Module, args: Any, keywords: dict[str, Any]) -> None:
        """The model's own loss is right when it neither shifts labels again nor divides by this rank's count."""
        given = arguments(module, args, keywords)
        if given.get("labels") is None:
            return
        for name, otherwise in LOSS_ARGUMENTS.items():
            if given.get(name) is None:
                told = f"is missing beside labels: the loss would {otherwise} (pass all that shard() returns)"
                raise UnsupportedError(told, field=name)
        if self._first_loss is not None:
            self._first_loss(module, given)
            self._first_loss = None

    def _take_over_routers(self, module: Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Have the model leave the loss of its routers to `_add_router_loss`: its own would be of this shard."""
        own: Any = module  # this model or a copy of it
        asked = arguments(module, args, keywords).get(ROUTER_LOGITS)
        wanted = asks_for_router_loss(own) if asked is None else bool(asked)
        self._adds_router_loss = wanted and self.router is not None
        if not wanted:
            return args, keywords
        if self.router is None:
            raise UnsupportedError("is on; set it in the configuration, before the model is attached: the audit proves "
                                   "nothing about it otherwise", field=ROUTER_LOGITS)  # fmt: skip
        if asked is not None and ROUTER_LOGITS not in keywords:
            raise UnsupportedError("is given by place; give it by name", field=ROUTER_LOGITS)
        if not keywords.get("return_dict", getattr(own.config, "return_dict", True)):
            raise UnsupportedError("is off; the loss of routers is added by name", field="return_dict")
        return args, keywords | {ROUTER_LOGITS: False}

    def _add_router_loss(self, output: Any) -> Any:
        """Add this rank's part of the routers' loss to its part of the loss; parts of all ranks add up."""
        if not self._adds_router_loss or self.router is None:
            return output
        part = self.router.take()
        output["aux_loss"] = part
        if output.loss is not None:
            output["loss"] = output.loss + self.router.coefficient * part.to(output.loss.dtype)
        return output

    def _check_call(self, module: Module, args: Any, keywords: dict[str, Any]) -> None:
        own: Any = module  # this model or a copy of it
        if own.config._attn_implementation not in OUR_NAMES:
            self.require_attached()
            raise InputError(f"is {own.config._attn_implementation!r} since it was attached: ranks would attend within "
                             "their shards", field="attn_implementation")  # fmt: skip
        given = arguments(module, args, keywords)
        self._refuse_other_inputs(given)
        embeddings = None
        with suppress(NotImplementedError):  # a class that does not say which they are
            embeddings = own.get_input_embeddings()
        if getattr(embeddings, "neftune_noise_alpha", None) and getattr(embeddings, "training", False):
            raise UnsupportedError("depends on the length a rank sees; leave it out", field="neftune_noise_alpha")
        self.positions.check(given.get("position_ids"), self._placing.uncounted_in(given, self.seq_len_tokens))
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if self._one_sequence and tokens is not None and tokens.shape[0] != 1:
            raise UnsupportedError(f"is {tokens.shape[0]}; patterns are chosen for one sequence at a time",
                                   field="batch size")  # fmt: skip

    def _refuse_other_inputs(self, given: dict[str, Any]) -> None:
        """What is written out shows no mask to anybody, and cross-attention looks like any other."""
        for name in OTHER_SEQUENCES:
            if given.get(name) is not None:
                raise UnsupportedError(
                    "is another sequence; only a sequence's attention to itself is split", field=name
                )
        mask = given.get("attention_mask")
        if self._name == WRITTEN_OUT_NAME and isinstance(mask, Tensor) and not bool(mask.all()):
            raise UnsupportedError("marks padding; shard() pads, the model must not", field="attention_mask")

    def require_attached(self) -> None:
        """Raise InputError once it is detached."""
        if self._detached:
            raise InputError("was detached from its plan; attach it again", field="model")


def _of_output(step: Callable[[Any], Any]) -> Callable[[Module, Any, Any], Any]:
    """Return a hook that takes the output alone."""
    return lambda module, args, output: step(output)


def plain_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside of peft's wrapper, or the model itself; UnsupportedError for others."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is no transformers model", field="model")
    return inner


@torch.compiler.disable
def _planned_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function of transformers' interface: [B, H, S, D] in, [B, S, H, D] out."""
    attached: Attached | None = getattr(module, "_sparsering", None)
    if attached is None:
        raise UnsupportedError("has no plan: use sparsering.attach", field=type(module).__name__)
    return _attend(attached, module, query, key, value, attention_mask, layer=module.layer_idx, scaling=scaling,
                   dropout=dropout, **keywords), None  # fmt: skip


def _attend(
    attached: Attached, module: Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    layer: int, scaling: float | None, dropout: float = 0.0, **keywords: Any,
) -> Tensor:  # fmt: skip
    """Return attention [B, S, H, D] of one layer's [B, H, S, D]."""
    form = attention_form(
        module, query, key, attention_mask, dropout=dropout, keywords=keywords, reach=attached.reaches[layer],
        seq_len_tokens=attached.seq_len_tokens,
    )  # fmt: skip
    if torch.is_autocast_enabled(query.device.type):  # rotation may have left queries and keys in float32
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(low) for tensor in (query, key, value))
    scale = float(query.shape[3] ** -0.5 if scaling is None else scaling)
    if (bias := key_bias(attention_mask)) is not None:
        query, key = biased(query, key, bias=bias, scale=scale)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    attached.require_attached()
    mask = None if attached.masks is None else attached.masks(layer)
    heads, value_dim = q.shape[2], v.shape[3]
    if heads < attached.shape.heads and form.sinks is not None:
        raise UnsupportedError("are learned in a layer with fewer heads than others", field="s_aux")
    q, k, v = fitted(q, k, v, attached.shape)
    return attached.planned(q, k, v, mask, scale=scale, layer=layer, form=form)[:, :, :heads, :value_dim]


AttentionInterface.register(ATTENTION_NAME, _planned_attention)
AttentionMaskInterface.register(ATTENTION_NAME, refuse_masks)
AttentionMaskInterface.register(WRITTEN_OUT_NAME, zero_masks)
