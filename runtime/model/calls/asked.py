"""What a Hugging Face attention call may ask of us. Everything else is refused before any work is done.

transformers hands every attention function whatever keywords the model has; ignoring one that changes the result
(packed lengths, say) would be silently wrong. A softcap, learned sinks and the layer's own window are understood.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....traces.errors import UnsupportedError
from ...pattern.form import AttentionForm, Reach
from .mask_functions import refuse_own_functions

# They describe the call and do not change what attention returns.
HARMLESS = frozenset(
    {"cache_position", "labels", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits",
     "position_embeddings", "position_ids", "return_dict", "shift_labels", "use_cache"}
)  # fmt: skip
# Up to how many keys a model leaves to a query: DeepSeek's sparse attention, Doge's dynamic mask.
KEYS_OF_A_QUERY = ("index_topk", "keep_window_size")
CHOSEN_KEYS = "indices"  # of models that choose keys for each query; the configuration says up to where that is all


def attention_form(
    module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, *, dropout: float,
    keywords: dict[str, Any], reach: Reach, seq_len_tokens: int,
) -> AttentionForm:  # fmt: skip
    """Return what a call of causal attention of whole sequences on themselves asks for beside scores and their scale.

    query [B, H, S, D], key [B, H_kv, S, D] as transformers passes them: a sequence of seq_len_tokens, or a shard of it.
    reach: the layer's, as the configuration states it. UnsupportedError for anything else.
    """
    if attention_mask is not None and not _is_no_mask(attention_mask) and key_bias(attention_mask) is None:
        raise UnsupportedError("an explicit attention mask is not supported", field="attention_mask")
    if dropout:
        raise UnsupportedError(f"is {dropout}; attention dropout is not supported", field="dropout")
    if query.shape[2] != key.shape[2]:
        told = f"{query.shape[2]} queries on {key.shape[2]} keys: a key/value cache is not supported"
        raise UnsupportedError(told, field="attention")
    if not getattr(module, "is_causal", True) and not getattr(module, "is_decoder", False):  # a mask makes it causal
        raise UnsupportedError(f"{type(module).__name__} is not causal", field="is_causal")
    given = dict(keywords)
    softcap, sinks = given.pop("softcap", None), given.pop("s_aux", None)
    if softcap is not None and not (isinstance(softcap, int | float) and softcap > 0):
        raise UnsupportedError(f"is {softcap!r}, no number above 0", field="softcap")
    if sinks is not None and (not isinstance(sinks, Tensor) or tuple(sinks.shape) != (query.shape[1],)):
        raise UnsupportedError("are not one learned logit a head", field="s_aux")
    for name, value in given.items():
        if name in HARMLESS or value is None or value is (name == "is_causal"):
            continue
        if name == CHOSEN_KEYS and isinstance(value, Tensor) and value.shape[-1] == key.shape[2]:  # all of them
            continue
        if name == "sliding_window" and type(value) is int and value in _known_windows(value, reach, seq_len_tokens):
            continue
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise UnsupportedError(f"is {shown}; this attention keyword is not supported", field=name)
    return AttentionForm(softcap=None if softcap is None else float(softcap), sinks=sinks, reach=reach)


def _known_windows(value: int, reach: Reach, seq_len_tokens: int) -> tuple[int, ...]:
    """Return windows that a call may name: the configuration's of this layer, and what is no limit."""
    return (reach.window_tokens, *((value,) if value >= seq_len_tokens else ()))


def no_mask(batch_size: int, q_length: int, kv_length: int, *, dtype: torch.dtype, device: Any) -> Tensor:
    """Return zeros [B, 1, q, kv] that take no memory, for classes that look at a mask."""
    return torch.zeros((), dtype=dtype, device=device).expand(batch_size, 1, q_length, kv_length)


def key_bias(mask: Tensor | None) -> Tensor | None:
    """Return what a mask [B, H, q, kv] adds to a key's scores, the same for all queries, as [B, H, kv]; else None."""
    if mask is None or _is_no_mask(mask) or mask.dim() != 4 or mask.stride(2) != 0 or not mask.is_floating_point():
        return None
    return mask[:, :, 0]


def _is_no_mask(mask: Tensor) -> bool:
    """Whether a mask is what `no_mask` returned: of one number only."""
    return mask.dim() == 4 and not any(mask.stride())


def refuse_masks(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, *,
    attention_mask: Tensor | None = None, **settings: Any,
) -> Tensor | None:  # fmt: skip
    """Mask function for `AttentionMaskInterface`: makes no mask, or one of zeros for models that choose keys by it.

    Raises UnsupportedError for padding and caches.

    A padding mask of ones only is let through. What else transformers would mask is not asked for: positions of a shard
    are not contiguous, which it takes for packed documents; windows are held to by `attention_form`. Functions of a
    model's own are refused.
    """
    refuse_own_functions(settings.get("mask_function"), settings.get("config"))
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError("marks padding; shard() pads, the model must not", field="attention_mask")
    if q_length != kv_length or q_offset != kv_offset:
        raise UnsupportedError(f"{q_length} queries on {kv_length} keys: a cache is not supported", field="use_cache")
    if type(getattr(settings.get("config"), KEYS_OF_A_QUERY[0], None)) is not int:
        return None
    return no_mask(batch_size, q_length, kv_length, dtype=settings["dtype"], device=settings["device"])
