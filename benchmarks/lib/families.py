"""transformers' families as causal language models: in which form each is audited, and what a refused one is."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d
from transformers import CONFIG_MAPPING, PreTrainedModel

from ...runtime.audit.audit import causal_class, small_model
from ...runtime.audit.proof import AUDITED_TOKENS, random_batch
from ...runtime.audit.small import make
from ...runtime.audit.twins import Double
from ...runtime.model.shape import attention_modules, setting, text_config

DROPOUT = re.compile("dropout|pdrop|layerdrop|jitter")
TWO_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
# Where the default configuration makes no model, or hides what the family is.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": TWO_ROPES},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "conv"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
}
POSITIONS = ("max_position_embeddings", "max_target_positions")
STATE = re.compile("linear|conv|mamba|recurrent")  # in the names of kinds of layers
LEAST_CHANGE = 1e-3  # of the largest logit: masks of finite numbers let a little through
CARRIES_STATE, LOOKS_AHEAD, NOT_ALONE = "carries a state", "looks ahead", "not from tokens alone"


def causal_form(family: str) -> tuple[Any, type[PreTrainedModel], str | None]:
    """Return the configuration and class in which a family is a causal language model, and what that is, if not plain.

    Dropout is off. Encoders are asked to be decoders, and of what holds more than a language model only that is taken.
    """
    default = CONFIG_MAPPING[family](**SETTINGS.get(family, {}))
    config: Any = type(default).from_dict(_without_dropout(default.to_dict()))
    model_class, text = causal_class(config), config.get_text_config(decoder=True)
    if type(text) is not type(config):
        own: Any = model_class.config_class
        model_class = model_class if own is type(text) else causal_class(text)
        return text, model_class, f"its language model alone, {model_class.__name__}"
    if getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder:
        config.is_decoder = True
        return config, model_class, "a decoder, is_decoder: true"
    return config, model_class, None


def _without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    for name, value in settings.items():
        if isinstance(value, dict):
            _without_dropout(value)
        elif isinstance(name, str) and DROPOUT.search(name) and isinstance(value, int | float) and value:
            settings[name] = 0.0
    return settings


def audited_tokens(config: Any, seq_len_tokens: int) -> int:
    """Return how long sequences of a family are audited: shorter where it has fewer positions."""
    positions = next((found for name in POSITIONS if type(found := getattr(config, name, None)) is int), None)
    if positions is None or not AUDITED_TOKENS <= positions < seq_len_tokens:
        return seq_len_tokens
    return (positions - 2) // 64 * 64  # some tables begin with two rows for padding


def not_causal_without_state(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str | None:
    """Return why a family that is refused is no causal language model whose tokens meet in attention; None if it is.

    It carries a state along the sequence; alone, an earlier token's logits change with a later token; or alone, it
    does not run from token ids and labels.
    """
    if any(STATE.search(str(kind)) for kind in getattr(config, "layer_types", None) or ()):
        return CARRIES_STATE
    with torch.device("meta"):
        if carries_state(make(config, model_class)):
            return CARRIES_STATE
    try:
        model = small_model(config, model_class, audited_tokens(config, seq_len_tokens))
    except Exception:  # nothing is known of it: it counts as one that should be right
        return None
    ids = random_batch(model.eval(), seed=4)["input_ids"]
    others = ids.clone()
    others[:, -1] = (ids[:, -1] + 1) % AUDITED_TOKENS
    try:
        before, after = (_logits(model, one)[:, :-1] for one in (ids, others))
        changes = float((before - after).abs().max())
    except Exception:  # what its own code says of being called so
        return NOT_ALONE
    return LOOKS_AHEAD if changes > LEAST_CHANGE * float(before.abs().max()) else None


def carries_state(model: PreTrainedModel) -> bool:
    """Whether layers keep a state along the sequence: convolutions over it, recurrences in the place of attention."""
    if any(isinstance(module, Conv1d) for module in model.modules()):
        return True
    attending = {module.layer_idx for module in attention_modules(model)}
    return model._is_stateful and len(attending) != setting(text_config(model.config), "num_hidden_layers")


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad(), Double():
        found: Any = model(input_ids=ids, labels=ids)
        return found.logits
