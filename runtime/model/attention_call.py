"""What a Hugging Face attention call may ask of us. Everything else is refused before any work is done.

transformers hands every attention function whatever keywords the model has; ignoring one that changes the result
(softcap, sinks, an active sliding window, packed lengths) would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ...traces.errors import UnsupportedError

# They describe the call and do not change what attention returns.
HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "labels",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)


def check_attention_call(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    keywords: dict[str, Any],
    seq_len_tokens: int,
) -> None:
    """Raise UnsupportedError unless this is plain causal attention of whole sequences on themselves.

    query [B, H, S, D], key [B, H_kv, S, D] as transformers passes them: a sequence of seq_len_tokens, or a shard of it.
    """
    if attention_mask is not None:
        raise UnsupportedError("an explicit attention mask is not supported", field="attention_mask")
    if dropout:
        raise UnsupportedError(f"is {dropout}; attention dropout is not supported", field="dropout")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            f"{query.shape[2]} queries on {key.shape[2]} keys: a key/value cache is not supported", field="attention"
        )
    if not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{type(module).__name__} is not causal", field="is_causal")
    for name, value in keywords.items():
        _check_keyword(name, value, seq_len_tokens=seq_len_tokens)


def _check_keyword(name: str, value: Any, *, seq_len_tokens: int) -> None:
    if name in HARMLESS or value is None or (value is False and name != "is_causal"):
        return
    if name == "is_causal" and value is True:
        return
    if name == "sliding_window" and isinstance(value, int) and value >= seq_len_tokens:
        return
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise UnsupportedError(f"is {shown}; this attention keyword is not supported", field=name)


def refuse_masks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> None:
    """Mask function for `AttentionMaskInterface`: makes no mask, and raises UnsupportedError where one is needed.

    A padding mask of ones only is let through; packed documents, windows shorter than the sequence and caches are
    refused.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError("marks padding; shard() pads, the model must not", field="attention_mask")
    if mask_function is not causal_mask_function and not _last_token_sees_all(mask_function, q_length):
        raise UnsupportedError("a sliding window or packed sequences (restarting position_ids) are not supported",
                               field="attention_mask")  # fmt: skip
    if q_length != kv_length or q_offset != kv_offset:
        raise UnsupportedError(f"{q_length} queries on {kv_length} keys: a cache is not supported", field="use_cache")


def _last_token_sees_all(mask_function: Callable[..., Any], tokens: int) -> bool:
    """Whether the last query may attend every key: then no window, chunk or document is shorter than the sequence."""
    first, last = torch.zeros(1, dtype=torch.int64), torch.tensor([tokens - 1])
    allowed = mask_function(first, first, last, torch.arange(tokens))
    return bool(torch.as_tensor(allowed).all())
