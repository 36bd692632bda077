"""A tiny training run on disk, for tests: model configuration, data, YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.traces.files import write_json

MODEL = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SEQ_LEN_TOKENS = 256
DENSE = {"selector": "sink-window", "settings": {"window_tokens": SEQ_LEN_TOKENS}}


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a model configuration; the same weights follow from the run's seed."""
    write_json(folder / "config.json", MODEL | changes)
    return folder


def write_text(folder: Path, *, documents: int = 8, bytes_each: int = 700) -> Path:
    """Write seeded text files whose bytes a model can learn something about."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    words = ["ring ", "plan ", "token ", "block ", "mask\n"]
    for number in range(documents):
        text = "".join(generator.choice(words, bytes_each // 4))[:bytes_each]
        (folder / f"{number}.txt").write_text(text)
    return folder


def write_run(
    folder: Path, *, model: dict[str, Any] | None = None, documents: int = 8, **changes: Any
) -> dict[str, Any]:
    """Write model, data and `config.yaml` of a CPU run below `folder`; return the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_model(folder / "model", **(model or {}))
    if not (folder / "data").exists():
        write_data([write_text(folder / "text", documents=documents)], folder / "data", byte_tokenizer())
    config: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "random_weights": True},
        "data": {"folder": str(folder / "data")},
        "seq_len_tokens": SEQ_LEN_TOKENS,
        "steps": 5,
        "dtype": "float32",
        "device": "cpu",
        "parallel": {"data": 1, "context": 2},
        "plan": {"block_size": 64, "pattern": DENSE},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "timeout_s": 60.0,
    }  # fmt: skip
    config = merged(config, changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return config


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "pattern"
        result[key] = merged(result[key], value) if both else value
    return result


def require_verified_replay(plan: Path, trace: Path) -> None:
    """Play a plan over its trace by the command, as a process of its own; it must agree with float64 on every rank."""
    command = [sys.executable, "-m", "sparsering", "run", plan, "--trace", trace, "--verify"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    assert "Verified against a float64 reference on every rank" in shown
