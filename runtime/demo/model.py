"""The demo's model: Qwen2's architecture in small, trained for a minute on the standard library's sources.

It need not write good Python. It must attend like a model that learned something: to sinks, to what is near, to where
the same text stood before; a model with random weights attends to everything alike.

Shape legend: B sequences, S tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from ...traces.progress import Progress, no_progress
from .sample_text import BYTE_VOCABULARY

MODEL_ID = "demo-qwen2-byte"
LAYERS = 4
HEADS = 6
KV_HEADS = 2
HEAD_DIM = 64
HIDDEN = 128
WARMUP_STEPS = 10
TRIAL_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How the model is trained. seconds: stop after that many, though `steps` are not done (slow machines)."""

    steps: int = 400
    seconds: float = 60.0
    sequences: int = 2
    seq_len_tokens: int = 384
    peak_learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training did. losses: natural log per byte, of the first step and the mean of the last ten."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    parameters: int


def make_model(*, seed: int, seq_len_tokens: int) -> PreTrainedModel:
    """Return the model with fresh weights, in float32: 6 query heads on 2 KV heads, head dimension 64."""
    settings: dict[str, Any] = {
        "vocab_size": BYTE_VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        # Qwen2's own 0.02 is for wide models; with it so small a one attends to everything alike for long.
        "initializer_range": HIDDEN**-0.5,
        "max_position_embeddings": seq_len_tokens, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**settings))


def train(
    model: PreTrainedModel, tokens: Tensor, settings: TrainingSettings, *, progress: Progress = no_progress
) -> Trained:
    """Train in place with AdamW on random windows of `tokens` (int64 [any]); seeded, but for where time ends it."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.peak_learning_rate, betas=(0.9, 0.98))
    model.train()
    losses: list[float] = []
    began = time.monotonic()
    with _threads_by_trial() as pick_threads:
        for step in range(settings.steps):
            pick_threads(step)
            for group in optimizer.param_groups:
                group["lr"] = settings.peak_learning_rate * _pace(step, time.monotonic() - began, settings)
            losses.append(_train_step(model, optimizer, _windows(tokens, settings, generator)))
            progress(f"loss {losses[-1]:.2f}", step + 1, settings.steps)
            if time.monotonic() - began > settings.seconds:
                break
    model.eval()
    last = losses[-10:]
    return Trained(
        steps=len(losses),
        seconds=time.monotonic() - began,
        first_loss=losses[0],
        last_loss=sum(last) / len(last),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


@contextmanager
def _threads_by_trial() -> Iterator[Callable[[int], None]]:
    """Yield what is called before every step: it tries all threads, then one, and keeps what was quicker.

    On cores that are busy with other work, one thread may be many times quicker than threads that wait for each other.
    """
    most = torch.get_num_threads()
    started: dict[int, float] = {}

    def before(step: int) -> None:
        if step > 2 * TRIAL_STEPS:
            return
        started[step] = time.monotonic()
        if step == TRIAL_STEPS:
            torch.set_num_threads(1)
        if step == 2 * TRIAL_STEPS:
            # The first step of either trial warms up and is left out.
            together = started[TRIAL_STEPS] - started[1]
            alone = started[2 * TRIAL_STEPS] - started[TRIAL_STEPS + 1]
            torch.set_num_threads(most if together < alone else 1)

    try:
        yield before
    finally:
        torch.set_num_threads(most)


def _pace(step: int, elapsed_s: float, settings: TrainingSettings) -> float:
    """Return the learning rate's share of its peak: a linear warm-up, then a cosine over steps or time."""
    done = max(step / settings.steps, elapsed_s / settings.seconds)
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))


def _windows(tokens: Tensor, settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Return int64 [B, S + 1] of consecutive tokens."""
    length = settings.seq_len_tokens + 1
    starts = torch.randint(tokens.numel() - length, (settings.sequences, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def _train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, windows: Tensor) -> float:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
