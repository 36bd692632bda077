"""What a model's configuration and modules say: attention shape, decoder layers, the modules that attend, the head.

Shape legend: H query heads, H_kv K/V heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Module, ModuleList
from transformers import PreTrainedModel

from ...planner.plan import ModelShape
from ...traces.errors import UnsupportedError, shown
from ...traces.validation import validated
from ..pattern.form import WHOLE, Reach
from .head_sizes import head_sizes, most_heads

# How a model scales its logits, by the name of the setting: as a factor of hidden @ weight.T.
SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1, "logits_mup_width_multiplier": -1}
WINDOW, CHUNK = "sliding_window", "attention_chunk_size"
# GPT-Neo's words for the same: a list of "global" and "local", and how far the latter look.
LOCAL_KINDS, LOCAL_WINDOW = "attention_layers", "window_size"
ATTENTION_SOFTCAP = "attn_logit_softcapping"
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

ROUTER_LOGITS = "output_router_logits"  # transformers' setting: compute the loss of the routers, and add it
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


# Of models that have an encoder too, the causal language model is the decoder.
OF_THE_DECODER = {"num_attention_heads": "decoder_attention_heads", "num_hidden_layers": "decoder_layers"}


def setting(config: Any, name: str) -> Any:
    """Return one setting of a configuration, None where it has none, or where it differs from layer to layer."""
    if type(own := getattr(config, OF_THE_DECODER.get(name, ""), None)) is int:
        return own
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers: "a per-layer attribute and may vary across layers"
        return None


def model_shape(config: Any) -> ModelShape:
    """Return the attention shape that a transformers configuration states: of heads, those that hold all layers'.

    UnsupportedError where it states none.
    """
    text = text_config(config)
    found = {name: setting(text, name) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")}
    if found["num_attention_heads"] is None and type(found["num_hidden_layers"]) is int:
        found["num_attention_heads"] = most_heads(text, layers=found["num_hidden_layers"])
    for name, value in found.items():
        if type(value) is not int or value < 1:
            raise UnsupportedError(f"is {shown(value)}, or not one for all layers", field=name)
    heads, layers, _ = found.values()
    sizes = head_sizes(text, heads=heads, layers=layers)
    reaches = layer_reaches(text)
    shape = {
        "layers": layers, "heads": heads, "kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim,
        "windows": [reach.window_tokens for reach in reaches], "chunks": [reach.chunk_tokens for reach in reaches],
        "softcap": attention_softcap(text),
    }  # fmt: skip
    return validated(ModelShape, shape, "the model's configuration")


def layer_reaches(config: Any) -> tuple[Reach, ...]:
    """Return how far back each layer looks: by its kind where the configuration names kinds, else all alike.

    What a configuration states in other words than these is not known here. The audit, which compares the whole model
    with its own attention, finds it.
    """
    text = text_config(config)
    layers, kinds = setting(text, "num_hidden_layers"), setting(text, "layer_types")
    count = layers if type(layers) is int else 0
    lengths = {name: found[name] if (found := positive_settings(text, (name,))) else 0 for name in (WINDOW, CHUNK)}
    window = lengths[WINDOW] if setting(text, "use_sliding_window") is not False else 0
    local = setting(text, LOCAL_KINDS)
    if isinstance(local, list | tuple) and len(local) == count:
        near = Reach(window_tokens=positive_settings(text, (LOCAL_WINDOW,)).get(LOCAL_WINDOW, 0))
        return tuple(near if kind == "local" else WHOLE for kind in local)
    if not isinstance(kinds, list | tuple) or len(kinds) != count:
        return (Reach(window_tokens=window, chunk_tokens=lengths[CHUNK]),) * count
    known = {"sliding_attention": Reach(window_tokens=window), "chunked_attention": Reach(chunk_tokens=lengths[CHUNK])}
    return tuple(known.get(str(kind), WHOLE) for kind in kinds)


def attention_softcap(config: Any) -> float | None:
    """Return the softcap of a model's attention scores, None where it has none."""
    found = positive_settings(config, (ATTENTION_SOFTCAP,), int | float)
    return float(found[ATTENTION_SOFTCAP]) if found else None


def text_config(config: Any) -> Any:
    """Return the configuration of a language model. UnsupportedError where it is a part of a larger model's."""
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise UnsupportedError("holds several language models", field=config.model_type) from error
    if text is not config:
        raise UnsupportedError(f"holds more than the language model {text.model_type!r}, which alone can be split",
                               field=config.model_type)  # fmt: skip
    return text


def positive_settings(config: Any, names: Iterable[str], kind: Any = int) -> dict[str, Any]:
    """Return those of the settings that are numbers above 0, in the order of the names."""
    found = {name: setting(config, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, kind) and value > 0}


def head_form(config: Any) -> tuple[float, float | None]:
    """Return (scale, softcap) of the logits: softcap * tanh(scale * x / softcap), or scale * x without a softcap."""
    text, scale, softcap = text_config(config), 1.0, None
    for name, value in positive_settings(text, SCALES, int | float).items():
        scale *= float(value) ** SCALES[name]
    for value in positive_settings(text, SOFTCAPS, int | float).values():
        softcap = float(value)
    return scale, softcap


def active_parameters(model: PreTrainedModel) -> int | None:
    """Return how many parameters a token meets: of experts, those that it visits. None where the number is not said."""
    text = text_config(model.config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters()) - experts
    if not experts:
        return total
    counts = list(positive_settings(text, EXPERTS).values())
    visited = list(positive_settings(text, EXPERTS_OF_A_TOKEN).values())
    return total + experts * visited[0] // counts[0] if counts and visited else None


def asks_for_router_loss(model: PreTrainedModel) -> bool:
    """Whether a model's configuration adds the loss of its routers."""
    return bool(setting(model.config, ROUTER_LOGITS))


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """Return the modules that call the attention interface: those that know their layer, and are causal or not or look
    the interface up."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and (hasattr(m, "is_causal") or _looks_up(m))]


def _looks_up(module: Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def model_body(model: PreTrainedModel) -> PreTrainedModel:
    """Return what computes hidden states below the head: transformers' base model, wherever the class keeps it."""
    body = model.base_model
    if not isinstance(body, PreTrainedModel) or body is model:
        inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        body = inner[0] if inner else model
    while body is not model and isinstance(only := _only_child(body), PreTrainedModel):
        body = only  # a wrapper around a decoder, which the model calls past it
    return body


def _only_child(module: Module) -> Module | None:
    children = list(module.children())
    return children[0] if len(children) == 1 else None


def decoder_layers(model: PreTrainedModel) -> list[Module]:
    """Return the decoder layers in order: the outermost list of modules with as many entries as the model has layers.

    Of a model whose decoder layers attend more than once, the list that its `num_layers` counts. UnsupportedError when
    there is none.
    """
    text = text_config(model.config)
    counts = [found for name in ("num_hidden_layers", "num_layers") if type(found := setting(text, name)) is int]
    for count in counts:
        for module in model_body(model).modules():
            if isinstance(module, ModuleList) and len(module) == count:
                return list(module)
    raise UnsupportedError(f"{type(model).__name__} has no list of {counts} decoder layers", field="model")


def check_angles(model: Module) -> None:
    """Refuse rotation frequencies below float32, which lose relative positions at long range, as TF32 would."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype not in (torch.float32, torch.float64):
            told = f"is {buffer.dtype}, float32 is needed: load the model with dtype= instead of converting it"
            raise UnsupportedError(told, field=name)
    if torch.backends.cuda.matmul.allow_tf32:
        raise UnsupportedError("is on: rotation angles would lose their positions", field="allow_tf32")
