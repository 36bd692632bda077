"""Models with faults planted in them: tokens meet outside attention, or a shard is taken for a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from model_cases import BASE, case_config
from sparsering.runtime.audit.audit import audit
from sparsering.runtime.audit.result import Audit

SEQ_LEN_TOKENS = 256
SMALL: dict[str, Any] = BASE


def audited(model_class: type[PreTrainedModel], config: Any = None, *, seq_len_tokens: int = SEQ_LEN_TOKENS) -> Audit:
    chosen = LlamaConfig(**SMALL) if config is None else config
    return audit(chosen, seq_len_tokens=seq_len_tokens, model_class=model_class, cache=None)


class Wrapped(Module):
    """A layer's MLP with something of a test's own after it."""

    def __init__(self, inner: Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class OwnLlama(LlamaForCausalLM):
    """A class of a user's own that changes nothing."""


class ConvolvedOverTime(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        for layer in layers:
            layer.mlp = Wrapped(layer.mlp, lambda x: x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class RunningMean(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[1].mlp = Wrapped(layers[1].mlp, lambda x: x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class AttentionOfItsOwn(LlamaAttention):
    """Causal attention by torch, whatever the interface says."""

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class IgnoresTheInterface(LlamaForCausalLM):
    """In its last layer only, so that the first calls the interface."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].self_attn = AttentionOfItsOwn(config, 1)


class ScaledHead(LlamaForCausalLM):
    """Its logits, and so its loss, are not what its head gives."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        labels, shifted = keywords.pop("labels", None), keywords.pop("shift_labels", None)
        count = keywords.pop("num_items_in_batch", None)
        output: Any = super().forward(*args, **keywords)
        output.logits = output.logits / 8.0
        if labels is not None:
            output.loss = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=shifted,
                num_items_in_batch=count,
            )  # fmt: skip
        return output


class PositionsFromArange(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rotary = self.model.rotary_emb
        plain = rotary.forward
        rotary.forward = lambda x, position_ids, *more: plain(x, torch.arange(x.shape[1])[None], *more)


class Memory(Module):
    """Adds the mean of what it saw in the call before."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner, self.before = inner, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x) + self.before
        self.before = x.detach().mean()
        return out


class RemembersTheLastCall(LlamaForCausalLM):
    """A cache: what it computes depends on what it was called with before."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[0].mlp = Memory(layers[0].mlp)


class RoutesByTheBatch(Qwen3MoeForCausalLM):
    """Every expert takes the tokens of the batch that want it most: a capacity."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        for layer in layers:
            layer.mlp = Wrapped(
                layer.mlp,
                lambda x: x * (x.norm(dim=-1) >= x.norm(dim=-1).median(dim=1, keepdim=True).values)[..., None],
            )


class NoisyLayers(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[0].mlp = Wrapped(layers[0].mlp, lambda x: x + 0.01 * torch.randn_like(x))


class ShiftsLabelsItself(LlamaForCausalLM):
    def forward(self, *args: Any, **keywords: Any) -> Any:
        labels = keywords.pop("labels", None)
        keywords = {name: v for name, v in keywords.items() if name not in ("shift_labels", "num_items_in_batch")}
        output: Any = super().forward(*args, **keywords)
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output


class Gate(Module):
    """Opens where there are many tokens: few give its parameter no gradient at all."""

    def __init__(self, inner: Module, width: int) -> None:
        super().__init__()
        self.inner, self.extra = inner, torch.nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out * self.extra if x.shape[1] > 16 else out


class UsesSomeParametersOnly(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[0].mlp = Gate(layers[0].mlp, config.hidden_size)


def shifted(x: Tensor) -> Tensor:
    """Let every token see the one before it."""
    return x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class ShiftedIf(Module):
    """An MLP in which tokens see their neighbours where a condition holds."""

    def __init__(self, inner: Module, condition: Callable[[Module, Tensor], bool]) -> None:
        super().__init__()
        self.inner, self.condition = inner, condition

    def forward(self, x: Tensor) -> Tensor:
        return shifted(self.inner(x)) if self.condition(self, x) else self.inner(x)


def shifting(condition: Callable[[Any, int, Module, Tensor], bool]) -> type[LlamaForCausalLM]:
    """Return a class whose layers let tokens see their neighbours where (config, layer, module, x) say so."""

    class Shifting(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            layers: Any = self.model.layers
            for number, layer in enumerate(layers):
                layer.mlp = ShiftedIf(layer.mlp, lambda module, x, n=number: condition(config, n, module, x))

    return Shifting


ManyTokens = shifting(lambda config, layer, module, x: x.shape[1] > 200)
LateLayers = shifting(lambda config, layer, module, x: layer >= 5)
LengthInADictionary = shifting(lambda config, layer, module, x: x.shape[1] > config.sparse_config["dense_len"])
LengthAsAFloat = shifting(lambda config, layer, module, x: x.shape[1] > config.dense_len)
OtherwiseInEval = shifting(lambda config, layer, module, x: not module.training)


class SegmentsByToken(LlamaForCausalLM):
    """Counts how often a special token came before: over the shard, not over the sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        embed = self.model.embed_tokens
        embed.register_forward_hook(lambda module, inputs, out: out + (inputs[0] == 2).cumsum(1)[..., None])


MOE = case_config("qwen3-moe")
OTHERS = r"what a token becomes depends on others|off by .*: split over ranks it is another model"
FAULTS = [
    (ConvolvedOverTime, None, OTHERS),
    (RunningMean, None, OTHERS),
    (IgnoresTheInterface, None, r"asked for by layers \[0\] of 2"),
    (ScaledHead, None, r"off by .* by the loss of train"),
    (PositionsFromArange, None, OTHERS),
    (RemembersTheLastCall, None, rf"off by .* when it is called a second time, alone|{OTHERS}"),
    (RoutesByTheBatch, MOE, OTHERS),
    (NoisyLayers, None, OTHERS),
    (UsesSomeParametersOnly, None, rf"gets a gradient only from some tokens|{OTHERS}"),
]
# What a small copy of few tokens, few layers, in training mode, would not show.
HIDDEN = [
    (ManyTokens, {}),
    (LateLayers, {"num_hidden_layers": 8}),
    (LengthInADictionary, {"sparse_config": {"dense_len": 200}}),
    (LengthAsAFloat, {"dense_len": 200.0}),
    (SegmentsByToken, {}),
    (OtherwiseInEval, {}),
]
