"""Small models of bytes, and held-out text for them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.data.writer import byte_tokenizer, write_data

BYTES = 256


def byte_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """A causal LM whose tokens are bytes: 4 query heads, 2 K/V heads, 2 layers, weights large enough to tell apart."""
    config = AutoConfig.for_model(
        family, vocab_size=BYTES, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def byte_data(folder: Path, *, documents: int = 12, size: int = 700, seed: int = 0, align: int = 1) -> TokenData:
    """A data folder of texts of random words, each another length around `size` bytes."""
    random = Random(seed)
    (folder / "texts").mkdir(parents=True)
    for number in range(documents):
        words = ["".join(random.choices("abcdefgh", k=random.randint(1, 7))) for _ in range(size // 4)]
        text = " ".join(words)[: size + 13 * number]
        (folder / "texts" / f"{number:02}.txt").write_text(text)
    write_data([folder / "texts"], folder / "data", byte_tokenizer(), align_tokens=align)
    return TokenData.open(folder / "data")
