"""Tiny random-weight Hugging Face models for tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """Return a causal LM of that family: 4 query heads, 2 K/V heads, head dim 16, 97 tokens; the same for one seed."""
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
