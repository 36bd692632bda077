"""What a Hugging Face attention call may ask of us. Everything else is refused before any work is done.

transformers hands every attention function whatever keywords the model has; ignoring one that changes the result
(softcap, sinks, an active sliding window, packed lengths) would be silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...traces.errors import UnsupportedError

# They describe the call and do not change what attention returns.
HARMLESS = frozenset(
    {"cache_position", "labels", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits",
     "position_embeddings", "position_ids", "return_dict", "shift_labels", "use_cache"}
)  # fmt: skip


def check_attention_call(
    module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, *, dropout: float,
    keywords: dict[str, Any], seq_len_tokens: int,
) -> None:  # fmt: skip
    """Raise UnsupportedError unless this is plain causal attention of whole sequences on themselves.

    query [B, H, S, D], key [B, H_kv, S, D] as transformers passes them: a sequence of seq_len_tokens, or a shard of it.
    """
    if attention_mask is not None:
        raise UnsupportedError("an explicit attention mask is not supported", field="attention_mask")
    if dropout:
        raise UnsupportedError(f"is {dropout}; attention dropout is not supported", field="dropout")
    if query.shape[2] != key.shape[2]:
        told = f"{query.shape[2]} queries on {key.shape[2]} keys: a key/value cache is not supported"
        raise UnsupportedError(told, field="attention")
    if not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{type(module).__name__} is not causal", field="is_causal")
    for name, value in keywords.items():
        if name in HARMLESS or value is None or value is (name == "is_causal"):
            continue
        if name == "sliding_window" and isinstance(value, int) and value >= seq_len_tokens:
            continue
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise UnsupportedError(f"is {shown}; this attention keyword is not supported", field=name)


def refuse_masks(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, *,
    attention_mask: Tensor | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Mask function for `AttentionMaskInterface`: makes no mask, and raises UnsupportedError for padding and caches.

    A padding mask of ones only is let through. What else transformers would mask is not looked at: positions of a shard
    are not contiguous, which it takes for packed documents; windows are held to by `check_attention_call`.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError("marks padding; shard() pads, the model must not", field="attention_mask")
    if q_length != kv_length or q_offset != kv_offset:
        raise UnsupportedError(f"{q_length} queries on {kv_length} keys: a cache is not supported", field="use_cache")
